"""Random models whose structure depends on their data, against a loop of single samples in float64.

``python tests/engine/random_models.py 3000`` tries that many; the test suite tries a few.
"""

import copy
import random
import sys
import warnings
from collections import Counter

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import rnn as packing

from unlearn_ext import fisher_diagonal
from unlearn_ext.tasks import losses

WIDTH, CLASSES = 4, 3


def lengths_of(x):
    """How long each sequence is, from its first entry: 1 to T."""
    return (x[:, 0, 0].abs() * 7).long() % x.shape[1] + 1


def owners_of(x):
    mask = torch.arange(x.shape[1]) < lengths_of(x)[:, None]
    return mask, torch.arange(len(x))[:, None].expand_as(mask)[mask]


class Positions(nn.Module):
    """Something that is applied to every position: [n, T, E] to [n, T, E]."""

    KINDS = ("linear", "transposed", "norm", "conv", "rnn", "rnn transposed", "scale", "windows", "attention")

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        if kind in ("linear", "transposed", "windows"):
            self.layer = nn.Linear(WIDTH, WIDTH)
        elif kind == "norm":
            self.layer = nn.LayerNorm(WIDTH)
        elif kind == "conv":
            self.layer = nn.Conv1d(WIDTH, WIDTH, 3, padding=1)
        elif kind.startswith("rnn"):
            made = random.choice([nn.RNN, nn.GRU, nn.LSTM])
            self.layer = made(WIDTH, WIDTH, batch_first=kind == "rnn")
        elif kind == "scale":
            self.layer = nn.Parameter(torch.rand(WIDTH) + 0.5)
        elif kind == "attention":
            self.layer = nn.Linear(WIDTH, 3 * WIDTH)

    def forward(self, x, raw):
        if self.kind == "transposed":
            return self.layer(x.transpose(0, 1)).tanh().transpose(0, 1)
        if self.kind == "conv":
            return self.layer(x.mT).mT.tanh()
        if self.kind == "rnn":
            return self.layer(x)[0]
        if self.kind == "rnn transposed":
            return self.layer(x.transpose(0, 1))[0].transpose(0, 1)
        if self.kind == "scale":
            return x * self.layer
        if self.kind == "windows":  # positions folded into the batch, samples fastest
            n = len(x)
            return self.layer(x.transpose(0, 1).flatten(0, 1)).sin().unflatten(0, (-1, n)).transpose(0, 1)
        if self.kind == "attention":
            q, k, v = self.layer(x).chunk(3, -1)
            mask, _ = owners_of(raw)
            scores = (q @ k.mT).masked_fill(~mask[:, None], -1e9)
            return x + scores.softmax(-1) @ v
        return self.layer(x).tanh()


class Ragged(nn.Module):
    """Something that depends on the data in more than its values: [n, T, E] to [n, E]."""

    KINDS = (
        *("index_add", "scatter", "split", "slices", "padded", "product", "masks", "packed", "experts"),
        *("sorted", "one by one", "last", "capacity", "cat", "topk", "batch maximum", "repeat"),
        *("gather rows", "unique", "bag", "einsum", "dispatch", "argmax", "half and half"),
    )

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        if kind == "packed":
            made = random.choice([nn.RNN, nn.GRU, nn.LSTM])
            self.rnn = made(WIDTH, WIDTH, bidirectional=random.random() < 0.3)
            self.back = nn.Linear(WIDTH * (2 if self.rnn.bidirectional else 1), WIDTH)
        if kind in ("experts", "capacity", "dispatch"):
            self.router = nn.Linear(WIDTH, 2)
            self.others = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(2)])
        if kind == "bag":
            self.table = nn.EmbeddingBag(6, WIDTH, mode=random.choice(["sum", "mean"]))

    def rows(self, rows):
        return self.norm(self.layer(rows)).tanh()

    def forward(self, x, raw):
        n, length = raw.shape[:2]
        lengths = lengths_of(raw)
        mask, owners = owners_of(raw)
        kind = self.kind
        if kind in ("index_add", "scatter", "split", "slices", "padded", "product", "masks", "einsum"):
            rows = self.rows(x[mask])
            if kind == "index_add":
                return rows.new_zeros(n, WIDTH).index_add(0, owners, rows)
            if kind == "scatter":
                return rows.new_zeros(n, WIDTH).scatter_add(0, owners[:, None].expand_as(rows), rows)
            if kind == "split":
                return torch.stack([part.sum(0) for part in rows.split(lengths.tolist())])
            if kind == "slices":
                ends = lengths.cumsum(0).tolist()
                return torch.stack([rows[a:b].mean(0) for a, b in zip([0, *ends], ends, strict=False)])
            if kind == "padded":
                whole = rows.new_zeros(n, length, WIDTH)
                whole[mask] = rows
                return whole.sum(1)
            belongs = (owners == torch.arange(n)[:, None]).to(rows.dtype)
            if kind == "product":
                return belongs @ rows
            if kind == "einsum":
                return torch.einsum("nr,rc->nc", belongs, rows)
            return (belongs[..., None] * rows).sum(1)
        if kind == "packed":
            order = lengths.argsort(descending=True, stable=True)
            packed = packing.pack_padded_sequence(x[order], lengths[order], batch_first=True)
            out = packing.pad_packed_sequence(self.rnn(packed)[0], batch_first=True)[0]
            return self.back(out.sum(1))[order.argsort()]
        if kind in ("experts", "capacity", "dispatch"):
            rows = x[mask] if kind == "experts" else x.flatten(0, 1)
            gate, chosen = self.router(rows).softmax(-1).max(-1)
            if kind == "dispatch":
                hot = F.one_hot(chosen, 2)
                place = (hot.cumsum(0) * hot).sum(-1) - 1
                slots = F.one_hot(place, len(rows)).to(rows.dtype)[:, None] * hot[..., None]
                inputs = torch.einsum("res,rc->esc", slots, rows)
                done = torch.stack([layer(part) for layer, part in zip(self.others, inputs, strict=True)])
                out = torch.einsum("res,esc->rc", slots, done.tanh())
            else:
                out = torch.zeros_like(rows)
                for number, layer in enumerate(self.others):
                    index = (chosen == number).nonzero().squeeze(1)
                    index = index[:4] if kind == "capacity" else index
                    out = out.index_add(0, index, layer(rows[index]).tanh())
            out = out * gate[:, None]
            if kind == "experts":
                return out.new_zeros(n, WIDTH).index_add(0, owners, out)
            return out.view(n, length, WIDTH).sum(1)
        if kind == "sorted":
            rows = x.flatten(0, 1)
            order = raw[..., 1].flatten().round().argsort(stable=True)
            return self.rows(rows[order])[order.argsort()].view(n, length, WIDTH).sum(1)
        if kind == "one by one":
            return torch.stack(
                [self.rows(one[:k]).mean(0) for one, k in zip(x, lengths.tolist(), strict=True)]
            )
        if kind == "last":
            return self.rows(x)[torch.arange(n), lengths - 1]
        if kind == "cat":
            long = lengths > length // 2
            parts = torch.cat([self.rows(x[long].flatten(0, 1)), self.rows(x[~long].flatten(0, 1))])
            order = torch.cat([long.nonzero(), (~long).nonzero()]).squeeze(1)
            return parts.view(n, length, WIDTH).sum(1)[order.argsort()]
        if kind == "topk":
            rows = self.rows(x)
            best = rows[..., 0].topk(1, dim=1)[1]
            return rows.gather(1, best[..., None].expand(-1, -1, WIDTH)).squeeze(1)
        if kind == "batch maximum":  # couples samples in some batches
            rows = self.rows(x).sum(1)
            return rows * (2.0 if float(raw.amax()) > 2.2 else 1.0)
        if kind == "repeat":
            rows = self.rows(x[:, 0].repeat_interleave(lengths, dim=0))
            return torch.zeros_like(x[:, 0]).index_add(0, torch.arange(n).repeat_interleave(lengths), rows)
        if kind == "gather rows":
            index = (lengths - 1)[:, None, None].expand(-1, 1, WIDTH)
            return self.rows(x.gather(1, index)).squeeze(1)
        if kind == "unique":
            keys, where = raw[:, 0, 1].round().unique(return_inverse=True)
            shared = self.rows(keys[:, None].expand(-1, WIDTH).to(x.dtype))
            return shared[where] + x.sum(1)
        if kind == "bag":
            indices = raw[..., 1].abs().mul(5).long()[mask] % 6
            offsets = lengths.cumsum(0) - lengths
            return self.table(indices, offsets) + x.mean(1)
        if kind == "argmax":
            return self.rows(x).max(1)[0]
        if kind == "half and half":
            keep = raw[:, 0, 1] > 0
            out = torch.empty_like(x[:, 0])
            out[keep] = self.rows(x[keep].sum(1))
            out[~keep] = self.layer(x[~keep].mean(1))
            return out
        raise AssertionError(kind)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.stages = nn.ModuleList(
            [Positions(random.choice(Positions.KINDS)) for _ in range(random.randrange(3))]
        )
        self.ragged = nn.ModuleList(
            [Ragged(random.choice(Ragged.KINDS)) for _ in range(random.choice([1, 1, 2]))]
        )
        self.head = nn.Linear(WIDTH, CLASSES)
        self.share = random.choice([0.0] * 12 + [1e-3, 1e-1])
        if random.random() < 0.1:
            nn.init.zeros_(self.head.weight)

    def forward(self, raw):
        x = raw
        for stage in self.stages:
            x = stage(x, raw)
        y = sum(part(x, raw) for part in self.ragged)
        if self.share:
            y = y + self.share * y.mean(0)
        return self.head(y)

    def __repr__(self):
        kinds = [part.kind for part in (*self.stages, *self.ragged)]
        return f"{kinds}, coupled by {self.share}"


def make_batch(dtype, *, is_first):
    n, length = random.choice([2, 3, 4, 4, 5]), random.choice([1, 2, 3, 4, 5])
    x = torch.randn(n, length, WIDTH, dtype=dtype)
    if is_first:
        kind = random.choice(["any", "same length", "equal", "zeros", "one", "square"])
        if kind == "same length":
            x[:, 0, 0] = x[0, 0, 0]
        elif kind == "equal":
            x[:] = x[0]
        elif kind == "zeros":
            x[: random.randrange(n) + 1] = 0
        elif kind == "one":
            x[:] = 0
            x[:, 0, 0] = 1
        elif kind == "square":
            x = torch.randn(n, n, WIDTH, dtype=dtype)
    y = torch.randint(CLASSES, (n,))
    if random.random() < 0.1:
        y[: random.randrange(n)] = -100
    return x, y


def make(seed):
    """Return a model and its batches."""
    random.seed(seed)
    torch.manual_seed(seed)
    dtype = random.choice([torch.float64, torch.float32])
    model = Model().to(dtype).eval()
    return model, [make_batch(dtype, is_first=not index) for index in range(4)]


def oracle(model, batches):
    model = copy.deepcopy(model).double()
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    n = 0
    for x, y in batches:
        for sample in range(len(x)):
            one = (x[sample : sample + 1].double(), y[sample : sample + 1])
            grads = torch.autograd.grad(
                losses.cross_entropy(model, one).sum(), list(model.parameters()), allow_unused=True
            )
            for entry, grad in zip(total.values(), grads, strict=True):
                if grad is not None:
                    entry += grad.square()
            n += 1
    return {name: entry / n for name, entry in total.items()}


def attempt(seed):
    """Return the largest error, and what coverage says; float32 decisions may differ from float64 ones."""
    model, batches = make(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            expected = oracle(model, batches)
        except RuntimeError:
            return None
        found = fisher_diagonal(model, batches)
    largest = max(float(value.max()) for value in expected.values())
    error = max(
        float((found[name] - value).abs().max()) / max(float(value.max()), 1e-6 * largest, 1e-30)
        for name, value in expected.items()
    )
    tolerance = 1e-8 if batches[0][0].dtype == torch.float64 else 2e-4
    return error / tolerance, found.coverage, repr(model)


def main(count, first=0):
    """Try many and print what went wrong."""
    wrong, fused, names, why = 0, 0, 0, Counter()
    for seed in range(first, first + count):
        result = attempt(seed)
        if result is None:
            continue
        error, coverage, text = result
        if not error <= 1:
            wrong += 1
            print(
                f"seed {seed}: {error:.1e} times the tolerance; {text}; {set(coverage.values())}", flush=True
            )
        names += len(coverage)
        fused += sum(how == "fused" for how in coverage.values())
        why.update(how.split(";")[0].split(" (by")[0] for how in coverage.values())
    print(f"{count} models, {wrong} wrong, {100 * fused / names:.1f} % of the parameters fused")
    for how, times in why.most_common():
        print(f"  {times:6d} {how}")
    return wrong


if __name__ == "__main__":
    sys.exit(bool(main(*map(int, sys.argv[1:]))))
