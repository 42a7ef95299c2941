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
from unlearn_ext.fisher.engine.axis_rules import rule_for
from unlearn_ext.fisher.engine.coupling import may_couple
from unlearn_ext.fisher.engine.sample_axis import Operation, SampleAxis
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
            first = self.table.weight.index_select(0, tokens[:, 0])
            return self.head(own + first + self.bag(tokens) + hot + tokens.new_zeros(len(tokens), 1))

    assert not watched(Last(), (torch.randint(9, (N, 6)), labels(N)))


def put(x, where):
    x = x.clone()
    x[where] = 0.0
    return x


def square(x):
    return x @ x.mT + torch.eye(x.shape[1])


# x is [N, 3, E] and depends on parameters.
APART = {
    "matrices, several results": lambda x: torch.linalg.slogdet(square(x))[1],
    "matrices, one result": lambda x: torch.linalg.matrix_exp(square(x) / 9),
    "products of matrices": lambda x: torch.bmm(x, x.mT),
    "values written under a mask": lambda x: put(x, x > 1),
    "rows written under a mask": lambda x: put(x, x[:, :, 0] > 1),
    "every sample's own row": lambda x: x[torch.arange(N), (x.sum((1, 2)) > 0).long()],
    "the same row of all": lambda x: x[torch.arange(N), torch.tensor([2]).expand(N)],
    "padded within": lambda x: F.pad(x, (1, 1, 2, 0)),
    "padded before the samples": lambda x: F.pad(x.transpose(0, 1), (0, 0, 0, 0, 1, 0)).transpose(0, 1),
    "a sample as a channel": lambda x: F.batch_norm(x.transpose(0, 1), None, None, training=True).transpose(
        0, 1
    ),
    "positions, and what differs by position": lambda x: (
        (x.transpose(0, 1).flatten(0, 1) * torch.arange(3).repeat_interleave(N)[:, None])
        .unflatten(0, (3, N))
        .transpose(0, 1)
    ),
}
MIXED = {
    "a row by the place in the batch": lambda x: x[torch.arange(N), torch.arange(N) % 3],
    "padded between the samples": lambda x: F.pad(x, (0, 0, 0, 0, 1, -1)),
    "positions, and what differs by place": lambda x: (
        (x.transpose(0, 1).flatten(0, 1) * torch.arange(3 * N)[:, None]).unflatten(0, (3, N)).transpose(0, 1)
    ),
}


@pytest.mark.parametrize("kind", [*APART, *MIXED])
def test_operators_keep_samples_apart_or_are_seen_to_mix_them(kind):
    torch.manual_seed(0)
    model = nn.Linear(E, E)

    def loss_fn(model, batch):
        return (APART | MIXED)[kind](model(batch[0])).reshape(N, -1).sin().sum(1)

    assert bool(watched(model, (torch.randn(N, 3, E),), loss_fn)) == (kind in MIXED)


BAGS = {
    "of a sample each": (lambda table, tokens: F.embedding_bag(tokens, table), False),
    "over the samples": (lambda table, tokens: F.embedding_bag(tokens.T.contiguous(), table), True),
    "by what is frequent": (
        lambda table, tokens: F.embedding_bag(tokens, table, scale_grad_by_freq=True, mode="sum"),
        True,
    ),
}


@pytest.mark.parametrize("kind", BAGS)
def test_bags_that_hold_tokens_of_several_samples_are_seen_to_mix_them(kind):
    torch.manual_seed(0)
    function, is_mixed = BAGS[kind]

    def loss_fn(model, batch):
        return function(model.weight, batch[0]).sin().sum(1)

    assert bool(watched(nn.Embedding(9, E), (torch.randint(9, (N, N)),), loss_fn)) == is_mixed


def test_what_attention_returns_beside_its_output_belongs_to_no_sample():
    """Kernels for GPUs return a seed and an offset, which have no axes."""
    q = torch.randn(N, 2, 3, E)
    at = SampleAxis(0)
    results = [q, q[..., 0], torch.tensor(7), torch.tensor(0)]
    named = {"query": q, "key": q, "value": q}
    call = Operation("_scaled_dot_product_efficient_attention", named, results, N, {id(q): at})
    assert rule_for(call.name, ())(call) == [at, at, None, None]


@pytest.mark.parametrize("target", ["own", "same for all", "of a place in the batch", "of another sample"])
def test_a_loss_by_labels_is_seen_apart_where_the_label_goes_with_the_sample(target):
    places = torch.arange(N) % CLASSES

    def loss_fn(model, batch):
        x, y = batch
        labels = {
            "own": lambda: y,
            "same for all": lambda: places[:1].expand(len(x)),
            "of a place in the batch": lambda: places[: len(x)],
            "of another sample": lambda: y.flip(0),
        }[target]()
        return F.nll_loss(model(x).log_softmax(1), labels, reduction="none")

    found = watched(nn.Linear(E, CLASSES), (torch.randn(N, E), labels(N)), loss_fn)
    assert bool(found) == (target in ("of a place in the batch", "of another sample"))


@pytest.mark.parametrize("kind", ["one_hot", "bag"])
def test_what_comes_behind_a_lookup_is_watched_as_well(kind):
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.bag, self.head = nn.EmbeddingBag(9, E), nn.Linear(E, CLASSES)

        def forward(self, tokens):
            found = F.one_hot(tokens[:, 0], 9)[:, :E].float() if kind == "one_hot" else self.bag(tokens)
            return self.head(found - found.mean(0))

    assert watched(Centred(), (torch.randint(9, (N, 6)), labels(N)))


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


@pytest.mark.parametrize("which", ["largest", "smallest"])
def test_gradients_that_a_sample_has_in_company_alone_are_found_out(which):
    """Its loss is the same on its own, but without a graph."""
    torch.manual_seed(0)
    model, (x, y) = nn.Linear(E, CLASSES), (torch.randn(6, E), labels(6))
    with torch.no_grad():
        values = F.cross_entropy(model(x), y, reduction="none").sort().values
    limit = float(values[2:4].mean())

    def loss_fn(model, batch):
        losses = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
        is_left_out = losses > limit if which == "largest" else losses < limit
        return losses.detach() if bool(is_left_out.all()) else losses

    found = ux.fisher_diagonal(model, [(x, y)], loss_fn=loss_fn)
    expected = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for sample in range(6):
        loss = loss_fn(model, (x[sample : sample + 1], y[sample : sample + 1])).sum()
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, list(model.parameters()))
            for total, grad in zip(expected.values(), grads, strict=True):
                total += grad.square() / 6
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value)


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
    assert not [entry for entry in recwarn.list if not issubclass(entry.category, ResourceWarning)]


def test_questions_about_masks_are_trusted_where_transformers_asks_them():
    """A function of the user's with the same name may do anything."""

    def _ignore_causal_mask_sdpa(x):
        return bool((x[:, 0] > 5).any())

    def function(model, x):
        return model.a(x) if _ignore_causal_mask_sdpa(x) else model.b(x)

    torch.manual_seed(0)
    model, batches = Model(function), calm_then_not()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert_right(model, batches)
    loss = PerSampleLoss(model, ux.losses.cross_entropy)
    with prepared(model):
        assert may_couple(loss, Samples(batches[0], N))
