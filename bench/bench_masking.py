"""A step of masked training against a full one, over the share of neurons that is trained.

``pytest bench/bench_masking.py -k "vit and 0.05"`` runs a selection. Groups are called
``masked_step/model/depth/density/device``. Neurons are drawn at random in every layer, but for a share of the
first ones, the depth: 0.5 is what ``gradient_masking`` does by default, 0 is the worst case, in which
gradients have to reach the first layer: forward pass and gradients of inputs, two thirds of a step, stay.

The full step is what anyone would write: training mode, gradients of all parameters, ``torch.optim.SGD``.
"masked gradients" is a step that changes the same neurons as ours, from gradients of all parameters.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.models import MODELS
from bench.race import Contender, Race, replay
from unlearn_ext import Scores, ops, select_mask
from unlearn_ext.masks.neurons import neuron_groups
from unlearn_ext.optim.masked import MaskedSGD
from unlearn_ext.optim.row_gradients import RowGradients

OURS, MASKED, FULL = "ours", "masked gradients", "full step"
RUNS = ((0.5, 0.01), (0.5, 0.05), (0.5, 0.2), (0.5, 0.5), (0.0, 0.05), (0.0, 0.2))  # depth, density
BATCHES = {"resnet18": 16, "vit": 16}


@dataclass(frozen=True)
class Group:
    """One race: a network, and the share of its neurons that is trained."""

    model: str
    depth: float
    density: float

    @property
    def label(self) -> str:
        return f"masked_step/{self.model}/{self.depth}/{self.density}"

    def build(self, device: torch.device) -> Race:
        model = MODELS[self.model].build().to(device)
        x, y = (tensor.to(device) for tensor in MODELS[self.model].batch(BATCHES[self.model]))
        masks = random_neurons(model, (x, y), self.density, self.depth)
        return Race(
            reference=masked(model, x, y, masks),
            read_reference=lambda model: selected_gradients(model, masks),
            contenders={
                OURS: Contender(
                    rows_only(model, x, y, masks), read=lambda model: selected_gradients(model, masks)
                ),
                FULL: Contender(full(model, x, y), read=lambda _: [], compared=False),
            },
            rtol=1e-4,
        ).only((OURS, MASKED, FULL), MASKED)


def random_neurons(
    model: nn.Module, batch: tuple[Tensor, Tensor], density: float, depth: float
) -> dict[str, Tensor]:
    values = {name: torch.rand_like(p) for name, p in model.named_parameters()}
    scores = Scores(values, neuron_groups(model, [batch]), score="random")
    return select_mask(scores, density, granularity="neuron", scope="layer", min_depth=depth)


# The learning rate is 0: all does its work, and every lap finds the same network.


def full(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], object]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def run() -> None:
        model.train().requires_grad_(True)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return run


def _frozen_statistics(model: nn.Module) -> None:
    model.train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()


def selected_gradients(model: nn.Module, masks: dict[str, Tensor]) -> list[Tensor]:
    return [
        p.grad * ops.unpack_mask(masks[name], list(p.shape))
        for name, p in model.named_parameters()
        if bool(masks[name].any()) and p.grad is not None
    ]


def masked(model: nn.Module, x: Tensor, y: Tensor, masks: dict[str, Tensor]) -> Callable[[], object]:
    optimizer = MaskedSGD(model.named_parameters(), lr=0.0, momentum=0.9, masks=masks)

    def run() -> nn.Module:
        _frozen_statistics(model)
        model.requires_grad_(True)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        return model

    return run


def rows_only(model: nn.Module, x: Tensor, y: Tensor, masks: dict[str, Tensor]) -> Callable[[], object]:
    trained = {name: p for name, p in model.named_parameters() if bool(masks[name].any())}
    rows = {}
    for name, p in trained.items():
        if p.ndim > 1:
            rows[p] = ops.unpack_mask(masks[name], [p.shape[0], p[0].numel()]).any(1).nonzero().flatten()
    optimizer = MaskedSGD(trained.items(), lr=0.0, momentum=0.9, masks=masks)

    def run() -> nn.Module:
        _frozen_statistics(model)
        for name, p in model.named_parameters():
            p.requires_grad_(name in trained)
        optimizer.zero_grad()
        with RowGradients(rows):
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        return model

    return run


def cases() -> list:
    return [
        pytest.param(group, name, id=f"{group.label}-{name}")
        for group in (Group(model, *run) for model in BATCHES for run in RUNS)
        for name in (OURS, MASKED, FULL)
    ]


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize("group, name", cases())
def test_step(group: Group, name: str, compete: Callable, races) -> None:
    compete(f"{group.label}/{races.device.type}", name, lambda: group.build(races.device))
