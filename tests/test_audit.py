"""Scores of an audit against slow plain versions and known cases; rows of margins survive a kill."""

import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import unlearn_ext as ux
from unlearn_ext import metrics
from unlearn_ext.evaluation import audit as audit_function
from unlearn_ext.evaluation import margins as margins_module
from unlearn_ext.evaluation.audit import FLOOR, Figure
from unlearn_ext.evaluation.audit_scores import (
    area_and_recall,
    epsilons,
    forgetting_score,
    klom,
    likelihood_ratios,
)


def draws(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def slow_klom(u, o):
    u, o = (np.clip(side, -100, 100) for side in (u, o))
    low, high = min(u.min(), o.min()), max(u.max(), o.max())
    if low == high:
        return 0.0
    edges = [low + (high - low) * k / 20 for k in range(21)]

    def share(values, k):
        inside = sum(edges[k] <= v < edges[k + 1] or (k == 19 and v >= edges[20]) for v in values)
        return inside / len(values)

    total = 0.0
    for k in range(20):
        p, q = share(u, k), share(o, k)
        if p > 0:
            total += p * math.log(p / max(q, 1e-5))
    return total


def slow_epsilon(u, o):
    cuts = sorted({*u, *o})
    cuts = [-math.inf, *[(a + b) / 2 for a, b in itertools.pairwise(cuts)], math.inf]
    best = 0.0
    for i, low in enumerate(cuts):
        for high in cuts[i + 1 :]:
            for inside in (True, False):
                fnr = np.mean([(low < v < high) != inside for v in u])
                fpr = np.mean([(low < v < high) == inside for v in o])
                if fpr == 0 and fnr == 0:
                    return 50.0
                if fpr == 0 or fnr == 0:
                    continue
                for a, b in ((fpr, fnr), (fnr, fpr)):
                    if 1 - 1e-5 - a > 0:
                        best = max(best, math.log(1 - 1e-5 - a) - math.log(b))
    return min(best, 50.0)


def test_klom_is_the_divergence_of_histograms():
    u, o = 3 * draws(0, 13, 6), 3 * draws(1, 17, 6) + 1
    u[0, 0], o[0, 1] = 500.0, -np.inf  # clipped
    np.testing.assert_allclose(klom(u, o), [slow_klom(a, b) for a, b in zip(u.T, o.T, strict=True)])
    same = np.full((5, 2), 3.0)
    assert klom(same, same).tolist() == [0, 0]
    assert klom(same, same + 1).tolist() == pytest.approx([math.log(1e5)] * 2)
    # Half of one's values in one bin, the other's in two: log 2.
    assert klom(np.array([[0.0]] * 4), np.array([[0.0], [0.0], [1.0], [1.0]])) == pytest.approx([math.log(2)])


def test_epsilon_is_that_of_the_best_single_or_double_threshold():
    u, o = draws(2, 9, 5), 1.5 * draws(3, 8, 5) + 0.5
    u[:, 0], o[:4, 1] = u[:, 0].round(), u[:4, 1]  # ties
    np.testing.assert_allclose(epsilons(u, o), [slow_epsilon(a, b) for a, b in zip(u.T, o.T, strict=True)])
    apart = np.arange(8.0)[:, None]
    assert epsilons(apart, apart + 8) == [50.0]
    assert epsilons(apart, apart) <= [math.log(7)]
    # Inside against outside: a double threshold tells what no single one does.
    ring = np.array([-5.0, -4, 4, 5])[:, None]
    assert epsilons(np.zeros((4, 1)) + apart[:4] / 10, ring) == [50.0]
    n = 10  # one error on either side: the largest finite value
    u = np.r_[np.zeros(n - 1), 1.0][:, None]
    assert epsilons(u, 1 - u) == pytest.approx([math.log(n - 1 - 1e-4)], rel=1e-3)


def test_the_score_halves_with_every_half_of_epsilon_up_to_the_ceiling():
    assert forgetting_score(np.array([0.0, 0.49]), 16) == 1
    assert forgetting_score(np.array([0.5, 1.0]), 16) == (0.5 + 0.25) / 2
    assert forgetting_score(np.array([3.0, 3.01]), 16) == 2**-6 / 2  # ceil(log 15) = 3
    assert forgetting_score(np.array([50.0]), 64) == 0


def test_likelihood_ratios_leave_out_the_network_they_judge():
    u, o = draws(4, 6, 3) + 1, draws(5, 7, 3)
    found = likelihood_ratios(u, o)

    def log_density(value, others):
        return -(((value - others.mean()) / others.std()) ** 2) / 2 - math.log(others.std())

    for own, side in enumerate((u, o)):
        for i in range(len(side)):
            for j in range(3):
                without = np.delete(side[:, j], i)
                fits = (without, o[:, j]) if own == 0 else (u[:, j], without)
                wanted = log_density(side[i, j], fits[0]) - log_density(side[i, j], fits[1])
                assert found[own][i, j] == pytest.approx(wanted)


def test_the_attack_is_chance_between_networks_of_one_kind_and_certain_between_far_ones():
    u, o = draws(6, 64, 200), draws(7, 64, 200)
    area, recall = area_and_recall(*likelihood_ratios(u, o))
    assert area == pytest.approx(0.5, abs=0.02)
    assert recall == pytest.approx(0.01, abs=0.005)
    area, recall = area_and_recall(*likelihood_ratios(u + 8, o))
    assert area > 0.999
    assert recall > 0.99
    # Two Gaussians one deviation apart: the best attack's AUC is Phi(1 / sqrt 2).
    area, _ = area_and_recall(*likelihood_ratios(u + 1, o))
    assert area == pytest.approx(0.5 * (1 + math.erf(0.5)), abs=0.02)


# -- the audit itself


def blobs(n, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    centres = torch.eye(3, 5) * 2
    return TensorDataset(centres[labels] + 1.2 * torch.randn(n, 5, generator=generator), labels)


def make_model():
    return nn.Sequential(nn.Linear(5, 24), nn.ReLU(), nn.Linear(24, 3))


def train(model, data, epochs=12):
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    for _ in range(epochs):
        for x, y in data:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()


def perfect(model, forget, retain, generator):
    """A method that retrains, with other randomness than any oracle."""
    torch.manual_seed(int(generator.initial_seed()) + 1000)
    new = make_model()
    train(new, retain)
    model.load_state_dict(new.state_dict())


def nothing(model, forget, retain):
    """A method that does nothing."""


def failing(model, forget, retain):
    raise ZeroDivisionError("no")


@pytest.fixture
def problem():
    known = blobs(60, 0)
    forget, retain = ux.data.split(known, ids=range(10))
    return {
        "forget": DataLoader(forget, 5),
        "retain": DataLoader(retain, 25, shuffle=True),
        "validation": DataLoader(blobs(45, 1), 45),
        "full": DataLoader(known, 30, shuffle=True),
        "make_model": make_model,
        "train": train,
    }


METHODS = {"perfect": perfect, "nothing": nothing, "failing": failing}


def test_perfect_unlearning_is_like_retraining_and_none_is_not(problem):
    found = audit_function(METHODS, **problem, n_models=12, bootstrap=20)
    score = {
        label: {name: figure.value for name, figure in row.items()} for label, row in found.figures.items()
    }
    assert score["perfect"]["klom forget, median"] < score["nothing"]["klom forget, median"]
    assert score["perfect"]["epsilon, median"] < score["nothing"]["epsilon, median"]
    assert score["perfect"]["score"] > score["nothing"]["score"]
    assert abs(score["perfect"]["ulira auc"] - 0.5) < 0.15 < score["nothing"]["ulira auc"] - 0.5
    # What does nothing is the original.
    assert found.figures["nothing"] == found.figures["original"]
    assert np.array_equal(found.margins["nothing"]["retain"], found.margins["original"]["retain"])
    assert found.margins["oracles"]["forget"].shape == (12, 10)
    assert found.margins["perfect"]["validation"].shape == (12, 45)
    for figure in found.figures["perfect"].values():
        assert figure.low <= figure.high
    assert found.failed == {"failing": "ZeroDivisionError: no"}
    text = found.to_markdown()
    assert FLOOR in text
    assert "2.40" in text  # log 11
    assert json.loads(found.to_json())["figures"]["perfect"]["score"]["value"] == score["perfect"]["score"]


def test_margins_are_log_odds_in_reading_order(problem):
    model = make_model()
    found = audit_function(
        {"nothing": nothing}, **{**problem, "full": None}, model=model, n_models=4, bootstrap=0
    )
    x, y = next(iter(problem["validation"]))
    p = model(x).double().softmax(-1).gather(1, y[:, None]).squeeze(1)
    for row in found.margins["nothing"]["validation"]:
        np.testing.assert_allclose(row, (p / (1 - p)).log().detach(), rtol=1e-4, atol=1e-6)
    assert any("one original" in limit for limit in found.limits)
    assert math.isnan(found.figures["nothing"]["score"].low)
    assert str(Figure(0.5)) == "0.5"


def test_samples_without_a_label_do_not_pass_for_forgotten(problem):
    """Their log-odds are 0 in every network, which would be perfect."""
    forget = list(problem["forget"])
    unlabelled = [(inputs, torch.full_like(labels, -100)) for inputs, labels in forget]
    found, want = (
        audit_function({"nothing": nothing}, **{**problem, "forget": data}, n_models=4, bootstrap=0)
        for data in (forget + unlabelled, forget)
    )
    for kind, margins in want.margins.items():
        assert np.array_equal(found.margins[kind]["forget"], margins["forget"])
    with pytest.raises(
        ValueError, match="audit: forget must hold at least one sample with a label, got none"
    ):
        audit_function({"nothing": nothing}, **{**problem, "forget": unlabelled}, n_models=4, bootstrap=0)


def test_what_is_known_is_not_computed_again(problem, tmp_path, monkeypatch, capsys):
    settings = {**problem, "n_models": 4, "bootstrap": 0, "cache": tmp_path}
    first = audit_function({"perfect": perfect}, **settings)
    monkeypatch.setattr(margins_module.Rows, "measured", None)  # nothing can be measured from here on
    assert capsys.readouterr().err == ""
    again = audit_function({"perfect": perfect}, progress=True, **settings)
    assert again.figures == first.figures
    assert "perfect" in capsys.readouterr().err  # a line per network
    # Other settings of the method, another order of the samples, a cut file: other rows.
    other = {**settings, "forget": list(reversed(list(problem["forget"])))}
    with pytest.raises(TypeError, match="not callable"):
        audit_function({"perfect": perfect}, **other)
    assert audit_function({"nothing": nothing}, **settings).failed
    rows = sorted(tmp_path.glob("margins-*.npz"))
    for row in rows[::2]:
        row.write_bytes(row.read_bytes()[:40])
    monkeypatch.undo()
    assert audit_function({"perfect": perfect}, **settings).figures == first.figures


def test_a_killed_audit_goes_on_where_it_was(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            f"""
            import sys, time
            import torch
            sys.path.insert(0, {str(Path(__file__).parent)!r})
            torch.set_num_threads(1)
            from torch.utils.data import DataLoader
            import unlearn_ext as ux
            from test_audit import blobs, make_model, train, perfect
            from unlearn_ext.evaluation import audit

            def slow(model, data):
                time.sleep(0.05)
                train(model, data, 2)

            known = blobs(60, 0)
            forget, retain = ux.data.split(known, ids=range(10))
            found = audit(
                {{"perfect": perfect}}, forget=DataLoader(forget, 5),
                retain=DataLoader(retain, 25), validation=DataLoader(blobs(45, 1), 45),
                full=DataLoader(known, 30), make_model=make_model, train=slow, n_models=6,
                bootstrap=0, cache=sys.argv[1], progress=True,
            )
            print(found.to_json())
            """
        )
    )

    def run(folder, kill_after=None):
        process = subprocess.Popen(
            [sys.executable, str(script), str(folder)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        if kill_after is not None:
            for line in process.stderr:
                if line.startswith(kill_after):
                    break
            os.kill(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        return out, err

    folder = tmp_path / "cache"
    run(folder, "audit: oracle 4/6")
    kept = {path.name: path.stat().st_mtime_ns for path in folder.glob("margins-*.npz")}
    assert len(kept) >= 2  # those before the one that was being made
    run(folder, "audit: perfect 3/6")
    out, err = run(folder)
    assert err.count("audit: ") == 18
    for name, at in kept.items():
        assert (folder / name).stat().st_mtime_ns == at  # not made again
    whole, _ = run(tmp_path / "fresh")
    assert json.loads(out) == json.loads(whole)


def test_bad_calls_are_refused(problem):
    with pytest.raises(ValueError, match="exactly one of full and model"):
        audit_function({}, **{**problem, "full": None})
    with pytest.raises(ValueError, match="n_models must be at least 4, got 2"):
        audit_function({}, **problem, n_models=2)
    with pytest.raises(ValueError, match="methods must be among"):
        audit_function(["magic"], **problem)
    with pytest.raises(ValueError, match="a label must not be 'original'"):
        audit_function({"original": nothing}, **problem)
    with pytest.raises(NotImplementedError, match=r"audit: model .*pass what it wraps"):
        audit_function({}, **{**problem, "full": None, "model": nn.DataParallel(make_model())})


# -- without oracles


def test_rf_jsd_compares_mean_predictions_of_classes():
    torch.manual_seed(0)
    a, b = make_model(), make_model()
    forget, unseen = ([blobs(n, seed).tensors] for n, seed in ((30, 0), (60, 1)))
    total = 0.0
    for label in range(3):
        means = []
        for model, (x, y) in ((a, forget[0]), (b, unseen[0])):
            means.append(model(x[y == label]).double().softmax(-1).mean(0))
        m = (means[0] + means[1]) / 2
        total += sum(float((p * (p / m).log2()).sum()) for p in means) / 2
    assert metrics.rf_jsd(a, b, forget=forget, unseen=unseen) == pytest.approx(total / 3, rel=1e-5)
    only = [(forget[0][0][:1], forget[0][1][:1])]
    other = [(unseen[0][0][1:2], unseen[0][1][1:2])]
    with pytest.raises(ValueError, match="share a class"):
        metrics.rf_jsd(a, b, forget=only, unseen=other)


def test_rf_jsd_leaves_out_samples_that_do_not_count():
    torch.manual_seed(0)
    a, b = make_model(), make_model()
    forget, unseen = ([blobs(n, seed).tensors] for n, seed in ((30, 0), (60, 1)))
    want = metrics.rf_jsd(a, b, forget=forget, unseen=unseen)
    for data in (forget, unseen):
        data.append((data[0][0] + 1, torch.full_like(data[0][1], -100)))
    assert metrics.rf_jsd(a, b, forget=forget, unseen=unseen) == want


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_rf_jsd_refuses_answers_that_are_no_numbers(value):
    """They came to 0, which is ideal."""
    data = [(torch.eye(3), torch.arange(3))]
    broken = [(torch.eye(3).fill_diagonal_(value), torch.arange(3))]
    with pytest.raises(FloatingPointError, match=r"rf_jsd: .* got NaN"):
        metrics.rf_jsd(nn.Identity(), nn.Identity(), forget=broken, unseen=data)


def test_tug_of_war_is_one_only_for_equal_accuracies():
    same = {"forget": 0.5, "retain": 1.0}
    assert metrics.tug_of_war(same, same) == 1
    assert metrics.tug_of_war({"forget": 1.0, "retain": 0.9}, same) == pytest.approx(0.5 * 0.9)
    with pytest.raises(ValueError, match="same sets"):
        metrics.tug_of_war(same, {"forget": 1.0})
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\], got 90"):
        metrics.tug_of_war({"forget": 90, "retain": 1.0}, same)
