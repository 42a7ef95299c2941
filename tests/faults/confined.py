"""Work in forks that may do no harm, of a process that has imported all but the package."""

import contextlib
import gc
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MEMORY, FILE_SIZE = 8 << 30, 1 << 30
# What tests import as they go.
LATER = ["hypothesis", "safetensors.torch", "sklearn.datasets", "torch._dynamo", "torch.distributed.tensor"]


def run_tests(tests, plugin, *more):
    """Exit code of pytest for tests by their names, from the repository's root."""
    quiet = [
        "-x",
        "-q",
        "--no-header",
        "-p",
        "no:cacheprovider",
        *more,
        "-p",
        "no:xdist",
        "-p",
        "no:benchmark",
    ]
    config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT), "--basetemp", "pytest"]
    return int(pytest.main([*quiet, *config, *(f"{ROOT}/{test}" for test in tests)], plugins=[plugin]))


def in_child(work, seconds, idle=300):
    """What ``work`` returned in a fork that may do no harm: ``(answer or None, why it ended)``.

    ``seconds`` bounds the processor's time, which a busy machine does not stretch; ``idle`` is how long, by
    the clock, the fork may sleep without using any.
    """
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        child = os.fork()
        if not child:
            try:
                _confine(folder, seconds)
                Path("answer").write_text(json.dumps(work()))
            finally:
                os._exit(0)
        deadline, used, status = time.monotonic() + idle, None, None
        while status is None and time.monotonic() < deadline:
            ended, code = os.waitpid(child, os.WNOHANG)
            status = code if ended else time.sleep(0.02)
            if status is None and (now := _used(child)) != used:
                deadline, used = time.monotonic() + idle, now
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        if status is None:
            os.waitpid(child, 0)
            return None, "timeout"
        answer = Path(folder, "answer")
        if answer.exists():
            return json.loads(answer.read_text()), "returned"
        is_late = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
        return None, "timeout" if is_late else "crash"


def _used(process):
    """The processor's time that a process has used; while it waits for a processor, another in every call."""
    state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return time.monotonic() if state == "R" else tuple(fields[10:14])


def _confine(folder, seconds):
    os.setpgid(0, 0)
    os.chdir(folder)
    os.environ.update(HOME=folder, TMPDIR=folder, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    tempfile.tempdir = None
    for limit, value in (
        (resource.RLIMIT_AS, MEMORY),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_CPU, int(seconds) + 1),
    ):
        resource.setrlimit(limit, (value, value))
    output = os.open("output", os.O_CREAT | os.O_WRONLY)
    os.dup2(output, 1)
    os.dup2(output, 2)


def preload():
    """Import all that importing the package imports, but not the package; children then start at once."""
    script = "import sys, unlearn_ext; print(*(m for m in sys.modules if not m.startswith('unlearn_ext')))"
    command = [sys.executable, "-c", script]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    for name in [*found, *LATER]:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    os.environ["UNLEARN_TEST_RANKS"] = "fork"  # ranks are mutants too
    sys.dont_write_bytecode = False  # a child starts in a tenth of the time where modules are compiled
    gc.collect()
    gc.freeze()  # forks then share the memory
