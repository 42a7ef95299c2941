"""Cases aimed at the proof: what README.md beside the engine assumes, and what violates it."""

import copy
import math

import pytest
import torch
from oracle import assert_right, errors, expected_of
from torch import nn

import unlearn_ext as ux
from unlearn_ext import fisher_diagonal
from unlearn_ext.fisher.engine import per_sample
from unlearn_ext.fisher.engine.gradients import Projection
from unlearn_ext.fisher.engine.graph import Graph, kind_of
from unlearn_ext.fisher.engine.layout import Axis, Layout, MismatchError
from unlearn_ext.fisher.engine.selections import below, selections

CLASSES = 3


def labels(n):
    return torch.randint(CLASSES, (n,))


# Samples and rows that tell layouts apart, or do not -----------------------------------------------------


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_transposed_recurrent_layers_of_two_units(kind):
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = kind(3, 2), nn.Linear(2, CLASSES)

        def forward(self, x):
            return self.head(self.rnn(x.transpose(0, 1))[0].sum(0))

    for seed in range(12):
        torch.manual_seed(seed)
        assert_right(Transposed(), [(torch.randn(3, 3, 3), labels(3)) for _ in range(2)], fused=True)


class Pooled(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.lin(x.transpose(0, 1)).tanh().sum(0))


@pytest.mark.parametrize("kind", ["padded", "single", "zeros", "same", "one hot", "diagonal"])
def test_degenerate_samples_come_first(kind):
    torch.manual_seed(0)
    model, n = Pooled(), 4
    first = torch.randn(n, n, 4)
    if kind == "padded":
        first[0], first[1, 1:] = 0, 0
    elif kind == "single":
        first[:2] = 0
        first[0, 0, 0] = first[1, 1, 1] = 1
    elif kind == "zeros":
        first[:] = 0
    elif kind == "same":
        first[:] = first[0, 0]
    elif kind == "one hot":
        first[:] = 0
        first[:, 0, 0] = 1
    elif kind == "diagonal":
        first = first * torch.eye(n)[..., None]
    y = labels(n)
    later = (torch.randn(n, n, 4), labels(n))
    assert_right(model, [(first, y), later], fused=True)
    nn.init.zeros_(model.lin.bias)
    assert_right(model, [(first, y), later], fused=True)


def test_a_zero_initialised_last_layer():
    torch.manual_seed(0)
    model = Pooled()
    nn.init.zeros_(model.head.weight)
    batches = [(torch.randn(4, 4, 4), labels(4)) for _ in range(2)]
    assert_right(model, batches, fused=True)


def test_a_zero_initialised_last_layer_over_a_constant_table():
    class Table(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.mix, self.head = nn.Embedding(5, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            shared = self.mix(self.table(torch.arange(5))).tanh().sum(0)
            return self.head(x + shared)

    torch.manual_seed(0)
    model = Table()
    nn.init.zeros_(model.head.weight)
    batches = [(torch.randn(4, 4), labels(4)) for _ in range(2)]
    assert_right(model, batches)
    nn.init.ones_(model.head.weight)
    assert_right(model, batches)


# Coupled samples -----------------------------------------------------------------------------------------


class Coupled(nn.Module):
    def __init__(self, share, *, hides=None):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.share, self.hides = share, hides

    def forward(self, x):
        h = self.first(x).tanh()
        mean = h.mean(0)
        if self.hides == "gradient":
            mean = mean.detach()
        if self.hides == "value":
            mean = mean - mean.detach()
        return self.head(h + self.share * mean)


@pytest.mark.parametrize("hides", [None, "gradient", "value"])
@pytest.mark.parametrize(
    "dtype, share", [(torch.float64, 1e-6), (torch.float32, 1e-3), (torch.float32, 1e-2)]
)
def test_weakly_coupled_samples(dtype, share, hides):
    torch.manual_seed(0)
    model = Coupled(share, hides=hides).to(dtype)
    batches = [(torch.randn(6, 4, dtype=dtype), labels(6)) for _ in range(2)]
    tolerance = 1e-9 if dtype == torch.float64 else 1e-5
    if hides == "value":
        found = assert_right(model, batches, tolerance=tolerance)
        assert "samples are coupled (by " in found.coverage["first.weight"]
    else:
        with pytest.warns(UserWarning, match="samples influence each other"):
            assert_right(model, batches, tolerance=tolerance)


def test_a_decision_about_the_whole_batch():
    class Deciding(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, CLASSES), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.a(x) + (self.b(x) if float(x[:, 0].max()) > 0 else 0)

    torch.manual_seed(0)
    x = torch.randn(6, 4)
    x[:, 0] = -1
    y = x.clone()
    y[5, 0] = 1
    with pytest.warns(UserWarning, match="samples influence each other"):
        assert_right(Deciding(), [(x, labels(6)), (y, labels(6))])


# Speed that is promised ----------------------------------------------------------------------------------


class Dead(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift, self.dead = nn.Linear(4, 1), nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(x + (self.dead(x) - 100).relu()) + self.shift(x)  # softmax takes the shift away


@pytest.mark.usefixtures("no_certificates")
def test_parameters_without_a_gradient_are_proven_like_others(monkeypatch):
    torch.manual_seed(0)
    model = Dead()
    batches = [(torch.randn(6, 4), labels(6)) for _ in range(6)]
    monkeypatch.setattr(per_sample, "Fallback", None)  # would be called
    sizes = []

    def loss_fn(model, batch):
        sizes.append(len(batch[0]))
        return ux.losses.cross_entropy(model, batch)

    assert_right(model, batches, fused=True)
    fisher_diagonal(model, batches, loss_fn=loss_fn)
    sizes.clear()
    fisher_diagonal(model, batches, loss_fn=loss_fn)
    assert sizes.count(6) == 6


def test_a_unit_that_comes_alive_later():
    torch.manual_seed(0)
    model = Dead()
    x = torch.randn(6, 4)
    batches = [(x, labels(6)), (300 * x, labels(6)), (x, labels(6))]
    assert_right(model, batches, fused=True, tolerance=1e-4)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 2), (1, 2), (2, 3, 2)])
def test_random_directions_see_what_sums_would_hide(shape):
    """Entries of opposite signs beside each other: a rule that moves them about would go unnoticed."""
    grads = torch.ones(1, math.prod(shape))
    grads[:, 1::2] = -1
    projected = Projection(shape, 0, torch.device("cpu"), torch.float64).of(grads.view(1, *shape).double())
    assert projected.abs().min() > 1e-3
    flipped = -grads.view(1, *shape).double()
    torch.testing.assert_close(
        Projection(shape, 0, torch.device("cpu"), torch.float64).of(flipped), -projected
    )


@pytest.mark.parametrize("axis", [Axis.FIRST, Axis.INNER])
def test_rows_that_the_samples_do_not_divide_are_a_mismatch(axis):
    for tensor in (torch.zeros(5, 3), torch.zeros(())):
        with pytest.raises(MismatchError, match=r"the first axis of \[.*\] does not hold 2 samples"):
            Layout(2, axis)._split(tensor, axis)


def test_what_lies_below_a_selection_is_all_that_it_is_made_of():
    torch.manual_seed(0)
    layer, other, x = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(3, 4)
    picked = layer(x).tanh().sin()[torch.tensor([2, 0, 1])]
    losses = (picked + other(x)).exp().sum(1)
    graph = Graph(losses.grad_fn)
    (selection,) = [found for found in selections(graph) if kind_of(found.node) == "Index"]
    kinds = sorted(kind_of(node) for node in below(graph, [selection]))
    assert kinds == sorted(["Sin", "Tanh", "Addmm", "T", "AccumulateGrad", "AccumulateGrad"])


# Certificates --------------------------------------------------------------------------------------------


class Turning(nn.Module):
    """Takes the samples for positions from the second batch on, without a trace in the graph."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)
        self.is_turned = False

    def forward(self, x):
        if self.is_turned and len(x) > 1:
            x = x + 1e-2 * x.roll(1, 0)
        return self.head(self.first(x).tanh())


def test_a_certificate_finds_what_no_proof_can_see(monkeypatch):
    torch.manual_seed(0)
    model = Turning()
    first, second = ((torch.randn(6, 4), labels(6)) for _ in range(2))

    class Data:
        def __iter__(self):
            object.__setattr__(model, "is_turned", False)
            yield first
            object.__setattr__(model, "is_turned", True)
            yield second

    expected = expected_of(model, [first, second])
    monkeypatch.setattr(per_sample, "CERTIFICATES", float("inf"))
    fisher_diagonal(model, [first])  # a price is known
    with pytest.warns(UserWarning, match="samples influence each other"):
        found = fisher_diagonal(model, Data())
    assert max(errors(found, expected).values()) <= 1e-5


def proofs_of(monkeypatch):
    """The sizes of the batches on which layouts are proven from now on."""
    proofs = []
    real = per_sample.LayoutProof

    class Counted(real):
        def run(self, names):
            proofs.append(self._n)
            return super().run(names)

    monkeypatch.setattr(per_sample, "LayoutProof", Counted)
    return proofs


def test_a_class_token_is_told_apart_on_fewer_samples(monkeypatch):
    """65 positions of 16 samples: one row of each sample has a gradient, and 65 = 1 modulo 16."""
    torch.manual_seed(0)

    class Token(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.mix = nn.Linear(5, 8), nn.Linear(8, 8)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            n, t, _ = x.shape
            rows = self.mix(self.embed(x).reshape(n * t, 8)).reshape(n, t, 8)
            return self.head(rows[:, 0].tanh())

    model = Token()
    batches = [(torch.randn(16, 65, 5), torch.randint(3, (16,))) for _ in range(4)]
    proofs = proofs_of(monkeypatch)
    importance = ux.fisher_diagonal(model, batches)
    assert set(importance.coverage.values()) == {"fused"}
    assert proofs == [16, 3]  # the first batch, three of its samples, and none after that
    oracle = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in model.named_parameters()}
    twin = copy.deepcopy(model).double()
    for x, y in batches:
        for n in range(16):
            loss = nn.functional.cross_entropy(twin(x[n : n + 1].double()), y[n : n + 1])
            for (name, _), grad in zip(
                twin.named_parameters(), torch.autograd.grad(loss, list(twin.parameters())), strict=True
            ):
                oracle[name] += grad.square() / 64
    for name, expected in oracle.items():
        torch.testing.assert_close(importance[name].double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("batch_first", [True, False])
def test_rows_of_sequences_with_the_samples_second_are_proven_once(monkeypatch, batch_first):
    """Attention flattens [T, N, E]: of the rows, two names for a layout mean the same."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, 2, 12, norm_first=True, batch_first=batch_first)
            self.layers = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = x if batch_first else x.transpose(0, 1)
            return self.head(self.layers(x).mean(1 if batch_first else 0))

    torch.manual_seed(0)
    model = Encoder().eval()
    batches = [(torch.randn(n, length, 8), torch.randint(3, (n,))) for n, length in SIZES]
    proofs = proofs_of(monkeypatch)
    importance = ux.fisher_diagonal(model, batches)
    assert set(importance.coverage.values()) == {"fused"}
    assert proofs == [6]
    twin, n_samples = copy.deepcopy(model).double(), sum(n for n, _ in SIZES)
    oracle = {name: torch.zeros_like(p) for name, p in twin.named_parameters()}
    for x, y in batches:
        for n in range(len(x)):
            loss = nn.functional.cross_entropy(twin(x[n : n + 1].double()), y[n : n + 1])
            grads = torch.autograd.grad(loss, list(twin.parameters()))
            for total, grad in zip(oracle.values(), grads, strict=True):
                total += grad.square() / n_samples
    for name, expected in oracle.items():
        torch.testing.assert_close(importance[name].double(), expected, rtol=1e-4, atol=1e-8)


# Samples and positions: as many of both, sizes that divide each other, sizes of batches seen and not.
SIZES = [(6, 5), (6, 6), (4, 8), (8, 4), (6, 12), (12, 6), (5, 5)]
