"""Exactness of the per-sample engine on single layers, in all their settings."""

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact
from torch import nn

from unlearn_ext import fisher_diagonal

N, CLASSES = 6, 3


class Head(nn.Module):
    """Some layers, then a linear one on the mean over positions: channels second, or last if ``last``."""

    def __init__(self, *layers, width, last=False):
        super().__init__()
        self.body, self.head, self.last = nn.Sequential(*layers), nn.Linear(width, CLASSES), last

    def forward(self, x):
        x = self.body(x).sin()
        if self.last:
            x = x.movedim(-1, 1)
        return self.head(x.flatten(2).mean(2) if x.ndim > 2 else x)


def labels(n=N):
    return torch.randint(CLASSES, (n,))


def conv(dims, *arguments, transposed=False, **settings):
    kind = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    if transposed:
        kind = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
    return kind[dims](*arguments, **settings)


CONVOLUTIONS = {
    "1d": (1, {}, (11,)),
    "2d": (2, {}, (7, 6)),
    "3d": (3, {}, (5, 4, 6)),
    "stride": (2, {"stride": (2, 3)}, (9, 8)),
    "padding": (2, {"padding": (2, 1)}, (5, 4)),
    "dilation": (2, {"dilation": (1, 2), "padding": 2}, (7, 8)),
    "groups": (2, {"groups": 2, "padding": 1}, (5, 5)),
    "depthwise": (1, {"groups": 4, "padding": 1}, (8,)),
    "same": (2, {"padding": "same", "dilation": 2}, (6, 7)),
    "circular": (2, {"padding": 1, "padding_mode": "circular"}, (5, 6)),
    "reflect": (1, {"padding": 2, "padding_mode": "reflect"}, (6,)),
    "replicate": (3, {"padding": 1, "padding_mode": "replicate"}, (4, 3, 3)),
    "transposed": (2, {"transposed": True}, (4, 5)),
    "transposed stride": (2, {"transposed": True, "stride": 2, "padding": 1}, (4, 5)),
    "transposed output padding": (
        1,
        {"transposed": True, "stride": 3, "padding": 1, "output_padding": 2, "groups": 2},
        (5,),
    ),
    "transposed wide output padding": (
        2,
        {"transposed": True, "stride": 1, "dilation": 3, "padding": 1, "output_padding": 2},
        (5, 4),
    ),
    "transposed 3d": (3, {"transposed": True, "stride": (1, 2, 2), "dilation": (2, 1, 1)}, (3, 3, 2)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions(name, bias):
    torch.manual_seed(0)
    dims, settings, size = CONVOLUTIONS[name]
    width = 8
    model = Head(
        conv(dims, 4, width, 3, bias=bias, **settings),
        nn.Tanh(),
        conv(dims, width, width, 1),
        width=width,
    )
    assert_exact(model, (torch.randn(N, 4, *size), labels()))


@pytest.mark.filterwarnings("ignore:.*even kernel lengths")  # torch says so once per process
def test_a_convolution_with_an_even_kernel_pads_one_side_more():
    torch.manual_seed(0)
    model = Head(nn.Conv2d(2, 4, (4, 3), padding="same"), width=4)
    assert_exact(model, (torch.randn(N, 2, 6, 5), labels()))


def with_statistics(norm):
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    return norm


NORMS = {
    "layer": (lambda: nn.LayerNorm(6), (5, 6), True),
    "layer, two axes": (lambda: nn.LayerNorm((4, 6)), (3, 4, 6), True),
    "layer, no positions": (lambda: nn.LayerNorm(6), (6,), True),
    "rms": (lambda: nn.RMSNorm(6), (5, 6), True),
    "group": (lambda: nn.GroupNorm(2, 6), (6, 4, 3), False),
    "batch 1d": (lambda: with_statistics(nn.BatchNorm1d(6)), (6,), False),
    "batch 1d, positions": (lambda: with_statistics(nn.BatchNorm1d(6)), (6, 4), False),
    "batch 2d": (lambda: with_statistics(nn.BatchNorm2d(6)), (6, 4, 3), False),
    "batch 3d": (lambda: with_statistics(nn.BatchNorm3d(6)), (6, 2, 4, 3), False),
    "instance 1d": (lambda: nn.InstanceNorm1d(6, affine=True), (6, 5), False),
    "instance 2d": (lambda: nn.InstanceNorm2d(6, affine=True), (6, 4, 3), False),
    "instance, statistics": (
        lambda: with_statistics(nn.InstanceNorm2d(6, affine=True, track_running_stats=True)),
        (6, 4, 3),
        False,
    ),
    "prelu": (lambda: nn.PReLU(), (6, 4), False),
    "prelu, channels": (lambda: nn.PReLU(6), (6, 4, 3), False),
}


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("name", NORMS)
def test_norms_and_other_scales(name, power):
    torch.manual_seed(0)
    build, size, last = NORMS[name]
    norm = build()
    for parameter in norm.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5)
    assert_exact(Head(norm, width=6, last=last), (torch.randn(N, *size), labels()), power=power)


class Lookup(nn.Module):
    def __init__(self, **settings):
        super().__init__()
        self.table = nn.Embedding(7, 4, **settings)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, tokens):
        return self.head(self.table(tokens).flatten(1, -2).sin().sum(1))


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize(
    "settings", [{}, {"padding_idx": 0}, {"sparse": True}], ids=["plain", "padding", "sparse"]
)
def test_lookups_with_repeated_indices(settings, power):
    torch.manual_seed(0)
    tokens = torch.randint(7, (N, 3, 4))
    dense = {key: value for key, value in settings.items() if key != "sparse"}
    model = Lookup(**dense)
    batch = (tokens, labels())
    found = assert_exact(model, batch, power=power)
    model.table.sparse = "sparse" in settings
    assert torch.equal(found["table.weight"], fisher_diagonal(model, [batch], power=power)["table.weight"])


def test_a_table_scaled_by_frequency_falls_back():
    torch.manual_seed(0)
    tokens = torch.randint(7, (N, 4))
    assert_exact(Lookup(scale_grad_by_freq=True), (tokens, labels()), fused=["head.weight", "head.bias"])


def test_a_bag_scaled_by_frequency_falls_back_and_says_why():
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(7, 5, mode="sum", scale_grad_by_freq=True), nn.Linear(5, 3))
    batch = (torch.randint(7, (N, 4)), labels())
    found = assert_exact(model, batch, fused=["1.weight", "1.bias"])
    assert "scale_grad_by_freq counts over the batch" in found.coverage["0.weight"]


class Functional(nn.Module):
    """Weights without a layer, in the forms in which matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.right = nn.Parameter(torch.randn(5, 6) / 2)
        self.left = nn.Parameter(torch.randn(4, 6) / 2)
        self.bias = nn.Parameter(torch.randn(6))
        self.column = nn.Parameter(torch.randn(4, 1))
        self.scale = nn.Parameter(torch.randn(()))
        self.table = nn.Parameter(torch.randn(CLASSES, 4))

    def forward(self, x):
        x = torch.addmm(self.bias, x, self.right, alpha=0.5, beta=2.0).tanh()
        x = (self.left @ x.T + self.column).T.sin()
        x = 1.5 - (x - self.column[:, 0]) * self.scale
        return F.linear(x, self.table)


@pytest.mark.parametrize("power", [2, 1])
def test_weights_of_no_layer(power):
    torch.manual_seed(0)
    model = Functional()
    found = assert_exact(model, (torch.randn(N, 5), labels()), power=power, fused=None)
    assert {name for name, how in found.coverage.items() if how != "fused"} <= {"column"}


class Conv1D(nn.Module):
    """A linear layer with its weight the other way round."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(inputs, outputs) / inputs)
        self.bias = nn.Parameter(torch.randn(outputs))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], -1)


class LlamaNorm(nn.Module):
    """A norm that computes in float32."""

    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(width) + 0.5)

    def forward(self, x):
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class LayerScale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.gamma = nn.Parameter(torch.rand(width))

    def forward(self, x):
        return x + self.gamma * x.tanh()


def test_layers_of_well_known_transformers():
    torch.manual_seed(0)
    model = Head(Conv1D(5, 6), LlamaNorm(6), LayerScale(6), Conv1D(6, 4), width=4, last=True)
    assert_exact(model, (torch.randn(N, 7, 5), labels()))


class Recurrent(nn.Module):
    def __init__(self, kind, **settings):
        super().__init__()
        self.rnn = kind(5, 4, **settings)
        self.head = nn.Linear(4 * (1 + self.rnn.bidirectional), CLASSES)

    def forward(self, x):
        outputs = self.rnn(x if self.rnn.batch_first else x.transpose(0, 1))[0]
        return self.head(outputs.select(1 if self.rnn.batch_first else 0, -1))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind, batch_first):
    torch.manual_seed(0)
    model = Recurrent(kind, num_layers=2, bidirectional=True, batch_first=batch_first)
    assert_exact(model, (torch.randn(N, 3, 5), labels()))


def test_a_recurrent_layer_runs_plainly_only_inside():
    model = Recurrent(nn.LSTM, batch_first=True)
    before = torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled
    assert_exact(model, (torch.randn(N, 3, 5), labels()))
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == before
    with pytest.raises(RuntimeError):
        assert_exact(model, (torch.randn(N, 3, 4), labels()))
    assert (torch.backends.mkldnn.enabled, torch.backends.cudnn.enabled) == before
    assert not model.rnn._forward_hooks
    assert not model.rnn._forward_pre_hooks


class Encoder(nn.Module):
    def __init__(self, batch_first, **settings):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=batch_first, **settings)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head, self.batch_first = nn.Linear(8, CLASSES), batch_first

    def forward(self, x):
        x = self.layers(x if self.batch_first else x.transpose(0, 1))
        return self.head(x[:, 0] if self.batch_first else x[0])


@pytest.mark.parametrize("length", [5, N])
@pytest.mark.parametrize("batch_first", [True, False])
def test_attention_with_packed_projections(batch_first, length):
    """Also with as many positions as samples, where the axes look the same."""
    torch.manual_seed(0)
    assert_exact(Encoder(batch_first, norm_first=True), (torch.randn(N, length, 8), labels()), tolerance=2e-5)


class CrossAttention(nn.Module):
    """Queries through one part of the packed projection, keys and values through the other."""

    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, bias=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        return self.head(self.attention(x[:, :2], x, x, need_weights=False)[0].mean(1))


@pytest.mark.parametrize("power", [2, 1])
def test_parts_of_a_weight_are_used_apart(power):
    torch.manual_seed(0)
    assert_exact(CrossAttention(), (torch.randn(N, 5, 8), labels()), power=power)


class Bilinear(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.mix, self.head = nn.Linear(4, 5), nn.Bilinear(5, 4, 6), nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.mix(self.body(x).sin(), x))


def test_what_has_no_rule_falls_back_alone_and_says_why():
    torch.manual_seed(0)
    found = assert_exact(
        Bilinear(),
        (torch.randn(N, 4), labels()),
        fused=["body.weight", "body.bias", "mix.bias", "head.weight", "head.bias"],
    )
    assert found.coverage["mix.weight"].startswith("fallback: no rule for ")
    assert found.coverage["mix.weight"].endswith("; vmap")
