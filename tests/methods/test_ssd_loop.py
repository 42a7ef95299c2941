"""Selective synaptic dampening in a closed loop."""

import copy
import math
import warnings

import numpy as np
import pytest
import torch
from methods import models
from torch import nn

import unlearn_ext as ux
from unlearn_ext import Importance, fisher_diagonal, plan_ssd, ssd
from unlearn_ext.demo import load_digits
from unlearn_ext.methods import ssd_search
from unlearn_ext.methods.ssd_search import alpha_at, scopes_of
from unlearn_ext.methods.until import UnlearningFailed
from unlearn_ext.methods.use_order import order_of_use
from unlearn_ext.tasks import losses


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(a, b):
    def words(tensor):
        return tensor.contiguous().view(-1).view(torch.uint8)

    return a.keys() == b.keys() and all(torch.equal(words(a[name]), words(b[name])) for name in a)


@pytest.fixture(scope="module")
def data():
    pytest.importorskip("sklearn")
    return [part.tensors for part in load_digits()]


@pytest.fixture(scope="module")
def network(data):
    """A small convolutional network with BatchNorm that has learnt digits, in train mode."""
    (x, y), _ = data
    torch.manual_seed(0)
    body = [nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2)]
    body += [nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1)]
    model = nn.Sequential(*body, nn.Flatten(), nn.Linear(32, 48), nn.ReLU(), nn.Linear(48, 10))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=10 * -(-len(y) // 64))
    for _ in range(10):
        for index in torch.randperm(len(y)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            schedule.step()
    return model.train()


@pytest.fixture
def model(network):
    return copy.deepcopy(network)


def split(data, mine):
    x, y = data[0]
    return [list(zip(x[part].split(64), y[part].split(64), strict=True)) for part in (mine, ~mine)]


def class_of(data, *classes):
    return split(data, torch.isin(data[0][1], torch.tensor(classes)))


def random_samples(data, n=50):
    mine = torch.zeros(len(data[0][1]), dtype=torch.bool)
    mine[torch.randperm(len(mine), generator=torch.Generator().manual_seed(0))[:n]] = True
    return split(data, mine)


@pytest.mark.parametrize("label", range(10))
def test_each_class_is_forgotten_at_next_to_no_cost(data, model, label):
    forget, retain = class_of(data, label)
    before = [ux.metrics.accuracy(model, part) for part in (forget, retain)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = ssd(model, forget, retain)
    after = [ux.metrics.accuracy(model, part) for part in (forget, retain)]
    assert result.reached
    assert [result.before["forget_accuracy"], result.before["retain_accuracy"]] == before
    assert [result.after["forget_accuracy"], result.after["retain_accuracy"]] == after
    assert before[0] > 0.9
    assert after[0] <= 0.01
    assert after[1] >= before[1] - 0.02
    x, y = data[1]
    assert ux.metrics.accuracy(model, [(x[y == label], y[y == label])]) <= 0.05
    for name, value in (("forget", forget), ("retain", retain)):
        mean = torch.cat([losses.cross_entropy(model.eval(), batch) for batch in value]).mean()
        assert result.after[f"{name}_loss"] == pytest.approx(float(mean.detach()), rel=1e-4)


def test_planning_leaves_no_trace_and_what_is_applied_is_reverted_to_the_bit(data, model):
    forget, retain = class_of(data, 3)
    before, flags = bits(model), [module.training for module in model.modules()]
    pointers, random_state = [p.data_ptr() for p in model.parameters()], torch.get_rng_state()
    plan = plan_ssd(model, forget, retain)
    assert same_bits(before, bits(model))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    plan.apply()
    after = bits(model)
    assert not same_bits(before, after)
    with pytest.raises(RuntimeError, match="applied already"):
        plan.apply()
    plan.revert()
    assert same_bits(before, bits(model))
    plan.apply()
    assert same_bits(after, bits(model))
    plan.revert()
    assert [module.training for module in model.modules()] == flags
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_the_choice_is_that_of_the_rule_written_out(data, model):
    """One round, worked out with plain PyTorch and NumPy for every class."""
    accuracy = ux.metrics.accuracy
    for label in range(10):
        forget, retain = class_of(data, label)
        plan = plan_ssd(model, forget, retain)
        part, full = plan.importance_forget, plan.importance_full
        rho = part.n_samples / full.n_samples
        ratios = np.concatenate([(part[name] / full[name]).numpy().ravel() for name in full])
        ratios = ratios[np.isfinite(ratios)]
        r0 = accuracy(model, retain)
        late = ["9.weight", "11.weight"]
        names = [name for name, _ in model.named_parameters()]
        chosen = None
        for scope, k_from in ((late, 1), (names, 1)):
            states = {}

            def state(k, scope=scope, states=states, part=part, full=full, ratios=ratios, rho=rho):
                if k not in states:
                    share = min(1, 2.0**k * math.log(1 + 100 * rho) / 100)
                    odds = 2 if k <= 0 else 1
                    alpha = max(np.quantile(ratios, 1 - share), odds / (1 + (odds - 1) * rho))
                    alpha = min(alpha, 0.999 / rho)
                    states[k] = copy.deepcopy(model)
                    with torch.no_grad():
                        for name, p in states[k].named_parameters():
                            if name in scope:
                                factor = (0.1 * full[name] / part[name]).clamp(max=1)
                                p.copy_(torch.where(part[name] > alpha * full[name], p * factor, p))
                return states[k]

            k = k_from
            while accuracy(state(k), forget) > 0.01 and k < 4:
                k += 1
            if accuracy(state(k), forget) > 0.01:
                continue
            best = k
            while r0 - accuracy(state(k), retain) > 0.005 and k > -3:
                k -= 1
                if accuracy(state(k), forget) > 0.01:
                    break
                if accuracy(state(k), retain) > accuracy(state(best), retain):
                    best = k
            if r0 - accuracy(state(best), retain) <= 0.005:
                chosen = state(best)
                break
        assert chosen is not None
        plan.apply()
        after = copy.deepcopy(model)
        plan.revert()
        for a, b in zip(after.parameters(), chosen.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


def test_passes_are_counted_as_the_model_is_run(data, model):
    forget, retain = class_of(data, 5)
    shown = []
    model.register_forward_hook(
        lambda module, args, output: None if output.requires_grad else shown.append(len(args[0]))
    )
    plan = plan_ssd(model, forget, retain)
    total = sum(len(y) for part in (forget, retain) for _, y in part)
    ordered = len(forget[0][1])  # one batch with gradients, to tell in which order parameters are used
    assert plan.apply().passes == pytest.approx((sum(shown) + ordered) / total)
    assert plan.candidates


def test_the_summary_tells_what_was_tried_and_why(data, model):
    plan = plan_ssd(model, *class_of(data, 3))
    lines = plan.summary().splitlines()
    chosen = [line for line in lines if line.startswith("->")]
    assert len(chosen) == 1
    assert "goal reached" in chosen[0]
    assert sum("selects" in line for line in lines) == len(plan.candidates) > 0
    assert any(line.startswith("goal: accuracy on the forget set at most 1.00%") for line in lines)
    assert any(line.startswith("reached: forget accuracy") for line in lines)
    result = plan.apply()
    tried = [entry for entry in result.history if entry["phase"] == "candidate"]
    assert [entry["alpha"] for entry in tried] == [candidate.alpha for candidate in plan.candidates]
    assert [entry["alpha"] for entry in tried if entry["chosen"]] == [plan.alpha]


def test_random_samples_are_refused_and_the_model_keeps_its_bits(data, model):
    forget, retain = random_samples(data)
    before = bits(model)
    plan = plan_ssd(model, forget, retain)
    assert plan.reached is False
    assert "samples to retain carry classes of the forget set (0, 1, 2" in plan.summary()
    with pytest.warns(UserWarning, match="the model is as it was: samples to retain carry classes"):
        result = ssd(model, forget, retain)
    assert (result.reached, result.changed) == (False, 0.0)
    assert result.after == result.before
    assert same_bits(before, bits(model))
    with pytest.raises(UnlearningFailed, match="carry classes") as caught:
        ssd(model, forget, retain, strict=True)
    assert caught.value.result.reached is False
    assert same_bits(before, bits(model))
    with pytest.raises(RuntimeError, match="refused before any importance was measured"):
        plan.sweep([1.0])


def test_what_cannot_be_reached_within_the_budget_leaves_the_model_alone(data, model, monkeypatch):
    forget, retain = class_of(data, 8)
    for name in ("LEAST", "FIRST", "MOST"):
        monkeypatch.setattr(ssd_search, name, 4)
    monkeypatch.setattr(ssd_search, "ROUNDS", 1)
    before = bits(model)
    for settings, why in (
        ({"lambda_": 1e6}, "none of 2 candidates brought the forget set to the goal"),
        ({"budget": 0.0, "lambda_": 0.0}, "beyond the budget of 0"),
    ):
        plan = plan_ssd(model, forget, retain, **settings)
        with pytest.warns(UserWarning, match=f"the model is as it was.*{why}"):
            result = plan.apply()
        assert result.reached is False
        assert same_bits(before, bits(model))
        plan.revert()
        with pytest.raises(UnlearningFailed, match=why):
            ssd(model, forget, retain, strict=True, **settings)
        assert same_bits(before, bits(model))
        assert [entry["chosen"] for entry in result.history if entry["phase"] == "candidate"] == [False] * 2


def test_rounds_build_on_each_other_and_are_reverted_together(data, model, monkeypatch):
    """With a share that is too small for one round, and a goal just out of its reach."""
    forget, retain = class_of(data, 3)
    for name in ("LEAST", "FIRST", "MOST"):
        monkeypatch.setattr(ssd_search, name, -6)
    before = bits(model)
    first = min(c.forget.accuracy for c in plan_ssd(model, forget, retain).candidates if c.round == 1)
    plan = plan_ssd(model, forget, retain, until=first - 1e-3)
    assert same_bits(before, bits(model))
    assert plan.reached
    rounds = [candidate.round for candidate in plan.candidates]
    assert max(rounds) > 1
    assert sorted(rounds) == rounds
    result = plan.apply()
    chosen = [entry for entry in result.history if entry.get("chosen")]
    assert [entry["round"] for entry in chosen] == list(range(1, max(rounds) + 1))
    accuracies = [entry["forget_accuracy"] for entry in chosen]
    assert accuracies == sorted(accuracies, reverse=True)
    assert ux.metrics.accuracy(model, forget) == accuracies[-1] < first
    assert ux.metrics.accuracy(model, retain) == chosen[-1]["retain_accuracy"]
    plan.revert()
    assert same_bits(before, bits(model))


def test_without_retain_data_the_least_that_reaches_the_goal_is_taken(data, model):
    forget, retain = class_of(data, 4)
    parts = [fisher_diagonal(model, part, loss_fn=losses.log_odds) for part in (forget, retain)]
    for settings in ({"importance": parts[0] + parts[1]}, {"retain": parts[1]}):
        plan = plan_ssd(model, forget, loss_fn=losses.log_odds, **settings)
        assert "nothing watches the retain set" in plan.summary()
        assert all(candidate.lost is None for candidate in plan.candidates)
        chosen = next(c for c in plan.candidates if c.alpha == plan.alpha and c.reached)
        below = [c for c in plan.candidates if c.scope == chosen.scope and c.k == chosen.k - 1]
        assert chosen.k == ssd_search.LEAST or not below[0].reached
        own = copy.deepcopy(model)
        result = plan_ssd(own, forget, loss_fn=losses.log_odds, **settings).apply()
        assert result.reached
        assert "nothing watched the rest" in result.history[-1]["reason"]
        assert set(result.after) == {"forget_accuracy", "forget_loss"}
        assert result.after["forget_accuracy"] == ux.metrics.accuracy(own, forget) <= 0.01


@pytest.mark.parametrize("goal", ["unseen", 0.6, "callable"])
def test_other_goals_stop_where_they_say(data, model, goal):
    forget, retain = class_of(data, 2)
    settings = {"until": goal}
    if goal == "unseen":  # inputs of that class, which the model is sure to get wrong half of the time
        (x, y) = forget[0]
        settings["validation"] = [(x, torch.where(torch.arange(len(y)) % 2 == 0, y, y + 1))]
    if goal == "callable":
        settings["until"] = lambda model: ux.metrics.accuracy(model, forget) < 0.3
    result = ssd(model, forget, retain, **settings)
    left = ux.metrics.accuracy(model, forget)
    assert result.reached
    assert left <= {"unseen": ux.metrics.accuracy(model, settings.get("validation", forget)), 0.6: 0.6}.get(
        goal, 0.3
    )


def test_a_goal_that_is_met_already_changes_nothing(data, model):
    forget, retain = class_of(data, 2)
    before = bits(model)
    with pytest.warns(UserWarning, match="nothing was changed: the goal is met already"):
        result = ssd(model, forget, retain, until=1.0)
    assert (result.reached, result.changed) == (True, 0.0)
    assert same_bits(before, bits(model))


def test_a_model_that_changed_since_it_was_measured_is_refused(data, model):
    plan = plan_ssd(model, *class_of(data, 1))
    with torch.no_grad():
        model[0].bias[0] += 1e-3
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"0.bias has changed since plan_ssd\(\) measured the model"):
        plan.apply()
    assert same_bits(before, bits(model))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("at", [2, 3, 4])
def test_an_interrupted_search_leaves_the_model_as_it_was(data, model, monkeypatch, error, at):
    from unlearn_ext.methods import until

    calls = []
    honest = until.measure

    def failing(*args, **settings):
        calls.append(1)
        if len(calls) == at:
            raise error
        return honest(*args, **settings)

    monkeypatch.setattr(until, "measure", failing)
    before = bits(model)
    with pytest.raises(error):
        ssd(model, *class_of(data, 1))
    assert len(calls) == at
    assert same_bits(before, bits(model))


def test_importances_that_must_not_be_mixed_are_refused(data, model):
    forget, retain = class_of(data, 1)
    stored = fisher_diagonal(model, [*forget, *retain])
    plan = plan_ssd(model, forget, importance=stored)
    direct = fisher_diagonal(model, forget)
    for name, value in plan.importance_forget.items():
        torch.testing.assert_close(value, direct[name])
    assert plan.apply().hyperparameters["loss_fn"] == "unlearn_ext.losses.cross_entropy"
    plan.revert()
    with pytest.raises(ValueError, match=r"must be that of importance.*cross_entropy, got .*log_odds"):
        plan_ssd(model, forget, importance=stored, loss_fn=losses.log_odds)
    stored.loss = "mine.own"
    with pytest.raises(ValueError, match=r"loss_fn must be given: importance holds importances of mine.own"):
        plan_ssd(model, forget, importance=stored)


def test_importances_of_the_retain_set_are_not_taken_for_those_of_the_full_set(data, model):
    forget, retain = class_of(data, 1)
    alone = fisher_diagonal(model, retain, loss_fn=losses.log_odds)
    before = bits(model)
    with pytest.raises(ValueError, match="plan_ssd: importances of the full set must cover the forget set"):
        ssd(model, forget, importance=alone)
    assert same_bits(before, bits(model))


def test_importances_of_other_weights_are_warned_about(data, model):
    forget, retain = class_of(data, 1)
    stored = fisher_diagonal(model, [*forget, *retain], loss_fn=losses.log_odds)
    with torch.no_grad():
        model[11].bias[0] += 0.1
    with pytest.warns(UserWarning, match="measured with different weights"):
        plan_ssd(model, forget, importance=stored)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"until": None}, "alpha must be a number or 'adaptive' for until=None, got 'auto'"),
        ({"alpha": 2.0, "until": 0.5}, "until must be None where alpha is given, got 0.5"),
        ({"until": "unseen"}, "validation must be given"),
        ({"budget": 2}, r"budget must lie in \[0, 1\]"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(data, model, settings, message):
    with pytest.raises(ValueError, match=message):
        ssd(model, *class_of(data, 1), **settings)


# ------------------------------------------------------------------------------------ thresholds and scopes


@pytest.mark.parametrize("k", range(-3, 5))
@pytest.mark.parametrize("n_forget", [2, 30])
def test_the_threshold_is_that_of_the_design(k, n_forget):
    torch.manual_seed(0)
    full, part = torch.rand(3000) + 0.1, torch.rand(3000) ** 3
    rho = n_forget / 100
    part = part.minimum(full / rho)
    given = [Importance.from_dict({"w": values}, n) for values, n in ((part, n_forget), (full, 100))]
    share = min(1.0, 2**k * math.log(1 + 100 * rho) / 100)
    quantile = float(np.quantile((part / full).numpy().astype(np.float64), 1 - share))
    odds = 2 if k <= 0 else 1
    expected = min(max(quantile, odds / (1 + (odds - 1) * rho)), 0.999 / rho)
    assert alpha_at(k, *given) == pytest.approx(expected, rel=1e-5)


def test_the_largest_ratio_is_always_selected():
    full = torch.ones(100)
    part = torch.where(torch.arange(100) < 90, 10.0, 0.0)
    given = [Importance.from_dict({"w": values}, n) for values, n in ((part, 1), (full, 10))]
    assert all(alpha_at(k, *given) == pytest.approx(9.99) for k in range(-3, 4))


class Backwards(nn.Module):
    """Uses its parameters in another order than it registers them."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)
        self.scale = nn.Parameter(torch.ones(6))
        self.unused = nn.Parameter(torch.ones(2, 2))
        self.body = nn.ModuleList([nn.Linear(6, 6), nn.Linear(4, 6)])

    def forward(self, x):
        return self.head(self.body[0](torch.relu(self.body[1](x))) * self.scale)


def test_parameters_are_ordered_by_their_first_use():
    model = Backwards()
    named = dict(model.named_parameters())
    batch = (torch.randn(2, 4), torch.tensor([0, 1]))
    order = order_of_use(model, named, batch, losses.cross_entropy)
    assert order == [
        *("body.1.weight", "body.1.bias", "body.0.weight", "body.0.bias"),
        *("scale", "unused", "head.weight", "head.bias"),
    ]
    assert scopes_of(named, order) == {
        "late matrices": ["unused", "head.weight"],
        "all parameters": list(named),
    }
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("family", models.FAMILIES)
def test_the_late_half_of_every_family_lies_behind_its_first_layers(family):
    model, forget, _ = models.make(family)
    named = dict(model.named_parameters())
    task = ux.tasks.CausalLM() if family == "gpt" else ux.tasks.Classification()
    order = order_of_use(model, named, forget[0], task.loss)
    assert sorted(order) == sorted(named)
    first, last = {
        "resnet": ("0.weight", "7.weight"),
        "vit": ("patches.weight", "head.weight"),
        "gpt": ("wte.weight", "norm.weight"),
        "lstm": ("embedding.weight", "head.weight"),
    }[family]
    assert order.index(first) < len(order) // 2 <= order.index(last)


@pytest.mark.parametrize("affordable", range(ssd_search.LEAST, ssd_search.MOST + 1))
def test_the_most_that_can_be_afforded_is_looked_for_down_to_the_least(affordable):
    class Priced(ssd_search._Round):
        def __init__(self):
            self.allowed = 0.5

        def look(self, scope, k, *, at_retain=False):
            lost = 0.5 if k <= affordable else 0.6
            return ssd_search.Candidate(1, scope, k, 1.0, 1, None, None, lost if at_retain else None, False)

    found = Priced().most_affordable("all parameters")
    assert (found.k, found.lost) == (affordable, 0.5)
