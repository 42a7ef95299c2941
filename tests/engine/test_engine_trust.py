"""What a hook or a shape would get wrong, and how the check keeps it from being believed."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact, errors, one_by_one, split
from torch import nn

from unlearn_ext import fisher_diagonal
from unlearn_ext.fisher.engine import per_sample, verification
from unlearn_ext.tasks import losses

CLASSES = 3


def counted(loss_fn=losses.cross_entropy):
    sizes = []

    def counting(model, batch):
        sizes.append(len(batch[0]))
        return loss_fn(model, batch)

    return sizes, counting


class Sequences(nn.Module):
    """A linear layer on sequences in the order ``[T, N, E]``."""

    def __init__(self, *layers, pool=torch.sum):
        super().__init__()
        self.body = nn.Sequential(*(layers or (nn.Linear(5, 6), nn.Tanh(), nn.LayerNorm(6))))
        self.scale = nn.Parameter(torch.rand(6))
        self.head = nn.Linear(6, CLASSES)
        self.pool = pool

    def forward(self, x):
        return self.head(self.pool(self.body(x.transpose(0, 1)) * self.scale, 0))


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("n, length", [(6, 6), (6, 3), (3, 6), (5, 7), (4, 1), (2, 4)])
def test_samples_on_the_second_axis(n, length, power):
    torch.manual_seed(0)
    batch = (torch.randn(n, length, 5), torch.randint(CLASSES, (n,)))
    assert_exact(Sequences(), batch, power=power)


def test_samples_that_look_alike_do_not_hide_the_wrong_axis():
    """The same label, the same gradient at every position, and signs for which sums hide everything."""
    torch.manual_seed(0)
    model = Sequences(nn.Linear(5, 6), nn.ReLU(), pool=torch.mean)
    nn.init.zeros_(model.head.weight)
    nn.init.zeros_(model.head.bias)
    x, y = torch.randn(6, 6, 5), torch.zeros(6, dtype=torch.long)
    x[:3] = x[0, 0]
    y[3:] = torch.tensor([1, 2, 1])
    for power in (1, 2):
        assert_exact(model, (x, y), power=power)


class FoldedWindows(nn.Module):
    """Windows of an image as entries of the batch, those of a sample together or not."""

    def __init__(self, together):
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(2, 4, 2), nn.BatchNorm2d(4), nn.Linear(4, CLASSES)
        self.together = together

    def forward(self, x):
        n = len(x)
        windows = x.unfold(2, 3, 3).unfold(3, 3, 3).permute(0, 2, 3, 1, 4, 5).flatten(1, 2)
        windows = windows.flatten(0, 1) if self.together else windows.transpose(0, 1).flatten(0, 1)
        y = self.linear(self.norm(self.conv(windows)).tanh().mean((2, 3)))
        return (y.unflatten(0, (n, -1)) if self.together else y.unflatten(0, (-1, n)).transpose(0, 1)).sum(1)


@pytest.mark.parametrize("together", [True, False])
def test_windows_folded_into_the_batch(together):
    torch.manual_seed(0)
    assert_exact(FoldedWindows(together), (torch.randn(4, 2, 6, 6), torch.randint(CLASSES, (4,))))


def test_three_dimensional_windows():
    class Clips(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv3d(1, 2, 2), nn.Linear(2, CLASSES)

        def forward(self, x):
            y = self.conv(x.flatten(0, 1)).tanh().mean((2, 3, 4))
            return self.head(y.unflatten(0, x.shape[:2]).sum(1))

    torch.manual_seed(0)
    assert_exact(Clips(), (torch.randn(4, 3, 1, 3, 3, 3), torch.randint(CLASSES, (4,))))


class FunctionalHead(nn.Module):
    """Uses an embedding's weight without calling the embedding again."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(7, 4)

    def forward(self, tokens):
        return F.linear(self.table(tokens).tanh().sum(1), self.table.weight)


def test_a_weight_used_behind_its_layers_back():
    torch.manual_seed(0)
    assert_exact(FunctionalHead(), (torch.randint(7, (6, 5)), torch.randint(7, (6,))))


class InPlace(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = F.relu_(self.first(x))
        x = x.mean((2, 3))
        x += 1
        return self.second(x).mul_(2.0)


def test_operations_in_place_around_the_layers():
    torch.manual_seed(0)
    assert_exact(InPlace(), (torch.randn(5, 1, 5, 5), torch.randint(CLASSES, (5,))))


class Branching(nn.Module):
    """Which layers a batch meets depends on its values."""

    def __init__(self):
        super().__init__()
        self.common, self.rare, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        x = self.common(x).tanh()
        if float(x[:, 0].max()) > 0.5:
            x = self.rare(x).sin() + self.common(x)
        return self.head(x)


def test_a_later_batch_that_uses_parameters_elsewhere_is_checked_again():
    torch.manual_seed(0)
    model = Branching()
    x, y = torch.randn(24, 4), torch.randint(CLASSES, (24,))
    is_rare = model.common(x).tanh()[:, 0] > 0.5
    assert 2 < int(is_rare.sum()) < 22
    parts = [(x[mask], y[mask]) for mask in (~is_rare, is_rare)]
    expected = one_by_one(model, (x, y))
    found = fisher_diagonal(model, parts)
    assert max(errors(found, expected).values()) <= 1e-5
    assert set(found.coverage.values()) == {"fused"}


@pytest.mark.usefixtures("no_certificates")
def test_a_parameter_that_no_rule_reads_is_tried_once(monkeypatch):
    """A weight that a layer multiplies by is the same matrix in every batch: it moves nothing."""

    class Centres(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.centres = nn.Linear(5, 4), nn.Parameter(torch.randn(CLASSES, 4))

        def forward(self, x):
            return torch.cdist(self.first(x).tanh(), self.centres)

    torch.manual_seed(0)
    model, tried, run = Centres(), [], per_sample.LayoutProof.run

    def recorded(proof, names):
        tried.extend(names)
        return run(proof, names)

    monkeypatch.setattr(per_sample.LayoutProof, "run", recorded)
    found = fisher_diagonal(model, [(torch.randn(6, 5), torch.randint(CLASSES, (6,))) for _ in range(4)])
    assert found.coverage["centres"].startswith("fallback: no rule")
    assert tried.count("centres") == 1


@pytest.mark.usefixtures("no_certificates")
def test_a_slice_behind_a_weight_made_of_parameters_is_watched_once(monkeypatch):
    """The weight takes a second look at the graph, which must not count for what was seen on the first."""

    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.scale = nn.Parameter(torch.randn(8, 5)), nn.Parameter(torch.rand(8, 1))
            self.head = nn.Linear(3, CLASSES)

        def forward(self, x):
            return self.head(F.linear(x, self.weight * self.scale).tanh()[:, 2:5])

    torch.manual_seed(0)
    model, proofs, run = Sliced(), [], per_sample.LayoutProof.run

    def recorded(proof, names):
        proofs.append(sorted(names))
        return run(proof, proofs[-1])

    monkeypatch.setattr(per_sample.LayoutProof, "run", recorded)
    batches = [(torch.randn(6, 5), torch.randint(CLASSES, (6,))) for _ in range(4)]
    found = fisher_diagonal(model, batches)
    alone = [one_by_one(model, batch) for batch in batches]
    assert max(errors(found, {name: sum(a[name] for a in alone) / 4 for name in found}).values()) <= 1e-5
    assert set(found.coverage.values()) == {"fused"}
    assert len(proofs) == 1


@pytest.mark.usefixtures("no_certificates")
def test_a_slice_of_rows_that_hold_several_of_every_sample_is_known_by_its_axis(monkeypatch):
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(5, 8), nn.Linear(3, CLASSES)

        def forward(self, x):
            rows = self.first(x.flatten(0, 1)).tanh()[:, 2:5]
            return self.head(rows).unflatten(0, x.shape[:2]).sum(1)

    torch.manual_seed(0)
    model, proofs, run = Rows(), [], per_sample.LayoutProof.run

    def recorded(proof, names):
        proofs.append(sorted(names))
        return run(proof, proofs[-1])

    monkeypatch.setattr(per_sample.LayoutProof, "run", recorded)
    batches = [(torch.randn(6, 3, 5), torch.randint(CLASSES, (6,))) for _ in range(4)]
    found = fisher_diagonal(model, batches)
    assert set(found.coverage.values()) == {"fused"}
    assert len(proofs) == 1


@pytest.mark.usefixtures("no_certificates")
def test_rows_below_a_selection_are_proven_anew_however_far_below(monkeypatch):
    """Sorted in one batch and as they are in another: what two functions further down reads them."""

    class Sorted(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(5, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            rows = x.flatten(0, 1)
            order = rows[:, 0].argsort()
            found = self.first(rows[order]).tanh().sin()[order.argsort()]
            return self.head(found.unflatten(0, x.shape[:2]).sum(1))

    torch.manual_seed(0)
    model = Sorted()
    x, y = torch.randn(6, 2, 5), torch.randint(CLASSES, (6,))
    rows = x.flatten(0, 1)
    ascending = rows[rows[:, 0].argsort()].view_as(x)
    batches = [(ascending, y), (ascending + 0.1, y), (x, y)]
    found = fisher_diagonal(model, batches)
    alone = [one_by_one(model, batch) for batch in batches]
    assert max(errors(found, {name: sum(a[name] for a in alone) / 3 for name in found}).values()) <= 1e-5


@pytest.mark.usefixtures("no_certificates")
def test_a_parameter_that_keeps_turning_up_elsewhere_is_proven_each_time():
    class Restless(nn.Module):
        """Gives its norm as many axes as there are positions."""

        def __init__(self):
            super().__init__()
            self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.head(self.norm(x.view(len(x), *[1] * x.shape[1], -1, 4)).flatten(1, -2).sum(1))

    torch.manual_seed(0)
    model = Restless()
    parts = [(torch.randn(4, length, 4), torch.randint(CLASSES, (4,))) for length in range(1, 9)]
    sizes, loss_fn = counted()
    found = fisher_diagonal(model, parts, loss_fn=loss_fn)
    alone = [one_by_one(model, part) for part in parts]
    expected = {name: sum(part[name] for part in alone) / 8 for name in alone[0]}
    assert max(errors(found, expected).values()) <= 1e-5
    assert set(found.coverage.values()) == {"fused"}
    assert sizes.count(1) <= 2 + 8  # samples on their own: two, and one of each new form


def test_one_position_in_the_first_batch_says_nothing_about_many():
    torch.manual_seed(0)
    model = Sequences(nn.Linear(5, 6), nn.Tanh())
    short = (torch.randn(4, 1, 5), torch.randint(CLASSES, (4,)))
    long = (torch.randn(4, 4, 5), torch.randint(CLASSES, (4,)))
    a, b = one_by_one(model, short), one_by_one(model, long)
    found = fisher_diagonal(model, [short, long])
    assert max(errors(found, {name: (a[name] + b[name]) / 2 for name in a}).values()) <= 1e-5


class Windows(nn.Module):
    """Takes some positions of every sample, those of one time after those of the one before."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(5, 6), nn.Linear(6, CLASSES)
        self.length = 1

    def forward(self, x):
        rows = x.transpose(0, 1)[: self.length].flatten(0, 1)
        return self.head(self.first(rows).tanh().unflatten(0, (self.length, len(x))).sum(0))


@pytest.mark.usefixtures("no_certificates")
def test_rows_that_were_one_per_sample_and_are_several_are_proven_anew():
    """One row per sample cannot tell an order of rows; the batches look alike."""
    torch.manual_seed(0)
    model = Windows()
    batches = [(torch.randn(4, 3, 5), torch.randint(CLASSES, (4,))) for _ in range(2)]

    class Growing:
        def __iter__(self):
            for model.length, batch in zip((1, 3), batches, strict=True):
                yield batch

    found = fisher_diagonal(model, Growing())
    expected = dict.fromkeys(found, 0)
    for model.length, batch in zip((1, 3), batches, strict=True):
        alone = one_by_one(model, batch)
        expected = {name: expected[name] + alone[name] / 2 for name in found}
    assert max(errors(found, expected).values()) <= 1e-5
    assert set(found.coverage.values()) == {"fused"}  # and not given up, as what was found to be wrong is


def test_a_batch_of_one_first():
    torch.manual_seed(0)
    batch = (torch.randn(7, 3, 5), torch.randint(CLASSES, (7,)))
    model = Sequences()
    parts = [tuple(t[:1] for t in batch), tuple(t[1:4] for t in batch), tuple(t[4:] for t in batch)]
    assert max(errors(fisher_diagonal(model, parts), one_by_one(model, batch)).values()) <= 1e-5


@pytest.mark.parametrize("ignored", [2, 8, 20])
def test_samples_without_a_gradient_prove_nothing(ignored):
    """The first ones have no label, so nothing they show could tell one axis from the other."""
    torch.manual_seed(0)
    x, y = torch.randn(24, 6, 5), torch.randint(CLASSES, (24,))
    y[:ignored] = -100
    assert_exact(Sequences(), (x, y), size=6, fused=None)


def test_a_parameter_that_never_gets_a_gradient_costs_nothing(monkeypatch):
    class Dead(nn.Module):
        def __init__(self):
            super().__init__()
            self.dead, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            return self.head(x + (self.dead(x) - 100).relu())

    torch.manual_seed(0)
    model, batch = Dead(), (torch.randn(24, 4), torch.randint(CLASSES, (24,)))
    monkeypatch.setattr(per_sample, "Fallback", None)  # would be called
    found = fisher_diagonal(model, split(batch, 6))
    assert not found["dead.weight"].any()
    assert set(found.coverage.values()) == {"fused"}


class Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

    def forward(self, x):
        x = self.first(x)
        return self.head((x - x.mean(0)).tanh())


def test_a_layer_that_mixes_the_samples():
    torch.manual_seed(0)
    model, batch = Mixing(), (torch.randn(6, 4), torch.randint(CLASSES, (6,)))
    for _ in range(2):  # also where the trust is remembered
        with pytest.warns(UserWarning, match="samples influence each other"):
            found = fisher_diagonal(model, [batch])
        assert max(errors(found, one_by_one(model, batch)).values()) <= 1e-5
        assert all(how.startswith("fallback: samples influence") for how in found.coverage.values())


def test_samples_that_are_mixed_without_a_trace_in_the_losses_fall_back():
    """The values are a sample's own, and the gradients are not."""

    class Sneaky(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

        def forward(self, x):
            x = self.first(x).tanh()
            return self.head(x + x.mean(0) - x.mean(0).detach())

    torch.manual_seed(0)
    model, batch = Sneaky(), (torch.randn(6, 4), torch.randint(CLASSES, (6,)))
    found = fisher_diagonal(model, [batch])
    why = "fallback: disagrees with plain autograd: samples are coupled (by "
    assert found.coverage["first.weight"].startswith(why)
    assert found.coverage["head.bias"] == "fused"
    assert max(errors(found, one_by_one(model, batch)).values()) <= 1e-5


def test_rows_that_belong_to_no_sample_in_some_batches():
    class Grouped(nn.Module):
        """The rows of a batch, three at a time."""

        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 4), nn.Linear(4, CLASSES)

        def forward(self, x):
            rows = self.first(x if len(x) != 5 else torch.cat([x, x.new_zeros(1, 4)]))
            return self.head(rows[: len(x)].tanh())

    torch.manual_seed(0)
    batch = (torch.randn(13, 4), torch.randint(CLASSES, (13,)))
    assert_exact(Grouped(), batch, size=8)


@pytest.mark.usefixtures("no_certificates")
def test_a_model_is_checked_once():
    torch.manual_seed(0)
    model, batch = Sequences(), (torch.randn(12, 5, 5), torch.randint(CLASSES, (12,)))
    sizes, loss_fn = counted()
    first = fisher_diagonal(model, split(batch, 6), loss_fn=loss_fn)
    assert sizes.count(6) == 2  # the first of them watched
    assert sizes.count(1) == 3  # two of the first batch, and one of the second
    sizes.clear()
    second = fisher_diagonal(model, split(batch, 6), loss_fn=loss_fn)
    assert sizes == [6, 6]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model, "pool", torch.mean) or setattr(model, "flag", True),
        lambda model: model.body.append(nn.Tanh()),
        lambda model: model.head.weight.requires_grad_(False),
        lambda model: model.body[0].register_forward_hook(lambda *_: None),
        lambda model: setattr(model.head, "weight", nn.Parameter(torch.randn(CLASSES, 6))),
    ],
    ids=["setting", "module", "frozen", "hook", "parameter"],
)
def test_another_model_is_checked_again(change):
    torch.manual_seed(0)
    model, batch = Sequences(), (torch.randn(6, 5, 5), torch.randint(CLASSES, (6,)))
    sizes, loss_fn = counted()
    fisher_diagonal(model, [batch], loss_fn=loss_fn)
    change(model)
    sizes.clear()
    fisher_diagonal(model, [batch], loss_fn=loss_fn)
    assert len(sizes) > 1


def test_another_loss_and_another_form_of_batch_are_checked_again():
    torch.manual_seed(0)
    model, (x, y) = Sequences(), (torch.randn(6, 5, 5), torch.randint(CLASSES, (6,)))
    fisher_diagonal(model, [(x, y)])
    forms = (
        ((x, y), losses.logit_norm),
        ((x, y, y), lambda model, batch: losses.cross_entropy(model, batch[:2])),
    )
    for batch, loss in forms:
        sizes, loss_fn = counted(loss)
        fisher_diagonal(model, [batch], loss_fn=loss_fn)
        assert len(sizes) > 1


def test_a_changed_order_of_axes_is_noticed():
    torch.manual_seed(0)
    model = nn.LSTM(5, CLASSES)
    model.batch_first = False

    def loss_fn(model, batch):
        outputs = model(batch[0] if model.batch_first else batch[0].transpose(0, 1))[0]
        return F.cross_entropy(
            outputs[:, -1] if model.batch_first else outputs[-1], batch[1], reduction="none"
        )

    batch = (torch.randn(4, 4, 5), torch.randint(CLASSES, (4,)))
    for model.batch_first in (False, True):
        assert_exact(model, batch, loss_fn=loss_fn)


def test_the_verdict_does_not_keep_the_model_alive():
    import gc
    import weakref

    torch.manual_seed(0)
    model, batch = Sequences(), (torch.randn(6, 5, 5), torch.randint(CLASSES, (6,)))
    alive = weakref.ref(model)

    def compute(model):
        fisher_diagonal(model, [batch], loss_fn=lambda _, batch: losses.cross_entropy(model, batch))

    compute(model)
    fisher_diagonal(model, [batch], loss_fn=losses.logit_norm)
    del model
    gc.collect()
    assert alive() is None


def test_a_rule_that_is_wrong_is_found_out(monkeypatch):
    from unlearn_ext.fisher.engine import rules

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, CLASSES))
    batch = (torch.randn(6, 4), torch.randint(CLASSES, (6,)))
    honest = rules.RULES["NativeLayerNorm"]

    def wrong(call):
        term = honest(call)
        grads, normalized = term._given
        term._given = grads * 1.01, normalized
        return term

    monkeypatch.setitem(rules.RULES, "NativeLayerNorm", wrong)
    everything = {name for name, _ in model.named_parameters()}
    for size in (6, 2):  # in one batch, and once for all that follow
        found = assert_exact(model, batch, fused=everything - {"2.weight", "2.bias"}, size=size)
        assert found.coverage["2.weight"] == f"fallback: {verification.DISAGREES}; vmap"


@pytest.mark.usefixtures("no_certificates")
def test_a_parameter_that_no_batch_proves_is_given_up_in_the_end(monkeypatch):
    """Where rows are moved as the data say, another batch might have another use of the parameter."""

    class Picked(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.centres = nn.Embedding(7, 4), nn.Parameter(torch.randn(CLASSES, 4))

        def forward(self, x):
            return torch.cdist(self.table(x).tanh(), self.centres)

    torch.manual_seed(0)
    model, tried, run = Picked(), [], per_sample.LayoutProof.run

    def recorded(proof, names):
        tried.append(sorted(names))
        return run(proof, tried[-1])

    monkeypatch.setattr(per_sample.LayoutProof, "run", recorded)
    batches = [(torch.randint(7, (6,)), torch.randint(CLASSES, (6,))) for _ in range(8)]
    found = fisher_diagonal(model, batches)
    assert found.coverage["centres"].startswith("fallback: no rule")
    assert sum("centres" in names for names in tried) == 4


def test_a_loss_that_uses_parameters_itself():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))
    batch = (torch.randn(6, 4), torch.randint(CLASSES, (6,)))

    def decayed(model, batch):
        decay = sum(p.square().sum() for p in model.parameters())
        return losses.cross_entropy(model, batch) + 0.01 * decay

    assert_exact(model, batch, loss_fn=decayed, fused=None)


def test_no_warning_where_nothing_is_wrong():
    torch.manual_seed(0)
    batch = (torch.randn(6, 5, 5), torch.randint(CLASSES, (6,)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fisher_diagonal(Sequences(), [batch])


def test_losses_that_are_almost_zero_differ_by_rounding_only():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.Tanh(), nn.Linear(30, CLASSES))
    x = torch.randn(12, 40)
    with torch.no_grad():
        model[2].weight *= 100
        y = model(x).argmax(1)
    assert float(losses.cross_entropy(model, (x, y))[:2].max()) < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = fisher_diagonal(model, split((x, y), 6))
    assert set(found.coverage.values()) == {"fused"}


@pytest.mark.parametrize("sizes", [{1, 6}, {1}])
def test_a_model_that_takes_batches_of_some_sizes_only(sizes):
    class Particular(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.head = nn.Linear(4, 5), nn.Linear(5, CLASSES)

        def forward(self, x):
            if len(x) not in sizes:
                raise ValueError(f"{len(x)} is none of {sizes}")
            return self.head(self.first(x).tanh())

    torch.manual_seed(0)
    batch = (torch.randn(6, 4), torch.randint(CLASSES, (6,)))
    assert_exact(Particular(), batch, size=max(sizes))


def test_a_model_that_is_broken_by_another_order_only_in_the_backward_pass():
    class Picky(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.last = x.is_contiguous(memory_format=torch.channels_last)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            if ctx.last:
                raise RuntimeError("another order was expected")
            return grad

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(2, 3, 3), nn.Linear(3, CLASSES)

        def forward(self, x):
            return self.head(Picky.apply(self.conv(x)).mean((2, 3)))

    torch.manual_seed(0)
    assert_exact(Model(), (torch.randn(4, 2, 5, 5), torch.randint(CLASSES, (4,))))
