import copy
import importlib
import json
import math

import pytest
import torch
from methods import models
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader

import unlearn_ext as ux
from unlearn_ext import demo
from unlearn_ext.evaluation.metrics.accuracy import accuracy

QUICK = {"noise_batch": 8, "noise_steps": 2, "repair_steps_min": 2}
NOISE_ONLY = {"impair_epochs": 0, "repair_epochs": 0, "repair_steps_min": 0}


@pytest.fixture(scope="module")
def digits():
    """The demo's network, trained, and its data."""
    train_set, test_set = demo.load_digits()
    model, _ = demo.train(train_set, epochs=10, seed=0)
    return model, train_set, test_set


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture
def phases(monkeypatch):
    """Batches of every training phase, as they come, in ``{phase: [batch, ...]}``."""
    module = importlib.import_module("unlearn_ext.methods.unsir")
    honest, seen = module.train, {}

    def watching(run, phase, data, objective, optimizer, **settings):
        seen[phase] = []

        def watched(model, batch):
            seen[phase].append(batch)
            return objective(model, batch)

        return honest(run, phase, data, watched, optimizer, **settings)

    monkeypatch.setattr(module, "train", watching)
    return seen


class ReadsSequences(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 8, 2, batch_first=True, dropout=0.2)
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.lstm(x)[0][:, -1])


def make_sequences():
    torch.manual_seed(0)
    x, y = torch.randn(18, 5, 3), torch.arange(18) % 3 + 1
    return ReadsSequences(), [(x[:9], y[:9]), (x[9:], y[9:])]


def make(family):
    if family == "sequences":
        return make_sequences()
    model, _, retain = models.make(family)
    return model, retain


@pytest.mark.parametrize("classes", [3, [1, 5]])
def test_digits_are_forgotten_with_default_settings(digits, classes):
    model, train_set, test_set = copy.deepcopy(digits[0]), *digits[1:]
    _, retain = ux.data.split(train_set, classes=classes)
    test_forget, _ = ux.data.split(test_set, classes=classes)
    before = accuracy(model, DataLoader(retain, 256))
    ux.unsir(model, classes, DataLoader(retain, 64, shuffle=True), generator=seeded())
    assert accuracy(model, DataLoader(test_forget, 256)) <= 0.2
    assert before - accuracy(model, DataLoader(retain, 256)) <= 0.05


def test_a_small_part_of_the_retain_set_will_do(digits):
    model, train_set, test_set = copy.deepcopy(digits[0]), *digits[1:]
    _, retain = ux.data.split(train_set, classes=3)
    test_forget, test_retain = ux.data.split(test_set, classes=3)
    part = torch.utils.data.Subset(retain, range(180))
    before = accuracy(model, DataLoader(test_retain, 256))
    ux.unsir(model, 3, DataLoader(part, 32, shuffle=True), generator=seeded(), noise_batch=64)
    assert accuracy(model, DataLoader(test_forget, 256)) <= 0.2
    assert before - accuracy(model, DataLoader(test_retain, 256)) <= 0.1


class WeightGradients(TorchDispatchMode):
    """Counts gradients of weights that backward passes ask for."""

    def __init__(self):
        super().__init__()
        self.asked = self.passes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.passes += 1
            self.asked += bool(args[-1][1])
        return func(*args, **(kwargs or {}))


def test_learning_noise_computes_no_weight_gradient_and_changes_nothing():
    model, retain = make("resnet")
    before = bits(model)
    with WeightGradients() as counted:
        result = ux.unsir(model, 0, retain, noise_batch=8, noise_steps=3, generator=seeded(), **NOISE_ONLY)
    assert counted.passes == 3 * 7  # steps times convolutions
    assert counted.asked == 0
    assert same(before, bits(model))
    assert result.changed == 0
    assert all(p.grad is None for p in model.parameters())
    with WeightGradients() as counted:
        ux.unsir(model, 0, retain, noise_batch=8, noise_steps=0, generator=seeded(), repair_steps_min=0)
    assert counted.asked > 0  # the counter counts


def test_the_released_way_of_learning_noise_moves_batch_statistics_only():
    model, retain = make("resnet")
    before = bits(model)
    ux.unsir(model, 0, retain, **{**QUICK, **NOISE_ONLY}, freeze_bn_during_noise=False, generator=seeded())
    after = bits(model)
    buffers = {name for name, _ in model.named_buffers()}
    assert all(not torch.equal(before[name], after[name]) for name in buffers if "running" in name)
    assert all(torch.equal(before[name], after[name]) for name in before if name not in buffers)


def test_noise_maximises_the_error():
    """Starts near noise_l2 times the number of inputs, the expected square of N(0, 1), and falls below 0."""
    model, retain = make("resnet")
    result = ux.unsir(model, [0, 2], [(x, y.clamp(1, 1)) for x, y in retain], noise_batch=256, **NOISE_ONLY)
    assert [entry["label"] for entry in result.history] == [0, 2]
    for entry in result.history:
        assert len(entry["loss"]) == 40
        assert entry["loss"][0] == pytest.approx(0.1 * 3 * 8 * 8, rel=0.15)
        assert entry["loss"][-1] < 0


def test_a_step_of_the_noise_by_hand():
    """One Adam step moves by lr against the sign of the gradient of -CE + l2 |N|^2."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    retain = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))]
    settings = {**QUICK, "noise_batch": 4, "repair_steps_min": 0, "repair_epochs": 0, "noise_lr": 0.5}
    seen = []
    for steps in (0, 1):
        inputs = []
        with torch.no_grad():
            handle = model.register_forward_pre_hook(
                lambda _, args, into=inputs: into.append(args[0].detach())
            )
        twin = copy.deepcopy(model)
        handle.remove()
        ux.unsir(twin, 1, retain, **{**settings, "noise_steps": steps}, noise_share=0.5, generator=seeded(3))
        (mixed,) = (x for x in inputs if len(x) == 8)  # the impair step's
        seen.append(mixed[4:])  # four noise rows behind the four retain rows
    start = seen[0].clone().requires_grad_()
    target = torch.ones(4, dtype=torch.int64)
    loss = -nn.functional.cross_entropy(model(start), target) + 0.1 * start.square().sum(1).mean()
    (gradient,) = torch.autograd.grad(loss, start)
    torch.testing.assert_close(seen[1], seen[0] - 0.5 * gradient.sign(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("share, rows", [(0.02, 5), (0.5, 200), (0.9, 1800)])
def test_noise_has_its_share_of_the_impair_step_and_the_labels_of_its_classes(phases, share, rows):
    torch.manual_seed(0)
    x, y = torch.randn(200, 3), torch.arange(200) % 2
    retain = [(x[start : start + 32], y[start : start + 32]) for start in range(0, 200, 32)]
    ux.unsir(nn.Linear(3, 4), [3, 2], retain, **QUICK, noise_share=share, impair_epochs=2)
    for epoch in (phases["impair"][:7], phases["impair"][7:]):
        inputs, labels = (torch.cat(parts) for parts in zip(*epoch, strict=True))
        assert len(labels) == 200 + rows
        assert torch.equal(inputs[labels < 2], x)  # none lost, none changed
        counts = [int((labels == label).sum()) for label in (2, 3)]
        assert abs(counts[0] - counts[1]) <= 1
        assert sum(counts) == rows
        shares = [float((batch[1] >= 2).float().mean()) for batch in epoch]
        assert max(shares) - min(shares) < 0.13  # spread over the epoch; the last batch has 8 samples
    assert all(len(batch[0]) == len(given[0]) for batch, given in zip(phases["repair"], retain, strict=False))


def test_every_class_has_a_row_however_small_the_retain_set_is(phases):
    retain = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))]
    ux.unsir(nn.Linear(3, 4), [1, 2, 3], retain, **QUICK)
    assert phases["impair"][0][1].tolist() == [0, 0, 0, 0, 1, 2, 3]


def test_the_released_rows_and_labels(phases):
    """Three channels: three noise images per class, 20 times each, all of them labelled 0."""
    model, retain = make("resnet")
    retain = [(x, y.clamp(1, 1)) for x, y in retain]
    ux.unsir(model, [2, 3], retain, **QUICK, noise_rows="official", noise_label="official")
    inputs, labels = (torch.cat(parts) for parts in zip(*phases["impair"], strict=True))
    assert int((labels == 0).sum()) == 2 * 60
    assert len(inputs[labels == 0].unique(dim=0)) == 2 * 3
    phases.clear()
    ux.unsir(model, [2, 3], retain, **QUICK, noise_rows="official")
    labels = torch.cat([batch[1] for batch in phases["impair"]])
    assert [int((labels == label).sum()) for label in (2, 3)] == [60, 60]


def test_repair_makes_enough_steps_and_its_learning_rate_falls(phases):
    retain = [(torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))] * 4
    model = nn.Linear(3, 4)
    result = ux.unsir(model, 1, retain, noise_batch=2, noise_steps=1)
    repair = [entry for entry in result.history if entry["phase"] == "repair"]
    assert sum(entry["steps"] for entry in repair) == len(phases["repair"]) == 50
    rates = [entry["lr"] for entry in repair]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 1e-6
    result = ux.unsir(model, 1, retain, noise_batch=2, noise_steps=1, repair_epochs=20)
    assert len(phases["repair"]) == 80
    result = ux.unsir(model, 1, retain, **QUICK, repair_schedule="constant")
    assert result.history[-1]["lr"] == 0.003


@pytest.mark.parametrize("family", ["resnet", "vit", "sequences"])
def test_two_steps_on_any_network(family):
    model, retain = make(family)
    frozen = [p for p in model.parameters() if p.ndim > 1][-1].requires_grad_(False)
    kept, pointers = frozen.detach().clone(), [p.data_ptr() for p in model.parameters()]
    flags = [module.training for module in model.modules()]
    random = torch.random.get_rng_state()
    twin = copy.deepcopy(model)
    result = ux.unsir(model, 0, retain, **QUICK, generator=seeded(1))
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(frozen, kept)
    assert not frozen.requires_grad
    assert result.changed > 0.3
    if family == "resnet":
        assert not torch.equal(model[1].running_mean, twin[1].running_mean)
    ux.unsir(twin, 0, retain, **QUICK, generator=seeded(1))
    assert same(bits(model), bits(twin))
    ux.unsir(twin, 0, retain, **QUICK, generator=seeded(2))
    assert not same(bits(model), bits(twin))
    assert json.loads(result.to_json())["hyperparameters"]["noise_share"] == 0.02


def test_mappings_do_as_tuples_do():
    class Named(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, pixel_values, scale):
            return {"logits": self.inner(pixel_values * scale.view(-1, 1, 1, 1))}

    model, retain = make("resnet")
    named = Named(copy.deepcopy(model))
    mapped = [
        {"pixel_values": x, "scale": torch.ones(len(x), dtype=torch.int64), "labels": y} for x, y in retain
    ]
    ux.unsir(model, 0, retain, **QUICK, generator=seeded())
    ux.unsir(named, 0, mapped, **QUICK, generator=seeded())
    assert same(bits(model), bits(named.inner))


@pytest.mark.parametrize("family", ["gpt", "lstm"])
def test_token_ids_are_refused(family):
    model, _, retain = models.make(family)
    with pytest.raises(TypeError, match=r"retain must be one floating-point tensor, got .*token ids"):
        ux.unsir(model, 0, retain)


@pytest.mark.parametrize("phase", ["noise", "impair", "repair"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_all_or_nothing(phase, error):
    model, retain = make("resnet")
    model.eval()
    before, random = bits(model), torch.random.get_rng_state()
    # Forward passes: 2 to measure, 1 for the number of classes, 2 of noise, 2 and 2.
    count = {"noise": 5, "impair": 7, "repair": 9}[phase]

    def fail(module, args, output):
        nonlocal count
        count -= 1
        if count == 0 and error is KeyboardInterrupt:
            raise error
        return output * math.nan if count == 0 else output

    handle = model.register_forward_hook(fail)
    with pytest.raises(error, match=None if error is KeyboardInterrupt else f"unsir: .* phase '{phase}'"):
        ux.unsir(model, 0, retain, **QUICK, generator=seeded())
    handle.remove()
    assert count == 0
    assert same(before, bits(model))
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), random)


class Secret:
    """Fails whatever is done with it."""

    def __getattribute__(self, name):
        raise AssertionError("forget data was read")


def test_by_name_it_reads_the_labels_of_the_forget_set_only():
    model, retain = make("resnet")
    twin = copy.deepcopy(model)
    forget = [(Secret(), torch.tensor([0, 0])), (Secret(), torch.tensor([0]))]
    result = ux.unlearn("unsir", model, forget, retain, **QUICK, generator=seeded())
    assert result.hyperparameters["forget_classes"] == [0]
    ux.METHODS["unsir"](twin, Secret(), retain, forget_classes=0, **QUICK, generator=seeded())
    assert same(bits(model), bits(twin))
    with pytest.raises(ValueError, match="forget or forget_classes must be given"):
        ux.METHODS["unsir"](model, None, retain)


@pytest.mark.parametrize(
    "classes, settings, message",
    [
        ([], {}, "forget_classes must be distinct and at least one"),
        ([1, 1], {}, "forget_classes must be distinct"),
        (-1, {}, "forget_classes must be integers >= 0, got -1"),
        (4, {}, r"forget_classes must lie in \[0, 4\), got 4"),
        (1, {}, "retain must not hold samples of the classes to forget"),
        (0, {"noise_share": 1.0}, r"noise_share must lie in \(0, 1\), got 1.0"),
        (0, {"noise_batch": 0}, "noise_batch must be finite and >= 1, got 0"),
        (0, {"impair_lr": math.inf}, "impair_lr must be finite"),
        (0, {"noise_rows": "some"}, "noise_rows must be one of all, official, got 'some'"),
    ],
)
def test_mistakes_are_refused(classes, settings, message):
    model, retain = make("resnet")
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        ux.unsir(model, classes, retain, **{**QUICK, **settings})
    assert same(before, bits(model))


def test_data_of_the_wrong_form_is_refused():
    model, retain = make("resnet")
    made = ux.tasks.Classification(
        inputs=lambda batch: batch[0], labels=1
    )  # where noise would go is not known
    with pytest.raises(TypeError, match="the inputs of retain must be one floating-point tensor"):
        ux.unsir(model, 0, retain, task=made, **QUICK)
    with pytest.raises(ValueError, match="retain must be re-iterable"):
        ux.unsir(model, 0, iter(retain))
    with pytest.raises(ValueError, match="retain must hold a batch, got none"):
        ux.unsir(model, 0, [])
    larger = [retain[0], (torch.randn(4, 3, 16, 16), torch.ones(4, dtype=torch.int64))]
    with pytest.raises(ValueError, match=r"inputs must all have the shape \[3, 8, 8\], got \[3, 16, 16\]"):
        ux.unsir(model, 0, larger, **QUICK)
    shared = {"pixel_values": retain[0][0], "mask": retain[0][0], "labels": retain[0][1]}
    with pytest.raises(TypeError, match="one floating-point tensor"):
        ux.unsir(model, 0, [shared], **QUICK)
