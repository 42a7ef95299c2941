"""What runs on every rank in test_sharded_resume.py: passes of sharded models that go on where they ended."""

import os
import pathlib
import shutil
import signal

import pytest
import torch
import torch.distributed as dist
from sharded_checks import own
from sharded_models import images, shard, shares, small

import unlearn_ext as ux

SIZES = [[3, 2, 4, 1, 3, 2, 2], [2, 2, 3, 3], [1, 1]]
EVERY = 2


class StopError(Exception):
    """What interrupts a pass."""


class Stopping(list):
    """Batches, and an interruption before one of them."""

    def __init__(self, batches, at):
        super().__init__(batches)
        self.at, self.read = at, 0

    def __iter__(self):
        for index, batch in enumerate(super().__iter__()):
            if index == self.at:
                self.interrupt()
            self.read += 1
            yield batch

    def interrupt(self):
        raise StopError("interrupted")


def _data(at=None):
    batches = own(shares(images, dist.get_world_size(), SIZES))
    return batches if at is None or dist.get_rank() else Stopping(batches, at)


def _fisher(path, data, **settings):
    settings = {"checkpoint_every": EVERY, **settings}
    return ux.fisher_diagonal(shard(small()), data, checkpoint=path, **settings)


def _file(path):
    return f"{path}.rank{dist.get_rank()}of{dist.get_world_size()}"


def _same(a, b):
    for name, tensor in a.items():
        assert torch.equal(tensor.to_local(), b[name].to_local()), name
    assert (a.n_samples, a.n_batches, a.batch_size) == (b.n_samples, b.n_batches, b.batch_size)
    assert a.coverage == b.coverage


def _interrupted(path, at, **settings):
    with pytest.raises((StopError, RuntimeError), match=r"interrupted|on another rank"):
        _fisher(path, _data(at), **settings)
    assert os.path.exists(_file(path))


def goes_on(folder, estimator):
    """To the bits of a pass that was not interrupted; a finished one is not computed again."""
    settings = {"estimator": estimator}

    def generator(seed=0):
        return {"generator": torch.Generator().manual_seed(seed + dist.get_rank())}

    whole = _fisher(f"{folder}/whole", _data(), **settings, **generator())
    plain = ux.fisher_diagonal(shard(small()), _data(), **settings, **generator())
    for name, tensor in plain.items():
        torch.testing.assert_close(whole[name].to_local(), tensor.to_local(), rtol=1e-5, atol=1e-9)
    for at in (3, 6):
        path = f"{folder}/file{at}"
        _interrupted(path, at, **settings, **generator())
        _interrupted(path, at, **settings, **generator(50))
        for seed in (60, 70):  # the draws are those of the interrupted run
            _same(_fisher(path, _data(), **settings, **generator(seed)), whole)
    return float(sum(t.full_tensor().sum() for t in whole.values()))


def files_of_different_steps(folder):
    """Where one rank was killed before it had written, or its file is damaged, the step before counts."""
    whole = _fisher(f"{folder}/whole", _data())
    for case in ("killed", "damaged", "half finished"):
        path = f"{folder}/{case}"
        if case == "half finished":
            _fisher(path, _data())
        else:
            _interrupted(path, 6)
        if dist.get_rank() == 1:
            if case == "damaged":
                with open(_file(path), "r+b") as file:
                    file.seek(-3, 2)
                    file.write(b"xyz")
            else:
                shutil.move(f"{_file(path)}.old", _file(path))
        dist.barrier()
        _same(_fisher(path, _data()), whole)


class Signalled(Stopping):
    """Batches; the process is told to end while one of them is read."""

    def interrupt(self):
        signal.raise_signal(signal.SIGTERM)


def told_to_end(folder):
    """SIGTERM comes through when all ranks have written the step that was being made."""

    def end(*_):
        raise StopError("told to end")

    whole = _fisher(f"{folder}/whole", _data(), checkpoint_every=100)
    before = signal.signal(signal.SIGTERM, end)
    found = []
    try:
        for at in (0, 2):
            path, data = f"{folder}/file{at}", Signalled(_data(), at)
            with pytest.raises(StopError, match="told to end"):
                _fisher(path, data, checkpoint_every=100)
            assert signal.getsignal(signal.SIGTERM) is end
            assert os.path.exists(_file(path))
            again = _fisher(path, _data(), checkpoint_every=100)
            for name, tensor in whole.items():
                torch.testing.assert_close(again[name].to_local(), tensor.to_local(), rtol=1e-5, atol=1e-9)
            assert (again.n_samples, again.n_batches) == (whole.n_samples, whole.n_batches)
            found.append(data.read)
    finally:
        signal.signal(signal.SIGTERM, before)
    return found


def refused(folder):
    """Other data, settings, weights, ranks; files of no common step. Nothing is written."""
    path = f"{folder}/file"
    _interrupted(path, 6)
    before = pathlib.Path(_file(path)).read_bytes()
    rank, world = dist.get_rank(), dist.get_world_size()
    changed = [(x + (index == 1) * (rank == 1), y) for index, (x, y) in enumerate(_data())]
    other = shard(small(3))
    found = []
    for call in (
        lambda: _fisher(path, changed),
        lambda: _fisher(path, _data(), power=1),
        lambda: _fisher(path, _data(), checkpoint_every=3),
        lambda: _fisher(path, _data(), checkpoint_every=0),
        lambda: ux.fisher_diagonal(other, _data(), checkpoint=path, checkpoint_every=EVERY),
    ):
        with pytest.raises(ValueError, match="fisher_diagonal: ") as error:
            call()
        found.append(str(error.value))
        assert pathlib.Path(_file(path)).read_bytes() == before
    dist.barrier()
    if rank == 0:
        pathlib.Path(f"{path}.rank0of{world + 2}").touch()
    dist.barrier()
    with pytest.raises(ValueError, match="fisher_diagonal: ") as error:
        _fisher(path, _data())
    found.append(str(error.value))
    dist.barrier()
    if rank == 0:
        os.remove(f"{path}.rank0of{world + 2}")
        os.remove(_file(path))
        os.remove(f"{_file(path)}.old")
    dist.barrier()
    with pytest.raises(ValueError, match="fisher_diagonal: ") as error:
        _fisher(path, _data())
    found.append(str(error.value))
    return found
