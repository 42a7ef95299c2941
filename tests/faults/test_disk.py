"""Full disks, folders that are none, files that vanish, loaders that fail: a clear error, nothing half."""

import contextlib
import os
import resource
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import unlearn_ext as ux
from unlearn_ext._internal import files
from unlearn_ext._internal.files import replacing


def network():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 3))


def samples(n=24):
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(0)), torch.arange(n) % 3


def batches(size=6):
    x, y = samples()
    return list(zip(x.split(size), y.split(size), strict=True))


def evidence():
    model = network()
    before = ux.report.weights_digest(model)
    result = ux.methods.finetune(model, batches(), batches(), epochs=1, lr=1e-3)
    return ux.report.evidence(result, model=model, before=before)


def comparison():
    parts = batches()
    return ux.compare(network(), parts[:1], parts[1:3], parts[3:], methods=["finetune"], metrics=("retain",))


# Each makes something once and returns what writes it to a path.
WRITERS = {
    "Importance.save": lambda: ux.fisher_diagonal(network(), batches()).save,
    "KroneckerFactors.save": lambda: ux.kfac_factors(network(), batches()).save,
    "ActivationGram.save": lambda: ux.activation_gram(network(), batches()).save,
    "Evidence.to_json": lambda: evidence().to_json,
    "Comparison.to_json": lambda: comparison().to_json,
    "Comparison.to_html": lambda: comparison().to_html,
    "a pass with a checkpoint": lambda: (
        lambda path: ux.fisher_diagonal(network(), batches(), checkpoint=path, checkpoint_every=1)
    ),
}


@contextlib.contextmanager
def full_disk():
    """No file may grow beyond 100 bytes, as on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_full_disk_costs_no_old_file(writer, tmp_path):
    write = WRITERS[writer]()
    path = tmp_path / "kept"
    write(path)
    old = {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)}
    if "checkpoint" in writer:  # which has nothing to write where it is done
        path = tmp_path / "new"
    with full_disk(), pytest.raises(OSError, match=r"File too large|kept|new|os error"):
        write(path)
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == old


@pytest.mark.parametrize("writer", WRITERS)
def test_a_folder_that_is_none(writer, tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError, match="file"):
        WRITERS[writer]()(tmp_path / "file" / "kept")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("owner", [ux.Importance, ux.KroneckerFactors, ux.ActivationGram])
def test_a_file_that_is_not_there(owner, tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        owner.load(tmp_path / "gone")
    with pytest.raises(OSError, match=str(tmp_path)):
        owner.load(tmp_path)


class Broken(TensorDataset):
    """A data set that ends the process that reads its last sample."""

    def __getitem__(self, index):
        if index == len(self) - 1:
            os._exit(3)
        return super().__getitem__(index)


# In a process: torch raises a worker's death from a signal handler, wherever the process is, again and again.
DYING = """
    import signal, sys
    sys.path[:0] = [{here!r}, {root!r}]
    import torch
    from test_disk import Broken, batches, network, samples
    import unlearn_ext as ux

    model = network()
    before = ux.report.weights_digest(model)
    loader = torch.utils.data.DataLoader(
        Broken(*samples()), batch_size=6, num_workers=1, multiprocessing_context="fork"
    )
    settings = {{"validation": batches()}} if {name!r} == "newton" else {{}}
    try:
        try:
            ux.unlearn({name!r}, model, batches()[:1], loader, **settings)
        finally:  # a pipe may have told of the death before the signal does, which could strike from here on
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    except Exception as error:  # torch's own, or whatever a pipe whose other end is gone comes to
        told = repr(error)  # an EOFError has no text
    assert told
    assert ux.report.weights_digest(model) == before
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training and torch.is_grad_enabled()
    print("as it was")
"""


def python(code, **facts):
    """Start another process on this package and this folder."""
    places = {"here": str(Path(__file__).parent), "root": str(Path(ux.__file__).parents[1])}
    text = textwrap.dedent(code).format(**places, **facts)
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", text], stdout=-1, stderr=-1, text=True)


@pytest.mark.parametrize("name", ["ssd", "finetune", "gradient_masking", "newton"])
def test_a_worker_that_dies(name):
    told, errors = python(DYING, name=name).communicate()
    assert told == "as it was\n", errors


class Shrinking:
    """Yields fewer batches in every pass, as an exhausted queue does."""

    def __init__(self, parts):
        self.parts, self.passes = parts, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.parts[: max(1, len(self.parts) + 1 - self.passes)])


@pytest.mark.parametrize("name", ["finetune", "gradient_ascent", "gradient_masking"])
def test_other_data_in_another_pass_are_told(name):
    with pytest.warns(UserWarning, match=r"18 samples in the first pass and \d+ in a later one"):
        ux.unlearn(name, network(), batches()[:1], Shrinking(batches()[1:]), epochs=1)


RACE = """
    import sys
    sys.path[:0] = [{here!r}, {root!r}]
    import torch
    from test_disk import batches, network
    import unlearn_ext as ux
    torch.set_num_threads(1)
    parts = batches()

    def train(model, data):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for x, y in data:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

    found = ux.compare(
        network(), parts[:1], parts[1:3], parts[3:], methods=["finetune", "random_label"], seeds=(0, 1),
        metrics=("retain", "forget"), make_model=network, train=train, cache={cache!r}, cache_key="race",
    )
    for row in found.rows:
        print(row.label, row.seed, row.why, *(row.measures[name].value for name in ("retain", "forget")))
"""


def test_two_processes_with_one_cache(tmp_path):
    both = [python(RACE, cache=str(tmp_path / name)) for name in ("shared", "shared", "own")]
    told = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0, 0], told
    assert told[0][0] == told[1][0] == told[2][0]
    assert "None" in told[0][0]
    assert not [name for name in os.listdir(tmp_path / "shared") if name.startswith(".")]


@pytest.mark.parametrize("keep_old", [False, True])
def test_a_file_reaches_the_disk_and_its_folder_where_the_one_before_is_kept(keep_old, tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def noted(descriptor):
        synced.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    with replacing(tmp_path / "kept", keep_old=keep_old) as draft:
        draft.write_text("new")
    assert synced == (["file", "folder"] if keep_old else ["file"])


class Calls:
    """Counts the calls of C functions in a file, and interrupts as one of them comes back, as Python does."""

    def __init__(self, file, at=None):
        self.n, self.file, self.at = 0, file, at

    def __enter__(self):
        self.before = sys.getprofile()
        sys.setprofile(self._note)
        return self

    def __exit__(self, *_):
        sys.setprofile(self.before)

    def _note(self, frame, event, _):
        if event == "c_return" and frame.f_code.co_filename == self.file:
            self.n += 1
            if self.n == self.at:
                raise KeyboardInterrupt


def test_an_interrupt_leaves_no_descriptor_open(tmp_path):
    with Calls(files.__file__) as whole:
        files._sync_folder(tmp_path)
    assert whole.n >= 3  # what opens, syncs and closes
    for at in range(1, whole.n + 1):
        before = set(os.listdir("/proc/self/fd"))
        with pytest.raises(KeyboardInterrupt), Calls(files.__file__, at):
            files._sync_folder(tmp_path)
        assert set(os.listdir("/proc/self/fd")) == before, at
