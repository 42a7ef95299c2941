"""Times ``fisher_diagonal`` on two ranks with one thread each against one process with two threads.

    python -m bench.ranks [--laps 9] [--models cnn,gpt] [--ranks 2]

All processes stay up, and the two sides run in turns over the same batches with the same weights; who goes
first alternates. Printed per network: the median over the laps of the ranks' throughput by the one process's
(1 where ranks cost nothing; the bar is 0.9), with its quartiles, and the largest relative difference of the
results.
"""

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from datetime import timedelta

import torch
import torch.distributed as dist

import unlearn_ext as ux
from bench.models import MODELS

BATCHES = {"mlp": 32, "cnn": 8, "resnet18": 4, "vit": 4, "gpt": 4}


def made(name):
    torch.manual_seed(0)
    model = MODELS[name].build().eval()
    return model, [MODELS[name].batch(32) for _ in range(BATCHES[name])]


def serve(rank, ranks, threads, store, pipe):
    """One process: makes a model when told its name, passes over its share when told to."""
    torch.set_num_threads(threads)
    group = None
    if ranks > 1:
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=timedelta(minutes=10)
        )
        group = dist.group.WORLD
    model, data, found = None, [], None
    while (word := pipe.recv()) != "end":
        if word == "lap":
            found = ux.fisher_diagonal(model, data, process_group=group)
            pipe.send("done")
        elif word == "result":
            pipe.send(dict(found))
        else:
            model, whole = made(word)
            data = whole[rank::ranks]
            pipe.send("made")
    if ranks > 1:
        dist.destroy_process_group()


class Side:
    """Some processes that work together."""

    def __init__(self, ranks, threads):
        context = multiprocessing.get_context("spawn")
        store = os.path.join(tempfile.mkdtemp(), "store")
        self._pipes = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            self._pipes.append(ours)
            context.Process(target=serve, args=(rank, ranks, threads, store, theirs), daemon=True).start()

    def tell(self, word):
        for pipe in self._pipes:
            pipe.send(word)
        return [pipe.recv() for pipe in self._pipes] if word != "end" else None

    def lap(self):
        start = time.perf_counter()
        self.tell("lap")
        return time.perf_counter() - start


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--laps", type=int, default=9)
    parser.add_argument("--models", default="cnn,gpt")
    parser.add_argument("--ranks", type=int, default=2)
    settings = parser.parse_args()
    alone, ranks = Side(1, settings.ranks), Side(settings.ranks, 1)
    for name in settings.models.split(","):
        for side in (alone, ranks):
            side.tell(name)
            side.lap()  # the first call proves layouts
        ratios = []
        for lap in range(settings.laps):
            sides = (alone, ranks) if lap % 2 else (ranks, alone)
            seconds = {side: side.lap() for side in sides}
            ratios.append(seconds[alone] / seconds[ranks])
        (expected,), found = alone.tell("result"), ranks.tell("result")[0]
        worst = max(float((found[k] - v).abs().max() / v.abs().max()) for k, v in expected.items())
        low, middle, high = statistics.quantiles(ratios, n=4)
        print(
            f"{name}: {settings.ranks} ranks x 1 thread have {middle:.2f} ({low:.2f} to {high:.2f}) of the "
            f"throughput of 1 x {settings.ranks}; results differ by {worst:.1e}",
            flush=True,
        )
    for side in (alone, ranks):
        side.tell("end")


if __name__ == "__main__":
    main()
