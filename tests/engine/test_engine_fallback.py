"""Samples one by one, or vmapped: what remains for functions that autograd cannot look into."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact, errors, one_by_one, split
from torch import nn

from unlearn_ext import fisher_diagonal
from unlearn_ext.fisher.engine import fallback

N, CLASSES = 37, 4


class Foreign(torch.autograd.Function):
    """A linear function whose node says nothing of what it computes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, weight):
        return x @ weight.mT

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.mT @ x


class Opaque(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / inputs**0.5)

    def forward(self, x):
        return Foreign.apply(x, self.weight)


class DataDependent(Opaque):
    """Control flow on a value, which vmap cannot follow."""

    def forward(self, x):
        return super().forward(x if float(x.abs().max()) > 0 else x + 1)


def make(kind=Opaque, width=7):
    torch.manual_seed(0)
    model = nn.Sequential(kind(5, width), nn.Tanh(), kind(width, CLASSES))
    return model, (torch.randn(N, 5), torch.randint(CLASSES, (N,)))


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("size", [1, 8, 37])
@pytest.mark.parametrize("kind", [Opaque, DataDependent])
def test_it_is_exact(kind, size, power):
    assert_exact(*make(kind), size=size, power=power, fused=False)


def how(kind, size=N, **settings):
    model, batch = make(kind, **settings)
    (why,) = set(fisher_diagonal(model, split(batch, size)).coverage.values())
    return why


def test_coverage_says_what_is_done_instead_and_why():
    why = "fallback: no rule for ForeignBackward"
    assert how(Opaque) == f"{why}; vmap"
    assert how(Opaque, size=1) == f"{why}; single-sample loop: batches of one sample"
    assert how(DataDependent).startswith(f"{why}; single-sample loop: vmap raised RuntimeError: ")
    assert how(Opaque, width=30_000) == (
        f"{why}; single-sample loop: faster than vmap for 270,000 scalars on cpu"
    )


def test_vmap_is_not_believed_where_it_disagrees(monkeypatch):
    def lying(*arguments):
        grads, values = honest(*arguments)
        return {name: 1.5 * grad if name == "2.weight" else grad for name, grad in grads.items()}, values

    honest = fallback.vmap_gradients
    monkeypatch.setattr(fallback, "vmap_gradients", lying)
    found = assert_exact(*make(), fused=False)
    assert found.coverage["0.weight"].endswith("; single-sample loop: vmap disagrees with plain autograd")


def test_vmap_that_gives_up_half_way_counts_no_sample_twice(monkeypatch):
    honest, calls = fallback.vmap_gradients, itertools.count()

    def tired(*arguments):
        if next(calls) == 2:
            raise RuntimeError("out of memory\nat length")
        return honest(*arguments)

    monkeypatch.setattr(fallback, "vmap_gradients", tired)
    found = assert_exact(*make(), size=8, fused=False)
    assert found.coverage["0.weight"].endswith("vmap raised RuntimeError: out of memory")


def test_chunks_split_a_batch_without_touching_shared_tensors(monkeypatch):
    """A tensor shared by the samples whose length is that of a chunk stays shared."""
    model, (x, y) = make()
    scalars = sum(p.numel() for p in model.parameters())
    monkeypatch.setattr(fallback, "VMAP_SCALARS", {"cpu": (10 * scalars, 2)})
    weights = torch.linspace(0.5, 2.0, 10)  # as long as a chunk

    def loss_fn(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * batch[2].sum()

    found = fisher_diagonal(model, [(x, y, weights)], loss_fn=loss_fn)
    assert set(found.coverage.values()) == {"fallback: no rule for ForeignBackward; vmap"}
    expected = {k: v * float(weights.sum()) ** 2 for k, v in one_by_one(model, (x, y)).items()}
    assert max(errors(found, expected).values()) <= 1e-5


def test_only_what_has_no_rule_falls_back():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Opaque(6, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES))
    _, batch = make()
    everything = {name for name, _ in model.named_parameters()}
    assert_exact(model, batch, size=8, fused=everything - {"2.weight"})


def test_other_parameters_do_not_pay_for_it(monkeypatch):
    """vmap differentiates with respect to what falls back, and to nothing else."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Opaque(6, CLASSES))
    seen, honest = set(), fallback.vmap_gradients

    def watching(loss, chosen, *rest):
        seen.update(chosen)
        return honest(loss, chosen, *rest)

    monkeypatch.setattr(fallback, "vmap_gradients", watching)
    fisher_diagonal(model, [make()[1]])
    assert seen == {"2.weight"}
