import copy
import math
import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import unlearn_ext as ux
from unlearn_ext import Importance, fisher_diagonal, tasks
from unlearn_ext.tasks import losses

CLASSES = 4


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(5, 6, num_layers=2, batch_first=True, dropout=0.3)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


class Transformer(nn.Module):
    """A class token and positions as plain parameters, a packed attention projection, LayerNorm."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.positions = nn.Parameter(torch.randn(1, 7, 8))
        self.block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        tokens = torch.cat([self.token.expand(len(x), -1, -1), x], dim=1) + self.positions
        return self.head(self.block(tokens)[:, 0])


class TiedForCausalLM(nn.Module):
    """Embedding and output head share their weight; called with keywords."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 6)
        self.mixer = nn.Linear(6, 6)
        self.head = nn.Linear(6, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, input_ids):
        return SimpleNamespace(logits=self.head(self.mixer(self.embedding(input_ids)).tanh()))


class Custom(nn.Module):
    """A parameter of no layer, used twice, and a parameter that gets no gradient."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.randn(5))
        self.unused = nn.Parameter(torch.randn(3))
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head((x * self.scale).sin() * self.scale.exp())


class DataDependent(nn.Module):
    """Control flow on a value, which vmap cannot follow."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, CLASSES)

    def forward(self, x):
        return self.head(x if float(x.abs().max()) > 0 else x + 1)


def convolutional():
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(6, 8, 3, stride=2, groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32, CLASSES),
    )


MODELS = {
    "mlp": (lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, CLASSES)), (5,)),
    "cnn": (convolutional, (1, 6, 6)),
    "transformer": (Transformer, (6, 8)),
    "lstm": (Recurrent, (3, 5)),
    "custom": (Custom, (5,)),
    "data-dependent": (DataDependent, (5,)),
}
N = 37  # ragged for every batch size below but 1


def make(name):
    torch.manual_seed(0)
    if name == "tied":
        tokens = torch.randint(9, (N, 5))
        labels = tokens.clone()
        labels[::3, 3:] = -100  # padding, of a third of the samples
        labels[4] = -100  # and one sample without anything to predict
        return TiedForCausalLM(), {"input_ids": tokens, "labels": labels}
    build, shape = MODELS[name]
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
    return model, (torch.randn(N, *shape), torch.randint(CLASSES, (N,)))


def batched(batch, size):
    if isinstance(batch, dict):
        return [dict(zip(batch, part, strict=True)) for part in batched(tuple(batch.values()), size)]
    return list(zip(*(tensor.split(size) for tensor in batch), strict=True))


def one_by_one(model, batch, loss_fn=losses.cross_entropy, power=2):
    """The definition: a float64 loop of single samples."""
    model = copy.deepcopy(model).double().eval()
    totals = {name: torch.zeros_like(p) for name, p in model.named_parameters() if p.requires_grad}
    wanted = [p for p in model.parameters() if p.requires_grad]
    samples = batched(batch, 1)
    for sample in samples:
        sample = ux.data.map_tensors(lambda t: t.double() if t.is_floating_point() else t, sample)
        loss = loss_fn(model, sample).sum()
        grads = torch.autograd.grad(loss, wanted, allow_unused=True)
        for total, grad in zip(totals.values(), grads, strict=True):
            if grad is not None:
                total += grad.abs() ** power
    return {name: total / len(samples) for name, total in totals.items()}


def assert_close_to(importance, expected, tolerance=1e-5, power=2):
    assert list(importance) == list(expected)
    largest = max(float(value.max()) for value in expected.values())
    for name, value in expected.items():
        # Gradients that vanish in exact arithmetic (key biases of attention) leave rounding behind.
        scale = max(float(value.max()), (1e-6 if power == 2 else 0.1) * largest)
        assert float((importance[name] - value).abs().max()) <= tolerance * scale, name


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("name", [*MODELS, "tied"])
def test_per_sample_is_exact_for_any_architecture_and_batch_size(name, power):
    model, batch = make(name)
    expected = one_by_one(model, batch, power=power)
    previous = None
    for size in (1, 7, 32):
        found = fisher_diagonal(model, batched(batch, size), power=power)
        assert_close_to(found, expected, power=power)
        if previous is not None:
            assert_close_to(found, previous, tolerance=1e-6, power=power)
        previous = found
        assert (found.n_samples, found.batch_size, found.n_batches) == (N, size, math.ceil(N / size))
        assert (found.estimator, found.power) == ("per_sample", power)
        assert all(value.dtype == torch.float32 for value in found.values())


def test_order_and_ragged_batches_do_not_matter():
    model, (x, y) = make("mlp")
    order = torch.randperm(N)
    shuffled = list(zip(x[order].split([5, 1, 20, 11]), y[order].split([5, 1, 20, 11]), strict=True))
    assert_close_to(fisher_diagonal(model, shuffled), fisher_diagonal(model, [(x, y)]), tolerance=1e-6)


def test_a_data_loader_feeds_it():
    model, (x, y) = make("mlp")
    loader = DataLoader(TensorDataset(x, y), batch_size=8, shuffle=True)
    assert_close_to(fisher_diagonal(model, loader), one_by_one(model, (x, y)))


def test_coverage_names_every_parameter_and_why():
    def how(estimator="per_sample", size=N):
        coverage = fisher_diagonal(model, batched(batch, size), estimator=estimator).coverage
        assert list(coverage) == [name for name, _ in model.named_parameters()]
        (why,) = set(coverage.values())
        return why

    model, batch = make("mlp")
    assert how() == how("mc") == how(size=1) == "fused"
    assert how("batch") == "fallback: one plain gradient per batch is the estimator's definition"


def test_frozen_parameters_are_left_out():
    model, batch = make("cnn")
    model[0].requires_grad_(False)
    found = fisher_diagonal(model, [batch])
    assert [name for name, _ in model.named_parameters() if name not in found] == ["0.weight", "0.bias"]
    assert_close_to(found, one_by_one(model, batch))


def test_a_parameter_without_gradient_has_zeros_and_a_tied_one_a_single_entry():
    model, batch = make("custom")
    assert torch.equal(fisher_diagonal(model, [batch])["unused"], torch.zeros(3))
    assert torch.equal(fisher_diagonal(model, batched(batch, 1))["unused"], torch.zeros(3))
    model, batch = make("tied")
    assert list(fisher_diagonal(model, [batch])) == ["embedding.weight", "mixer.weight", "mixer.bias"]


def test_params_restricts_what_is_looked_at():
    model, batch = make("mlp")
    found = fisher_diagonal(model, [batch], params=["2.bias", "0.weight"])
    everything = fisher_diagonal(model, [batch])
    assert list(found) == ["0.weight", "2.bias"]
    assert_close_to(found, {name: everything[name] for name in found}, tolerance=1e-6)


def test_sparse_gradients_and_channels_last():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Flatten(), nn.Linear(12, CLASSES))
    batch = (torch.randint(7, (9, 3)), torch.randint(CLASSES, (9,)))
    dense = copy.deepcopy(model)
    dense[0].sparse = False
    assert_close_to(fisher_diagonal(model, [batch]), one_by_one(dense, batch))
    model, (x, y) = make("cnn")
    expected = one_by_one(model, (x, y))
    model = model.to(memory_format=torch.channels_last)
    found = fisher_diagonal(model, [(x.to(memory_format=torch.channels_last), y)])
    assert found["4.weight"].stride() == model[4].weight.stride()
    assert_close_to(found, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_precisions(dtype):
    model, (x, y) = make("mlp")
    expected = one_by_one(model, (x, y))
    found = fisher_diagonal(model.to(dtype), [(x.to(dtype), y)])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert {value.dtype for value in found.values()} == {wide}
    assert_close_to(found, expected, tolerance=1e-6 if dtype == torch.float64 else 5e-2)


def test_squares_of_small_half_precision_gradients_do_not_underflow():
    model = nn.Linear(1, 1, bias=False).half()

    def loss_fn(model, batch):
        return (model(batch[0]) * 1e-4).flatten()

    found = fisher_diagonal(model, [(torch.ones(4, 1, dtype=torch.float16), None)], loss_fn=loss_fn)
    assert found["weight"].item() == pytest.approx(1e-8, rel=1e-2)


def test_compiled_and_wrapped_models():
    model, batch = make("mlp")
    expected = one_by_one(model, batch)
    found = fisher_diagonal(torch.compile(model, backend="eager"), [batch])
    assert_close_to(found, expected)


def test_batch_is_the_released_definition():
    """Mean over batches, the short last one like the others, of the squared gradient of the batch mean."""
    model, (x, y) = make("cnn")
    found = fisher_diagonal(model, batched((x, y), 8), estimator="batch")
    reference = copy.deepcopy(model).eval()
    totals = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    parts = batched((x, y), 8)
    for inputs, labels in parts:
        reference.zero_grad()
        F.cross_entropy(reference(inputs), labels).backward()
        for name, p in reference.named_parameters():
            totals[name] += p.grad**2 / len(parts)
    assert_close_to(found, totals, tolerance=1e-6)
    assert (found.n_samples, found.batch_size, found.n_batches, found.estimator) == (N, 8, 5, "batch")


def test_batch_of_one_is_the_fisher():
    model, batch = make("mlp")
    ones = batched(batch, 1)
    assert_close_to(fisher_diagonal(model, ones, estimator="batch"), one_by_one(model, batch))


def test_mc_draws_targets_from_the_models_own_distribution():
    torch.manual_seed(0)
    model = nn.Linear(2, 3)
    x, wrong = torch.randn(6, 2), torch.zeros(6, dtype=torch.long)
    repeats = 4000
    data = [(x.repeat(repeats, 1), wrong.repeat(repeats))]
    found = fisher_diagonal(model, data, estimator="mc", generator=torch.Generator().manual_seed(3))
    chances = model(x).softmax(-1).detach()
    expected = torch.zeros(3)
    for label in range(3):
        residual = chances - F.one_hot(torch.tensor(label), 3)
        expected += (chances[:, label, None] * residual**2).mean(0)
    torch.testing.assert_close(found["bias"], expected, rtol=0.03, atol=0)
    assert found.estimator == "mc"


@pytest.mark.parametrize("name", ["mlp", "tied"])
def test_mc_is_reproducible_and_leaves_ignored_labels_alone(name):
    model, batch = make(name)
    seen = []

    def loss_fn(model, batch):
        if len(ux.data.targets(batch)) == N:
            seen.append(ux.data.targets(batch).clone())
        return losses.cross_entropy(model, batch)

    def draw(seed):
        seen.clear()
        seeded = torch.Generator().manual_seed(seed)
        fisher_diagonal(model, [batch], estimator="mc", loss_fn=loss_fn, generator=seeded)
        return seen[0]

    given = ux.data.targets(batch)
    first, again, other = draw(1), draw(1), draw(2)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(first < 0, given < 0)
    assert first.dtype == given.dtype
    if name == "tied":
        assert torch.equal(first[:, 0], given[:, 0])  # nothing predicts the first token


def test_mc_without_generator_uses_the_global_state_and_puts_it_back():
    model, batch = make("mlp")
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = fisher_diagonal(model, [batch], estimator="mc")
    assert torch.equal(torch.get_rng_state(), state)
    assert_close_to(fisher_diagonal(model, [batch], estimator="mc"), first, tolerance=0)


@pytest.mark.parametrize(
    "batch",
    [
        (torch.zeros(2, 5),),
        (torch.zeros(2, 5), torch.zeros(2, 4)),
        (torch.zeros(2, 5), torch.zeros(3, dtype=torch.long)),
    ],
    ids=["no targets", "targets that are no classes", "another shape"],
)
def test_mc_needs_targets_it_can_replace(batch):
    model, _ = make("mlp")
    with pytest.raises(ValueError, match=r"labels|targets"):
        fisher_diagonal(model, [batch], estimator="mc", loss_fn=losses.logit_norm)


def test_the_loss_free_variant_needs_no_labels():
    model, (x, _) = make("mlp")
    found = fisher_diagonal(model, [(x,)], loss_fn=losses.logit_norm, power=1)
    assert_close_to(found, one_by_one(model, (x,), losses.logit_norm, power=1), power=1)


def snapshot(model):
    return {
        "training": [module.training for module in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "values": [t.clone() for t in model.state_dict().values()],
        "hooks": [len(m._forward_hooks) + len(m._backward_hooks) for m in model.modules()],
        "random": torch.get_rng_state(),
        "pointers": [p.data_ptr() for p in model.parameters()],
    }


def assert_same_state(a, b):
    for key, before in a.items():
        after = b[key]
        if isinstance(before, torch.Tensor):
            assert torch.equal(before, after), key
        else:
            for x, y in zip(before, after, strict=True):
                assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y, key


@pytest.mark.parametrize("estimator", ["per_sample", "batch", "mc"])
@pytest.mark.parametrize("failure", [None, "exception", "interrupt", "nan"])
def test_the_model_is_as_it_was_also_after_a_failure(estimator, failure):
    model, batch = make("cnn")
    model[1].eval()
    model[4].bias.requires_grad_(False)
    model[0].weight.grad = torch.full_like(model[0].weight, 3.0)
    fired = []
    model[0].register_forward_hook(lambda *_: fired.append(1) and None)
    errors = {"exception": ZeroDivisionError, "interrupt": KeyboardInterrupt, "nan": FloatingPointError}

    def loss_fn(model, batch):
        values = losses.cross_entropy(model, batch)
        if len(fired) > 6 and failure == "nan":
            return values * math.nan
        if len(fired) > 6 and failure:
            raise errors[failure]
        return values

    before = snapshot(model)
    loader = DataLoader(TensorDataset(*batch), batch_size=4, shuffle=True)
    if failure:
        with pytest.raises(errors[failure]):
            fisher_diagonal(model, loader, estimator=estimator, loss_fn=loss_fn)
    else:
        fisher_diagonal(model, loader, estimator=estimator, loss_fn=loss_fn)
    assert fired
    assert_same_state(before, snapshot(model))


def test_it_works_where_the_caller_has_turned_gradients_off():
    model, batch = make("mlp")
    expected = one_by_one(model, batch)
    for off in (torch.no_grad(), torch.inference_mode()):
        with off:
            assert_close_to(fisher_diagonal(model, [batch]), expected)
            assert_close_to(fisher_diagonal(model, batched(batch, 1)), expected)


@pytest.mark.parametrize("estimator", ["per_sample", "batch", "mc"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_its_batch(estimator, bad):
    model, (x, y) = make("mlp")
    scale = torch.ones(N)
    scale[18] = bad

    def loss_fn(model, batch):
        return losses.cross_entropy(model, batch[:2]) * batch[2]

    with pytest.raises(FloatingPointError, match=f"loss must be finite, got {bad} in batch 2"):
        fisher_diagonal(
            model,
            batched((x, y, scale), 8),
            task=tasks.Classification(),  # three entries: the drawn targets have to be put somewhere
            loss_fn=loss_fn,
            estimator=estimator,
        )
    x[18] = math.nan
    with pytest.raises(FloatingPointError, match="must be finite, got nan in batch 2"):
        fisher_diagonal(model, batched((x, y), 8), estimator=estimator)


def test_samples_that_influence_each_other_are_warned_about():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3, track_running_stats=False), nn.Linear(3, 2))

    def per_pair(model, batch):  # BatchNorm without statistics refuses a batch of one
        x = model[0](batch[0])
        return F.cross_entropy(model[2](x - x.mean(0)), batch[1], reduction="none")

    batch = (torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    with pytest.warns(UserWarning, match="another loss than in its batch"):
        fisher_diagonal(model, [batch], loss_fn=per_pair)


def test_a_shared_tensor_that_a_ragged_batch_takes_apart_is_warned_about():
    model, (x, y) = make("mlp")
    shared = torch.linspace(0.5, 2.0, 5)  # 37 samples in batches of 8 leave 5

    def loss_fn(model, batch):
        return losses.cross_entropy(model, batch[:2]) * batch[2].sum()

    parts = [(*part, shared) for part in batched((x, y), 8)]
    with pytest.warns(UserWarning, match="as long as the batch and was taken apart"):
        fisher_diagonal(model, parts, loss_fn=loss_fn)


def mean_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def detached_loss(model, batch):
    return losses.cross_entropy(model, batch).detach()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"data": []}, ValueError, "at least one sample, got none"),
        ({"data": [(torch.zeros(0, 5), torch.zeros(0, dtype=torch.long))]}, ValueError, "at least one"),
        ({"data": iter([])}, ValueError, "one-shot"),
        ({"estimator": "exact"}, ValueError, "must be one of per_sample, batch, mc, got 'exact'"),
        ({"power": 3}, ValueError, "power must be 1 or 2, got 3"),
        ({"params": ["weight"]}, ValueError, "must name trainable parameters, got 'weight'"),
        ({"params": []}, ValueError, "params must name at least one parameter"),
        ({"model": nn.ReLU()}, ValueError, "must have a trainable parameter"),
        ({"model": nn.Linear(5, 4).requires_grad_(False)}, ValueError, "must have a trainable parameter"),
        ({"model": nn.Linear(5, 4, dtype=torch.complex64)}, TypeError, "weight must be .*, got .*complex64"),
        ({"loss_fn": mean_loss}, ValueError, r"one loss per sample, a tensor \[37\], got \[\]"),
        ({"loss_fn": lambda model, batch: 1.0}, ValueError, r"a tensor \[37\], got float"),
        ({"loss_fn": detached_loss}, ValueError, "depend on the parameters, got a constant"),
    ],
)
@pytest.mark.parametrize("estimator", ["per_sample", "batch"])
def test_what_is_wrong_is_said(change, error, message, estimator):
    model, batch = make("mlp")
    arguments = {"model": model, "data": [batch], "estimator": estimator, **change}
    with pytest.raises(error, match=message):
        fisher_diagonal(arguments.pop("model"), arguments.pop("data"), **arguments)


def test_an_error_of_the_users_model_comes_through():
    model, _ = make("mlp")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fisher_diagonal(model, [(torch.zeros(3, 6), torch.zeros(3, dtype=torch.long))])


def test_a_sample_that_the_loss_leaves_out_counts_with_zero():
    model, (x, y) = make("mlp")
    y[3] = -100
    for size in (1, 37):
        assert_close_to(fisher_diagonal(model, batched((x, y), size)), one_by_one(model, (x, y)))


def part(model, batch, start, stop, size=4, **settings):
    return fisher_diagonal(model, batched(tuple(t[start:stop] for t in batch), size), **settings)


@pytest.mark.parametrize("power", [1, 2])
def test_sum_and_difference_are_those_of_the_data_sets(power):
    model, batch = make("mlp")
    whole = part(model, batch, 0, N, power=power)
    a, b = part(model, batch, 0, 10, power=power), part(model, batch, 10, N, size=7, power=power)
    assert_close_to(a + b, whole, tolerance=1e-6)
    assert ((a + b).n_samples, (a + b).n_batches, (a + b).batch_size) == (N, a.n_batches + b.n_batches, 7)
    assert_close_to(whole - a, b, tolerance=1e-5)
    assert (whole - a).n_samples == N - 10
    assert all(bool((value >= 0).all()) for value in (whole - a).values())


def test_a_difference_is_never_negative():
    whole = Importance.from_dict({"w": torch.tensor([1.0, 1.0])}, 4)
    rest = whole - Importance.from_dict({"w": torch.tensor([4.5, 1.0])}, 1)
    assert rest["w"].tolist() == [0.0, 1.0]


def test_batch_importances_pool_by_batches_and_have_no_difference():
    model, batch = make("mlp")
    a = part(model, batch, 0, 8, estimator="batch")
    b = part(model, batch, 8, 30, estimator="batch")  # five full batches and a ragged one
    assert_close_to(a + b, part(model, batch, 0, 30, estimator="batch"), tolerance=1e-6)
    assert (a + b).n_batches == 8
    with pytest.raises(ValueError, match="has no difference"):
        (a + b) - a
    with pytest.raises(ValueError, match=r"batch sizes must agree .* got 4 and 7"):
        a + part(model, batch, 8, 30, size=7, estimator="batch")


def plain(n=4, **settings):
    return Importance.from_dict({"w": torch.ones(2)}, n, **settings)


@pytest.mark.parametrize(
    "other, message",
    [
        (plain(estimator="mc"), "estimator must agree, got 'per_sample' and 'mc'"),
        (plain(power=1), "power must agree, got 2 and 1"),
        (Importance.from_dict({"v": torch.ones(2)}, 1), "parameters must agree, got '[vw]'"),
        (Importance.from_dict({"w": torch.ones(3)}, 1), r"shapes must agree, got \[2\] and \[3\] for 'w'"),
    ],
)
@pytest.mark.parametrize("operation", ["__add__", "__sub__"])
def test_different_things_are_not_combined(operation, other, message):
    with pytest.raises(ValueError, match=message):
        getattr(plain(), operation)(other)


def test_a_part_as_large_as_the_whole_cannot_be_removed():
    with pytest.raises(ValueError, match="must be smaller than the whole, got 4 of 4"):
        plain() - plain()
    with pytest.raises(TypeError):
        plain() + 1


def test_importances_computed_elsewhere():
    given = {"w": torch.ones(2), "v": torch.zeros(1, dtype=torch.float64)}
    found = Importance.from_dict(given, 10, batch_size=4)
    assert found.n_batches == 3
    assert found["w"].data_ptr() == given["w"].data_ptr()
    assert dict(found.coverage) == dict.fromkeys(given, "fallback: computed elsewhere")
    assert "n_samples=10" in repr(found)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (({}, 1), ValueError, "at least one parameter"),
        (({"w": torch.ones(1)}, 0), ValueError, "n_samples must be at least 1, got 0"),
        (({"w": torch.ones(1)}, 2.5), TypeError, "n_samples must be a whole number, got 2.5"),
        (({"w": torch.tensor([1.0, -0.5])}, 1), ValueError, "w must be non-negative, got -0.5"),
        (({"w": torch.ones(1, dtype=torch.float16)}, 1), TypeError, "w must be float32 or float64, got"),
        (({"w": [1.0]}, 1), TypeError, "w must be float32 or float64, got list"),
    ],
)
def test_what_is_no_importance_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        Importance.from_dict(*arguments)


@pytest.mark.parametrize("count", [np.int64(3), torch.tensor(3), True], ids=["numpy", "tensor", "bool"])
def test_counts_of_any_kind_can_be_saved_and_read_again(tmp_path, count):
    taken = Importance.from_dict({"w": torch.ones(2)}, count, batch_size=count, n_batches=count)
    taken.save(tmp_path / "taken.safetensors")
    read = Importance.load(tmp_path / "taken.safetensors")
    for found in (read.n_samples, read.batch_size, read.n_batches):
        assert type(found) is int
        assert found == int(count)


def test_save_and_load(tmp_path):
    model, batch = make("cnn")
    model = model.to(memory_format=torch.channels_last)
    saved = part(model, batch, 0, N)
    path = tmp_path / "importance.safetensors"
    saved.save(path)
    loaded = Importance.load(path)
    assert list(loaded) == list(saved)
    assert all(torch.equal(loaded[name], saved[name]) for name in saved)
    for attribute in ("n_samples", "estimator", "power", "batch_size", "n_batches", "coverage"):
        assert getattr(loaded, attribute) == getattr(saved, attribute)
    (loaded + saved).save(path)
    assert Importance.load(path).n_samples == 2 * N
    assert [entry.name for entry in tmp_path.iterdir()] == ["importance.safetensors"]
    (tmp_path / "other").touch()
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode


def test_tensors_that_share_memory_can_be_saved(tmp_path):
    memory = torch.arange(6.0)
    shared = Importance.from_dict({"a": memory, "b": memory[2:4], "c": torch.ones(1).expand(3)}, 1)
    shared.save(tmp_path / "i")
    assert Importance.load(tmp_path / "i")["b"].tolist() == [2.0, 3.0]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "i"
    plain().save(path)
    before = path.read_bytes()

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        plain(9).save(path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["i"]


def test_a_reader_never_sees_half_a_file(tmp_path):
    path = tmp_path / "i"
    big = [Importance.from_dict({"w": torch.full((200_000,), float(n))}, n) for n in (1, 2)]
    big[0].save(path)
    done = threading.Event()

    def write():
        for n in range(20):
            big[n % 2].save(path)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        seen = Importance.load(path)
        assert bool((seen["w"] == seen.n_samples).all())
    writer.join()


def test_another_file_is_not_taken_for_importances(tmp_path):
    from safetensors.torch import save_file

    save_file({"w": torch.ones(1)}, tmp_path / "weights")
    with pytest.raises(ValueError, match="must hold saved importances"):
        Importance.load(tmp_path / "weights")


def test_without_safetensors_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    for call in (lambda: plain().save(tmp_path / "i"), lambda: Importance.load(tmp_path / "i")):
        with pytest.raises(ImportError, match=r"pip install 'unlearn_ext\[safetensors\]'"):
            call()


def test_importing_the_package_does_not_load_optional_libraries():
    code = "import sys, unlearn_ext; print({'sklearn', 'matplotlib', 'safetensors'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
