import copy
import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import unlearn_ext as ux
from unlearn_ext import Importance, fisher_diagonal, losses, ops, plan_ssd, ssd


@pytest.fixture(autouse=True)
def one_thread():
    """Models of this size gain nothing from threads."""
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_threads)


class Two(nn.Module):
    """Two scalars, for numbers that can be worked out by hand."""

    def __init__(self, a=2.0, b=-4.0):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([a, b]))

    def forward(self, x):
        return x * self.theta


def importances(full, forget, n=10, n_forget=1, **settings):
    return {
        "forget": Importance.from_dict({"theta": torch.tensor(forget)}, n_forget, **settings),
        "importance": Importance.from_dict({"theta": torch.tensor(full)}, n, **settings),
    }


def make():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(64, 3)
    )
    x, y = torch.randn(40, 1, 6, 6), torch.arange(40) % 3
    model[1].running_mean.normal_()
    forget, retain = ux.data.split(TensorDataset(x, y), classes=0)
    return model, DataLoader(forget, 8), DataLoader(retain, 8)


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_bits(a, b):
    def words(tensor):
        return tensor.contiguous().view(-1).view(torch.uint8)

    return a.keys() == b.keys() and all(torch.equal(words(a[name]), words(b[name])) for name in a)


# theta = (2, -4), full = (1, 1), forget = (4, 1.5).
# alpha = 2 selects the first only: 4 > 2 * 1, 1.5 < 2 * 1. Its factor is (lambda * 1 / 4)^exponent, bounded.
@pytest.mark.parametrize(
    "settings, expected",
    [
        ({}, 0.5),
        ({"lambda_": 2.0}, 1.0),
        ({"lambda_": 8.0}, 2.0),
        ({"lambda_": 8.0, "beta_max": 1.5}, 3.0),
        ({"lambda_": 0.0}, 0.0),
        ({"lambda_": 0.0, "beta_min": 0.25}, 0.5),
        ({"exponent": 2.0}, 0.125),
        ({"exponent": 0.5}, 1.0),
    ],
)
def test_an_example_worked_out_by_hand(settings, expected):
    model = Two()
    result = ssd(model, **importances([1.0, 1.0], [4.0, 1.5]), alpha=2.0, **settings)
    assert model.theta.tolist() == [expected, -4.0]
    assert result.changed == (0.0 if expected == 2.0 else 0.5)


def test_selection_is_strict_and_a_missing_full_importance_zeroes():
    model = Two()
    ssd(model, **importances([1.0, 1.0], [2.0, 2.0]), alpha=2.0)
    assert model.theta.tolist() == [2.0, -4.0]
    ssd(model, **importances([0.0, 0.0], [1e-30, 0.0]), alpha=2.0)
    assert model.theta.tolist() == [0.0, -4.0]


def test_retain_and_forget_are_pooled_by_their_counts():
    """n = 4 + 12 samples: full = (4 * 4 + 12 * 0) / 16 = 1, ratio 4, factor 1/4."""
    forget = Importance.from_dict({"theta": torch.tensor([4.0, 0.0])}, 4)
    retain = Importance.from_dict({"theta": torch.tensor([0.0, 1.0])}, 12)
    model = Two()
    plan = plan_ssd(model, forget, retain, alpha=2.0)
    assert plan.importance_full["theta"].tolist() == [1.0, 0.75]
    plan.apply()
    assert model.theta.tolist() == [0.5, -4.0]


def test_data_stored_and_pooled_importances_agree():
    model, forget, retain = make()
    together = DataLoader(torch.utils.data.ConcatDataset([forget.dataset, retain.dataset]), 7)
    variants = [copy.deepcopy(model) for _ in range(3)]
    ssd(variants[0], forget, retain, alpha=1.3)
    ssd(variants[1], forget, importance=fisher_diagonal(model, together), alpha=1.3)
    ssd(variants[2], fisher_diagonal(model, forget), fisher_diagonal(model, retain), alpha=1.3)
    for variant in variants[1:]:
        for a, b in zip(variants[0].parameters(), variant.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert not same_bits(bits(model), bits(variants[0]))


def test_what_is_not_selected_keeps_its_bits_and_everything_its_storage():
    model, forget, retain = make()
    with torch.no_grad():
        model[5].weight[0, 0] = -0.0
        model[5].weight[0, 1] = 1e-40  # a subnormal
    before, pointers = bits(model), [p.data_ptr() for p in model.parameters()]
    flags = [module.training for module in model.modules()]
    plan = plan_ssd(model, forget, retain, alpha=1.25)  # exact in float32
    assert same_bits(before, bits(model))
    result = plan.apply()
    assert [p.data_ptr() for p in model.parameters()] == pointers
    assert [module.training for module in model.modules()] == flags
    n_selected = 0
    for name, parameter in model.named_parameters():
        ratio = plan.importance_forget[name].double() > plan.alpha * plan.importance_full[name].double()
        changed = parameter.detach().view(torch.int32) != before[name].view(torch.int32)
        assert not bool((changed & ~ratio).any())
        n_selected += int(ratio.sum())
        assert result.changed_per_parameter[name] == pytest.approx(float(changed.float().mean()))
    assert 0 < n_selected < sum(p.numel() for p in model.parameters())
    assert result.history[1]["selected"] == n_selected
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_revert_is_exact_to_the_bit(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Linear(3, 5)).to(dtype)
    model[0] = model[0].to(memory_format=torch.channels_last)
    with torch.no_grad():
        model[1].weight[0, :2] = torch.tensor([-0.0, math.inf])
        model[1].weight[1, 0] = math.nan
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    imp = {
        which: {name: torch.rand(p.shape, dtype=wide) for name, p in model.named_parameters()}
        for which in ("full", "forget")
    }
    imp["forget"]["1.weight"][:2] = 10.0
    before, pointers = bits(model), [p.data_ptr() for p in model.parameters()]
    plan = plan_ssd(
        model,
        Importance.from_dict(imp["forget"], 1),
        importance=Importance.from_dict(imp["full"], 100),
        alpha=1.5,
    )
    for _ in range(2):
        assert plan.apply().changed > 0
        assert not same_bits(before, bits(model))
        plan.revert()
        assert same_bits(before, bits(model))
    assert [p.data_ptr() for p in model.parameters()] == pointers


@pytest.mark.parametrize(
    "change",
    [
        lambda weight: weight.data.add_(1e-3),
        lambda weight: weight.data[-1].mul_(1 + 2**-22),
        lambda weight: weight.data.view(-1)[:2].copy_(weight.data.view(-1)[:2].flip(0).clone()),
        lambda weight: ops.selective_dampen_(
            [weight], [torch.ones_like(weight)], [torch.full_like(weight, 2.0)], alpha=1.0, lambda_=1.0
        ),
    ],
    ids=["all", "last bits of a row", "two scalars swapped", "raw memory, no version counter"],
)
def test_revert_refuses_a_parameter_that_has_changed_and_writes_nothing(change):
    model, forget, retain = make()
    plan = plan_ssd(model, forget, retain, alpha=1.1)
    plan.apply()
    with torch.no_grad():
        change(model[5].weight)
    before = bits(model)
    with pytest.raises(RuntimeError, match=r"5.weight has changed since apply"):
        plan.revert()
    assert same_bits(before, bits(model))


def test_revert_minds_only_what_it_touched():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    imp = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    forget = {name: value * (5.0 if name == "1.weight" else 0.0) for name, value in imp.items()}
    plan = plan_ssd(
        model, Importance.from_dict(forget, 1), importance=Importance.from_dict(imp, 10), alpha=2.0
    )
    original = model[1].weight.detach().clone()
    plan.apply()
    with torch.no_grad():
        model[0].weight.zero_()
        model[1].weight.add_(0.0)  # the version counter moves, the bits do not
    plan.revert()
    assert torch.equal(model[1].weight, original)
    assert not model[0].weight.any()


def test_plans_are_undone_in_the_reverse_order():
    model, forget, retain = make()
    before = bits(model)
    first = plan_ssd(model, forget, retain, alpha=1.1)
    first.apply()
    second = plan_ssd(model, first.importance_forget, importance=first.importance_full, alpha=1.1)
    second.apply()
    with pytest.raises(RuntimeError, match="has changed"):
        first.revert()
    second.revert()
    first.revert()
    assert same_bits(before, bits(model))


def test_a_plan_is_applied_once():
    model, forget, retain = make()
    plan = plan_ssd(model, forget, retain)
    with pytest.raises(RuntimeError, match="not applied"):
        plan.revert()
    plan.apply()
    after = bits(model)
    with pytest.raises(RuntimeError, match="applied already"):
        plan.apply()
    assert same_bits(after, bits(model))


def test_purge_drops_what_derives_from_the_data():
    model, forget, retain = make()
    plan = plan_ssd(model, forget, retain)
    plan.apply()
    after = bits(model)
    plan.purge()
    assert plan.importance_forget is None
    assert plan.importance_full is None
    for call in (plan.apply, plan.revert, plan.summary, lambda: plan.sweep([1.0])):
        with pytest.raises(RuntimeError, match="purged"):
            call()
    assert same_bits(after, bits(model))


def test_summary_says_what_apply_will_do():
    model, forget, retain = make()
    plan = plan_ssd(model, forget, retain, alpha=1.5)
    text = plan.summary()
    result = plan.apply()
    assert "forget 14 of 40 samples" in text
    assert "alpha 1.5 (given)" in text
    assert f"selected {result.history[1]['selected']:,} of 243 scalars" in text
    share, name = text.splitlines()[3].split()
    assert share == f"{max(result.changed_per_parameter.values()):.3%}"
    assert result.changed_per_parameter[name] == max(result.changed_per_parameter.values())
    assert "(adaptive)" in plan_ssd(*make()).summary()


def test_a_sweep_tells_shares_and_factors_and_leaves_the_model_alone():
    model, forget, retain = make()
    plan = plan_ssd(model, forget, retain, alpha=1.5, beta_min=0.1)
    before = bits(model)
    alphas, lambdas = [0.5, 1.5, 2.0, 100.0, "adaptive"], [0.3, 1.0]
    table = plan.sweep(alphas, lambdas)
    assert same_bits(before, bits(model))
    assert len(table) == 10
    full = torch.cat([value.flatten().double() for value in plan.importance_full.values()])
    part = torch.cat([value.flatten().double() for value in plan.importance_forget.values()])
    for row, (alpha, lambda_) in zip(table, [(a, b) for a in alphas for b in lambdas], strict=True):
        assert row.lambda_ == lambda_
        assert alpha in (row.alpha, "adaptive")
        chosen = part > row.alpha * full
        assert row.selected == pytest.approx(float(chosen.double().mean()))
        if not bool(chosen.any()):
            assert math.isnan(row.mean_factor)
        else:
            factors = (lambda_ * full[chosen] / part[chosen]).clamp(0.1, 1.0)
            assert row.mean_factor == pytest.approx(float(factors.mean()), rel=1e-5)
    assert table.rows[3].selected == pytest.approx(plan.apply().history[1]["selected"] / full.numel())
    lines = str(table).splitlines()
    assert lines[0].split() == ["alpha", "lambda", "selected", "mean", "factor"]
    assert len(lines) == 11


@pytest.mark.parametrize(
    "alphas, lambdas", [([-1.0], [1.0]), ([1.0], [-1.0]), ([math.nan], [1.0]), (["auto"], [1.0])]
)
def test_a_sweep_checks_its_settings(alphas, lambdas):
    model, forget, retain = make()
    with pytest.raises(ValueError, match="must be"):
        plan_ssd(model, forget, retain).sweep(alphas, lambdas)


def test_the_adaptive_threshold_is_the_percentile_of_the_ratios():
    model, forget, retain = make()
    plan = plan_ssd(model, forget, retain)
    with np.errstate(all="ignore"):
        ratios = np.concatenate(
            [
                (plan.importance_forget[name].numpy() / plan.importance_full[name].numpy()).ravel()
                for name in plan.importance_full
            ]
        )
    ratios = ratios[np.isfinite(ratios)]
    expected = np.percentile(ratios, 100 - math.log(1 + 100 * 14 / 40))
    assert plan.alpha == pytest.approx(expected, rel=1e-6)
    result = plan.apply()
    share = result.history[1]["selected"] / len(ratios)
    assert share == pytest.approx(math.log(1 + 100 * 14 / 40) / 100, abs=1 / len(ratios))
    assert result.hyperparameters["alpha"] == "adaptive"
    assert result.hyperparameters["alpha_value"] == plan.alpha


def test_the_adaptive_threshold_selects_what_the_forget_set_alone_uses_however_much_it_is():
    full, forget = torch.rand(1000) + 0.1, torch.rand(1000) * 0.1
    forget[:700] = full[:700] * 10  # n / n_forget, but for rounding
    model = nn.ParameterDict({"theta": nn.Parameter(torch.ones(1000))})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = ssd(model, imp(1, theta=forget), importance=imp(10, theta=full))
    assert result.history[1]["selected"] == 700
    assert bool((model["theta"][700:] == 1).all())


def test_no_ratio_exceeds_the_bound_and_an_alpha_above_it_is_warned_about():
    model, forget, retain = make()
    plan = plan_ssd(model, forget, retain)
    for name, full in plan.importance_full.items():
        assert bool((plan.importance_forget[name] <= full * 40 / 14 * (1 + 1e-5)).all())
    before = bits(model)
    with pytest.warns(UserWarning, match=r"alpha = 3 selects nothing.*n / n_forget = 2.85714"):
        result = ssd(model, forget, retain, alpha=3.0)
    assert result.changed == 0
    assert same_bits(before, bits(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plan_ssd(model, forget, retain, alpha=2.8)
        plan_ssd(model, forget, retain, alpha=100.0, estimator="batch")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("which", ["forget", "full"])
def test_importances_that_are_not_finite_name_their_parameter(bad, which):
    values = {"forget": [1.0, 1.0], "full": [1.0, 1.0]}
    values[which][1] = bad
    with pytest.raises(FloatingPointError, match=f"importance of theta on the {which} set must be finite"):
        plan_ssd(Two(), **importances(values["full"], values["forget"]))


def settings_of(**given):
    forget = [(torch.ones(2, 2), torch.tensor([0, 1]))]
    return {"forget": forget, "retain": [(torch.ones(4, 2), torch.zeros(4).long())], **given}


def imp(n=4, **tensors):
    return Importance.from_dict(tensors, n)


ONE = imp(theta=torch.ones(2))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"retain": None}, ValueError, "exactly one of retain and importance"),
        ({"importance": ONE}, ValueError, "exactly one of retain and importance"),
        ({"forget": []}, ValueError, "at least one sample"),
        ({"retain": []}, ValueError, "at least one sample"),
        ({"forget": iter([])}, ValueError, "forget must be re-iterable"),
        ({"retain": iter([])}, ValueError, "retain must be re-iterable"),
        ({"retain": None, "importance": [1]}, TypeError, "importance must be an Importance, got list"),
        ({"alpha": -1.0}, ValueError, "alpha must be finite and >= 0, got -1.0"),
        ({"alpha": "auto"}, ValueError, "alpha must be a number, got 'auto'"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite"),
        ({"lambda_": -0.1}, ValueError, "lambda_ must be finite and >= 0"),
        ({"exponent": 0.0}, ValueError, "exponent must be positive"),
        (
            {"beta_min": 0.5, "beta_max": 0.4},
            ValueError,
            "beta_min must not exceed beta_max, got 0.5 and 0.4",
        ),
        ({"estimator": "exact"}, ValueError, "estimator must be one of"),
        ({"power": 3}, ValueError, "power must be 1 or 2"),
        (
            {"retain": ONE, "estimator": "batch"},
            ValueError,
            "retain holds 'per_sample' importances of power 2",
        ),
        ({"forget": ONE, "power": 1}, ValueError, "forget holds 'per_sample' importances of power 2"),
        ({"retain": imp(x=torch.ones(2))}, ValueError, "x must be a parameter of"),
        ({"retain": imp(theta=torch.ones(3))}, ValueError, r"must have shape \[2\]"),
        ({"retain": None, "importance": imp(1, theta=torch.ones(2))}, ValueError, "full set"),
    ],
)
def test_what_is_wrong_is_said_and_the_model_untouched(change, error, message):
    model = Two()
    with pytest.raises(error, match=message):
        ssd(model, **settings_of(**change))
    assert model.theta.tolist() == [2.0, -4.0]


def test_a_one_shot_retain_set_is_found_before_any_pass():
    passes = []

    def loss_fn(model, batch):
        passes.append(1)
        return losses.cross_entropy(model, batch)

    with pytest.raises(ValueError, match="one-shot"):
        ssd(Two(), **settings_of(retain=(b for b in [])), loss_fn=loss_fn)
    assert not passes


@pytest.mark.parametrize(
    "a, b, message",
    [
        ({"estimator": "mc"}, {}, "estimator must agree"),
        ({"power": 1}, {}, "power must agree"),
        (
            {"estimator": "batch", "batch_size": 2, "n_batches": 2},
            {"estimator": "batch", "batch_size": 4, "n_batches": 1},
            r"batch sizes must agree .* got 2 \(forget\) and 4",
        ),
    ],
)
def test_different_importances_are_not_mixed(a, b, message):
    forget = Importance.from_dict({"theta": torch.ones(2)}, 4, **a)
    full = Importance.from_dict({"theta": torch.ones(2)}, 8, **b)
    with pytest.raises(ValueError, match=message):
        plan_ssd(Two(), forget, importance=full)
    with pytest.raises(ValueError, match=message):
        plan_ssd(Two(), forget, full)


def test_a_set_smaller_than_one_batch_is_only_warned_about():
    forget = Importance.from_dict({"theta": torch.tensor([4.0, 0.0])}, 3, estimator="batch", batch_size=3)
    rest = Importance.from_dict({"theta": torch.tensor([1.0, 1.0])}, 24, estimator="batch", batch_size=8)
    with pytest.warns(UserWarning, match="smaller than one batch.* 3 .forget. and 8"):
        plan = plan_ssd(Two(), forget, rest)
    assert plan.importance_full["theta"].tolist() == [1.75, 0.75]  # one batch of four
    with pytest.warns(UserWarning, match="smaller than one batch"):
        plan_ssd(Two(), forget, importance=rest)


def test_frozen_parameters_and_those_without_importance_stay():
    model, forget, retain = make()
    model[0].requires_grad_(False)
    before = bits(model)
    result = ssd(model, forget, retain, alpha=1.1)
    assert same_bits({"w": before["0.weight"]}, {"w": model[0].weight.detach()})
    assert result.changed_per_parameter["0.weight"] == 0
    assert result.changed > 0

    partial = fisher_diagonal(make()[0], retain, params=["5.weight"]) + fisher_diagonal(
        make()[0], forget, params=["5.weight"]
    )
    model, forget, _ = make()
    before = bits(model)
    ssd(model, forget, importance=partial, alpha=1.1)
    changed = [name for name, p in model.named_parameters() if not torch.equal(p, before[name])]
    assert changed == ["5.weight"]
    model[5].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"5.weight must be trainable in the model"):
        ssd(model, forget, importance=partial)


def test_the_order_of_stored_importances_does_not_matter():
    model, forget, retain = make()
    stored = fisher_diagonal(model, forget) + fisher_diagonal(model, retain)
    reordered = Importance.from_dict({name: stored[name] for name in reversed(list(stored))}, 40)
    other = copy.deepcopy(model)
    ssd(model, forget, importance=stored, alpha=1.3)
    ssd(other, forget, importance=reordered, alpha=1.3)
    assert same_bits(bits(model), bits(other))


def test_the_loss_free_variant_reads_no_labels():
    model, forget, retain = make()
    unlabelled = [[(x,) for x, _ in part] for part in (forget, retain)]
    result = ssd(model, *unlabelled, power=1, loss_fn=losses.logit_norm, alpha=1.02)
    assert result.changed > 0
    assert result.hyperparameters["loss_fn"] == "unlearn_ext.losses.logit_norm"
    assert result.hyperparameters["power"] == 1


def test_sequential_requests_with_stored_importances():
    """The second request starts from what is left: the stored importances less the forgotten part."""
    model, forget, retain = make()
    full = fisher_diagonal(model, forget) + fisher_diagonal(model, retain)
    plan = plan_ssd(model, forget, importance=full)
    plan.apply()
    left = full - plan.importance_forget
    assert left.n_samples == 26
    second, _ = ux.data.split(retain.dataset, classes=1)
    assert ssd(model, DataLoader(second, 8), importance=left).changed > 0


def test_batch_parity_equals_the_published_loop():
    """The released code's arithmetic, written out: squares of batch-mean gradients, alpha 10 and lambda 1."""
    model, forget, retain = make()
    full_loader = DataLoader(torch.utils.data.ConcatDataset([retain.dataset, forget.dataset]), 7)
    forget = DataLoader(forget.dataset, 7)

    def published(loader):
        reference.eval()
        totals = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
        for x, y in loader:
            reference.zero_grad()
            nn.functional.cross_entropy(reference(x), y).backward()
            for name, p in reference.named_parameters():
                totals[name] += p.grad**2 / len(loader)
        return totals

    reference = copy.deepcopy(model)
    whole, part = published(full_loader), published(forget)
    with torch.no_grad():
        for name, p in reference.named_parameters():
            chosen = part[name] > 2.0 * whole[name]
            p[chosen] *= (whole[name] / part[name])[chosen].clamp(max=1.0)
    stored = fisher_diagonal(model, full_loader, estimator="batch")
    assert ssd(model, forget, importance=stored, estimator="batch", alpha=2.0).changed > 0
    for a, b in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["before", "during", "after"])
def test_a_failure_in_apply_leaves_the_model_as_it_was(error, when, monkeypatch):
    model, forget, retain = make()
    plan = plan_ssd(model, forget, retain, alpha=1.1)
    before = bits(model)
    honest = ops.selective_dampen_

    def failing(params, *rest, **settings):
        if settings["lambda_"] != 0:  # the journal's own calls use lambda 0
            if when == "during":
                honest(params, *rest, **settings)
            raise error
        honest(params, *rest, **settings)

    if when == "after":
        monkeypatch.setattr(ops, "pack_mask", lambda mask: (_ for _ in ()).throw(error()))
    else:
        monkeypatch.setattr(ops, "selective_dampen_", failing)
    with pytest.raises(error):
        plan.apply()
    assert same_bits(before, bits(model))
    monkeypatch.undo()
    assert plan.apply().changed > 0


def test_a_nan_loss_leaves_the_model_as_it_was():
    model, forget, retain = make()
    before = bits(model)
    poisoned = [(x, y) for x, y in retain]
    poisoned[1][0][0] = math.nan
    with pytest.raises(FloatingPointError, match="batch 1"):
        ssd(model, forget, poisoned)
    assert same_bits(before, bits(model))
    assert model.training


def test_tied_parameters_are_dampened_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    before = model[0].weight.detach().clone()
    imp = Importance.from_dict({"0.weight": torch.ones(3, 3)}, 10)
    ssd(model, Importance.from_dict({"0.weight": torch.full((3, 3), 4.0)}, 1), importance=imp, alpha=2.0)
    torch.testing.assert_close(model[1].weight.detach(), before / 4)


def test_the_result_is_a_record():
    model, forget, retain = make()
    result = ux.unlearn("ssd", model, forget, retain, alpha=1.5)
    assert result.method == "ssd"
    assert set(result.seconds) == {"importance", "dampening"}
    assert set(result.changed_per_parameter) == {name for name, _ in model.named_parameters()}
    parsed = json.loads(result.to_json())
    assert parsed["hyperparameters"] == {
        "alpha": 1.5,
        "alpha_value": 1.5,
        "lambda_": 1.0,
        "exponent": 1.0,
        "beta_min": 0.0,
        "beta_max": 1.0,
        "estimator": "per_sample",
        "power": 2,
        "loss_fn": "unlearn_ext.losses.cross_entropy",
    }
    assert ux.METHODS["ssd"] is ssd
    with pytest.raises(ValueError, match="must be one of ssd, got 'SSD'"):
        ux.unlearn("SSD", model, forget, retain)
