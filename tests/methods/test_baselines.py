import copy
import json
import math

import pytest
import torch
import torch.nn.functional as F
from methods.models import FAMILIES, make
from torch import nn
from torch.utils.data import DataLoader

import unlearn_ext as ux
from unlearn_ext import demo
from unlearn_ext.evaluation.metrics.accuracy import accuracy
from unlearn_ext.methods.common import Paired
from unlearn_ext.methods.fisher_forgetting import _fisher
from unlearn_ext.methods.run import unlearning
from unlearn_ext.methods.teachers import _initialised_afresh, divergence
from unlearn_ext.tasks import losses

TWO_STEPS = {
    "finetune": {"epochs": 2},
    "gradient_ascent": {"epochs": 2, "cap": 50.0},
    "neg_grad_plus": {"epochs": 2},
    "random_label": {"epochs": 2},
    "bad_teacher": {"epochs": 2, "retain_share": 1.0},
    "scrub": {"epochs": 2, "forget_epochs": 1},
    "fisher_forgetting": {},
}
MOVES_STATISTICS = {"finetune"}
NEEDS_RETAIN = set(TWO_STEPS) - {"gradient_ascent"}

each_method = pytest.mark.parametrize("name", TWO_STEPS)
each_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(scope="module")
def digits():
    """The demo's network, trained, and its data split by class 3."""
    train_set, test_set = demo.load_digits()
    model, _ = demo.train(train_set, epochs=10, seed=0)
    forget, retain = ux.data.split(train_set, classes=3)
    test_forget, _ = ux.data.split(test_set, classes=3)
    return model, forget, retain, test_forget


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


def unlearned_digits(digits, name, **settings):
    """Test accuracy on the forgotten class before and after, retain accuracy lost, and the record."""
    model, (forget, retain, test_forget) = copy.deepcopy(digits[0]), digits[1:]
    before = [accuracy(model, DataLoader(part, 256)) for part in (test_forget, retain)]
    result = ux.unlearn(
        name,
        model,
        DataLoader(forget, 64, shuffle=True),
        DataLoader(retain, 64, shuffle=True),
        generator=seeded(),
        **settings,
    )
    after = [accuracy(model, DataLoader(part, 256)) for part in (test_forget, retain)]
    return before[0], after[0], before[1] - after[1], result


@pytest.mark.parametrize("name", ["finetune", "neg_grad_plus", "random_label", "bad_teacher", "scrub"])
def test_digits_are_forgotten_with_default_settings(digits, name):
    _, known, lost, _ = unlearned_digits(digits, name)
    assert known <= 0.2
    assert lost <= 0.05


def test_gradient_ascent_forgets_digits_and_stops_at_its_cap(digits):
    """What it costs differs from class to class; this one's price is as its documentation says."""
    _, known, lost, result = unlearned_digits(digits, "gradient_ascent")
    assert known <= 0.25
    assert lost <= 0.25
    assert len(result.history) < 30
    assert result.history[-1]["loss"] == pytest.approx(-math.log(10) / 2, rel=1e-5)


def test_fisher_forgetting_forgets_digits_in_part_only(digits):
    known_before, known, lost, result = unlearned_digits(digits, "fisher_forgetting")
    assert result.hyperparameters["forget_classes"] == [3]
    assert result.history[-1]["output_layer"] == ["14.weight", "14.bias"]
    assert known < known_before - 0.1
    assert lost <= 0.05


def test_a_retrained_network_never_saw_the_class(digits):
    def fit(model, data):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(3):
            for x, y in data:
                optimizer.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()

    _, known, lost, result = unlearned_digits(
        digits, "retrain", make_model=lambda: demo.make_model(5), train=fit
    )
    assert known == 0
    assert lost <= 0.1
    assert result.changed > 0.99


@each_family
@each_method
def test_two_steps_on_any_network(name, family):
    model, forget, retain = make(family)
    frozen = [p for p in model.parameters() if p.ndim > 1][1].requires_grad_(False)
    kept, pointers = frozen.detach().clone(), [p.data_ptr() for p in model.parameters()]
    flags, random = [module.training for module in model.modules()], torch.random.get_rng_state()
    twin, before = copy.deepcopy(model), bits(model)
    result = ux.METHODS[name](model, forget, retain, **TWO_STEPS[name], generator=seeded(1))
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [module.training for module in model.modules()] == flags
    assert torch.equal(torch.random.get_rng_state(), random)
    assert torch.equal(frozen, kept)
    assert not frozen.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert result.changed > 0.2
    assert all(torch.isfinite(p).all() for p in model.parameters())
    moved = {n for n, buffer in model.named_buffers() if not torch.equal(buffer, before[n])}
    assert bool(moved) == (family == "resnet" and name in MOVES_STATISTICS)
    ux.METHODS[name](twin, forget, retain, **TWO_STEPS[name], generator=seeded(1))
    assert same(bits(model), bits(twin))
    assert json.loads(result.to_json())["method"] == name


@each_method
@pytest.mark.parametrize("error", [KeyboardInterrupt, FloatingPointError])
def test_all_or_nothing(name, error):
    model, forget, retain = make("resnet")
    model.eval()
    before, random = bits(model), torch.random.get_rng_state()
    count = 2 if name == "gradient_ascent" else 4  # its second step; elsewhere the model is asked first

    def fail(module, args, output):
        nonlocal count
        count -= 1
        if count <= 0 and error is KeyboardInterrupt:
            raise error
        return output * math.nan if count <= 0 else output

    handle = model.register_forward_hook(fail)
    with pytest.raises(error):
        ux.METHODS[name](model, forget, retain, **TWO_STEPS[name], generator=seeded())
    handle.remove()
    assert same(before, bits(model))
    assert not any(module.training for module in model.modules())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.parametrize("lr", [math.nan, math.inf])
def test_weights_that_are_no_numbers_do_not_pass_for_unlearned(lr):
    # After a single step no loss tells of it, and answers of NaN are wrong: accuracy 0 on the forget set.
    model, forget, retain = linear()
    before = bits(model)
    with pytest.raises(FloatingPointError, match=r"weight must stay finite, .* of its 12 scalars"):
        ux.METHODS["gradient_ascent"](model, forget, retain, lr=lr, epochs=1)
    assert same(before, bits(model))


def test_statistics_that_are_no_numbers_do_not_pass_for_unlearned():
    # The variance of such inputs is infinite: in train mode they are normalised to 0, and the loss is finite.
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).eval()
    x, y = torch.randn(12, 4), torch.arange(12) % 3
    forget, retain = [(x[y == 0], y[y == 0])], [(1e25 * x[y != 0], y[y != 0])]
    before = bits(model)
    with pytest.raises(FloatingPointError, match="running_var of BatchNorm1d must stay finite"):
        ux.METHODS["finetune"](model, forget, retain, epochs=1)
    assert same(before, bits(model))


def test_weights_that_were_no_numbers_before_are_not_the_methods_fault():
    model, forget, retain = linear()
    spare = nn.Parameter(torch.full((2,), math.nan))
    model.register_parameter("spare", spare)
    ux.METHODS["gradient_ascent"](model, forget, retain, lr=0.1, epochs=1)
    assert bool(spare.isnan().all())


@pytest.mark.parametrize("weight", ["ce_weight", "kl_weight"])
@pytest.mark.parametrize("value", [-1.0, math.inf, math.nan])
def test_scrub_does_not_climb_the_retain_set(weight, value):
    model, forget, retain = linear()
    with pytest.raises(ValueError, match=f"scrub: {weight} must be finite and >= 0, got {value}"):
        ux.METHODS["scrub"](model, forget, retain, **{weight: value})


@each_method
def test_data_that_cannot_be_read_twice_is_refused(name):
    model, forget, retain = make("resnet")
    sets = {"forget": forget, "retain": retain}
    for which in {"finetune": ["retain"], "gradient_ascent": ["forget"]}.get(name, ["forget", "retain"]):
        with pytest.raises(ValueError, match="re-iterable"):
            ux.METHODS[name](model, **{**sets, which: iter(sets[which])}, **TWO_STEPS[name])


def linear(seed=0, n=6, classes=4):
    generator = seeded(seed)
    model = nn.Linear(3, classes)
    with torch.no_grad():
        model.weight.normal_(generator=generator)
        model.bias.normal_(generator=generator)
    batches = [
        (torch.randn(n, 3, generator=generator), torch.randint(classes, (n,), generator=generator))
        for _ in range(2)
    ]
    return model, batches[:1], batches[1:]


def gradients(model, loss):
    return torch.autograd.grad(loss, list(model.parameters()))


def test_a_step_of_gradient_ascent_by_hand():
    model, forget, _ = linear()
    values = F.cross_entropy(model(forget[0][0]), forget[0][1], reduction="none")
    cap = float(values.detach().sort().values[2:4].mean())
    wanted = [
        p + 0.5 * g
        for p, g in zip(
            model.parameters(), gradients(model, values[values < cap].sum() / len(values)), strict=True
        )
    ]
    ux.methods.gradient_ascent(model, forget, lr=0.5, cap=cap, epochs=1)
    for p, value in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.detach(), value.detach())


def test_ascent_leaves_alone_what_is_at_the_cap():
    model, forget, _ = linear()
    before = bits(model)
    result = ux.methods.gradient_ascent(model, forget, cap=1e-9)
    assert same(before, bits(model))
    assert len(result.history) == 1


@pytest.mark.parametrize("batches, epochs", [(2, 30), (40, 3)])
def test_ascent_makes_about_a_hundred_steps_however_large_the_forget_set(batches, epochs):
    model, forget, _ = linear()
    result = ux.methods.gradient_ascent(model, forget * batches, lr=1e-6)
    assert result.hyperparameters["epochs"] == len(result.history) == epochs


def test_a_step_of_neg_grad_plus_by_hand():
    model, forget, retain = linear()
    kept, forgotten = (F.cross_entropy(model(x), y) for x, y in (*retain, *forget))
    wanted = [
        p - 0.5 * g
        for p, g in zip(model.parameters(), gradients(model, 0.8 * kept - 0.2 * forgotten), strict=True)
    ]
    ux.methods.neg_grad_plus(model, forget, retain, retain_weight=0.8, lr=0.5, epochs=1, cap=100.0)
    for p, value in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(p.detach(), value.detach())
    with pytest.raises(ValueError, match=r"retain_weight must lie in \[0, 1\], got 1.5"):
        ux.methods.neg_grad_plus(model, forget, retain, retain_weight=1.5)


def test_finetuning_is_sgd_on_the_retain_set_with_a_falling_rate():
    model, _, retain = linear()
    twin = copy.deepcopy(model)
    result = ux.methods.finetune(model, None, retain, epochs=2, lr=0.4)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.4, momentum=0.9, weight_decay=5e-4)
    for lr in (0.4, 0.2):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        losses.cross_entropy(twin, retain[0]).mean().backward()
        optimizer.step()
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert [entry["lr"] for entry in result.history] == [0.4, 0.2]


def test_random_labels_are_wrong_and_uniform():
    model, forget, retain = linear(n=300)
    labels = []

    def watching(model, batch):
        labels.append(batch[1])
        return losses.cross_entropy(model, batch)

    forget = [(forget[0][0], torch.where(torch.arange(300) < 10, -100, forget[0][1]))]
    ux.methods.random_label(model, forget, retain, epochs=4, loss_fn=watching, generator=seeded())
    drawn = torch.stack(labels[1::2])
    assert torch.equal(labels[0], retain[0][1])
    assert bool((drawn[:, :10] == -100).all())  # what the loss ignores stays ignored
    offsets = (drawn - forget[0][1])[:, 10:] % 4
    assert bool((offsets != 0).all())
    shares = torch.stack([(offsets == k).float().mean() for k in (1, 2, 3)])
    torch.testing.assert_close(shares, torch.full((3,), 1 / 3), atol=0.05, rtol=0)
    assert len({tuple(row.tolist()) for row in drawn}) == 4  # drawn anew
    with pytest.raises(ValueError, match=r"one logit.*Binary"):
        ux.methods.random_label(nn.Linear(3, 1), [(torch.randn(2, 3), torch.zeros(2).long())], retain)


def test_divergence_by_hand():
    teacher, batch, _ = linear(0)
    student, _, _ = linear(1)
    p = (teacher(batch[0][0]) / 2).softmax(-1)
    q = (student(batch[0][0]) / 2).softmax(-1)
    torch.testing.assert_close(divergence(teacher, student, batch[0], 2.0), (p * (p / q).log()).sum(-1))
    assert float(divergence(teacher, teacher, batch[0]).abs().max().detach()) < 1e-6


def test_divergence_of_sequences_counts_labelled_positions_only():
    teacher, student = (make("gpt", seed)[0].eval() for seed in (0, 1))
    batch = make("gpt")[1][0]
    masked = {**batch, "labels": batch["labels"].index_fill(1, torch.tensor([4, 5]), -100)}
    shorter = {name: tensor[:, :4] for name, tensor in batch.items()}
    torch.testing.assert_close(divergence(teacher, student, masked), divergence(teacher, student, shorter))


def test_the_bad_teacher_wins_on_the_forget_set_and_the_good_one_on_the_rest():
    model, forget, retain = linear(n=40)
    forget[0][0][:, 0] += 6
    original, bad = copy.deepcopy(model), linear(7)[0]
    start = float(divergence(bad, model, forget[0]).mean().detach())
    ux.methods.bad_teacher(model, forget, retain, incompetent=bad, epochs=150, lr=0.05)
    assert float(divergence(bad, model, forget[0]).mean().detach()) < 0.1 * start
    assert float(divergence(original, model, retain[0]).mean().detach()) < 0.5


@pytest.mark.parametrize("share, steps", [(0.3, 3), (0.25, 3), (1.0, 10), (0.01, 1)])
def test_the_bad_teacher_reads_a_share_of_the_retain_batches(share, steps):
    model, forget, retain = linear()
    result = ux.methods.bad_teacher(model, forget, retain * 10, retain_share=share, epochs=2)
    assert [entry["steps"] for entry in result.history] == [steps] * 2


@each_family
def test_nothing_learned_is_left_in_the_incompetent_teacher(family):
    model = make(family)[0]
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(3.5)
    for buffer in model.buffers():
        buffer.fill_(7)
    new = _initialised_afresh(model)
    assert not any(bool((p == 3.5).any()) for p in new.parameters())
    assert not any(bool((buffer == 7).any()) for buffer in new.buffers())
    assert all(bool((p == 3.5).all()) for p in model.parameters())


def test_scrub_alternates_and_its_learning_rate_falls():
    model, forget, retain = linear()
    result = ux.methods.scrub(model, forget, retain, epochs=10, forget_epochs=3, lr=1.0)
    phases = [entry["phase"] for entry in result.history]
    assert phases == ["max", "min"] * 3 + ["min"] * 7
    rates = [entry["lr"] for entry in result.history if entry["phase"] == "min"]
    assert rates == pytest.approx([1.0] * 5 + [0.1] * 3 + [0.01] + [0.001])


def test_pairs_start_the_second_set_again_when_it_ends_and_go_on_from_pass_to_pass():
    pairs = Paired("who", [(1,), (2,), (3,)], forget=[("a",), ("b",)])
    assert list(pairs) == [((1,), ("a",)), ((2,), ("b",)), ((3,), ("a",))]
    assert list(pairs) == [((1,), ("b",)), ((2,), ("a",)), ((3,), ("b",))]
    with pytest.raises(ValueError, match="who: forget must hold a batch"):
        list(Paired("who", [(1,)], forget=[]))


def test_the_expected_fisher_is_the_sum_over_labels():
    model, _, retain = linear()
    x = retain[0][0]
    wanted = [torch.zeros_like(p) for p in model.parameters()]
    for row in x:
        logs = model(row).log_softmax(-1)
        for label in range(4):
            parts = torch.autograd.grad(-logs[label], list(model.parameters()), retain_graph=True)
            for total, part in zip(wanted, parts, strict=True):
                total += logs[label].exp().detach() * part.square() / len(x)
    with unlearning(model, "test", {}) as run:
        task, names = ux.tasks.Classification(), ["weight", "bias"]
        found = _fisher(run, retain, task, 4, "expected", names, progress=False)
    for value, total in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(value, total)


def test_fisher_noise_has_the_variance_of_its_formula():
    """Inputs that are always 0 have no importance: their variance is the bound. Rows share one variance."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(400, 300), nn.Linear(300, 4))
    retain = [(torch.zeros(2, 400), torch.tensor([0, 1]))]
    before = bits(model)
    ux.methods.fisher_forgetting(model, None, retain, scale=1e-6, forget_classes=[2], generator=seeded())
    noise = {name: tensor - before[name] for name, tensor in bits(model).items()}
    assert float(noise["0.weight"].var()) == pytest.approx(1e-6 * 1e3, rel=0.02)
    row = model[1].weight[2].detach()
    assert float(row.square().mean()) == pytest.approx(1e-3, rel=0.3)
    assert bool((noise["1.weight"][[0, 1, 3]].square().mean(1) < 1e-6 * 1e2 * 10 * 1.3).all())
    assert float(noise["1.bias"][:2].abs().max()) < 5 * math.sqrt(1e-6 * 1e2 * 10)


def test_fisher_forgetting_replaces_rows_of_whole_classes_only():
    model, forget, retain = linear()
    result = ux.methods.fisher_forgetting(model, forget, [*retain, *forget])
    assert result.hyperparameters["forget_classes"] == []
    before = bits(model)
    ux.methods.fisher_forgetting(model, None, retain, forget_classes=[], scale=0.0)
    assert same(before, bits(model))
    with pytest.raises(ValueError, match="forget or forget_classes must be given"):
        ux.methods.fisher_forgetting(model, None, retain)
    with pytest.raises(ValueError, match="estimator must be one of mc, expected, per_sample, got 'all'"):
        ux.methods.fisher_forgetting(model, forget, retain, estimator="all")


def test_retraining_takes_over_everything_in_place():
    model, forget, retain = make("resnet")
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    pointers = [tensor.data_ptr() for tensor in model.state_dict().values()]
    trained = make("resnet", seed=3)[0]
    trained[1].running_mean.fill_(2)
    result = ux.methods.retrain(
        model, forget, retain, make_model=lambda: make("resnet", seed=4)[0], train=lambda new, data: trained
    )
    assert same(bits(trained), bits(model))
    assert [tensor.data_ptr() for tensor in model.state_dict().values()] == pointers
    assert result.changed == 1
    assert "lambda" in result.hyperparameters["make_model"]


def test_retraining_draws_from_the_generator():
    def retrained(seed):
        model, _, retain = linear()
        ux.methods.retrain(
            model,
            None,
            retain,
            make_model=lambda: nn.Linear(3, 4),
            train=lambda *_: None,
            generator=seeded(seed),
        )
        return bits(model)

    assert same(retrained(0), retrained(0))
    assert not same(retrained(0), retrained(1))


def test_retraining_from_trained_weights_is_pointed_out():
    model, _, retain = make("resnet")

    def half_fresh():
        new = copy.deepcopy(model)
        new[-1].reset_parameters()
        return new

    with pytest.warns(UserWarning, match=r"initialise all weights afresh, got 0\.weight as it is") as caught:
        ux.methods.retrain(model, None, retain, make_model=half_fresh, train=lambda *_: None)
    (told,) = [warning for warning in caught if "afresh" in str(warning.message)]
    assert told.filename == __file__  # at the user's own line


@pytest.mark.parametrize("name", ["gradient_ascent", "neg_grad_plus", "random_label", "bad_teacher", "scrub"])
def test_without_a_forget_set_it_is_said_what_is_missing(name):
    model, _, retain = linear()
    before = bits(model)
    with pytest.raises(ValueError, match=f"{name}: forget must be given"):
        getattr(ux.methods, name)(model, None, retain)
    assert same(before, bits(model))


def test_retraining_gone_wrong_changes_nothing():
    model, _, retain = linear()
    before = bits(model)

    def broken(new, data):
        with torch.no_grad():
            new.bias[0] = math.nan

    with pytest.raises(FloatingPointError, match="the new bias must be finite"):
        ux.methods.retrain(model, None, retain, make_model=lambda: nn.Linear(3, 4), train=broken)
    assert same(before, bits(model))
    with pytest.raises(ValueError, match=r"got \[5, 3\] for weight of \[4, 3\]"):
        ux.methods.retrain(model, None, retain, make_model=lambda: nn.Linear(3, 5), train=lambda *_: None)
    with pytest.raises(ValueError, match="must make a new model"):
        ux.methods.retrain(model, None, retain, make_model=lambda: model, train=lambda *_: None)
    assert same(before, bits(model))
