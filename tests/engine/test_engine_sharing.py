"""Parameters that are used several times: a sample's gradients add up before they are squared."""

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact
from test_engine_layers import CLASSES, Head, N, labels
from torch import nn

from bench.models import GPTLMHeadModel
from unlearn_ext.fisher.engine import gradients, tied


def twice(layer, **settings):
    return Head(layer, nn.Tanh(), layer, **settings)


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize(
    "build, size, settings",
    [
        (lambda: nn.Linear(5, 5), (5,), {"width": 5}),
        (lambda: nn.Linear(5, 5), (4, 5), {"width": 5, "last": True}),
        (lambda: nn.Conv1d(4, 4, 3, groups=2), (4, 9), {"width": 4}),
        (lambda: nn.Conv2d(3, 3, 3, stride=2, padding=1), (3, 9, 8), {"width": 3}),
        (lambda: nn.Conv3d(2, 2, 2), (2, 4, 4, 3), {"width": 2}),
        (lambda: nn.LayerNorm(5), (4, 5), {"width": 5, "last": True}),
        (lambda: nn.GroupNorm(2, 4), (4, 3, 3), {"width": 4}),
        (lambda: nn.PReLU(4), (4, 3, 3), {"width": 4}),
    ],
    ids=["linear", "linear, positions", "conv1d", "conv2d", "conv3d", "layer norm", "group norm", "prelu"],
)
def test_a_layer_used_twice(build, size, settings, power):
    torch.manual_seed(0)
    assert_exact(twice(build(), **settings), (torch.randn(N, *size), labels()), power=power)


class Both(nn.Module):
    """A weight that several functions use."""

    def __init__(self, forward, *shapes):
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(shape) / 2) for shape in shapes])
        self._forward = forward

    def forward(self, x):
        return self._forward(x, *self.weights)


USES = {
    "a weight and its transpose": (
        lambda x, w: F.linear(F.linear(x, w).tanh(), w.T)[..., :3],
        (4, 5),
        (N, 5),
    ),
    "a weight on either side": (lambda x, w: (w @ (x @ w).T).T[:, :3], (5, 5), (N, 5)),
    "a weight that is also added": (lambda x, w: (x @ w.T).sin() @ w + w[0], (3, 3), (N, 3)),
    "parts that overlap": (lambda x, w: x @ w[:, :3] + (x @ w[:, 1:4]).sin(), (5, 4), (N, 5)),
    "parts that do not": (lambda x, w: x @ w[:, :3] + (x @ w[:, 3:]).sin(), (5, 6), (N, 5)),
    "a kernel of two strides": (
        lambda x, w: F.conv1d(x, w).mean(2) + F.conv1d(x, w, stride=2).sin().mean(2),
        (3, 2, 3),
        (N, 2, 8),
    ),
    "a kernel that is also a weight": (
        lambda x, w: F.conv1d(x, w).mean(2) + x[:, :, 0].sin() @ w[:, :, 0].T,
        (3, 2, 3),
        (N, 2, 8),
    ),
    "a scale that is also a shift": (lambda x, w: x.tanh() * w + w, (3,), (N, 3)),
    "a weight per head": (
        lambda x, w: torch.einsum("nti,hio->nhto", x, w).sin().mean((1, 2)),
        (2, 5, 3),
        (N, 4, 5),
    ),
    "a weight for each group": (
        lambda x, w: torch.einsum("nti,tio->nto", x, w).sin().mean(1),
        (4, 5, 3),
        (N, 4, 5),
    ),
    "a weight on the left of a batch": (
        lambda x, w: torch.bmm(w, x.permute(1, 2, 0)).sin().mean(0).T,
        (4, 3, 5),
        (N, 4, 5),
    ),
    "a vector": (lambda x, w: torch.stack([x @ w, (x @ w).sin()], -1).sum(1), (5,), (N, 4, 5)),
    "a divisor": (lambda x, w: x.sin() / w, (3,), (N, 3)),
    "a dividend": (lambda x, w: w / (x.sin() + 2), (3,), (N, 3)),
    "a temperature": (lambda x, w: x * w.exp(), (), (N, 3)),
    "a masked weight": (lambda x, w: x @ (w * (torch.arange(3, dtype=w.dtype) - 1)), (5, 3), (N, 5)),
    "a kernel as a matrix": (lambda x, w: x.sin() @ w.view(3, 5).T, (3, 5, 1, 1), (N, 5)),
    "a token where there is none": (
        lambda x, w: torch.where(x[..., :1] > 0, w, x).sin().sum(1)[:, :3],
        (5,),
        (N, 4, 5),
    ),
    "a scale of positions": (lambda x, w: (x * w + w[:, :1]).sum(1)[:, :3], (4, 5), (N, 4, 5)),
}


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("name", USES)
def test_different_uses_of_one_weight(name, power):
    torch.manual_seed(0)
    forward, shape, size = USES[name]
    few = 2 if name == "a vector" else CLASSES
    assert_exact(Both(forward, shape), (torch.randn(size), labels() % few), power=power)


class TwoTables(nn.Module):
    """A table looked up twice, with as many entries per sample or not, and perhaps as the head's weight."""

    def __init__(self, is_tied, padding_idx=None):
        super().__init__()
        self.table = nn.Embedding(9, 5, padding_idx=padding_idx)
        self.mix = nn.Linear(5, 5)
        self.is_tied, self.head = is_tied, nn.Linear(5, 9, bias=False)
        if is_tied:
            self.head.weight = self.table.weight

    def forward(self, tokens):
        x = self.mix(self.table(tokens[:, :4])).tanh() + self.table(tokens[:, 4:]).mean(1, keepdim=True)
        return self.head(x)


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("padding_idx", [None, 0])
@pytest.mark.parametrize("is_tied", [True, False])
def test_tables(is_tied, padding_idx, power):
    torch.manual_seed(0)
    model = TwoTables(is_tied, padding_idx)
    batch = (torch.randint(9, (N, 6)), torch.randint(9, (N, 4)))
    assert_exact(model, batch, power=power)


def test_the_rows_of_a_tied_table_are_worked_on_in_parts(monkeypatch):
    torch.manual_seed(0)
    model = GPTLMHeadModel(width=8, depth=1, heads=2, length=6, vocabulary=15)
    text = torch.randint(15, (N, 7))
    whole = assert_exact(model, (text[:, :-1], text[:, 1:]))
    monkeypatch.setattr(tied, "CHUNK", 100)
    parts = assert_exact(model, (text[:, :-1], text[:, 1:]))
    torch.testing.assert_close(parts["tokens.weight"], whole["tokens.weight"])


def test_gradients_that_no_op_covers_are_made_in_parts(monkeypatch):
    torch.manual_seed(0)
    forward, shape, size = USES["a weight that is also added"]
    model, batch = Both(forward, shape), (torch.randn(size), labels())
    whole = assert_exact(model, batch)
    monkeypatch.setattr(gradients, "CHUNK", 20)
    torch.testing.assert_close(assert_exact(model, batch)["weights.0"], whole["weights.0"])


class Positions(nn.Module):
    """Learned positions, as tables and parameters of several forms."""

    def __init__(self, forward, *parameters):
        super().__init__()
        self.first = nn.Linear(5, 4)
        self.tables = nn.ModuleList([nn.Embedding(*shape) for shape in parameters])
        self.head = nn.Linear(4, CLASSES)
        self._forward = forward

    def forward(self, x):
        return self.head(self._forward(self.first(x), *self.tables).sin().mean(1))


def relative(x, table):
    """A bias per distance on the attention scores, used by two layers."""
    distance = (torch.arange(6)[:, None] - torch.arange(6)[None, :] + 5).clamp(0, 10)
    bias = table(distance).permute(2, 0, 1).unsqueeze(0)
    for _ in range(2):
        scores = (x @ x.mT)[:, None] + bias
        x = x + (scores.softmax(-1) @ x[:, None]).mean(1)
    return x


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize(
    "forward, shapes",
    [
        (lambda x, table: x + table(torch.arange(6)), [(6, 4)]),
        (lambda x, table: x + table(torch.arange(6)[None]), [(8, 4)]),
        (lambda x, table: x + table(torch.arange(6) // 2), [(3, 4)]),
        (lambda x, table: x * table(torch.arange(6))[None], [(6, 4)]),
        (lambda x, a, b: x + (a(torch.arange(6) // 3) + b(torch.arange(6) % 3)), [(2, 4), (3, 4)]),
        (lambda x, table: x + F.linear(table(torch.arange(6)), torch.eye(4, dtype=x.dtype)), [(6, 4)]),
        (relative, [(11, 2)]),
    ],
    ids=["table", "one row", "repeated", "factors", "rows and columns", "mapped", "relative"],
)
def test_positions_that_all_samples_share(forward, shapes, power):
    torch.manual_seed(0)
    model = Positions(forward, *shapes)
    assert_exact(model, (torch.randn(N, 6, 5), labels()), power=power, tolerance=2e-5)


def normed(normalize):
    torch.manual_seed(0)
    model = Head(nn.Linear(5, 4), nn.Tanh(), normalize(nn.Linear(4, 4)), width=4)
    return model, (torch.randn(N, 5), labels())


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("kind", ["weight", "spectral", "orthogonal"])
def test_weights_that_are_functions_of_parameters(kind, power):
    normalize = {
        "weight": nn.utils.parametrizations.weight_norm,
        "spectral": nn.utils.parametrizations.spectral_norm,
        "orthogonal": nn.utils.parametrizations.orthogonal,
    }[kind]
    model, batch = normed(normalize)
    assert_exact(model, batch, power=power, fused=None)


def test_a_normalised_kernel_is_fused():
    torch.manual_seed(0)
    model = Head(nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 3)), width=4)
    assert_exact(model, (torch.randn(N, 2, 5, 5), labels()))


# Biases and factors that get dimensions of one entry from `expand`, which adds up nothing.
EXPANDED = {
    "bias": lambda model, x: model.layer(x) + model.w.expand(1, CLASSES),
    "factor": lambda model, x: model.layer(x) * model.w.expand(1, CLASSES),
    "twice": lambda model, x: model.layer(x) + model.w.expand(1, CLASSES).expand(len(x), CLASSES),
    "over the samples": lambda model, x: model.layer(x) + model.w.expand(len(x), CLASSES),
    "of a function": lambda model, x: model.layer(x) + (2 * model.w).exp().expand(1, CLASSES),
    "samples second": lambda model, x: (model.layer(x).unsqueeze(0) + model.w.expand(1, 1, CLASSES))[0],
}


class Expanded(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.layer, self.w, self.kind = nn.Linear(4, CLASSES), nn.Parameter(torch.randn(CLASSES)), kind

    def forward(self, x):
        return EXPANDED[self.kind](self, x)


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("kind", EXPANDED)
def test_what_is_expanded_by_dimensions_of_one_entry_is_fused(kind, power):
    torch.manual_seed(0)
    model = Expanded(kind)
    for n, size in ((6, None), (7, 3), (1, None)):  # one sample shows nothing of what lies along the samples
        assert_exact(model, (torch.randn(n, 4), labels(n)), power=power, size=size)


def test_a_gradient_that_no_axis_holds_the_samples_of_is_told_as_such():
    torch.manual_seed(0)
    model = Expanded("bias")
    model.w = nn.Parameter(torch.randn(1))
    found = assert_exact(model, (torch.randn(6, 4), labels(6)), fused=["layer.weight", "layer.bias"])
    assert found.coverage["w"].startswith("fallback: the first axis of [1, 3] does not hold 6 samples")
