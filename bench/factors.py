"""What Gram matrices and Kronecker factors cost: ``activation_gram`` and ``kfac_factors``.

``python -m bench.factors [--laps 9]`` writes ``bench/results/factors.md``: two batches of 64 images, as a
multiple of plain forward and backward passes over them, and of a forward pass whose hooks unfold the inputs
of every layer and add up X^T X in float32, by ``F.unfold`` and ``addmm_``. Contenders in turns in one
process, processor time, one thread, medians of the laps' ratios.
"""

import statistics
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models import MODELS, resnet18
from bench.small_networks import Batches, footer, laps_asked, passes, seconds_of
from unlearn_ext import activation_gram, kfac_factors

PAGE = Path(__file__).parent / "results" / "factors.md"


def unfolded(model: nn.Module, batches: Batches) -> Callable[[], object]:
    """A forward pass whose hooks unfold what layers see."""

    def run() -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
            def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                x = inputs[0].detach()
                if isinstance(layer, nn.Conv2d):
                    patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
                    x = patches.transpose(1, 2)
                x = x.reshape(-1, x.shape[-1])
                if name not in totals:
                    totals[name] = x.new_zeros(x.shape[1], x.shape[1])
                totals[name].addmm_(x.T, x)

            return add

        layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        handles = [layer.register_forward_hook(hook(name)) for name, layer in layers]
        with torch.no_grad():
            for x, _ in batches:
                model(x)
        for handle in handles:
            handle.remove()
        return totals

    return run


def measured(name: str, model: nn.Module, batches: Batches, laps: int) -> str:
    """A line of the table."""
    contenders = [
        passes(model, batches, squared=False),
        unfolded(model, batches),
        lambda: activation_gram(model, batches),
        lambda: kfac_factors(model, batches),
    ]
    seconds = seconds_of(contenders, laps)

    def ratio(a: int, b: int) -> str:
        return f"{statistics.median(lap[a] / lap[b] for lap in seconds):.2f}"

    times = " | ".join(f"{1e3 * statistics.median(each):.0f}" for each in zip(*seconds, strict=True))
    return f"| {name} | {times} | {ratio(2, 0)} | {ratio(1, 2)} | {ratio(3, 0)} |"


def main(arguments: list[str] | None = None) -> int:
    """Measure all rows and write the page."""
    laps = laps_asked(__doc__, arguments)
    lines = [
        "## Gram matrices and Kronecker factors",
        "",
        "Two batches of 64 images: ms of plain forward and backward passes, of a forward pass whose hooks",
        "add up X^T X of unfolded inputs in float32, of `activation_gram` (float64 totals) and of",
        "`kfac_factors` (both sides of every layer, float64 totals, checked against plain autograd), and",
        "ratios.",
        "",
        "| network | plain | unfold | gram | factors | gram to plain | unfold to gram | factors to plain |",
        "|---|---|---|---|---|---|---|---|",
    ]
    models = {name: MODELS[name].build() for name in ("mlp", "cnn", "vit", "resnet18")}
    models["resnet18, half width"] = resnet18(32)
    for name, model in models.items():
        make = MODELS[name.split(",")[0]].batch
        lines.append(measured(name, model.eval(), [make(64) for _ in range(2)], laps))
        print(lines[-1], flush=True)
    lines += footer("factors", laps)
    PAGE.write_text("\n".join(lines))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
