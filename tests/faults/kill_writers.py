"""``kill -9`` at random moments of writing: ``python tests/faults/kill_writers.py --kills 200``.

A process writes two versions of every file in turns; once it was killed, each must be one of them, whole.
"""

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch

import unlearn_ext as ux
from unlearn_ext._internal.files import write_text

NAMES = ("importances", "factors", "grams", "text")


def _model():
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(96, 128), torch.nn.ReLU(), torch.nn.Linear(128, 3))


def made(version):
    """What is written, by name: of other data in each version."""
    draws = torch.Generator().manual_seed(version)
    data = [(torch.randn(8, 96, generator=draws), torch.arange(8) % 3)]
    return {
        "importances": ux.fisher_diagonal(_model(), data),
        "factors": ux.kfac_factors(_model(), data),
        "grams": ux.activation_gram(_model(), data),
        "text": f"{version}" * 100_000,
    }


def write_for_ever(folder, started):
    torch.set_num_threads(1)
    versions = [made(0), made(1)]
    for number in range(10**9):
        for name, what in versions[number % 2].items():
            if name == "text":
                write_text(folder / name, what)
            else:
                what.save(folder / name)
        started.set()


def seen(folder):
    """Digests of what is there; loading refuses what is not whole."""
    text = (folder / "text").read_text()
    assert text in ("0" * 100_000, "1" * 100_000)
    found = {"text": text[0]}
    owners = (ux.Importance, ux.KroneckerFactors, ux.ActivationGram)
    for name, owner in zip(NAMES[:3], owners, strict=True):
        loaded = owner.load(folder / name)
        values = [v if isinstance(v, torch.Tensor) else v[0] for v in loaded.values()]
        found[name] = tuple(float(value.double().sum()) for value in values)
    return found


def kill(n, seed):
    """Kill writers.

    Args:
        n: How often.
        seed: Of the moments.

    Returns:
        How many files were looked at; a file that is not one of the versions raises.
    """
    moments = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        expected = []
        for version in range(2):
            folder = Path(place) / str(version)
            for name, what in made(version).items():
                write_text(folder / name, what) if name == "text" else (
                    folder.mkdir(exist_ok=True),
                    what.save(folder / name),
                )
            expected.append(seen(folder))
        context = multiprocessing.get_context("fork")
        folder = Path(place) / "killed"
        folder.mkdir()
        looked = 0
        for _ in range(n):
            started = context.Event()
            writer = context.Process(target=write_for_ever, args=(folder, started))
            writer.start()
            assert started.wait(120)
            time.sleep(moments.random() * 0.05)
            writer.kill()
            writer.join()
            found = seen(folder)
            for name, value in found.items():
                assert value in (expected[0][name], expected[1][name]), name
                looked += 1
    return looked


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    print(f"{options.kills} kills, {kill(options.kills, options.seed)} files looked at, all whole")
