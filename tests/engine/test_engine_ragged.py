"""Rows per sample that differ between batches, and batches that only the caller can take apart."""

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact, assert_right, errors, one_by_one
from torch import nn
from torch.nn.utils import rnn as packing

import unlearn_ext as ux
from unlearn_ext import fisher_diagonal
from unlearn_ext.fisher.engine import PerSample

CLASSES = 3


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


def plain_cross_entropy(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def selected(model, batches, select, n, loss_fn=plain_cross_entropy):
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
