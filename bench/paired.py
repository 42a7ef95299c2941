"""Times ``fisher_diagonal`` of two checkouts side by side, on the five networks of ``bench/models.py``.

    git worktree add ../old 03c71c8     # and build it there: make build
    python -m bench.paired ../old . [--laps 15] [--models mlp,cnn] [--threads 1]

One process per checkout stays up. They run in turns, and who goes first alternates; each lap is over the same
batches with the same weights. Printed per network: the median over the laps of second / first, by wall clock
and by CPU time (steadier where others use the machine), the quartiles of the latter, the same ratio of the
first calls, and the largest relative difference between the two results.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

BATCHES = {"mlp": 16, "cnn": 4, "resnet18": 2, "vit": 2, "gpt": 2}

# What one side runs: a line of input is one request, a line of output its answer.
SERVER = r"""
import importlib.util, json, sys, time
import torch
torch.set_num_threads(int(sys.argv[2]))
import unlearn_ext as ux
assert ux.__file__.startswith(sys.argv[1] + "/"), ux.__file__
spec = importlib.util.spec_from_file_location("models", sys.argv[3])
models = importlib.util.module_from_spec(spec)
sys.modules["models"] = models
spec.loader.exec_module(models)
for line in sys.stdin:
    word, name = line.split()
    if word == "make":
        torch.manual_seed(0)
        model = models.MODELS[name].build().eval()
        batches = [models.MODELS[name].batch(32) for _ in range(json.loads(sys.argv[4])[name])]
    if word == "save":
        torch.save(dict(result.items()), name)
        print(json.dumps({}), flush=True)
        continue
    wall, cpu = time.perf_counter(), time.process_time()
    result = ux.fisher_diagonal(model, batches)
    print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}), flush=True)
"""


class Side:
    """A checkout at work."""

    def __init__(self, folder, threads, models):
        environment = dict(os.environ, PYTHONPATH=str(folder), OMP_NUM_THREADS=str(threads))
        self._process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(folder), str(threads), str(models), json.dumps(BATCHES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=tempfile.gettempdir(),
        )

    def ask(self, word, name):
        self._process.stdin.write(f"{word} {name}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            sys.exit(f"one side ended (exit status {self._process.wait()})")
        return json.loads(line)


def difference(first, second):
    """Largest difference of two results, relative to the largest entry of each tensor."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, name) for name in ("first.pt", "second.pt")]
        for side, path in zip((first, second), paths, strict=True):
            side.ask("save", path)
        a, b = (torch.load(path) for path in paths)
    assert a.keys() == b.keys()
    return max(
        float((a[k].double() - b[k].double()).abs().max() / a[k].double().abs().max().clamp_min(1e-300))
        for k in a
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("--laps", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--models", default=",".join(BATCHES))
    options = parser.parse_args()
    folders = [folder.resolve() for folder in (options.first, options.second)]
    first, second = (Side(folder, options.threads, folders[0] / "bench" / "models.py") for folder in folders)
    print(f"{folders[1]} / {folders[0]}, {options.threads} thread(s), {options.laps} laps, {time.ctime()}")
    print("network       wall     CPU    quartiles    first call  difference", flush=True)
    for name in options.models.split(","):
        calls = [side.ask("make", name)["wall"] for side in (first, second)]
        walls, cpus = [], []
        for lap in range(options.laps):
            order = (first, second) if lap % 2 else (second, first)
            taken = {side: side.ask("run", name) for side in order}
            walls.append(taken[second]["wall"] / taken[first]["wall"])
            cpus.append(taken[second]["cpu"] / taken[first]["cpu"])
        low, _, high = statistics.quantiles(cpus, n=4) if len(cpus) > 1 else (cpus[0],) * 3
        print(
            f"{name:10} {statistics.median(walls):7.3f} {statistics.median(cpus):7.3f}"
            f"  {low:6.3f} {high:6.3f}"
            f"  {calls[1] / calls[0]:9.2f}  {difference(first, second):10.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
