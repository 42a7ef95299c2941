"""Samples that may influence each other, in some batches only or without a trace in autograd's graph."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_right
from test_engine_models import small
from torch import nn

import unlearn_ext as ux
from unlearn_ext.fisher.engine import coupling, per_sample, prepared
from unlearn_ext.fisher.engine.coupling import may_couple
from unlearn_ext.fisher.engine.sample_losses import PerSampleLoss, Samples

CLASSES, N, E = 3, 5, 4


class Model(nn.Module):
    """``forward(x)`` is a function of two layers and the batch."""

    def __init__(self, function):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(E, E), nn.Linear(E, E), nn.Linear(E, CLASSES)
        self.function = function

    def forward(self, x):
        return self.head(self.function(self, x))


def labels(n):
    return torch.randint(CLASSES, (n,))


def calm_then_not():
    """Nothing in the first batch is large; one entry of a sample in each later one is."""
    batches = []
    for index in range(3):
        x = torch.randn(N, E).clamp(-1, 1)
        if index:
            x[N - 1, 0] = 9.0
        batches.append((x, labels(N)))
    return batches


def growing():
    return [(torch.randn(N, E) * (20 if index else 1), labels(N)) for index in range(3)]


def gated(x, gate):
    return x * (1 + gate.to(x.dtype))


# What a batch decides, by something else than the operator that decides.
DECISIONS = {
    "mean": lambda x: x[:, 0].mean() > 1,
    "sum": lambda x: x.sum(0)[0] > 6,
    "standard deviation": lambda x: x.std(0, unbiased=False)[0] > 2,
    "norm": lambda x: x[:, 0].norm() > 5,
    "product": lambda x: x[:, 0].exp().prod() > 1e3,
    "logsumexp": lambda x: x.logsumexp(0)[0] > 6,
    "largest": lambda x: x.amax() > 3,
    "any": lambda x: (x > 3).any(),
    "count": lambda x: torch.count_nonzero(x > 3) > 0,
    "matrix product": lambda x: (x.new_ones(1, len(x)) @ x)[0, 0] > 6,
    "dot": lambda x: torch.dot(x[:, 0].contiguous(), x[:, 0].contiguous()) > 20,
    "einsum": lambda x: torch.einsum("ne->e", x)[0] > 6,
    "pooling": lambda x: F.max_pool1d(x.T[None], 3, 1, 1)[0].T[:, :1] > 6,
    "normalised over the batch": lambda x: F.layer_norm(x.T, (len(x),)).T[:, :1] > 1.9,
    "distances": lambda x: (torch.cdist(x, x) > 7).any(1, keepdim=True),
    "bag of all": lambda x: F.embedding_bag(torch.arange(len(x))[None], x, mode="max")[0, 0] > 3,
    "reversed": lambda x: x.flip(0)[:, :1] > 6,
    "neighbour": lambda x: x[(torch.arange(len(x)) + 1) % len(x)][:, :1] > 6,
    "the next one": lambda x: torch.cat([x[1:], x[:1] * 0])[:, :1] > 6,
    "python": lambda x: torch.tensor(sum(x[:, 0].tolist()) > 6),
    "numpy": lambda x: torch.tensor(bool(x[:, 0].numpy().max() > 6)),
    "a shape": lambda x: torch.tensor(x[x > 3].numel() > 0),
}


@pytest.mark.usefixtures("no_certificates")
@pytest.mark.parametrize("kind", DECISIONS)
def test_decisions_of_the_batch_that_only_later_batches_show(kind):
    torch.manual_seed(0)
    model = Model(lambda self, x: gated(self.a(x), DECISIONS[kind](x)))
    batches = calm_then_not()
    with pytest.warns(UserWarning, match="samples influence each other"):
        assert_right(model, batches)
    # Also where the trust of the first pass is remembered, and the other way round.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_right(model, batches[::-1])


# What passes between samples only where it is large enough.
PATHS = {
    "flip": lambda h: h.flip(0),
    "roll": lambda h: h.roll(1, 0),
    "softmax": lambda h: h * h[:, :1].softmax(0),
    "cumsum": lambda h: h.cumsum(0),
    "convolution": lambda h: F.conv1d(h.T[None], h.new_ones(E, 1, 3), padding=1, groups=E)[0].T,
    "gram": lambda h: (h @ h.mT).triu(1).sum(1, keepdim=True) / 8,
}


@pytest.mark.usefixtures("no_certificates")
@pytest.mark.filterwarnings("ignore:fisher_diagonal")
@pytest.mark.parametrize("kind", PATHS)
def test_paths_between_samples_that_are_dead_at_first(kind):
    torch.manual_seed(0)

    def function(self, x):
        h = self.a(x)
        return h + (PATHS[kind](h) - 5).relu()

    model, batches = Model(function), growing()
    assert_right(model, batches)
    assert_right(model, batches)


@pytest.mark.usefixtures("no_certificates")
@pytest.mark.filterwarnings("ignore:fisher_diagonal")
def test_a_path_without_a_trace_in_the_values_that_opens_later():
    def function(self, x):
        h = self.a(x).tanh()
        other = h.flip(0)
        return h + (x.amax() > 3).to(h.dtype) * (other - other.detach())

    torch.manual_seed(0)
    assert_right(Model(function), calm_then_not())


POSITIONS = {
    "the first samples": lambda self, x: torch.cat([self.a(x[:4]), self.b(x[4:])]),
    "every other one": lambda self, x: gated(self.a(x), torch.arange(len(x))[:, None] % 2 * 1e-3),
    "all but three": lambda self, x: gated(self.a(x), torch.arange(len(x))[:, None] >= 3),
    "the last one": lambda self, x: self.a(torch.cat([x[:-1], x[-1:] + 0.3 * x[:-1].sum(0)])),
    "a weight for each": lambda self, x: (
        self.a(x) + self.b.weight[:1].expand(8, E)[: len(x)] * torch.arange(len(x))[:, None]
    ),
}


@pytest.mark.usefixtures("no_certificates")
@pytest.mark.filterwarnings("ignore:fisher_diagonal")
@pytest.mark.parametrize("kind", POSITIONS)
def test_samples_whose_place_in_the_batch_matters(kind):
    torch.manual_seed(0)
    batches = [(torch.randn(n, E), labels(n)) for n in (3, 4, 6, 5)]
    assert_right(Model(POSITIONS[kind]), batches)


@pytest.mark.usefixtures("no_certificates")
@pytest.mark.parametrize("classes", [2, 3])
def test_equal_samples_that_share_a_row(classes):
    """A row stands for several samples: their codes' mean is no other sample's code."""

    class Distinct(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(E, 4), nn.Linear(4, classes)
            if classes == 2:  # with other labels, the gradients cancel
                nn.init.zeros_(self.head.weight)
                nn.init.zeros_(self.head.bias)

        def forward(self, x):
            rows, where = torch.unique(x, dim=0, return_inverse=True)
            return self.head(self.first(rows).tanh())[where]

    for seed in range(4):
        torch.manual_seed(seed)
        batches = [(torch.randn(6, E), torch.randint(classes, (6,))) for _ in range(3)]
        for x, y in batches[1:]:
            x[1], x[4], x[5] = x[0], x[3], x[3]
            y[0], y[1] = 0, 1 if classes == 2 else 0
        assert_right(Distinct(), batches[::-1])


# Models whose samples are apart, so that nothing has to be run on its own ---------------------------------


def watched(model, batch, loss_fn=ux.losses.cross_entropy):
    model.eval()
    with prepared(model):
        return may_couple(PerSampleLoss(model, loss_fn), Samples(batch, len(batch[0])))


@pytest.mark.parametrize("name", ["mlp", "cnn", "resnet18", "vit", "gpt"])
def test_samples_of_usual_models_are_seen_to_be_apart(name):
    assert not watched(*small(name))


def layers():
    image = (N, 2, 9, 9)
    yield image, [nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.MaxPool2d(2), nn.Flatten()]
    yield image, [nn.Conv2d(2, 4, 3, padding="same"), nn.GroupNorm(2, 4), nn.Upsample(scale_factor=2)]
    yield image, [nn.ConvTranspose2d(2, 4, 3), nn.Hardswish(), nn.PixelShuffle(2), nn.ReflectionPad2d(1)]
    yield (N, 2, 6, 6, 6), [nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4), nn.PReLU(), nn.MaxPool3d(2)]
    yield (N, E, 8), [nn.Conv1d(E, 4, 3), nn.BatchNorm1d(4), nn.AvgPool1d(2), nn.GLU(1), nn.LogSoftmax(1)]
    yield (N, N, E), [nn.TransformerEncoderLayer(E, 2, 8, batch_first=True), nn.RMSNorm(E)]


@pytest.mark.parametrize("size, modules", list(layers()))
def test_samples_of_usual_layers_are_seen_to_be_apart(size, modules):
    torch.manual_seed(0)
    model = nn.Sequential(*modules)

    def loss_fn(model, batch):
        return model(batch[0]).flatten(1).sin().sum(1)

    assert not watched(model, (torch.randn(size),), loss_fn)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
@pytest.mark.parametrize("batch_first", [False, True])
def test_samples_of_recurrent_layers_are_seen_to_be_apart(kind, batch_first):
    torch.manual_seed(0)
    model = kind(E, 3, 2, bidirectional=True, batch_first=batch_first)

    def loss_fn(model, batch):
        x = batch[0] if batch_first else batch[0].transpose(0, 1)
        return model(x)[0].sum(1 if batch_first else 0).sum(1)

    assert not watched(model, (torch.randn(N, N, E),), loss_fn)


def test_lookups_and_own_rows_are_seen_to_be_apart():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.bag, self.head = nn.Embedding(9, E), nn.EmbeddingBag(9, E), nn.Linear(E, CLASSES)

        def forward(self, tokens):
            last = (tokens > 0).sum(1).clamp(min=1) - 1
            own = self.table(tokens)[torch.arange(len(tokens)), last]
            hot = F.one_hot(tokens[:, 0], E + 5)[:, :E]
            return self.head(own + self.bag(tokens) + hot + tokens.new_zeros(len(tokens), 1))

    assert not watched(Last(), (torch.randint(9, (N, 6)), labels(N)))


def test_a_new_size_of_a_batch_is_watched_again(monkeypatch):
    sizes = []
    real = per_sample.Watch

    def counted(batch, n, **settings):
        sizes.append(n)
        return real(batch, n, **settings)

    monkeypatch.setattr(per_sample, "Watch", counted)
    monkeypatch.setattr(coupling, "Watch", counted)
    torch.manual_seed(0)
    model = Model(lambda self, x: self.a(x))
    ux.fisher_diagonal(model, [(torch.randn(n, E), labels(n)) for n in (4, 4, 6, 4, 6, 3)])
    assert sizes == [4, 6, 3]


def test_a_model_that_cannot_be_watched_runs_as_it_is():
    class Shy(nn.Linear):
        def forward(self, x):
            if torch.overrides._get_current_function_mode_stack():
                raise RuntimeError("not while somebody looks")
            return super().forward(x)

    torch.manual_seed(0)
    assert_right(Shy(E, CLASSES), [(torch.randn(4, E), labels(4)) for _ in range(2)], fused=True)


class RoundsByOrder(nn.Module):
    """Rounds otherwise in channels-last order, as other kernels do."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 2)
        self.orders = []

    def forward(self, x):
        is_last = x.is_contiguous(memory_format=torch.channels_last) and len(x) > 1
        self.orders.append((len(x), is_last))
        return self.head(self.conv(x).mean((2, 3))) * (1 + 1e-4 * is_last)


def test_other_rounding_in_another_order_of_memory_is_no_influence(monkeypatch, recwarn):
    monkeypatch.setattr(per_sample.PerSample, "_is_alike_formatted", lambda *_: True)
    draws = torch.Generator().manual_seed(0)
    data = [(torch.randn(6, 3, 5, 5, generator=draws), torch.tensor([0, 1] * 3)) for _ in range(3)]
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        model = RoundsByOrder()
    found = ux.fisher_diagonal(model, data)
    assert (6, True) in model.orders
    assert set(found.coverage.values()) == {"fused"}
    assert not recwarn.list
