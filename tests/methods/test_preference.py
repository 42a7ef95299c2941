"""Gradient difference, NPO, SimNPO and RMU against their formulas, written out sample by sample."""

import copy
import math

import pytest
import torch
from methods.models import make
from torch import nn
from torch.utils.data import DataLoader

import unlearn_ext as ux
from unlearn_ext.methods.preference import sequence_log_probability
from unlearn_ext.methods.rmu import activations
from unlearn_ext.tasks import CausalLM, Classification, Regression

NAMES = ("gradient_difference", "npo", "simnpo", "rmu")
RATE, STEPS = 1e-2, 3
WORDS = 7


class Words(nn.Module):
    """A causal model of two layers, in float64."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.look_up = nn.Embedding(WORDS, 6)
        self.inner = nn.Linear(6, 6)
        self.head = nn.Linear(6, WORDS)
        self.double()

    def forward(self, input_ids):
        so_far = self.look_up(input_ids).cumsum(1)
        return self.head(torch.tanh(self.inner(so_far)))


def texts(seed, count=5, length=6):
    """One batch of sequences whose ends are padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (count, length), generator=generator)
    labels = ids.clone()
    for row in range(count):
        labels[row, length - row % 3 :] = -100
    return {"input_ids": ids, "labels": labels}


def token_logs(model, batch):
    """Log-probabilities of the tokens that count, a list per sequence."""
    logits = model(batch["input_ids"])
    found = []
    for row, labels in zip(logits, batch["labels"], strict=True):
        logs = [row[t].log_softmax(-1)[labels[t + 1]] for t in range(len(labels) - 1) if labels[t + 1] >= 0]
        found.append(torch.stack(logs))
    return found


def mean_loss(model, batch):
    return torch.stack([-logs.mean() for logs in token_logs(model, batch)]).mean()


def by_hand(model, loss_of):
    """AdamW on a loss written out, the learning rate falling to 0."""
    model = copy.deepcopy(model)
    original = copy.deepcopy(model).requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), RATE, weight_decay=0.01)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
        optimizer.zero_grad()
        loss_of(model, original).backward()
        optimizer.step()
    return model


def largest_difference(a, b):
    return max(
        float((x - y).detach().abs().max()) for x, y in zip(a.parameters(), b.parameters(), strict=True)
    )


FORGET, RETAIN = texts(1), texts(2)
CAP = 2.0


def gradient_difference_loss(model, original):
    losses = torch.stack([-logs.mean() for logs in token_logs(model, FORGET)])
    return -0.7 * losses.clamp(max=CAP).mean() + 1.5 * mean_loss(model, RETAIN)


def npo_loss(model, original):
    ratios = [
        logs.sum() - before.sum()
        for logs, before in zip(token_logs(model, FORGET), token_logs(original, FORGET), strict=True)
    ]
    terms = [2 / 0.3 * torch.log1p(torch.exp(0.3 * ratio)) for ratio in ratios]
    return 0.7 * torch.stack(terms).mean() + 1.5 * mean_loss(model, RETAIN)


def simnpo_loss(model, original):
    terms = [
        2 / 0.3 * torch.log1p(torch.exp(0.3 * (logs.mean() + 0.2))) for logs in token_logs(model, FORGET)
    ]
    return 0.7 * torch.stack(terms).mean() + 1.5 * mean_loss(model, RETAIN)


WRITTEN_OUT = {
    "gradient_difference": (gradient_difference_loss, {"cap": CAP}),
    "npo": (npo_loss, {"beta": 0.3}),
    "simnpo": (simnpo_loss, {"beta": 0.3, "margin": 0.2}),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
@pytest.mark.parametrize("kind", ["list", "loader"])
def test_formulas(name, kind):
    loss_of, settings = WRITTEN_OUT[name]
    model = Words()
    want = by_hand(model, loss_of)
    rows = [{key: value[i] for key, value in FORGET.items()} for i in range(5)]
    forget = [FORGET] if kind == "list" else DataLoader(rows, 5)
    result = ux.METHODS[name](
        model,
        forget,
        [RETAIN],
        task=CausalLM(),
        forget_weight=0.7,
        retain_weight=1.5,
        epochs=STEPS,
        lr=RATE,
        **settings,
    )
    assert largest_difference(model, want) < 1e-10
    assert largest_difference(model, Words()) > 1e-3
    assert result.hyperparameters["task"] == "CausalLM(ignore_index=-100)"
    assert result.after["forget_loss"] != result.before["forget_loss"]


def test_npo_compares_with_the_original_whatever_the_order_of_the_loader():
    """A list's reference is worked out once, a loader's by a copy: both are the original's."""
    rows = [{key: value[i] for key, value in texts(4, 12).items()} for i in range(12)]
    settings = {"task": CausalLM(), "epochs": 4, "lr": RATE}
    models = [Words(), Words()]
    shuffled = DataLoader(rows, 4, shuffle=True, generator=torch.Generator().manual_seed(5))
    seen = []

    class Noted:
        def __iter__(self):
            for batch in shuffled:
                seen.append(batch)
                yield batch

    ux.methods.npo(models[0], Noted(), [RETAIN], **settings)
    assert len({tuple(batch["input_ids"].flatten().tolist()) for batch in seen}) > 3

    original = Words()
    seen = seen[-15:-3]  # without those of the measurements before and after
    optimizer = torch.optim.AdamW(models[1].parameters(), RATE, weight_decay=0.01)
    for step, batch in enumerate(seen):
        optimizer.param_groups[0]["lr"] = RATE * (1 - step // 3 / 4)
        ratios = sequence_log_probability(models[1], batch, CausalLM()) - sequence_log_probability(
            original, batch, CausalLM()
        )
        optimizer.zero_grad()
        (20 * torch.log1p(torch.exp(0.1 * ratios)).mean() + mean_loss(models[1], RETAIN)).backward()
        optimizer.step()
    assert largest_difference(*models) < 1e-10


def test_a_sequence_log_probability_sums_over_its_tokens():
    model = Words()
    want = [float(logs.sum().detach()) for logs in token_logs(model, FORGET)]
    assert sequence_log_probability(model, FORGET, CausalLM()).tolist() == pytest.approx(want, rel=1e-12)
    x, y = torch.randn(4, 3).double(), torch.tensor([0, 2, 1, 0])
    linear = nn.Linear(3, 3).double()
    want = linear(x).log_softmax(1)[range(4), y]
    assert sequence_log_probability(linear, (x, y), Classification()).tolist() == pytest.approx(want.tolist())


def test_rmu_formula():
    model, steering = Words(), 3.0
    original = Words()
    torch.manual_seed(7)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(7)))
    torch.manual_seed(seed)
    direction = torch.rand(6)
    goal = (steering * direction / direction.norm()).double()

    def distance(batch, found, wanted):
        terms = []
        for row in range(5):
            places = [t for t in range(5) if batch["labels"][row, t + 1] >= 0]
            terms.append(((found[row, places] - wanted(row, places)) ** 2).mean())
        return torch.stack(terms).mean()

    def inner(model, batch):
        return model.inner(model.look_up(batch["input_ids"]).cumsum(1))

    want = Words()
    kept = inner(original, RETAIN).detach()
    optimizer = torch.optim.AdamW(want.parameters(), RATE, weight_decay=0.01)
    for _ in range(STEPS):
        loss = distance(FORGET, inner(want, FORGET), lambda row, places: goal)
        loss = loss + 5 * distance(RETAIN, inner(want, RETAIN), lambda row, places: kept[row, places])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    ux.methods.rmu(
        model,
        [FORGET],
        [RETAIN],
        layer="inner",
        steering=steering,
        retain_weight=5.0,
        epochs=STEPS,
        lr=RATE,
        task=CausalLM(),
        generator=torch.Generator().manual_seed(7),
    )
    assert largest_difference(model, want) < 1e-6
    assert torch.equal(model.head.weight, original.head.weight)  # behind the layer nothing changes


def test_rmu_by_default_steers_to_twice_the_mean_norm():
    model = Words()
    with torch.no_grad():
        values, counted = activations(model, "inner", FORGET, CausalLM())
    want = 2 * float(values[counted].norm(dim=-1).mean())
    result = ux.methods.rmu(model, [FORGET], [RETAIN], layer="inner", epochs=1, task=CausalLM())
    assert result.hyperparameters["steering"] == pytest.approx(want)


def test_rmu_of_a_layer_with_one_vector_per_sample():
    """Its formula, at the one place there is; and a retain set that weighs nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    forget, retain = ((torch.randn(5, 3).double(), torch.arange(5) % 3) for _ in range(2))
    want = copy.deepcopy(model)
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(7)))
    torch.manual_seed(seed)
    direction = torch.rand(4)
    goal = (2.0 * direction / direction.norm()).double()
    optimizer = torch.optim.AdamW(want[0].parameters(), RATE, weight_decay=0.01)
    for _ in range(3):
        optimizer.zero_grad()
        (want[0](forget[0]) - goal).square().mean(1).mean().backward()
        optimizer.step()
    settings = {"layer": "0", "steering": 2.0, "epochs": 3, "lr": RATE, "retain_weight": 0.0}
    generator = torch.Generator().manual_seed(7)
    ux.methods.rmu(model, [forget], [retain], **settings, task=Classification(), generator=generator)
    assert largest_difference(model, want) < 1e-6


@pytest.mark.parametrize(
    "settings, message",
    [
        ({}, "layer must name a module of the model, got None; there are look_up, inner, head"),
        ({"layer": "outer"}, "layer must name a module of the model, got 'outer'"),
        ({"layer": "inner", "retain_weight": -1.0}, "retain_weight must be finite and >= 0"),
        ({"layer": "inner", "steering": math.nan}, "steering must be finite"),
    ],
)
def test_rmu_says_what_is_wrong(settings, message):
    with pytest.raises(ValueError, match=message):
        ux.methods.rmu(Words(), [FORGET], [RETAIN], task=CausalLM(), **settings)


def test_rmu_refuses_activations_of_another_form():
    model, forget, retain = make("resnet")
    before = copy.deepcopy(model.state_dict())
    layer = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    with pytest.raises(ValueError, match=r"must give out \[N, D\] or \[N, T, D\], got \["):
        ux.methods.rmu(model, forget, retain, layer=layer)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("name", NAMES)
def test_bad_calls_leave_the_model_as_it_was(name):
    model = Words()
    extra = {"layer": "inner"} if name == "rmu" else {}
    for settings, message in (
        ({"epochs": -1}, "epochs must be >= 0"),
        ({"retain_weight": math.inf}, "retain_weight must be finite"),
        ({"include": "nothing"}, "nothing"),
    ):
        with pytest.raises(ValueError, match=message):
            ux.METHODS[name](model, [FORGET], [RETAIN], task=CausalLM(), **extra, **settings)
    with pytest.raises(ValueError, match=f"{name}: retain must be given"):
        ux.METHODS[name](model, [FORGET], task=CausalLM(), **extra)
    with pytest.raises(ValueError, match="one-shot"):
        ux.METHODS[name](model, iter([FORGET]), [RETAIN], task=CausalLM(), **extra)
    assert largest_difference(model, Words()) == 0


@pytest.mark.parametrize("name, value", [("npo", 0.0), ("simnpo", -1.0)])
def test_beta_must_be_positive(name, value):
    with pytest.raises(ValueError, match=f"{name}: beta must be finite and > 0"):
        ux.METHODS[name](Words(), [FORGET], [RETAIN], task=CausalLM(), beta=value)


def test_numbers_have_no_probabilities():
    data = [(torch.randn(4, 3), torch.randn(4, 1))]
    with pytest.raises(NotImplementedError, match="give cap for tasks without classes"):
        ux.methods.gradient_difference(nn.Linear(3, 1), data, data, task=Regression())
    with pytest.raises(NotImplementedError, match="npo"):
        ux.methods.npo(nn.Linear(3, 1), data, data, task=Regression())
    result = ux.methods.gradient_difference(nn.Linear(3, 1), data, data, task=Regression(), cap=5.0, epochs=1)
    assert result.method == "gradient_difference"


@pytest.mark.parametrize("name", NAMES)
def test_a_frozen_parameter_and_what_exclude_names_keep_their_bits(name):
    model = Words()
    model.look_up.weight.requires_grad_(False)
    extra = {"layer": "inner"} if name == "rmu" else {}
    ux.METHODS[name](
        model, [FORGET], [RETAIN], task=CausalLM(), epochs=2, lr=RATE, exclude="inner.bias", **extra
    )
    original = Words()
    assert torch.equal(model.look_up.weight, original.look_up.weight)
    assert torch.equal(model.inner.bias, original.inner.bias)
    assert not torch.equal(model.inner.weight, original.inner.weight)
    assert not model.look_up.weight.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_one_loader_of_both_sets_is_the_same_as_two(name):
    extra = {"layer": "inner"} if name == "rmu" else {}
    settings = {"task": CausalLM(), "epochs": 2, "lr": RATE, **extra}
    models = [Words(), Words()]
    pairs = [{"forget": texts(i), "retain": texts(10 + i), "index": i} for i in range(3)]
    forget, retain = ux.data.forget_and_retain(pairs)
    assert len(forget) == len(retain) == 3
    for model, sets in zip(
        models, ((forget, retain), ([p["forget"] for p in pairs], [p["retain"] for p in pairs])), strict=True
    ):
        ux.METHODS[name](model, *sets, generator=torch.Generator().manual_seed(0), **settings)
    assert largest_difference(*models) < 1e-12


def test_a_loader_without_one_of_the_sets_is_refused_when_read():
    forget, retain = ux.data.forget_and_retain([{"forget": FORGET}])
    assert list(forget) == [FORGET]
    with pytest.raises(ValueError, match=r"batch 0 must be a mapping with 'retain', got \['forget'\]"):
        list(retain)
    with pytest.raises(ValueError, match="one-shot"):
        ux.data.forget_and_retain(iter([]))
