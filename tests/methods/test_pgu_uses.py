"""Projected-gradient unlearning of layers that do not do what their kind does."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import unlearn_ext as ux
from unlearn_ext.methods.pgu_uses import WHY


class Standardised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean(1, keepdim=True)
        return F.linear(x, weight / (weight.std(1, keepdim=True) + 1e-5), self.bias)


class OfSquares(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.cat([x[:, :6] ** 2, x[:, 6:]], 1), self.weight, self.bias)


class Equalised(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.3, self.bias)


class Reused(nn.Module):
    def __init__(self, is_reused: bool) -> None:
        super().__init__()
        self.body, self.head, self.is_reused = nn.Linear(12, 12), nn.Linear(12, 3), is_reused

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.body(x))
        if self.is_reused:
            h = h + torch.tanh(F.linear((3 * h + 1).cos(), self.body.weight))
        return self.head(h)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.body = nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.body(self.words(ids))).mean(1) @ self.words.weight[:3].T


class Attentive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(12, 2, batch_first=True), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(1) * torch.linspace(0.5, 1, 4).view(1, 4, 1)
        return self.head(self.attention(x, x, x)[0].mean(1))


def _sets() -> tuple[list[tuple[Tensor, Tensor]], list[tuple[Tensor, Tensor]]]:
    torch.manual_seed(0)
    kept = torch.randn(64, 3) @ torch.randn(3, 12)
    retain = [(part, torch.randint(3, (16,))) for part in kept.split(16)]
    return [(torch.randn(16, 12), torch.randint(3, (16,)))], retain


def _run(model: nn.Module, forget: object, retain: object) -> tuple[ux.UnlearnResult, float]:
    """The record, and how far the retain set's answers have moved."""
    before = [model(inputs).detach() for inputs, _ in retain]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ux.pgu(model, forget, retain, until=None, epochs=5, lr=0.1, energy=1 - 1e-9, leak=None)
    moved = max(float((model(x).detach() - y).abs().max()) for (x, _), y in zip(retain, before, strict=True))
    return result, moved


def _frozen(result: ux.UnlearnResult) -> dict[str, str]:
    return {entry["parameter"]: entry["frozen"] for entry in result.history if entry.get("frozen")}


@pytest.mark.parametrize("kind", [Standardised, OfSquares])
def test_layers_that_do_something_else_stay_as_they_are(kind: type[nn.Linear]) -> None:
    forget, retain = _sets()
    model = nn.Sequential(kind(12, 12), nn.Tanh(), nn.Linear(12, 3))
    before = model[0].weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ux.pgu(model, forget, retain, until=None, epochs=3, lr=0.1, energy=0.9)
    assert torch.equal(model[0].weight, before)
    assert _frozen(result) == {"0.weight": WHY}


@pytest.mark.parametrize("kind", [nn.Linear, Equalised])
def test_layers_that_do_not_keep_the_answers_to_the_retain_set(kind: type[nn.Linear]) -> None:
    forget, retain = _sets()
    model = nn.Sequential(kind(12, 3))
    result, moved = _run(model, forget, retain)
    assert not _frozen(result)
    assert moved < 1e-4
    assert torch.isfinite(model[0].weight).all()


def test_if_nothing_else_is_free_it_is_refused_and_says_why() -> None:
    forget, retain = _sets()
    model = nn.Sequential(Standardised(12, 3))
    before = model[0].weight.detach().clone()
    with pytest.raises(ValueError, match="as its kind does"):
        _run(model, forget, retain)
    assert torch.equal(model[0].weight, before)


@pytest.mark.parametrize("is_reused", [False, True])
def test_a_weight_that_is_used_behind_its_layers_back(is_reused: bool) -> None:
    forget, retain = _sets()
    model = Reused(is_reused)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ux.pgu(model, forget, retain, until=None, epochs=1, energy=0.9)
    assert _frozen(result) == ({"body.weight": WHY} if is_reused else {})


def test_an_embedding_that_is_the_head_too() -> None:
    generator = torch.Generator().manual_seed(0)
    forget, retain = (
        [
            (
                torch.randint(low, high, (16, 5), generator=generator),
                torch.randint(3, (16,), generator=generator),
            )
        ]
        for low, high in ((10, 20), (0, 12))
    )
    torch.manual_seed(0)
    model = Words()
    before = model.words.weight.detach().clone()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ux.pgu(model, forget, retain, until=None, epochs=1, energy=0.5)
    assert _frozen(result) == {"words.weight": WHY}
    assert torch.equal(model.words.weight, before)


def test_attention_is_taken_as_it_is() -> None:
    forget, retain = _sets()
    torch.manual_seed(0)
    model = Attentive()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ux.pgu(model, forget, retain, until=None, epochs=1, energy=0.9)
    assert not _frozen(result)
    changed = {entry["parameter"] for entry in result.history if entry.get("free")}
    assert {"attention.in_proj_weight", "head.weight"} <= changed
