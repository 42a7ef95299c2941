"""Per-sample Fisher diagonals of whole networks: ours against the other ways to the same numbers.

``pytest bench/bench_fisher.py -k vit`` runs a selection; ``python -m bench.bench_fisher`` runs all and prints
a table. Groups are called ``fisher_diagonal/model/dtype/device``.

A plain forward and backward pass over the same batches takes part for its time: it is the price of a training
step without the optimizer, and computes something else. BackPACK and Opacus take part where they are
installed and support the network. Errors are those against a float64 loop of single samples.
"""

import argparse
import copy
import importlib.util
import json
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from bench.models import MODELS
from bench.race import Contender, Race, replay
from unlearn_ext import fisher_diagonal
from unlearn_ext.tasks import losses

OURS, PLAIN, LOOP, VMAP = "ours", "plain forward and backward", "single-sample loop", "vmap(grad)"
BACKPACK, OPACUS = "BackPACK", "Opacus"
# Networks of which a library can give per-sample gradients of every parameter, in eval mode.
SUPPORTED = {BACKPACK: ("backpack", ("mlp", "cnn")), OPACUS: ("opacus", ("mlp", "cnn", "vit"))}

SAMPLES = 32
# About as much time for each.
BATCHES = {"mlp": 16, "cnn": 4, "resnet18": 2, "mobilenet": 1, "vit": 2, "gpt": 2}
VMAPPED = 8  # samples at a time: faster than all at once

Batches = Sequence[tuple[Tensor, Tensor]]
Diagonal = Mapping[str, Tensor]


def ours(model: nn.Module, batches: Batches) -> Callable[[], Diagonal]:
    return lambda: fisher_diagonal(model, batches)


def plain(model: nn.Module, batches: Batches, *, compiled: bool = False) -> Callable[[], Diagonal]:
    parameters = dict(model.named_parameters())
    passed = torch.compile(model, dynamic=False) if compiled else model

    def run() -> Diagonal:
        for batch in batches:
            loss = losses.cross_entropy(passed, batch).mean()
            grads = torch.autograd.grad(loss, list(parameters.values()))
        return dict(zip(parameters, grads, strict=True))

    return run


def loop(model: nn.Module, batches: Batches) -> Callable[[], Diagonal]:
    parameters = dict(model.named_parameters())

    def run() -> Diagonal:
        totals = {name: _total(p) for name, p in parameters.items()}
        for x, y in batches:
            for sample in range(len(x)):
                loss = losses.cross_entropy(model, (x[sample : sample + 1], y[sample : sample + 1]))
                grads = torch.autograd.grad(loss.sum(), list(parameters.values()))
                for total, g in zip(totals.values(), grads, strict=True):
                    wide = g.to(total.dtype)
                    total.addcmul_(wide, wide)
        return mean(totals, batches)

    return run


def vmapped(
    model: nn.Module, batches: Batches, chunk: int = VMAPPED, *, compiled: bool = False
) -> Callable[[], Diagonal]:
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    objective = Objective(model)

    def loss(parameters: Diagonal, x: Tensor, y: Tensor) -> Tensor:
        named = {f"model.{name}": value for name, value in parameters.items()}
        return functional_call(objective, named, ((x[None], y[None]),))[0]

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0))
    if compiled:
        per_sample = torch.compile(per_sample, dynamic=False)

    def run() -> Diagonal:
        totals = {name: _total(p) for name, p in parameters.items()}
        for x, y in batches:
            for part in zip(x.split(chunk), y.split(chunk), strict=True):
                with torch.no_grad():
                    grads = per_sample(parameters, *part)
                    for name, total in totals.items():
                        total += grads[name].to(total.dtype).square().sum(0)
        return mean(totals, batches)

    return run


class Objective(nn.Module):
    """A model and its loss, so that functional_call reaches the parameters."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return losses.cross_entropy(self.model, batch)


def backpack(model: nn.Module, batches: Batches) -> Callable[[], Diagonal]:
    from backpack import backpack as extensions
    from backpack import extend
    from backpack.extensions import SumGradSquared

    extended = extend(copy.deepcopy(model))
    loss_fn = extend(nn.CrossEntropyLoss(reduction="sum"))

    def run() -> Diagonal:
        totals = {name: torch.zeros_like(p) for name, p in extended.named_parameters()}
        for x, y in batches:
            extended.zero_grad()
            with extensions(SumGradSquared()):
                loss_fn(extended(x), y).backward()
            for name, p in extended.named_parameters():
                totals[name] += p.sum_grad_squared
        return mean(totals, batches)

    return run


def opacus(model: nn.Module, batches: Batches) -> Callable[[], Diagonal]:
    from opacus import GradSampleModule

    # It looks at models in training mode only; those that it supports behave alike in both.
    sampled = GradSampleModule(copy.deepcopy(model).train(), loss_reduction="sum")

    def run() -> Diagonal:
        totals = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for batch in batches:
            sampled.zero_grad()
            losses.cross_entropy(sampled, batch).sum().backward()
            for total, p in zip(totals.values(), sampled.parameters(), strict=True):
                total += p.grad_sample.square().sum(0)
        return mean(totals, batches)

    return run


def _total(parameter: Tensor) -> Tensor:
    # As ours: sums of squares do not fit in half precision.
    wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros_like(parameter, dtype=wide)


def mean(totals: dict[str, Tensor], batches: Batches) -> Diagonal:
    n = sum(len(x) for x, _ in batches)
    return {name: total.div_(n) for name, total in totals.items()}


def scales_of(oracle: Diagonal) -> dict[str, float]:
    """Each parameter's scale is its largest value; some gradients vanish in exact arithmetic."""
    largest = max(float(value.max()) for value in oracle.values())
    return {name: max(float(value.max()), 1e-6 * largest) for name, value in oracle.items()}


def largest_error(found: Diagonal, oracle: Diagonal) -> float:
    """Return the largest error of any parameter, on the scale of its own values."""
    scales = scales_of(oracle)
    return max(
        float((found[name].double() - exact).abs().max()) / scales[name] for name, exact in oracle.items()
    )


WAYS = {OURS: ours, PLAIN: plain, LOOP: loop, VMAP: vmapped, BACKPACK: backpack, OPACUS: opacus}


@dataclass(frozen=True)
class Group:
    """One race: a network, how many batches a lap has, and how many samples each."""

    model: str
    n_batches: int
    samples: int = SAMPLES

    @property
    def names(self) -> tuple[str, ...]:
        peers = [
            name
            for name, (package, models) in SUPPORTED.items()
            if self.model in models and importlib.util.find_spec(package)
        ]
        return (OURS, PLAIN, LOOP, VMAP, *peers)

    @property
    def label(self) -> str:
        usual = self.n_batches == BATCHES[self.model]
        network = self.model if usual else f"{self.model}, batches: {self.n_batches}"
        network += "" if self.samples == SAMPLES else f", samples: {self.samples}"
        return f"fisher_diagonal/{network}/float32"

    def build(self, device: torch.device, errors: dict[str, float]) -> Race:
        recipe = MODELS[self.model]
        model = recipe.build().to(device).eval()
        batches = [tuple(t.to(device) for t in recipe.batch(self.samples)) for _ in range(self.n_batches)]
        wide = [(x.double() if x.is_floating_point() else x, y) for x, y in batches]
        oracle = loop(copy.deepcopy(model).double(), wide)()
        scales = scales_of(oracle)

        def scaled(found: Diagonal) -> list[Tensor]:
            return [found[name].double() / scales[name] for name in oracle]

        def reading(contender: str) -> Callable[[Diagonal], list[Tensor]]:
            def read(found: Diagonal) -> list[Tensor]:
                errors[contender] = largest_error(found, oracle)
                return scaled(found)

            return read

        return Race(
            reference=lambda: oracle,
            read_reference=scaled,
            contenders={
                name: Contender(WAYS[name](model, batches), reading(name), compared=name != PLAIN)
                for name in self.names
            },
            rtol=1e-3,  # units of a large network that rounding switches on or off cost every way some 1e-4
        )


# The MLP again with one batch: its totals, written once per pass, weigh as much as that batch's work. The
# depthwise network with few images: what a call costs for every parameter, whatever the work.
GROUPS = [
    *(Group(model, n) for model, n in BATCHES.items()),
    Group("mlp", 1),
    Group("mobilenet", 1, samples=3),
    Group("mobilenet", 8, samples=3),
]

ERRORS: dict[str, dict[str, float]] = {}


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize(
    "group, name",
    [pytest.param(group, name, id=f"{group.label}-{name}") for group in GROUPS for name in group.names],
)
def test_fisher(group: Group, name: str, compete: Callable, races, benchmark) -> None:
    errors = ERRORS.setdefault(group.label, {})
    compete(f"{group.label}/{races.device.type}", name, lambda: group.build(races.device, errors))
    samples, error = group.samples * group.n_batches, errors[name] if name != PLAIN else None
    benchmark.extra_info.update(samples=samples, batches=group.n_batches, error=error)


def section(benchmarks: Iterable[Mapping[str, Any]]) -> str:
    """Render the groups of this file as a table.

    Args:
        benchmarks: Entries of pytest-benchmark's JSON; those of other files are left out.

    Returns:
        Markdown.
    """
    groups: dict[str, dict[str, Mapping[str, Any]]] = {}
    for entry in benchmarks:
        op, model, _, _ = entry["group"].split("/")
        if op == "fisher_diagonal":
            groups.setdefault(model, {})[entry["extra_info"]["contender"]] = entry
    peers = [name for name in WAYS if name != PLAIN and any(name in group for group in groups.values())]
    lines = [["network", f"{PLAIN}, ms", *peers], ["---"] * (2 + len(peers))]
    for model, group in groups.items():
        if PLAIN not in group:
            continue
        price = group[PLAIN]["stats"]
        extra = group[PLAIN]["extra_info"]
        n_batches = extra.get("batches", extra["samples"] / SAMPLES)
        cells = [model, f"{price['median'] / n_batches * 1e3:.3g}"]
        for name in peers:
            if name not in group:
                cells.append("")
                continue
            stats, error = group[name]["stats"], group[name]["extra_info"]["error"]
            ratios = stats["median"] / price["median"], stats["min"] / price["min"]
            cells.append(f"{ratios[0]:.2f} / {ratios[1]:.2f} ({error:.0e})")
        lines.append(cells)
    return "" if not groups else "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the file's races and print their table.

    Args:
        arguments: Of the command line; None: those of this process. They are handed on to pytest.

    Returns:
        pytest's exit code.
    """
    options = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="python -m bench.bench_fisher", description=__doc__)
    _, options = parser.parse_known_args(options)
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "fisher.json"
        fixed = [__file__, "-o", "addopts=", "-p", "no:cacheprovider", "-q", "--benchmark-quiet"]
        code = int(pytest.main([*fixed, f"--benchmark-json={output}", *options]))
        if output.exists():
            print(
                f"Times as multiples of a plain forward and backward pass of {SAMPLES} samples (or as said), "
                "by medians and by best laps; in brackets the largest error against float64.\n"
            )
            print(section(json.loads(output.read_text())["benchmarks"]))
    return code


if __name__ == "__main__":
    sys.exit(main())
