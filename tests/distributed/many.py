"""Runs a function on several ranks at once: fresh processes, a time limit, and what each of them came to."""

import multiprocessing
import os
import pickle
import tempfile
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

TIMEOUT = 600.0  # of one run; a hang fails the test

# Forked from a server that has imported everything once: a rank starts in tens of milliseconds. Forks of the
# test's own process, "fork", see what was changed in it: mutants.
CONTEXT = multiprocessing.get_context(os.environ.get("UNLEARN_TEST_RANKS", "forkserver"))
CONTEXT.set_forkserver_preload(
    [
        "unlearn_ext",
        "pytest",
        "torch._dynamo",  # which DistributedDataParallel imports
        "torch.distributed.fsdp",
        "torch.distributed.tensor",
    ]
)


class Failed(Exception):  # noqa: N818
    """What a rank raised, where `run` was told to expect nothing of the kind."""


def _main(function, rank, world, folder, args, timeout):
    torch.set_num_threads(1)
    try:
        store = dist.FileStore(f"{folder}/store", world)
        # A short timeout is of what is tested, not of how long processes take to start.
        store.set(f"started {rank}", "")
        store.wait([f"started {other}" for other in range(world)], timedelta(seconds=TIMEOUT))
        dist.init_process_group(
            "gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
        )
        try:
            outcome = (True, function(rank, world, *args))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
    except BaseException as error:
        outcome = (False, (type(error).__name__, str(error), traceback.format_exc()))
    with open(f"{folder}/{rank}.tmp", "wb") as file:
        pickle.dump(outcome, file)
    os.replace(f"{folder}/{rank}.tmp", f"{folder}/{rank}.out")


def start(function, world, *args, timeout=TIMEOUT):
    """Start the ranks; the caller joins them."""
    folder = tempfile.mkdtemp()
    ranks = [
        CONTEXT.Process(target=_main, args=(function, rank, world, folder, args, timeout), daemon=True)
        for rank in range(world)
    ]
    for process in ranks:
        process.start()
    return folder, ranks


def outcomes(function, world, *args, timeout=TIMEOUT, limit=TIMEOUT):
    """What every rank returned or raised: (True, value) or (False, (type, text, traceback))."""
    folder, ranks = start(function, world, *args, timeout=timeout)
    found = []
    for rank, process in enumerate(ranks):
        process.join(limit)
        if process.is_alive():
            for other in ranks:
                other.kill()
            raise TimeoutError(f"rank {rank} hangs")
        path = f"{folder}/{rank}.out"
        if not os.path.exists(path):
            found.append((False, ("Died", f"exit code {process.exitcode}", "")))
            continue
        with open(path, "rb") as file:
            found.append(pickle.load(file))
    return found


def run(function, world, *args, **settings):
    """What every rank returned; an exception on any fails the test, with all tracebacks."""
    found = outcomes(function, world, *args, **settings)
    failed = [(rank, value[2]) for rank, (is_good, value) in enumerate(found) if not is_good]
    if failed:
        raise Failed("\n".join(f"rank {rank}:\n{text}" for rank, text in failed))
    return [value for _, value in found]


def same_bits(a, b):
    """Whether nested values hold the same tensors, to the bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_bits, a, b))
    return a == b or (a != a and b != b)


def difference(a, b):
    """Largest difference of two dictionaries of tensors, relative to the largest value of each."""
    worst = 0.0
    for name, expected in b.items():
        scale = expected.abs().max().clamp(min=1e-30)
        worst = max(worst, float((a[name].double() - expected.double()).abs().max() / scale))
    return worst
