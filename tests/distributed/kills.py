"""A pass that is killed at random moments and started again: does it come to the bits of one that was not?

    python tests/distributed/kills.py --kills 100

`test_resume.py` does a few kills of it.
"""

import argparse
import random
import tempfile
import time
from pathlib import Path

import many
import torch
from torch import nn

import unlearn_ext as ux

BATCHES, EVERY = 40, 3


def model_of():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 3))


def batches_of(n, seed=1, size=4):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(size, 6, generator=generator), torch.randint(3, (size,), generator=generator))
        for _ in range(n)
    ]


class Noted:
    """Batches that leave a byte in a file when they are read; before one, `held_at`, a file is waited for."""

    def __init__(self, path, pause, held_at=None):
        self.path, self.pause, self.held_at = path, pause, held_at

    def __iter__(self):
        with open(self.path, "wb", buffering=0) as file:
            for index, batch in enumerate(batches_of(BATCHES)):
                if index == self.held_at:
                    _wait_for(Path(f"{self.path}.on").exists)
                time.sleep(self.pause)
                file.write(b".")
                yield batch


def _wait_for(is_so, seconds=300):
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.001)


def whole_pass(path, pause=0.0, held_at=None):
    torch.set_num_threads(1)
    data = Noted(f"{path}.read", pause, held_at)
    found = dict(ux.fisher_diagonal(model_of(), data, checkpoint=path, checkpoint_every=EVERY))
    torch.save(found, f"{path}.result")
    return found


def started(path, pause, until, held_at=None):
    """A process at work, once it has read so many batches or is over."""
    read = Path(f"{path}.read")
    read.unlink(missing_ok=True)
    process = many.CONTEXT.Process(target=whole_pass, args=(path, pause, held_at), daemon=True)
    process.start()
    _wait_for(lambda: not process.is_alive() or (read.exists() and read.stat().st_size >= until))
    return process


def result_after(folder, kills, draw):
    """The result of a pass that is killed so many times before it may end; how many hit it at work."""
    path, hit = f"{folder}/pass", 0
    for _ in range(kills):
        process = started(path, 0.003, draw.randrange(BATCHES))
        time.sleep(draw.random() * 0.03)
        hit += process.is_alive()
        process.kill()
        process.join()
    started(path, 0.0, BATCHES + 1).join()
    return torch.load(f"{path}.result"), hit


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    settings = parser.parse_args()
    draw = random.Random(settings.seed)
    whole = whole_pass(f"{tempfile.mkdtemp()}/whole")
    left, right, runs, hits = settings.kills, 0, 0, 0
    while left > 0:
        kills = min(left, draw.randrange(1, 9))
        found, hit = result_after(tempfile.mkdtemp(), kills, draw)
        left, runs, hits = left - kills, runs + 1, hits + hit
        right += many.same_bits(found, whole)
        print(
            f"{settings.kills - left} kills, {hits} at work, {right} of {runs} runs with the same bits",
            flush=True,
        )


if __name__ == "__main__":
    main()
