"""Cases aimed at the proof: every assumption of the engine (README.md beside it) with what violates it."""

import threading

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact, errors, one_by_one
from torch import nn
from torch.nn.utils import rnn as packing

import unlearn_ext as ux
from unlearn_ext import fisher_diagonal
from unlearn_ext.fisher.engine import PerSample, per_sample

CLASSES = 3


def picked(batch, sample):
    """A batch of one sample; every tensor holds the samples along its first dimension."""
    return tuple(tensor[sample : sample + 1] for tensor in batch)


def expected_of(model, batches, loss_fn=ux.losses.cross_entropy, power=2):
    parts = [(len(b[0]), one_by_one(model, b, loss_fn, power)) for b in batches]
    total = sum(n for n, _ in parts)
    return {name: sum(n * part[name] for n, part in parts) / total for name in parts[0][1]}


def assert_right(model, batches, *, tolerance=1e-5, fused=None, loss_fn=ux.losses.cross_entropy, power=2):
    expected = expected_of(model, batches, loss_fn, power)
    found = fisher_diagonal(model, batches, loss_fn=loss_fn, power=power)
    wrong = {
        k: (e, found.coverage[k]) for k, e in errors(found, expected, power).items() if not e <= tolerance
    }
    assert not wrong
    if fused is not None:
        assert {k for k, how in found.coverage.items() if how == "fused"} == (
            set(expected) if fused is True else set(fused)
        ), found.coverage
    return found


def labels(n):
    return torch.randint(CLASSES, (n,))


# Rows per sample that differ between batches -------------------------------------------------------------


class Packed(nn.Module):
    def __init__(self, kind, *, is_sorted=True, last=False):
        super().__init__()
        self.rnn, self.head = kind(4, 5), nn.Linear(5, CLASSES)
        self.is_sorted, self.last = is_sorted, last

    def forward(self, given):
        x, lengths = given[..., :-1], given[:, 0, -1].long()
        packed = packing.pack_padded_sequence(
            x, lengths.tolist(), batch_first=True, enforce_sorted=self.is_sorted
        )
        out, state = self.rnn(packed)
        if self.last:
            state = state[0] if isinstance(state, tuple) else state
            return self.head(state[-1])
        return self.head(packing.pad_packed_sequence(out, batch_first=True)[0].sum(1))


def sequences(*lengths):
    x = torch.randn(len(lengths), max(lengths), 5)
    x[..., -1] = torch.tensor(lengths, dtype=x.dtype)[:, None]
    return x, labels(len(lengths))


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_packed_sequences_of_other_lengths(kind, last, power):
    torch.manual_seed(0)
    batches = [sequences(8, 8), sequences(7, 1), sequences(4, 3), sequences(5, 5)]
    assert_right(Packed(kind, last=last), batches, power=power, fused=True)


def test_packed_sequences_in_any_order():
    torch.manual_seed(0)
    batches = [sequences(3, 3, 3), sequences(2, 6, 1), sequences(1, 1, 7)]
    assert_right(Packed(nn.LSTM, is_sorted=False), batches, fused=True)


class Selected(nn.Module):
    """Layers on the tokens that a mask keeps; their sums per sample are the features."""

    def __init__(self, how):
        super().__init__()
        self.table, self.mix, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)
        self.norm, self.how = nn.LayerNorm(4), how

    def forward(self, tokens):
        n = len(tokens)
        mask = tokens > 0
        rows = self.norm(self.mix(self.table(tokens[mask]))).tanh()
        owners = torch.arange(n)[:, None].expand_as(tokens)[mask]
        if self.how == "index_add":
            sums = rows.new_zeros(n, 4).index_add(0, owners, rows)
        elif self.how == "scatter":
            sums = rows.new_zeros(n, 4).scatter_add(0, owners[:, None].expand_as(rows), rows)
        elif self.how == "split":
            sums = torch.stack([part.sum(0) for part in rows.split(mask.sum(1).tolist())])
        elif self.how == "slices":
            ends = mask.sum(1).cumsum(0).tolist()
            starts = [0, *ends[:-1]]
            sums = torch.stack([rows[a:b].sum(0) for a, b in zip(starts, ends, strict=True)])
        elif self.how == "padded":
            whole = rows.new_zeros(*tokens.shape, 4)
            whole[mask] = rows
            sums = whole.sum(1)
        elif self.how == "product":
            sums = (owners == torch.arange(n)[:, None]).to(rows.dtype) @ rows
        elif self.how == "masks":
            sums = ((owners == torch.arange(n)[:, None]).to(rows.dtype)[..., None] * rows).sum(1)
        elif self.how == "where":
            sums = torch.where((owners == torch.arange(n)[:, None])[..., None], rows, 0).sum(1)
        return self.head(sums)


def tokens(*counts):
    x = torch.zeros(len(counts), 6, dtype=torch.long)
    for row, count in zip(x, counts, strict=True):
        row[torch.randperm(6)[:count]] = torch.randint(1, 9, (count,))
    return x, labels(len(counts))


WAYS = ["index_add", "scatter", "split", "slices", "padded", "product", "masks", "where"]


@pytest.mark.parametrize("how", WAYS)
def test_tokens_that_a_mask_selects(how):
    torch.manual_seed(0)
    batches = [tokens(4, 4, 4), tokens(6, 1, 2), tokens(1, 2, 6), tokens(3, 3, 3), tokens(5, 6, 1)]
    assert_right(Selected(how), batches, fused=True)


class Experts(nn.Module):
    """A switch: every token goes to one expert, perhaps only if that has room."""

    def __init__(self, capacity=None):
        super().__init__()
        self.router, self.head = nn.Linear(4, 3), nn.Linear(4, CLASSES)
        self.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.capacity = capacity

    def forward(self, x):
        rows = x.flatten(0, 1)
        gates = self.router(rows).softmax(-1)
        gate, chosen = gates.max(-1)
        out = torch.zeros_like(rows)
        for number, expert in enumerate(self.experts):
            index = (chosen == number).nonzero().squeeze(1)[: self.capacity]
            out = out.index_add(0, index, expert(rows[index]).tanh())
        return self.head((out * gate[:, None]).view(x.shape).sum(1))


def test_switched_experts():
    torch.manual_seed(0)
    batches = [(torch.randn(n, 4, 4), labels(n)) for n in (4, 4, 3, 4)]
    assert_right(Experts(), batches, fused=True)


def test_a_capacity_that_is_exceeded_only_later():
    torch.manual_seed(0)
    model = Experts(capacity=5)
    few = torch.randn(4, 1, 4)
    many = torch.randn(4, 6, 4)
    batches = [(few, labels(4)), (many, labels(4)), (few + 0.1, labels(4))]
    with pytest.warns(UserWarning, match="samples influence each other"):
        assert_right(model, batches)


class Crops(nn.Module):
    """Cuts as many windows out of an image as its first pixel says."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 2), nn.Linear(4, CLASSES)

    def forward(self, x):
        crops, owners = [], []
        for number, image in enumerate(x):
            for start in range(int(image[0, 0, 0])):
                crops.append(image[:, start : start + 3, start : start + 3])
                owners.append(number)
        features = self.conv(torch.stack(crops)).tanh().mean((2, 3))
        return self.head(features.new_zeros(len(x), 4).index_add(0, torch.tensor(owners), features))


def test_crops():
    torch.manual_seed(0)

    def images(*counts):
        x = torch.randn(len(counts), 1, 7, 7)
        x[:, 0, 0, 0] = torch.tensor(counts, dtype=x.dtype)
        return x, labels(len(counts))

    assert_right(Crops(), [images(2, 2), images(3, 1), images(1, 3), images(4, 2)], fused=True)


def test_samples_sorted_by_a_key_with_ties():
    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

        def forward(self, x):
            order = x[:, :, 0].flatten().argsort(stable=True)
            rows = self.first(x.flatten(0, 1)[order]).tanh()
            back = torch.empty_like(rows).index_copy(0, order, rows)
            return self.head(back.view(*x.shape[:2], -1).sum(1))

    torch.manual_seed(0)
    batches = [(torch.randn(4, 3, 4).round(), labels(4)) for _ in range(3)]
    batches[0][0][:, :, 0] = 0  # all the same: nothing moves in the first batch
    assert_right(Sorted(), batches, fused=True)


def test_columns_that_data_select_are_not_mistaken_for_rows():
    class Columns(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 5), nn.Linear(2, CLASSES)

        def forward(self, x):
            y = self.first(x)
            return self.head(torch.cat([y.topk(1, 1)[0], y.gather(1, x[:, :1].gt(0).long())], 1))

    torch.manual_seed(0)
    batches = [(torch.randn(4, 4), labels(4)) for _ in range(3)]
    assert_right(Columns(), batches, fused=True)


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


# What is not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", range(6))
def test_a_loss_that_is_not_a_number(where):
    torch.manual_seed(0)
    model = nn.Linear(4, CLASSES)
    x, y = torch.randn(6, 4), labels(6)
    y[:2] = -100
    x[where] = torch.nan
    if where < 2:
        y[where] = 0
    with pytest.raises(FloatingPointError, match="batch 1"):
        fisher_diagonal(model, [(torch.randn(2, 4), labels(2)), (x, y)])
    with pytest.raises(FloatingPointError, match="batch 0"):
        fisher_diagonal(model, [(x, y)])


def test_a_gradient_that_is_not_a_number():
    torch.manual_seed(0)
    model = nn.Linear(4, CLASSES)

    def loss_fn(model, batch):
        return model(batch[0]).sum(1).mul(0).abs().sqrt()

    with pytest.raises(FloatingPointError, match="importances must be finite"):
        fisher_diagonal(model, [(torch.randn(2, 4), labels(2))], loss_fn=loss_fn)


# The model's own state -----------------------------------------------------------------------------------


def test_an_embedding_with_a_largest_norm_keeps_its_weights():
    class Short(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.head(self.table(x).sum(1))

    torch.manual_seed(0)
    model = Short()
    before = model.table.weight.detach().clone()
    batches = [(torch.randint(9, (4, 3)), labels(4)) for _ in range(2)]
    assert_right(model, batches, fused=True)
    assert torch.equal(model.table.weight, before)


def test_buffers_that_a_forward_pass_registers_are_dropped():
    class Registering(nn.Linear):
        def forward(self, x):
            self.register_buffer("seen", x.detach().clone(), persistent=False)
            return super().forward(x)

    torch.manual_seed(0)
    model = Registering(4, CLASSES)
    assert_right(model, [(torch.randn(4, 4), labels(4))], fused=True)
    assert not dict(model.named_buffers())


def test_a_model_that_writes_to_its_parameters_is_refused():
    class Writing(nn.Linear):
        def forward(self, x):
            y = super().forward(x.clone())
            with torch.no_grad():
                self.bias.add_(0)
            return y

    with pytest.raises(RuntimeError, match="must not write to parameters, got a model that writes to bias"):
        fisher_diagonal(Writing(4, CLASSES), [(torch.randn(4, 4), labels(4))])


# Formats and precisions ----------------------------------------------------------------------------------


class Dense(nn.Module):
    """As in a DenseNet: every layer sees all before it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8 + 8 * i) for i in range(6)])
        self.convs = nn.ModuleList([nn.Conv2d(8 + 8 * i, 8, 3, padding=1, bias=False) for i in range(6)])
        self.norm, self.head = nn.BatchNorm2d(56), nn.Linear(56, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(norm(x).relu())], 1)
        return self.head(self.norm(x).relu().mean((2, 3)))


def test_a_memory_format_is_kept_only_where_the_gradients_are_the_same(monkeypatch):
    torch.manual_seed(0)
    model = Dense()
    batches = [(torch.randn(2, 3, 16, 16), labels(2)) for _ in range(2)]
    assert_right(model, batches, fused=True)
    seen = []

    class Sloppy(torch.autograd.Function):
        """Rounds away a little of what it is given in the other order."""

        @staticmethod
        def forward(ctx, x):
            ctx.last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(ctx.last)
            return grad * 1.0006 if ctx.last else grad

    class Layer(nn.Module):
        def forward(self, x):
            return Sloppy.apply(x)

    model = nn.Sequential(nn.Conv2d(3, 4, 3), Layer(), nn.ReLU(), nn.Flatten(), nn.Linear(144, CLASSES))
    assert_right(model, [(torch.randn(4, 3, 8, 8), labels(4)) for _ in range(2)])
    assert True in seen
    assert not seen[-1]


@pytest.mark.parametrize("kind", ["outside", "inside"])
def test_autocast_is_compared_at_its_own_precision(kind):
    class Cast(nn.Sequential):
        def forward(self, x):
            with torch.autocast("cpu", torch.bfloat16, enabled=kind == "inside"):
                return super().forward(x).float()

    torch.manual_seed(0)
    model = Cast(nn.Linear(16, 32), nn.ReLU(), nn.LayerNorm(32), nn.Linear(32, CLASSES))
    batches = [(torch.randn(8, 16), labels(8)) for _ in range(2)]
    exact = expected_of(nn.Sequential(*model), batches)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "outside"):
        found = fisher_diagonal(model, batches)
    assert set(found.coverage.values()) == {"fused"}
    assert max(errors(found, exact).values()) <= 0.1


def test_submodules_that_are_converted_in_every_pass():
    class Converting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)
            self.scale = nn.Parameter(torch.rand(5))

        def forward(self, x):
            self.head = self.head.to(x.dtype)
            return self.head(Opaque.apply(self.body(x), self.scale))

    torch.manual_seed(0)
    assert_right(Converting(), [(torch.randn(20, 4), labels(20)) for _ in range(2)])


class Opaque(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x, scale):
        return x * scale

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad):
        x, scale = ctx.saved_tensors
        return grad * scale, (grad * x).sum(0)


def test_attention_functions_under_vmap():
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(4, 2, batch_first=True), nn.Linear(4, CLASSES)
            self.scale = nn.Parameter(torch.rand(4))

        def forward(self, x):
            x = Opaque.apply(x, self.scale) if x.ndim == 2 else x * self.scale
            return self.head(self.attention(x, x, x)[0].sum(1))

    torch.manual_seed(0)
    model = Attending()
    nn.init.zeros_(model.head.weight)
    assert_right(model, [(torch.randn(20, 3, 4), labels(20)) for _ in range(2)])


def test_recurrent_layers_with_frozen_flags():
    torch.manual_seed(0)
    before = torch.backends.mkldnn.enabled
    script = """
import torch
torch.backends.disable_global_flags()
import unlearn_ext as ux
from torch import nn
for kind in (nn.RNN, nn.LSTM, nn.GRU):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.head = kind(3, 4, batch_first=True), nn.Linear(4, 2)
        def forward(self, x):
            return self.head(self.rnn(x)[0][:, -1])
    found = ux.fisher_diagonal(Model(), [(torch.randn(4, 3, 3), torch.randint(2, (4,)))])
    assert set(found.coverage.values()) == {"fused"}, found.coverage
print("fine")
"""
    import subprocess
    import sys

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "fine", done.stderr
    assert torch.backends.mkldnn.enabled == before


# Speed that is promised ----------------------------------------------------------------------------------


class Dead(nn.Module):
    def __init__(self):
        super().__init__()
        self.shift, self.dead = nn.Linear(4, 1), nn.Linear(4, 4)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(x + (self.dead(x) - 100).relu()) + self.shift(x)  # softmax takes the shift away


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


# Kinds of models that are refused, or surroundings that are shared ---------------------------------------


def test_parameters_that_the_losses_do_not_use_are_refused():
    class Shadowed(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, CLASSES)

        def forward(self, x):
            copies = [p.detach().clone().requires_grad_() for p in self.layer.parameters()]
            return F.linear(x, *copies)

    with pytest.raises(ValueError, match="the losses must depend on the chosen parameters"):
        fisher_diagonal(Shadowed(), [(torch.randn(4, 4), labels(4))])


def test_sharded_parameters_are_refused(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = nn.Linear(4, CLASSES)
        mesh = init_device_mesh("cpu", (1,))
        model.weight = nn.Parameter(distribute_tensor(model.weight.detach(), mesh))
        with pytest.raises(NotImplementedError, match="weight must be a plain tensor, got a DTensor"):
            fisher_diagonal(model, [(torch.randn(4, 4), labels(4))])
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("part", [False, True])
def test_parameters_that_are_not_there_are_refused(part):
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, CLASSES))
    (model[1] if part else model).to("meta")
    with pytest.raises(NotImplementedError, match="must be in memory, got a tensor on the meta device"):
        fisher_diagonal(model, [(torch.randn(4, 4), labels(4))])


def test_two_threads_leave_checkpoints_and_flags_as_they_were():
    import torch.utils.checkpoint as checkpoint

    function, hook = checkpoint.CheckpointFunction, checkpoint._checkpoint_hook
    enabled = torch.backends.mkldnn.enabled
    inside, leave = threading.Barrier(2), threading.Event()

    class Waiting(nn.Module):
        def __init__(self, waits):
            super().__init__()
            self.rnn, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, CLASSES)
            self.waits = waits

        def forward(self, x):
            if self.waits is not None:
                self.waits()
            return self.head(self.rnn(x)[0][:, -1])

    def first():
        once = iter([inside.wait])
        model = Waiting(lambda: next(once, lambda: None)())
        fisher_diagonal(model, [(torch.randn(3, 2, 3), labels(3))])
        leave.set()

    def second():
        once = iter([lambda: (inside.wait(), leave.wait(30))])
        model = Waiting(lambda: next(once, lambda: None)())
        fisher_diagonal(model, [(torch.randn(3, 2, 3), labels(3))])

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert checkpoint.CheckpointFunction is function
    assert checkpoint._checkpoint_hook is hook
    assert torch.backends.mkldnn.enabled == enabled


def test_a_compiled_model_that_ran_before():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    batches = [(torch.randn(4, 4), labels(4)) for _ in range(2)]
    expected = expected_of(model, batches)
    compiled = torch.compile(model, backend="eager")
    compiled(batches[0][0])
    found = fisher_diagonal(compiled, batches)
    assert set(found.coverage.values()) == {"fused"}
    assert max(errors(found, dict(zip(found, expected.values(), strict=True))).values()) <= 1e-5


# Rules ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_without_padding_by_name(dims):
    kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
    torch.manual_seed(0)
    model = nn.Sequential(kind(2, 4, 2, padding="valid"), nn.Tanh(), nn.Flatten(), nn.LazyLinear(CLASSES))
    x = torch.randn(4, 2, *[4] * dims)
    model(x)
    assert_exact(model, (x, labels(4)))


class Bag(nn.Module):
    def __init__(self, mode, padding_idx=None):
        super().__init__()
        self.bag = nn.EmbeddingBag(9, 4, mode=mode, padding_idx=padding_idx)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        if not isinstance(x, (tuple, list)):
            return self.head(self.bag(x))
        return self.head(self.bag(*x))


@pytest.mark.parametrize("padding_idx", [None, 2])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_of_one_size(mode, padding_idx):
    torch.manual_seed(0)
    batches = [(torch.randint(9, (4, 3)), labels(4)) for _ in range(2)]
    everything = {"bag.weight", "head.weight", "head.bias"}
    fused = everything - {"bag.weight"} if mode == "max" else everything
    assert_right(Bag(mode, padding_idx), batches, fused=fused)


def ragged(*counts):
    offsets = torch.tensor([0, *counts[:-1]]).cumsum(0)
    return ((torch.randint(9, (sum(counts),)), offsets), labels(len(counts)))


def select_bags(batch, samples):
    (indices, offsets), y = batch
    ends = [*offsets[1:].tolist(), len(indices)]
    parts = [indices[offsets[s] : ends[s]] for s in samples]
    starts = torch.tensor([0, *(len(part) for part in parts[:-1])]).cumsum(0)
    return (torch.cat(parts), starts), y[list(samples)]


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_bags_with_offsets(mode):
    torch.manual_seed(0)
    model = Bag(mode)
    batches = [ragged(3, 3, 3), ragged(1, 4, 2), ragged(2, 2, 5)]
    found, coverage, expected = selected(model, batches, select_bags, n=3)
    assert max(errors(found, expected).values()) <= 1e-5
    assert coverage["head.weight"] == "fused"
    if mode != "max":
        assert coverage["bag.weight"] == "fused"


def selected(model, batches, select, n, loss_fn=ux.losses.cross_entropy):
    """Run the engine with a ``select`` of the caller's, and a loop of single samples in float64."""
    import copy

    chosen = dict(model.named_parameters())
    fisher = {name: torch.zeros_like(p) for name, p in chosen.items()}
    model.eval()
    engine = PerSample(model, loss_fn, chosen, fisher, 2, select=select)
    for batch in batches:
        engine.accumulate(batch, n)
    engine.finish()
    wide = copy.deepcopy(model).double()
    expected = {name: torch.zeros_like(p) for name, p in wide.named_parameters()}
    for batch in batches:
        for sample in range(n):
            one = ux.data.map_tensors(
                lambda t: t.double() if t.is_floating_point() else t, select(batch, [sample])
            )
            grads = torch.autograd.grad(loss_fn(wide, one).sum(), list(wide.parameters()))
            for total, grad in zip(expected.values(), grads, strict=True):
                total += grad.square()
    return fisher, engine.coverage, expected


class Detector(nn.Module):
    """Takes a list of images, each of its own size."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, images):
        return torch.stack([self.head(self.conv(image[None]).tanh().mean((2, 3)))[0] for image in images])


def test_images_of_different_sizes_with_a_select_of_ones_own():
    torch.manual_seed(0)
    model = Detector()
    batches = [
        ([torch.randn(1, h, w) for h, w in sizes], labels(3))
        for sizes in ([(6, 6), (6, 6), (6, 6)], [(5, 7), (8, 4), (3, 3)])
    ]

    def select(batch, samples):
        return [batch[0][s] for s in samples], batch[1][list(samples)]

    found, coverage, expected = selected(model, batches, select, n=3)
    assert max(errors(found, expected).values()) <= 1e-5
    assert set(coverage.values()) == {"fused"}


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="no grouped products in this version")
def test_grouped_products():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 8) / 3)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x):
            rows = x.flatten(0, 1)
            key = rows[:, 0].sign().long() + (rows[:, 1] > 0).long()
            order = key.clamp(0, 2).argsort(stable=True)
            ends = torch.bincount(key.clamp(0, 2), minlength=3).cumsum(0).to(torch.int32)
            out = F.grouped_mm(rows[order].bfloat16(), self.weight.bfloat16(), offs=ends).to(x.dtype)
            back = torch.zeros_like(rows).index_copy(0, order, out)
            return self.head(back.view(x.shape).tanh().sum(1))

    torch.manual_seed(0)
    model = Grouped()
    batches = [(torch.randn(4, 3, 8), labels(4)) for _ in range(3)]
    found = fisher_diagonal(model, batches)
    one = expected_of_dtype(model, batches)
    assert max(errors(found, one).values()) <= 0.05
    assert set(found.coverage.values()) == {"fused"}


def expected_of_dtype(model, batches):
    parts = [one_by_one(model, batch, dtype=torch.float32) for batch in batches]
    return {name: sum(part[name] for part in parts) / len(parts) for name in parts[0]}
