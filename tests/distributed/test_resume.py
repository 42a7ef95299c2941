"""Passes that are interrupted and go on: the bits of a pass that was not, or a refusal."""

import os
import random
import signal
import threading
from pathlib import Path

import kills
import many
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, TensorDataset

import unlearn_ext as ux
from unlearn_ext.resume.store import Store

pytest.importorskip("safetensors")

EVERY = 3


class Stop(Exception):  # noqa: N818
    """Stands for whatever ends a process."""


class Stopping:
    """Batches up to one that never comes."""

    def __init__(self, data, at):
        self.data, self.at = data, at

    def __iter__(self):
        for index, batch in enumerate(self.data):
            if index == self.at:
                raise Stop
            yield batch


def _model():
    return kills.model_of()


def _batches(n=11):
    return kills.batches_of(n)


def _fisher(model, data, path, **settings):
    found = ux.fisher_diagonal(model, data, checkpoint=path, checkpoint_every=EVERY, **settings)
    return {**found, "facts": (found.n_samples, found.n_batches, found.batch_size, found.coverage)}


def _mc(model, data, path):
    return _fisher(model, data, path, estimator="mc", generator=torch.Generator().manual_seed(7))


def _mc_global(model, data, path):
    torch.manual_seed(3)
    return _fisher(model, data, path, estimator="mc")


def _batch(model, data, path):
    return _fisher(model, data, path, estimator="batch")


def _gram(model, data, path):
    found = ux.activation_gram(model, data, checkpoint=path, checkpoint_every=EVERY)
    return {**found, "facts": found.n_samples}


def _kfac(model, data, path):
    found = ux.kfac_factors(model, data, checkpoint=path, checkpoint_every=EVERY)
    pairs = {f"{name}{i}": tensor for name, pair in found.items() for i, tensor in enumerate(pair)}
    return {**pairs, "facts": (found.n_samples, found.n_rows, found.coverage)}


PASSES = {
    "fisher": _fisher,
    "mc": _mc,
    "mc_global": _mc_global,
    "batch": _batch,
    "gram": _gram,
    "kfac": _kfac,
}


def _same(a, b):
    return a.keys() == b.keys() and all(
        torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        for name in a
    )


@pytest.mark.parametrize("name", PASSES)
def test_a_pass_goes_on_with_the_same_bits(name, tmp_path):
    make, data = PASSES[name], _batches()
    whole = make(_model(), data, tmp_path / "whole")
    for stops in ([2], [7], [10, 5, 8]):
        path = tmp_path / f"{stops}"
        for at in stops:
            with pytest.raises(Stop):
                make(_model(), Stopping(data, at), path)
        assert _same(make(_model(), data, path), whole)
        # Over, and called again: nothing is computed any more.
        assert _same(make(_model(), data, path), whole)
    values = {k: v for k, v in whole.items() if k != "facts"}
    plain = {"fisher": ux.fisher_diagonal, "gram": ux.activation_gram}.get(name)
    if plain is not None:
        for key, expected in plain(_model(), data).items():
            torch.testing.assert_close(values[key], expected, rtol=2e-6, atol=1e-9)


def test_a_pass_goes_on_on_a_model_that_was_passed_over_before(tmp_path):
    data = _batches()
    whole = _fisher(_model(), data, tmp_path / "whole")
    model = _model()
    ux.fisher_diagonal(model, data)
    with pytest.raises(Stop):
        _fisher(model, Stopping(data, 7), tmp_path / "file")
    assert _same(_fisher(model, data, tmp_path / "file"), whole)


class _Stateful:
    """A loader that knows where it is, as torchdata's does."""

    def __init__(self, data):
        self.data, self.at, self.read = data, 0, 0

    def __iter__(self):
        for index in range(self.at, len(self.data)):
            self.at, self.read = index + 1, self.read + 1
            yield self.data[index]
        self.at = 0

    def state_dict(self):
        return {"at": self.at}

    def load_state_dict(self, state):
        self.at = state["at"]


class _StoppingStateful(_Stateful):
    def __iter__(self):
        return iter(Stopping(super().__iter__(), 8))


def test_a_loader_that_knows_where_it_is_reads_nothing_twice(tmp_path):
    data = _batches()
    whole = _fisher(_model(), data, tmp_path / "whole")
    with pytest.raises(Stop):
        _fisher(_model(), _StoppingStateful(data), tmp_path / "file")
    second = _Stateful(data)
    assert _same(_fisher(_model(), second, tmp_path / "file"), whole)
    assert second.read == len(data) - 6


@pytest.mark.parametrize("own", [False, True])
def test_a_loader_that_shuffles_gives_the_interrupted_order_again(own, tmp_path):
    inputs, labels = torch.randn(44, 6), torch.randint(3, (44,))

    def loader(seed):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed) if own else None
        return DataLoader(TensorDataset(inputs, labels), batch_size=4, shuffle=True, generator=generator)

    whole = _fisher(_model(), loader(1), tmp_path / "whole")
    data = loader(1)
    stopping = Stopping(data, 7)
    stopping.generator = data.generator
    with pytest.raises(Stop):
        _fisher(_model(), stopping, tmp_path / "file")
    # Another seed now, and other draws: those of the interrupted run count.
    random.seed(5)
    np.random.seed(6)
    data = loader(2)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert _same(_fisher(_model(), data, tmp_path / "file"), whole)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def _interrupted(tmp_path, at=8, make=_fisher):
    path = tmp_path / "file"
    with pytest.raises(Stop):
        make(_model(), Stopping(_batches(), at), path)
    return path


def test_what_is_not_the_interrupted_call_is_refused(tmp_path):
    path, data = _interrupted(tmp_path), _batches()
    before = path.read_bytes()
    other = _model()
    with torch.no_grad():
        other[0].bias.add_(1)
    changed = [(x + (index == 2), y) for index, (x, y) in enumerate(data)]
    for call, message in (
        (lambda: _fisher(other, data, path), "got weights"),
        (lambda: _fisher(_model(), changed, path), "others among the first 6 batches"),
        (lambda: _fisher(_model(), data[:4], path), "4 batches for 6 that are done"),
        (lambda: _fisher(_model(), data, path, power=1), r"got power \[2\] in the file for \[1\]"),
        (lambda: _fisher(_model(), data, path, params=["0.weight"]), "got params"),
        (lambda: _fisher(_model(), data, path, loss_fn=ux.losses.log_odds), "got loss"),
        (lambda: _gram(_model(), data, path), "got who"),
        (lambda: ux.fisher_diagonal(_model(), data, checkpoint=path, checkpoint_every=4), "checkpoint_every"),
        (lambda: ux.fisher_diagonal(_model(), data, checkpoint=path, checkpoint_every=0), "must be >= 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
        assert path.read_bytes() == before
    whole = _fisher(_model(), data, tmp_path / "whole")
    assert _same(_fisher(_model(), data, path), whole)
    with pytest.raises(ValueError, match="more than its 11 batches"):
        _fisher(_model(), _batches(12), path)


def test_a_damaged_file_is_never_believed(tmp_path):
    path, data = _interrupted(tmp_path), _batches()
    whole = _fisher(_model(), data, tmp_path / "whole")
    old = path.with_name("file.old")
    good, older = path.read_bytes(), old.read_bytes()
    draw = random.Random(0)
    outcomes = set()
    for trial in range(16):
        damaged = bytearray(good)
        if trial % 2:
            del damaged[draw.randrange(len(good)) :]
        else:
            damaged[draw.randrange(len(good))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        old.unlink(missing_ok=True)
        if trial % 4 < 2:
            old.write_bytes(older)
        try:
            assert _same(_fisher(_model(), data, path), whole)
            outcomes.add("older")
        except ValueError as error:
            outcomes.add(("damaged" in str(error), trial % 4 >= 2))
    assert outcomes == {"older", (True, True)}
    # Cut off between the two renamings: the file of before counts.
    path.unlink()
    old.write_bytes(older)
    assert _same(_fisher(_model(), data, path), whole)


def test_killed_at_any_moment_it_comes_to_the_same_bits(tmp_path):
    whole = kills.whole_pass(f"{tmp_path}/whole")
    for seed in range(2):
        folder = tmp_path / str(seed)
        folder.mkdir()
        found, _ = kills.result_after(folder, 3, random.Random(seed))
        assert many.same_bits(found, whole)


def test_asked_to_end_it_writes_what_is_done_and_ends_by_the_signal(tmp_path):
    path = f"{tmp_path}/file"
    process = kills.started(path, 0.0, 14, held_at=14)
    process.terminate()
    Path(f"{path}.read.on").touch()  # goes on once it has been asked, however late that is
    process.join(300)
    assert process.exitcode == -signal.SIGTERM
    tensors, facts = Store(Path(path), "test").read()
    assert facts["batches"] in (14, 15)  # those done, perhaps with the one that was being read
    assert not facts["is_finished"]
    assert tensors
    found = kills.whole_pass(path)
    whole = kills.whole_pass(f"{tmp_path}/whole")
    assert many.difference(found, whole) <= 1e-6


def _resumed(rank, world, folder):
    data, found = kills.batches_of(13)[rank::world], []
    settings = {"process_group": dist.group.WORLD, "checkpoint_every": 2}
    for make in (ux.fisher_diagonal, ux.activation_gram, ux.kfac_factors):
        whole = make(_model(), data, checkpoint=f"{folder}/{make.__name__}.whole", **settings)
        path = f"{folder}/{make.__name__}"
        try:
            make(_model(), Stopping(data, 4) if rank == 1 else data, checkpoint=path, **settings)
        except Exception as error:
            found.append(type(error).__name__)
        found.append([os.path.exists(f"{path}.rank{r}of{world}") for r in range(world)])
        dist.barrier()
        again = make(_model(), data, checkpoint=path, **settings)
        for name, value in whole.items():
            assert many.same_bits(tuple(again[name]), tuple(value)), (make, name)
        found.append({name: tuple(value) for name, value in again.items()})
    return found


def test_every_rank_goes_on_from_where_it_was(tmp_path):
    found = many.run(_resumed, 2, str(tmp_path))
    for place in range(0, 9, 3):
        assert [each[place] for each in found] == ["Exception", "Stop"]
        assert [each[place + 1] for each in found] == [[True, True]] * 2
        assert many.same_bits(found[0][place + 2], found[1][place + 2])


def test_sigterm_goes_to_the_handler_of_before(tmp_path):
    calls = []
    path, data = tmp_path / "file", _batches()

    class Signalling:
        def __iter__(self):
            for index, batch in enumerate(data):
                if index == 4:
                    os.kill(os.getpid(), signal.SIGTERM)
                    assert not calls
                yield batch

    def handler(number, _):
        calls.append((number, path.exists()))

    before = signal.signal(signal.SIGTERM, handler)
    try:
        found = _fisher(_model(), Signalling(), path)
        assert calls == [(signal.SIGTERM, True)]
        assert signal.getsignal(signal.SIGTERM) is handler
        plain = ux.fisher_diagonal(_model(), data)
        for name, value in plain.items():
            torch.testing.assert_close(found[name], value, rtol=2e-6, atol=1e-9)
        with pytest.raises(Stop):
            _fisher(_model(), Stopping(data, 2), tmp_path / "other")
        assert signal.getsignal(signal.SIGTERM) is handler
        # Another thread may not touch handlers, and needs none.
        thread = threading.Thread(target=_gram, args=(_model(), data, tmp_path / "thread"))
        thread.start()
        thread.join()
        assert (tmp_path / "thread").exists()
    finally:
        signal.signal(signal.SIGTERM, before)
