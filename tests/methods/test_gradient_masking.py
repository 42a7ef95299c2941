import copy
import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from methods.models import FAMILIES, make
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import unlearn_ext as ux
from unlearn_ext import METHODS, demo, gradient_masking, metrics, ops, salun, select_mask
from unlearn_ext.optim.row_gradients import RowGradients


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    def words(tensor):
        return tensor.contiguous().view(-1).view(torch.uint8)

    return all(torch.equal(words(a[name]), words(b[name])) for name in a)


# What it does to digits.


@functools.cache
def digits():
    train, test = demo.load_digits()
    return train, test, demo.train(train, epochs=10, seed=0)[0].state_dict()


def trained(weights):
    model = demo.make_model(0)
    model.load_state_dict(weights)
    return model


def loader(data):
    return DataLoader(data, 64, shuffle=True)


METHODS_HERE = {
    "gradient_masking": gradient_masking,
    "joint": functools.partial(gradient_masking, objective="joint"),
    "adamw": functools.partial(gradient_masking, optimizer="adamw"),
    "salun": functools.partial(salun, epochs=5),
}


@pytest.mark.parametrize("name", METHODS_HERE)
def test_a_class_is_forgotten(name):
    train, test, weights = digits()
    forget, retain = ux.data.split(train, classes=8)
    forget_test, retain_test = ux.data.split(test, classes=8)
    model = trained(weights)
    before = metrics.accuracy(model, loader(retain_test))
    METHODS_HERE[name](model, loader(forget), loader(retain), generator=seeded())
    assert metrics.accuracy(model, loader(forget_test)) <= 0.2
    assert metrics.accuracy(model, loader(retain_test)) >= before - 0.05


def test_random_neurons_forget_less_or_break_more():
    train, test, weights = digits()
    forget, retain = ux.data.split(train, classes=8)
    forget_test, retain_test = ux.data.split(test, classes=8)
    lost = {}
    for score in ("ratio", "random"):
        model = trained(weights)
        gradient_masking(model, loader(forget), loader(retain), score=score, generator=seeded())
        lost[score] = (
            metrics.accuracy(model, loader(forget_test)) + 1 - metrics.accuracy(model, loader(retain_test))
        )
    assert lost["ratio"] < lost["random"] - 0.05


def confidence(model, data):
    x, y = data[:]
    with torch.no_grad():
        return float(model.eval()(x).softmax(-1).gather(1, y[:, None]).mean())


@pytest.mark.parametrize("method", [gradient_masking, functools.partial(salun, epochs=5)])
def test_random_samples_lose_confidence_and_others_keep_their_accuracy(method):
    """A network that generalises goes on to classify them: retraining without them changes little, too."""
    train, test, weights = digits()
    forget, retain = ux.data.split(train, ids=range(0, 1000, 20))
    model = trained(weights)
    before, test_before = confidence(model, forget), metrics.accuracy(model, loader(test))
    method(model, loader(forget), loader(retain), generator=seeded())
    assert confidence(model, forget) < before - 0.01
    assert metrics.accuracy(model, loader(test)) >= test_before - 0.05


@functools.cache
def mislabelled():
    """Most training images of a 3 are labelled 8."""
    train, test, _ = digits()
    x, y = train[:]
    wrong = (y == 3).nonzero().flatten()[:80]
    labels = y.clone()
    labels[wrong] = 8
    data = TensorDataset(x, labels)
    return (
        data,
        wrong,
        TensorDataset(x[wrong], y[wrong]),
        test,
        demo.train(data, epochs=10, seed=0)[0].state_dict(),
    )


def test_wrong_labels_are_corrected_by_right_ones():
    data, wrong, corrected, test, weights = mislabelled()
    model = trained(weights)
    before = metrics.accuracy(model, loader(test))
    assert metrics.accuracy(model, loader(corrected)) < 0.3
    _, retain = ux.data.split(data, ids=wrong.tolist())
    gradient_masking(model, loader(corrected), loader(retain), objective="relabel", generator=seeded())
    assert metrics.accuracy(model, loader(corrected)) > 0.8
    assert metrics.accuracy(model, loader(test)) > max(before, 0.95)


def test_wrong_labels_are_forgotten():
    data, wrong, corrected, test, weights = mislabelled()
    forget, retain = ux.data.split(data, ids=wrong.tolist())
    model = trained(weights)
    salun(model, loader(forget), loader(retain), epochs=5, generator=seeded())
    assert metrics.accuracy(model, loader(corrected)) > 0.8
    assert metrics.accuracy(model, loader(test)) > 0.95


# Invariants.


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["element", "neuron", "layer"])
def test_what_is_masked_keeps_its_bits(family, granularity, optimizer):
    model, forget, retain = make(family)
    before, storage = state(model), [p.data_ptr() for p in model.parameters()]
    masks = select_mask(ux.saliency(model, forget, retain), 0.3, granularity=granularity)
    result = gradient_masking(
        model,
        forget,
        retain,
        masks=masks,
        objective="joint",
        epochs=2,
        lr=0.05,
        weight_decay=0.1,
        optimizer=optimizer,
        generator=seeded(),
    )
    parameters = dict(model.named_parameters())
    after = state(model)
    free = {name: ops.unpack_mask(mask, list(parameters[name].shape)) for name, mask in masks.items()}
    for name, mask in free.items():
        assert same({"": before[name][~mask]}, {"": after[name][~mask]})
    for name, _ in model.named_buffers():
        assert torch.equal(before[name], after[name])
    moved = sum(int((before[n] != after[n]).sum()) for n in parameters)
    assert moved > 0.5 * sum(int(mask.sum()) for mask in free.values())
    assert result.changed == moved / sum(p.numel() for p in parameters.values())
    assert [p.data_ptr() for p in model.parameters()] == storage
    assert model.training
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert result.history[0]["selected"] == pytest.approx(
        sum(int(mask.sum()) for mask in free.values()) / sum(mask.numel() for mask in free.values())
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["gradient_masking", "salun"])
def test_the_same_seed_gives_the_same_weights(family, name):
    outcomes = []
    for seed in (1, 1, 2):
        model, forget, retain = make(family)
        rng = torch.get_rng_state()
        METHODS[name](model, forget, retain, density=0.5, epochs=2, lr=0.05, generator=seeded(seed))
        assert torch.equal(rng, torch.get_rng_state())
        outcomes.append(state(model))
    assert same(outcomes[0], outcomes[1])
    assert not same(outcomes[0], outcomes[2])


def test_salun_moves_statistics_and_half_of_the_scalars():
    model, forget, retain = make("resnet")
    before = state(model)
    result = salun(model, forget, retain, epochs=2)
    assert result.history[0]["selected"] == pytest.approx(0.5, abs=1e-3)
    assert result.changed <= 0.5 + 1e-3
    assert not torch.equal(before["1.running_mean"], model.state_dict()["1.running_mean"])


@pytest.mark.parametrize(
    "objective", ["random_relabel", "ascend", "relabel", "finetune", "joint", "alternate"]
)
@pytest.mark.parametrize("family", ["resnet", "vit", "lstm"])
def test_every_objective_does_what_its_name_says(family, objective):
    model, forget, retain = make(family)

    def losses(data):
        with torch.no_grad():
            return float(torch.cat([ux.losses.cross_entropy(model.eval(), batch) for batch in data]).mean())

    before = losses(forget), losses(retain)
    settings = {"score": "grad", "density": 1.0, "min_depth": 0.0, "epochs": 10, "generator": seeded()}
    gradient_masking(
        model, forget, retain, objective=objective, lr=0.3 if objective == "ascend" else 0.03, **settings
    )
    after = losses(forget), losses(retain)
    if objective == "relabel":
        assert after[0] < before[0]
    elif objective == "finetune":
        assert after[1] < before[1]
    else:
        assert after[0] > before[0]


@pytest.mark.parametrize(
    "objective, density, lr, epochs",
    [("random_relabel", 0.05, 0.003, 10), ("ascend", 0.05, 0.03, 10), ("relabel", 0.2, 0.02, 50)],
)
def test_what_is_not_given_depends_on_the_objective(objective, density, lr, epochs):
    """Two batches to put right: fifty passes are a hundred steps."""
    model = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 3))
    forget = [(torch.randn(4, 4), torch.arange(4) % 3)] * 2
    result = gradient_masking(model, forget, score="fisher", objective=objective, generator=seeded())
    found = {name: result.hyperparameters[name] for name in ("density", "lr", "epochs", "retain_weight")}
    assert found == {"density": density, "lr": lr, "epochs": epochs, "retain_weight": 0.0}
    assert sum(entry.get("steps", 0) for entry in result.history) == 2 * epochs


def test_every_step_reads_the_retain_set_where_there_is_one():
    read = []

    def loss_fn(model, batch):
        read.append(int(batch[1][0]))
        return ux.losses.cross_entropy(model, batch)

    model = nn.Linear(4, 3)
    forget, retain = ([(torch.randn(4, 4), torch.full((4,), label))] * 3 for label in (0, 2))
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    settings = {"masks": masks, "objective": "relabel", "epochs": 1, "loss_fn": loss_fn}
    result = gradient_masking(model, forget, retain, **settings)
    assert read == [0, 2] * 3
    assert result.hyperparameters["retain_weight"] == 1.0
    read.clear()
    gradient_masking(model, forget, retain, **settings, retain_weight=0.0)
    assert read == [0] * 3


def test_random_labels_are_never_the_true_ones_and_ignored_ones_stay():
    seen = []

    def loss_fn(model, batch):
        seen.append(ux.data.targets(batch))
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none", ignore_index=-100)

    labels = torch.tensor([0, 1, 2, -100] * 50)
    forget = [(torch.randn(200, 4), labels)]
    model = nn.Linear(4, 3)
    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    gradient_masking(model, forget, masks=masks, epochs=5, loss_fn=loss_fn, generator=seeded())
    drawn = torch.stack(seen[-5:])
    assert bool((drawn[:, labels < 0] == -100).all())
    assert not bool((drawn == labels)[:, labels >= 0].any())
    assert set(drawn[:, labels == 0].flatten().tolist()) == {1, 2}
    assert not torch.equal(drawn[0], drawn[1])


@pytest.mark.parametrize("error", [FloatingPointError, KeyboardInterrupt])
def test_a_failure_leaves_the_model_as_it_was(error):
    model, forget, retain = make("resnet")
    model[0].weight.grad = torch.ones_like(model[0].weight)
    grad, before, calls = model[0].weight.grad, state(model), 0

    def loss_fn(model, batch):
        nonlocal calls
        calls += 1
        values = ux.losses.cross_entropy(model, batch)
        if calls > 10:
            if error is KeyboardInterrupt:
                raise error
            values = values * torch.nan
        return values

    masks = {name: torch.ones_like(p, dtype=torch.bool) for name, p in model.named_parameters()}
    with pytest.raises(error):
        gradient_masking(
            model, forget, retain, masks=masks, freeze_norm_stats=False, epochs=30, lr=0.1, loss_fn=loss_fn
        )
    assert calls > 10
    assert same(before, state(model))
    assert model[0].weight.grad is grad
    assert model.training
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"objective": "forget"}, "objective must be one of"),
        ({"optimizer": "lion"}, "optimizer must be"),
        ({"epochs": -1}, "epochs must be"),
        ({"density": 2.0}, "density must lie"),
        ({"retain": None}, "retain must be given for the score"),
        ({"retain": None, "score": "grad", "objective": "joint"}, "retain must be given for the objective"),
        ({"retain": None, "score": "grad", "retain_weight": 1.0}, "retain must be given for retain_weight"),
        ({"retain_weight": -1.0}, "retain_weight must be finite and >= 0, got -1.0"),
        ({"retain_weight": float("nan")}, "retain_weight must be finite and >= 0, got nan"),
        ({"masks": {"weight": torch.ones(3, 4, dtype=torch.bool)}}, "every trainable parameter"),
        (
            {
                "masks": {
                    "weight": torch.zeros(2, dtype=torch.uint8),
                    "bias": torch.zeros(1, dtype=torch.uint8),
                }
            },
            "at least one scalar",
        ),
        (
            {"masks": {"weight": torch.ones(4, dtype=torch.bool), "bias": torch.ones(3, dtype=torch.bool)}},
            "the parameter's shape",
        ),
    ],
)
def test_bad_arguments_are_refused(settings, message):
    data = [(torch.randn(4, 4), torch.arange(4) % 3)]
    with pytest.raises(ValueError, match=message):
        gradient_masking(nn.Linear(4, 3), data, **{"retain": data, **settings})


def test_frozen_parameters_need_no_mask_and_stay_frozen():
    model, forget, retain = make("lstm")
    model.embedding.weight.requires_grad_(False)
    before = model.embedding.weight.clone()
    gradient_masking(model, forget, retain, density=1.0, min_depth=0.0, epochs=2, generator=seeded())
    assert torch.equal(before, model.embedding.weight)
    assert not model.embedding.weight.requires_grad


# Weight gradients for selected rows only.

LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), (3, 4, 5)),
    "linear without bias": (lambda: nn.Linear(5, 7, bias=False), (3, 5)),
    "conv1d": (lambda: nn.Conv1d(4, 8, 3, dilation=2, padding=1), (2, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=(1, 0), stride=2), (2, 4, 9, 8)),
    "conv2d valid": (lambda: nn.Conv2d(4, 6, 3, padding="valid"), (2, 4, 5, 5)),
    "conv2d same": (lambda: nn.Conv2d(4, 6, 4, padding="same"), (2, 4, 5, 5)),
    "conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    "conv2d channels last": (lambda: nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), (2, 4, 5, 5)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2), (2, 4, 5, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 4, 2), (2, 2, 3, 3, 3)),
    "unbatched": (lambda: nn.Conv2d(4, 6, 3), (4, 5, 5)),
    "attention": (lambda: Attention(), (2, 3, 4)),
}


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x):
        return self.inner(x, x, x)[0]


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_rows_have_the_gradients_of_plain_autograd(name, first):
    torch.manual_seed(0)
    make_layer, shape = LAYERS[name]
    layer = make_layer().double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=not first)
    weights = {p: torch.tensor([0, 3]) for p in layer.parameters() if p.ndim > 1}
    outcomes = []
    for mode in (None, RowGradients(weights)):
        if mode is None:
            y = layer(x)
        else:
            with mode:
                y = layer(x)
        wanted = [*layer.parameters(), *([] if first else [x])]
        outcomes.append((y, torch.autograd.grad((y.cos() * y).sum(), wanted)))
    assert torch.equal(outcomes[0][0], outcomes[1][0])
    for p, plain, got in zip(layer.parameters(), outcomes[0][1], outcomes[1][1], strict=False):
        if p in weights:
            torch.testing.assert_close(got[weights[p]], plain[weights[p]])
            if mode.calls and name not in ("grouped",):
                rest = [row for row in range(len(p)) if row not in (0, 3)]
                assert not bool(got[rest].any())
        else:
            torch.testing.assert_close(got, plain)
    if not first:
        torch.testing.assert_close(outcomes[0][1][-1], outcomes[1][1][-1])
    assert mode.calls == (name not in ("conv2d same", "unbatched", "attention"))


def test_other_weights_and_passes_without_gradients_go_through():
    layer, other = nn.Linear(3, 4), nn.Linear(3, 4)
    with RowGradients({layer.weight: torch.tensor([1])}) as mode:
        other(torch.ones(2, 3))
        with torch.no_grad():
            layer(torch.ones(2, 3))
        with torch.autocast("cpu", torch.bfloat16):
            layer(torch.ones(2, 3))
        assert mode.calls == 0
        layer(torch.ones(2, 3))
        assert mode.calls == 1


def test_the_learning_rate_falls_to_a_tenth_along_a_cosine():
    model, forget, retain = make("resnet")
    result = gradient_masking(model, forget, retain, density=0.2, epochs=4, lr=0.05, generator=seeded())
    rates = [record["lr"] for record in result.history if "lr" in record]
    expected = [0.05 * (0.1 + 0.45 * (1 + math.cos(math.pi * epoch / 4))) for epoch in range(4)]
    assert rates == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("family", ["resnet", "gpt"])
def test_training_on_rows_only_gives_what_full_gradients_give(family, monkeypatch):
    outcomes = []
    for rows in (True, False):
        model, forget, retain = make(family)
        if not rows:
            monkeypatch.setattr(RowGradients, "_led", lambda *_: None)
        result = gradient_masking(model, forget, retain, density=0.2, epochs=3, lr=0.05, generator=seeded())
        assert (result.history[-1]["weight_gradients"] == "selected rows") == rows
        outcomes.append(state(model))
    for name in outcomes[0]:
        torch.testing.assert_close(outcomes[0][name], outcomes[1][name], rtol=1e-4, atol=1e-6)


def test_wrong_or_failing_row_gradients_are_found_out(monkeypatch):
    def wrong(self, func, args, kwargs):
        self.calls += 1
        return 2 * func(*args, **kwargs)

    def failing(self, func, args, kwargs):
        raise RuntimeError("no such kernel")

    expected = None
    for replacement, because in (
        (lambda *_: None, "no plain"),
        (wrong, "disagree"),
        (failing, "no such kernel"),
    ):
        monkeypatch.setattr(RowGradients, "_led", replacement)
        model, forget, retain = make("resnet")
        result = gradient_masking(model, forget, retain, density=0.2, epochs=2, generator=seeded())
        assert result.history[-1]["weight_gradients"] == "full"
        assert because in result.history[-1]["because"]
        expected = expected or state(model)
        assert same(expected, state(model))


def test_nothing_below_the_lowest_selected_layer_is_propagated():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    reached = []
    model[1].register_full_backward_hook(lambda *_: reached.append(1))
    model[3].register_full_backward_hook(lambda *_: reached.append(3))
    masks = {
        name: torch.full_like(p, name.startswith("2."), dtype=torch.bool)
        for name, p in model.named_parameters()
    }
    data = [(torch.randn(4, 4), torch.arange(4) % 3)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of hooks on modules whose inputs need no gradient
        gradient_masking(model, data, masks=masks, epochs=1, generator=seeded())
    assert set(reached) == {3}


def test_the_record_can_be_stored():
    model, forget, retain = make("resnet")
    result = ux.unlearn("gradient_masking", model, forget, retain, epochs=1)
    assert '"granularity": "neuron"' in result.to_json()
    assert copy.deepcopy(result).method == "gradient_masking"
