"""Losses that samples have only together, and samples that cannot be taken from their batch."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unlearn_ext as ux

INPUTS = torch.randn(12, 6, generator=torch.Generator().manual_seed(0))
TIMES = torch.rand(12, generator=torch.Generator().manual_seed(1))


def _model(outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, outputs))


def cox(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    risk, order = model(batch[0])[:, 0], batch[1].argsort(descending=True)
    return (torch.logcumsumexp(risk[order], 0) - risk[order])[order.argsort()]


def contrastive(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    found = F.normalize(model(batch[0]), dim=1)
    return F.cross_entropy(found @ found.T / 0.2, torch.arange(len(found)), reduction="none")


@pytest.mark.parametrize("loss", [cox, contrastive])
def test_losses_that_samples_have_only_together_are_refused(loss: object) -> None:
    data = [(INPUTS[:8], TIMES[:8]), (INPUTS[8:], TIMES[8:])]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"only samples together have.*estimator='batch'"):
            ux.fisher_diagonal(_model(), data, loss_fn=loss)
    found = ux.fisher_diagonal(_model(), data, loss_fn=loss, estimator="batch")
    model = _model().double()
    expected = [torch.zeros_like(p) for p in model.parameters()]
    for inputs, times in data:
        value = loss(model, (inputs.double(), times)).mean()
        for total, grad in zip(expected, torch.autograd.grad(value, list(model.parameters())), strict=True):
            total += grad.square() / len(data)
    for (name, _), value in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found[name].double(), value, rtol=1e-3, atol=1e-9)


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        return self.head(torch.relu(edges @ self.body(x)))


def test_samples_that_share_a_tensor_as_long_as_the_batch() -> None:
    edges, labels = torch.eye(12) + torch.eye(12).roll(1, 0), torch.arange(12) % 3
    task = ux.tasks.Classification(inputs=(0, 1), labels=2)
    with pytest.raises(ValueError, match=r"as long as its batch, 12.*\[12, 12\].*select and count"):
        ux.fisher_diagonal(Graph(), [(INPUTS, edges, labels)], task=task)
    weights = torch.tensor([1.0, 2.0, 0.5])
    batch = (INPUTS[:3], labels[:3], weights)
    with pytest.raises(ValueError, match="select and count"):
        ux.fisher_diagonal(
            _model(),
            [batch],
            loss_fn=lambda model, b: F.cross_entropy(model(b[0]), b[1], weight=b[2], reduction="none"),
        )
