"""The per-sample Fisher kernels against the plain weight gradient and other ways to the same diagonal.

``pytest bench/bench_fisher_ops.py -k resnet18`` runs a selection; ``python -m bench`` runs all and writes
``bench/RESULTS.md``. Groups are called ``op/layer/dtype/device``.

The plain weight gradient, the sum over samples that every training step computes, takes as many operations
but does not give the diagonal: its time is what the diagonal would cost if the squares were free.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.race import Contender, Race, replay
from bench.shapes import LAYERS, Layer
from unlearn_ext import ops
from unlearn_ext.ops import reference

OURS, PLAIN, EINSUM, SQUARES = "ours", "plain weight gradient", "einsum per sample", "product of squares"

# Gradients of single samples that the einsum keeps at a time.
CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**30}


@dataclass(frozen=True)
class Group:
    """One race: a layer and who takes part."""

    layer: Layer
    dtype: torch.dtype

    @property
    def op(self) -> str:
        return "fisher_conv_" if self.layer.kernel else "fisher_linear_"

    @property
    def names(self) -> tuple[str, ...]:
        # Without positions there is a closed form, which squares of half precision would not survive.
        closed = not self.layer.kernel and self.layer.positions == 1 and self.dtype == torch.float32
        return (OURS, PLAIN, EINSUM, *([SQUARES] if closed else []))

    @property
    def label(self) -> str:
        return f"{self.op}/{self.layer.name}/{str(self.dtype)[6:]}"

    def build(self, device: torch.device) -> Race:
        inputs, grads = (
            torch.randn(shape, device=device).to(self.dtype)
            for shape in (self.layer.inputs, self.layer.outputs)
        )
        fisher = torch.zeros(self.layer.weight, device=device)
        race = convolution if self.layer.kernel else linear
        return race(self.layer, fisher, inputs, grads).only(self.names, EINSUM)


def samples_at_once(layer: Layer, device: torch.device) -> int:
    return max(1, CHUNK_BYTES[device.type] // (4 * layer.scalars))


def linear(layer: Layer, fisher: Tensor, inputs: Tensor, grads: Tensor) -> Race:
    step = samples_at_once(layer, fisher.device)

    def plain() -> Tensor:
        return grads.flatten(0, -2).mT @ inputs.flatten(0, -2)

    def einsum() -> None:
        for g, a in zip(grads.split(step), inputs.split(step), strict=True):
            gradients = torch.einsum("nto,nti->noi", g.float(), a.float())
            fisher.add_(gradients.square_().sum(0))

    def squares() -> None:
        fisher.addmm_(grads[:, 0].square().mT, inputs[:, 0].square())

    return Race(
        reference=lambda: reference.fisher_linear_(fisher, inputs, grads),
        contenders={
            OURS: Contender(lambda: ops.fisher_linear_(fisher, inputs, grads)),
            PLAIN: Contender(plain, compared=False),
            EINSUM: Contender(einsum),
            SQUARES: Contender(squares),
        },
        written=[fisher],
        rtol=1e-4,
    )


def convolution(layer: Layer, fisher: Tensor, inputs: Tensor, grads: Tensor) -> Race:
    step = samples_at_once(layer, fisher.device)
    constants = {"stride": layer.stride, "padding": layer.padding, "dilation": 1}
    pairs = [[layer.stride] * 2, [layer.padding] * 2, [1] * 2]
    weight = torch.empty(layer.weight, device=inputs.device, dtype=inputs.dtype)

    def plain() -> Tensor:
        mask = [False, True, False]
        return torch.ops.aten.convolution_backward(
            grads, inputs, weight, None, *pairs, False, [0, 0], 1, mask
        )[1]

    def einsum() -> None:
        rows = fisher.view(layer.weight[0], -1)
        for g, x in zip(grads.split(step), inputs.split(step), strict=True):
            patches = F.unfold(x.float(), layer.kernel, **constants)
            gradients = torch.einsum("not,nit->noi", g.float().flatten(2), patches)
            rows.add_(gradients.square_().sum(0))

    return Race(
        reference=lambda: reference.fisher_conv_(fisher, inputs, grads, **constants),
        contenders={
            OURS: Contender(lambda: ops.fisher_conv_(fisher, inputs, grads, **constants)),
            PLAIN: Contender(plain, compared=False),
            EINSUM: Contender(einsum),
        },
        written=[fisher],
        rtol=1e-4,
    )


def cases() -> list:
    groups = [
        Group(layer, dtype)
        for layer in LAYERS
        for dtype in (torch.float32, *([torch.bfloat16] if layer.half else []))
    ]
    return [pytest.param(g, name, id=f"{g.label}-{name}") for g in groups for name in g.names]


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("group, name", cases())
def test_fisher_op(group: Group, name: str, compete: Callable, races, benchmark) -> None:
    layer = group.layer
    benchmark.extra_info.update(samples=layer.samples, positions=layer.positions, operations=layer.operations)
    compete(f"{group.label}/{races.device.type}", name, lambda: group.build(races.device))
