"""Fisher diagonals where there is little to compute: small networks, and small batches of a deep one.

``python -m bench.small_networks [--laps 9]`` writes ``bench/results/small_networks.md``. Digit networks
(``bench/digit_networks.py``): a pass over 22 batches of 64 images, as a multiple of the time of a plain loop
that squares every batch's gradient (which is another figure: that of the batches, not of the samples) and of
plain forward and backward passes. MobileNet-v2: 3 images of 64 x 64, one batch and passes of 8. Contenders
in turns in one process, processor time, one thread, medians of the laps' ratios.
"""

import argparse
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.digit_networks import BATCH, NETWORKS
from bench.models import MODELS
from unlearn_ext import fisher_diagonal

PAGE = Path(__file__).parent / "results" / "small_networks.md"
Batches = Sequence[tuple[Tensor, Tensor]]


def passes(model: nn.Module, batches: Batches, *, squared: bool) -> Callable[[], object]:
    """Plain passes over batches, with or without adding up the squares of their gradients."""
    parameters = list(model.parameters())

    def run() -> list[Tensor]:
        totals = [torch.zeros_like(p) for p in parameters] if squared else []
        for x, y in batches:
            grads = torch.autograd.grad(F.cross_entropy(model(x), y), parameters)
            if squared:
                torch._foreach_addcmul_(totals, grads, grads)
        if squared:
            torch._foreach_div_(totals, len(batches))
        return totals

    return run


def seconds_of(contenders: Sequence[Callable[[], object]], laps: int) -> list[list[float]]:
    """Processor time of contenders in turns, lap by lap, after two passes of each."""
    for contender in [*contenders, *contenders]:  # the first passes prove, compile and allocate
        contender()
    seconds: list[list[float]] = []
    for _ in range(laps):
        lap = []
        for contender in contenders:
            start = time.process_time()
            contender()
            lap.append(time.process_time() - start)
        seconds.append(lap)
    return seconds


def measured(name: str, model: nn.Module, batches: Batches, laps: int) -> str:
    """A line of the table."""
    contenders = [
        lambda: fisher_diagonal(model, batches),
        passes(model, batches, squared=True),
        passes(model, batches, squared=False),
    ]
    seconds = seconds_of(contenders, laps)
    ours, squares, plain = (statistics.median(times) for times in zip(*seconds, strict=True))
    to_squares, to_plain = (statistics.median(lap[0] / lap[k] for lap in seconds) for k in (1, 2))
    tensors, scalars = len(list(model.parameters())), sum(p.numel() for p in model.parameters())
    per_batch = " | ".join(f"{1e3 * each / len(batches):.2f}" for each in (ours, squares, plain))
    size = f"{len(batches)} | {tensors} | {scalars:,}"
    return f"| {name} | {size} | {per_batch} | {to_squares:.2f} | {to_plain:.2f} |"


def laps_asked(document: str | None, arguments: Sequence[str] | None) -> int:
    """Read the command line, and make ready to measure: one thread, fixed numbers."""
    parser = argparse.ArgumentParser(
        description=document, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--laps", type=int, default=9)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return int(parser.parse_args(arguments).laps)


def footer(module: str, laps: int) -> list[str]:
    """What stands below a table of ours."""
    git = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    return [
        "",
        f"- commit {commit}, torch {torch.__version__}, one thread; processor time, {laps} laps",
        f"- reproduce with `python -m bench.{module}`",
        "",
    ]


def main(arguments: list[str] | None = None) -> int:
    """Measure all rows and write the page."""
    laps = laps_asked(__doc__, arguments)
    lines = [
        "## Fisher diagonals of small networks and small batches",
        "",
        "`fisher_diagonal` beside a plain loop that squares the gradient of every batch, which computes",
        "something else, and beside plain forward and backward passes: ms of a batch, and ratios.",
        "",
        "| network | batches | tensors | scalars | ours | squares | plain | to squares | to plain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    digits = [(torch.randn(BATCH, 1, 8, 8), torch.randint(10, (BATCH,))) for _ in range(22)]
    rows = [(name, recipe.make().eval(), digits) for name, recipe in NETWORKS.items()]
    deep = MODELS["mobilenet"]
    model = deep.build().eval()
    rows += [("MobileNet-v2, 3 images", model, [deep.batch(3) for _ in range(n)]) for n in (1, 8)]
    for name, network, batches in rows:
        lines.append(measured(name, network, batches, laps))
        print(lines[-1], flush=True)
    lines += footer("small_networks", laps)
    PAGE.write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
