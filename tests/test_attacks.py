"""Membership inference by loss, without scikit-learn."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from unlearn_ext import tasks
from unlearn_ext.evaluation.metrics import attacks, mia


def labelled(confidences):
    """Two-class data on which the identity has these probabilities for the label, which is 0."""
    p = torch.tensor(confidences, dtype=torch.float64)
    return [(torch.stack([p, 1 - p], dim=1).log(), torch.zeros(len(p), dtype=torch.long))]


FORGET = labelled([0.9, 0.6, 0.4])
TEST = labelled([0.8, 0.5])


class Refusing:
    """A data set that must not be read."""

    def __iter__(self):
        raise AssertionError("read")


@pytest.fixture
def without_sklearn(monkeypatch):
    def refuse(module):
        raise ImportError(f"no sklearn.{module}")

    monkeypatch.setattr(attacks, "sklearn", refuse)


def by_definition(members, others, fpr=0.01):
    """Pair by pair, and threshold by threshold."""
    order = [(a > b) + (a == b) / 2 for a in members for b in others]
    rates = [
        np.mean(members > threshold)
        for threshold in (-math.inf, *members, *others)
        if np.sum(others > threshold) <= math.floor(fpr * len(others) + 1e-9)
    ]
    return np.mean(order), max(rates)


def test_the_attack_by_loss_needs_neither_retain_set_nor_scikit_learn(without_sklearn):
    attack = mia(nn.Identity(), forget=FORGET, retain=Refusing(), test=TEST, convention="loss")
    assert attack.auc == pytest.approx(0.5)
    assert attack.tpr == pytest.approx(1 / 3)
    assert (attack.score, attack.reference_score) == (attack.auc, None)
    assert mia(nn.Identity(), forget=FORGET, test=TEST, convention="loss") == attack
    with_reference = mia(nn.Identity(), forget=FORGET, test=TEST, convention="loss", reference=nn.Identity())
    assert with_reference.reference_auc == attack.auc
    with pytest.raises(ImportError, match=r"no sklearn\.linear_model"):
        mia(nn.Identity(), forget=FORGET, retain=FORGET, test=TEST)


@pytest.mark.parametrize("fpr", [0.0, 0.01, 0.1, 1.0])
@pytest.mark.parametrize("n, m", [(1, 1), (7, 3), (40, 200), (200, 40)])
def test_auc_and_tpr_are_those_of_the_definition(n, m, fpr):
    draws = np.random.default_rng(n)
    for digits in (0, 1, 8):  # with many ties, some, none
        members, others = draws.normal(0.5, 1, n).round(digits), draws.normal(0, 1, m).round(digits)
        auc, tpr = by_definition(members, others, fpr)
        assert attacks.auc(members, others) == pytest.approx(auc, abs=1e-12)
        assert attacks._tpr(members, others, fpr) == pytest.approx(tpr, abs=1e-12)


def test_a_resample_counts_what_it_drew():
    draws = np.random.default_rng(0)
    members, others = draws.normal(0.5, 1, 30).round(1), draws.normal(0, 1, 150).round(1)
    ranked = attacks._Ranked(members, others)
    for seed in range(20):
        ours, theirs = np.random.default_rng(seed), np.random.default_rng(seed)
        expected = by_definition(theirs.choice(members, 30), theirs.choice(others, 150))
        assert ranked.resampled(ours) == pytest.approx(expected, abs=1e-12)


def test_intervals_are_the_quantiles_of_the_resamples():
    draws = np.random.default_rng(1)
    forget, test = (draws.uniform(0.5, 1, n) for n in (60, 120))
    attack = mia(
        nn.Identity(), forget=labelled(forget), test=labelled(test), convention="loss", bootstrap=50, seed=3
    )
    theirs = np.random.default_rng(3)
    pairs = [by_definition(theirs.choice(forget, 60), theirs.choice(test, 120)) for _ in range(50)]
    low, high = np.quantile(pairs, [0.025, 0.975], axis=0)
    assert attack.auc_interval == pytest.approx((low[0], high[0]), abs=1e-9)
    assert attack.tpr_interval == pytest.approx((low[1], high[1]), abs=1e-9)


def test_both_forms_mean_the_same():
    pytest.importorskip("sklearn")
    retain = labelled([0.95, 0.97, 0.99])
    for convention in ("ssd", "salun"):
        old = mia(nn.Identity(), retain, FORGET, TEST, convention, bootstrap=10)
        new = mia(nn.Identity(), test=TEST, forget=FORGET, retain=retain, convention=convention, bootstrap=10)
        assert old == new
    assert mia(nn.Identity(), retain, FORGET, TEST, bootstrap=0).convention == "ssd"
    assert mia(nn.Identity(), retain, forget=FORGET, test=TEST, bootstrap=10).auc == new.auc


def test_scrub_reads_no_retain_set():
    pytest.importorskip("sklearn")
    many = labelled(np.linspace(0.6, 0.9, 12))
    attack = mia(nn.Identity(), forget=many, retain=Refusing(), test=many, convention="scrub", bootstrap=0)
    assert 0 <= attack.score <= 1


def test_calibration_takes_hard_samples_for_what_they_are():
    """The model is a little surer of members than others are; how hard a sample is hides that."""
    torch.manual_seed(0)

    class Model(nn.Module):
        def __init__(self, known):
            super().__init__()
            self.known = known

        def forward(self, x):
            margin = x[:, 0] + self.known * x[:, 1]
            return torch.stack([margin, torch.zeros_like(margin)], 1)

    def samples(member):
        x = torch.stack([3 * torch.randn(400), torch.full((400,), float(member))], 1)
        return [(x, torch.zeros(400, dtype=torch.long))]

    forget, test = samples(1), samples(0)
    model, others = Model(0.3), [Model(0.0), Model(0.0)]
    plain = mia(model, forget=forget, test=test, convention="loss", bootstrap=0)
    calibrated = mia(model, forget=forget, test=test, convention="loss", calibration=others, bootstrap=0)
    assert plain.auc < 0.6
    assert calibrated.auc > 0.95
    assert calibrated.score == calibrated.auc
    retrained = mia(others[0], forget=forget, test=test, convention="loss", calibration=others, bootstrap=0)
    assert retrained.auc == pytest.approx(0.5)
    # Loaders that shuffle, by the global generator or by their own: samples still meet themselves.
    for own in (None, torch.Generator().manual_seed(1)):
        shuffled = (
            DataLoader(TensorDataset(*data[0]), 64, shuffle=True, generator=own) for data in (forget, test)
        )
        found = mia(
            model,
            **dict(zip(("forget", "test"), shuffled, strict=True)),
            convention="loss",
            calibration=others,
            bootstrap=0,
        )
        assert found.auc == calibrated.auc


@pytest.mark.parametrize(
    "sets, settings, error, message",
    [
        (
            (),
            {"forget": FORGET, "test": TEST},
            ValueError,
            "mia: retain must be given",
        ),
        ((), {"forget": FORGET, "convention": "loss"}, ValueError, "mia: test must be given"),
        ((FORGET,), {"retain": FORGET, "test": TEST}, TypeError, "mia: retain must be given once"),
        ((FORGET, FORGET, TEST, "ssd", 1), {}, TypeError, "at most 4 arguments may follow"),
        ((), {"forget": FORGET, "test": [], "convention": "loss"}, ValueError, "test"),
        ((), {"forget": FORGET, "test": TEST, "convention": "x"}, ValueError, "convention must be one of"),
        (
            (),
            {"forget": FORGET, "test": TEST, "convention": "loss", "bootstrap": -1},
            ValueError,
            "bootstrap must be at least 0, got -1",
        ),
    ],
)
def test_what_is_missing_or_given_twice_is_said(sets, settings, error, message):
    with pytest.raises(error, match=message):
        mia(nn.Identity(), *sets, **settings)


def test_infinite_losses_are_ranked_and_refused_where_they_cannot_be():
    impossible, possible = labelled([0.0] * 6), labelled([0.5] * 6)
    sets = {"forget": impossible, "test": possible}
    plain = mia(nn.Identity(), **sets, convention="loss", bootstrap=0)
    assert plain.auc == 0.0
    with pytest.raises(FloatingPointError, match="forget set must be finite in the model or the calibration"):
        mia(nn.Identity(), **sets, convention="loss", calibration=[nn.Identity()], bootstrap=0)

    class Uniform(nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    assert mia(Uniform(), **sets, convention="loss", calibration=[nn.Identity()], bootstrap=0).auc == 1.0
    assert mia(nn.Identity(), **sets, convention="loss", calibration=[Uniform()], bootstrap=0).auc == 0.0
    with pytest.raises(FloatingPointError, match="losses must be finite for 'scrub'"):
        mia(nn.Identity(), **sets, convention="scrub", bootstrap=0)


def test_the_loss_is_that_of_the_task():
    torch.manual_seed(0)
    outputs = torch.randn(30, 3, dtype=torch.float64)
    numbers = torch.randn(30, 3, dtype=torch.float64)
    several = (torch.rand(30, 3) < 0.5).double()
    cases = [
        (tasks.Regression(), numbers, nn.functional.mse_loss),
        (tasks.MultiLabel(), several, nn.functional.binary_cross_entropy_with_logits),
    ]
    for task, labels, function in cases:
        forget, test = ([(outputs[part], labels[part])] for part in (slice(10), slice(10, 30)))
        attack = mia(nn.Identity(), forget=forget, test=test, convention="loss", task=task, bootstrap=0)
        values = -function(outputs, labels, reduction="none").mean(1).numpy()
        assert attack.auc == pytest.approx(by_definition(values[:10], values[10:])[0])
    with pytest.raises(NotImplementedError, match=r"ssd.*Regression|Regression.*log_scores"):
        mia(nn.Identity(), forget=forget, retain=forget, test=test, task=tasks.Regression())


def test_tokens_of_a_language_model_are_shifted_and_a_taggers_are_not():
    torch.manual_seed(0)
    logits, labels = torch.randn(12, 5, 4), torch.randint(4, (12, 5))

    class Model(nn.Module):
        def forward(self, x):
            return x

    data = [{"x": logits[:4], "labels": labels[:4]}], [{"x": logits[4:], "labels": labels[4:]}]
    for task, rows in ((tasks.CausalLM(), slice(1, None)), (tasks.TokenClassification(), slice(None))):
        used = logits[:, :-1] if rows.start else logits
        values = -nn.functional.cross_entropy(used.mT, labels[:, rows], reduction="none").mean(1).numpy()
        attack = mia(Model(), forget=data[0], test=data[1], convention="loss", task=task, bootstrap=0)
        assert attack.auc == pytest.approx(by_definition(values[:4], values[4:])[0])


@pytest.mark.parametrize(
    "reference, expected",
    [
        (0.40, "like the reference"),
        (0.50, "like the reference"),
        (0.39, "still recognised"),
        (0.51, "over-unlearned"),
    ],
)
def test_the_ends_of_an_interval_belong_to_it(reference, expected):
    attack = mia(nn.Identity(), forget=FORGET, test=TEST, convention="loss")
    attack = dataclasses.replace(
        attack, auc=0.45, auc_interval=attacks.Interval(0.40, 0.50), reference_auc=reference
    )
    assert attack.verdict == expected
