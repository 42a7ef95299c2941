import copy
import functools
import html
import importlib
import json
import logging
import math
import os
import random
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import unlearn_ext as ux
from unlearn_ext import metrics, report
from unlearn_ext._internal import seeding
from unlearn_ext.evaluation import keys as fingerprints
from unlearn_ext.evaluation import margins, study
from unlearn_ext.evaluation.audit import FLOOR
from unlearn_ext.evaluation.compare import compare
from unlearn_ext.evaluation.metrics import registry
from unlearn_ext.evaluation.rows import LOSS_EDGES, read_row, row_text
from unlearn_ext.evaluation.sets import Sets
from unlearn_ext.evaluation.settings import check_settings
from unlearn_ext.methods import METHODS

pytest.importorskip("sklearn")

N_CLASSES = 3


def blobs(n, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % N_CLASSES
    centres = torch.tensor([[2.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 2.0, 0.0]])
    return TensorDataset(centres[labels] + 0.8 * torch.randn(n, 4, generator=generator), labels)


def make_model():
    return nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 3))


def train(model, data):
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(8):
        for inputs, labels in data:
            optimizer.zero_grad()
            F.cross_entropy(model(inputs), labels).backward()
            optimizer.step()


def noisy(model, forget, retain, *, scale=0.1, generator=None):
    """A method: noise on every weight, from the generator it is given."""
    with torch.no_grad():
        for p in model.parameters():
            p.add_(scale * torch.randn(p.shape, generator=generator))


def loader_reader(model, forget, retain):
    """A method that depends on the order of a shuffling loader, and on the global random state."""
    with torch.no_grad():
        next(model.parameters()).add_(next(iter(retain))[0].mean() + torch.rand(()))


# Few resamples: what the intervals are is tested with the metric.
few = functools.partial(metrics.mia, bootstrap=20)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(registry, "mia", few)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    model = make_model()
    train(model, DataLoader(blobs(120, 0), 24, shuffle=True))
    return model.eval()


@pytest.fixture
def sets():
    forget, retain = ux.data.split(blobs(120, 0), classes=2)
    return {
        "forget": DataLoader(forget, 16),
        "retain": DataLoader(retain, 16, shuffle=True, generator=torch.Generator().manual_seed(3)),
        "test": DataLoader(blobs(90, 1), 45),
    }


def run(model, sets, **settings):
    given = {"methods": ["ssd"], "make_model": make_model, "train": train, **settings}
    return compare(model, **sets, **given)


def without_times(table):
    """The comparison without what no two runs share: seconds, and the phases they are made of."""
    document = copy.deepcopy(table.to_dict())
    for row in document["rows"]:
        row["phases"] = sorted(row["phases"])
        row["measures"].pop("seconds", None)
    for entry in document["table"]:
        entry["measures"].pop("seconds")
    return document


def test_figures_are_those_of_the_metrics(trained, sets):
    table = run(trained, sets, methods={"nothing": lambda model, forget, retain: None})
    found = table.measures("nothing")
    classes = [(x, y) for x, y in sets["test"]]
    kept = [(x[y < 2], y[y < 2]) for x, y in classes]
    gone = [(x[y == 2], y[y == 2]) for x, y in classes]
    assert found["retain"].value == metrics.accuracy(trained, sets["retain"])
    assert found["forget"].value == metrics.accuracy(trained, sets["forget"])
    assert found["test_retained"].value == metrics.accuracy(trained, kept)
    assert found["test_forgotten"].value == metrics.accuracy(trained, gone)
    attack = few(trained, sets["retain"], sets["forget"], gone)
    assert (found["mia_auc"].value, found["mia_auc"].low, found["mia_auc"].high) == (
        attack.auc,
        *attack.auc_interval,
    )
    assert found["mia_tpr"].value == attack.tpr
    assert found["changed"].value == 0
    assert "test" not in table.columns
    assert table.facts["forget_classes"] == [2]
    assert table.facts["samples"] == {"forget": 40, "retain": 80, "test": 90}


def test_the_gap_is_that_of_accuracies_and_attack(trained, sets):
    table = run(trained, sets, methods=["ssd"])
    names = ["retain", "forget", "test_retained", "test_forgotten", "mia_auc"]
    ours, theirs = table.measures("ssd"), table.measures("retrained")
    expected = sum(abs(ours[name].value - theirs[name].value) for name in names) / len(names)
    assert ours["gap"].value == pytest.approx(expected, abs=1e-12)
    assert theirs["gap"].value == 0
    assert theirs["js"].value == pytest.approx(0, abs=1e-12)
    assert theirs["forget"].value == 0
    assert ours["js"].value > 0
    assert ours["mia_auc"].note in ("like the reference", "still recognised", "over-unlearned")


@pytest.mark.parametrize("wrapped", [lambda model: model, torch.compile])
def test_a_given_reference_is_compared_with(trained, sets, wrapped):
    reference = wrapped(copy.deepcopy(trained))
    with pytest.warns(UserWarning, match="reference has the model's own weights"):
        table = run(trained, sets, methods=[noisy], reference=reference, make_model=None, train=None)
    assert table.measures("original")["js"].value == pytest.approx(0, abs=1e-12)
    assert table.measures("noisy")["js"].value == pytest.approx(
        _js_of_noisy(trained, sets, reference), rel=1e-12
    )
    assert "given" in table.measures("retrained")["seconds"].why


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_reference_with_weights_of_its_own_is_not_warned_about(trained, sets, dtype):
    """One of another dtype has its own, though the values are the same."""
    reference = copy.deepcopy(trained).to(dtype)
    with torch.no_grad():
        reference[0].bias[0] += dtype == torch.float32
    settings = {"methods": [noisy], "reference": reference, "make_model": None, "train": None}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        run(trained, sets, **settings)
    assert not [warning for warning in told if "the model's own weights" in str(warning.message)]


def test_a_model_whose_weights_are_not_here_is_refused(trained, sets):
    """Where only the reference's are not, the message says so."""
    for wrong, why in (
        (nn.LazyLinear(3), "must have made its parameters"),
        (nn.Linear(2, 3, device="meta"), "must have its parameters in memory"),
        (nn.DataParallel(copy.deepcopy(trained)), "pass what it wraps"),
    ):
        with pytest.raises(NotImplementedError, match=f"compare: reference: .*{why}"):
            run(trained, sets, methods=[noisy], reference=wrong, make_model=None, train=None)
        with pytest.raises(NotImplementedError, match=f"compare: model .*{why}"):
            run(wrong, sets, methods=[noisy])


def _js_of_noisy(model, sets, reference):
    subject = copy.deepcopy(model)
    noisy(subject, None, None, generator=torch.Generator().manual_seed(0))
    return metrics.js_divergence(subject, reference, sets["forget"])


def test_what_needs_a_reference_says_so_without_one(trained, sets):
    table = run(trained, sets, make_model=None, train=None)
    found = table.measures("ssd")
    for name in ("js", "activation_distance", "gap"):
        assert found[name].value is None
        assert "give reference=" in found[name].why
    assert found["retain"].value is not None
    assert found["mia_auc"].note is None
    assert "give reference=" in table.to_markdown()


def test_labels_that_do_not_count_are_no_classes(trained):
    """A sample without a label in both sets hid that all of a class was to go."""
    x, y = blobs(30, 0).tensors
    unlabelled = (x[:3], torch.full((3,), -100))
    forget, retain = ([(x[part], y[part]), unlabelled] for part in (y == 2, y != 2))
    found = Sets(trained, forget, retain, [(x, y)], task=None, hashed=False)
    assert found.classes == [2]
    assert list(found.tests) == ["test_retained", "test_forgotten"]
    found = Sets(trained, [unlabelled], retain[:1], [(x, y)], task=None, hashed=False)
    assert found.classes is None


def test_random_samples_are_not_taken_for_a_class(trained, sets):
    forget, retain = ux.data.split(blobs(120, 0), ids=range(10))
    table = run(trained, {**sets, "forget": DataLoader(forget, 5), "retain": DataLoader(retain, 16)})
    assert table.facts["forget_classes"] is None
    assert "test" in table.columns
    assert "test_forgotten" not in table.columns


def test_the_users_model_loaders_and_random_states_stay(trained, sets):
    model = copy.deepcopy(trained).train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[4].bias.requires_grad_(False)
    before = report.weights_digest(model)
    grad, state = model[0].weight.grad, torch.get_rng_state()
    order = sets["retain"].generator.get_state()
    run(model, sets, methods=["ssd", noisy, loader_reader])
    assert report.weights_digest(model) == before
    assert model.training
    assert model[0].weight.grad is grad
    assert not model[4].bias.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(sets["retain"].generator.get_state(), order)


def test_rows_do_not_depend_on_what_was_run_before(trained, sets):
    alone = run(trained, sets, methods=[loader_reader], seeds=[1])
    among = run(trained, sets, methods=[noisy, "ssd", loader_reader], seeds=[0, 1])
    (a,) = [row for row in alone.rows if row.label == "loader_reader"]
    (b,) = [row for row in among.rows if (row.label, row.seed) == ("loader_reader", 1)]
    assert {**a.measures, "seconds": None} == {**b.measures, "seconds": None}
    assert a.layers == b.layers


def test_seeds_differ_and_are_pooled(trained, sets):
    table = run(trained, sets, methods=[noisy], seeds=[0, 1, 2], metrics=["retain"])
    rows = [row for row in table.rows if row.label == "noisy"]
    assert [row.seed for row in rows] == [0, 1, 2]
    assert len({json.dumps(row.layers) for row in rows}) == 3
    values = torch.tensor([row.measures["retain"].value for row in rows], dtype=torch.float64)
    pooled = table.measures("noisy")["retain"]
    assert pooled.value == pytest.approx(float(values.mean()))
    assert pooled.spread == pytest.approx(float(values.std()))


def test_a_failing_method_loses_nobody_elses_results(trained, sets):
    def broken(model, forget, retain):
        next(iter(model.parameters())).data.zero_()
        raise RuntimeError("out of\nmemory")

    table = run(trained, sets, methods={"broken": broken, "ssd": "ssd", "unset": ("ssd", {"alpha": -1})})
    by_label = {row.label: row for row in table.rows}
    assert by_label["broken"].why == "RuntimeError: out of memory"
    assert "alpha must" in by_label["unset"].why
    assert by_label["ssd"].why is None
    assert by_label["ssd"].measures["retain"].value is not None
    assert table.measures("broken")["retain"].why == "RuntimeError: out of memory"
    text = table.to_markdown()
    assert "RuntimeError: out of memory" in text


def test_a_metric_that_fails_says_why_in_its_place(trained, sets):
    def impossible(model):
        raise ValueError("needs the moon")

    table = run(trained, sets, metrics=["retain", ("moon", impossible), ("weight", lambda m: math.inf)])
    found = table.measures("ssd")
    assert found["moon"].why == "needs the moon"
    assert found["weight"].why == "it came to inf"
    assert "needs the moon" in table.to_markdown()
    assert {"moon", "weight"} <= set(json.loads(table.to_json())["table"][0]["measures"])


def test_own_metrics_see_the_unlearned_model(trained, sets):
    def norm(model):
        return float(model[0].weight.detach().norm())

    table = run(trained, sets, methods={"doubled": _double}, metrics=[("norm", norm)])
    assert table.measures("doubled")["norm"].value == pytest.approx(2 * norm(trained))
    assert table.measures("original")["norm"].value == pytest.approx(norm(trained))


def _double(model, forget, retain):
    with torch.no_grad():
        model[0].weight.mul_(2)


def test_layers_tell_how_far_they_moved(trained, sets):
    table = run(trained, sets, methods={"doubled": _double}, metrics=["retain"])
    (row,) = [row for row in table.rows if row.label == "doubled"]
    weight, bias = (p.detach().double().norm() for p in (trained[0].weight, trained[0].bias))
    assert row.layers["0"] == pytest.approx(float(weight / (weight**2 + bias**2).sqrt()))
    assert row.layers["4"] == 0
    assert row.measures["changed"].value == pytest.approx(64 / sum(p.numel() for p in trained.parameters()))


def test_losses_are_counted_once(trained, sets):
    table = run(trained, sets, methods=[noisy])
    for row in table.rows:
        if row.why is None:
            assert sum(row.loss_counts["forget"]) == 40
            assert sum(row.loss_counts["test"]) == 30  # unseen samples of the forgotten class
    assert study._histogram(torch.tensor([0.0, 1e9, math.nan], dtype=torch.float64)) == [
        1,
        *[0] * (len(LOSS_EDGES) - 3),
        2,
    ]


def test_controls(trained, sets, monkeypatch):
    def masked(model, forget, retain, *, score="ratio", density=0.1):
        masked.seen.append((score, density))

    masked.seen = []
    monkeypatch.setitem(METHODS, "gradient_masking", masked)
    table = run(trained, sets, methods=[("gradient_masking", {"density": 0.3})], metrics=["retain"])
    assert table.labels[:2] == ("original", "retrained")
    assert table.labels[-1] == "random mask"
    assert masked.seen == [("ratio", 0.3), ("random", 0.3)]
    assert {row.label: row.kind for row in table.rows}["random mask"] == "control"
    bare = run(trained, sets, controls=False, metrics=["retain"])
    assert bare.labels == ("retrained", "ssd")


def test_a_method_warns_and_its_control_does_not(trained, sets, monkeypatch):
    def masked(model, forget, retain, *, score="ratio"):
        warnings.warn(f"gradient_masking: {score} did harm", stacklevel=2)

    monkeypatch.setitem(METHODS, "gradient_masking", masked)
    with pytest.warns(UserWarning, match="did harm") as caught:
        table = run(trained, sets, methods=["gradient_masking"], metrics=["retain"])
    assert table.labels[-1] == "random mask"
    assert [str(w.message) for w in caught] == ["gradient_masking: ratio did harm"]


def test_without_gradient_masking_the_control_says_why(trained, sets, monkeypatch):
    monkeypatch.delitem(METHODS, "gradient_masking", raising=False)
    table = run(trained, sets, metrics=["retain"])
    assert "no method gradient_masking" in table.measures("random mask")["retain"].why


def test_failing_retraining_is_told_and_the_rest_measured(trained, sets):
    def failing(model, data):
        raise MemoryError

    table = run(trained, sets, train=failing)
    assert table.measures("retrained")["retain"].why == "retraining failed: MemoryError"
    assert table.measures("ssd")["js"].why == "retraining failed: MemoryError"
    assert table.measures("ssd")["gap"].why == "retraining failed: MemoryError"
    assert table.measures("ssd")["retain"].value is not None


class Interrupting:
    """A method that is interrupted when it is called for the n-th time."""

    def __init__(self, n):
        self.left = n

    def __call__(self):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop_at", [1, 2, 4])
def test_an_interrupted_comparison_continues_to_the_same_table(trained, sets, tmp_path, monkeypatch, stop_at):
    settings = {"methods": ["counted", "ssd", loader_reader], "seeds": [0, 1], "make_model": make_model}
    # The functions below close over what they count, which must not decide which rows are the same.
    kept = {"cache": tmp_path, "cache_key": "first"}
    bell = Interrupting(-1)
    calls = []

    def counted(model, forget, retain, *, generator=None):
        bell()
        calls.append("counted")
        noisy(model, forget, retain, generator=generator)

    def counted_training(model, data):
        bell()
        calls.append("train")
        train(model, data)

    monkeypatch.setitem(METHODS, "counted", counted)
    whole = run(trained, sets, **{**settings, "train": train, "methods": ["counted", "ssd", loader_reader]})
    bell.left, done = stop_at, len(calls)
    with pytest.raises(KeyboardInterrupt):
        run(trained, sets, train=counted_training, **kept, **settings)
    before = len(calls)
    assert before - done == stop_at - 1
    bell.left = -1
    continued = run(trained, sets, train=counted_training, **kept, **settings)
    assert len(calls) - done == 4  # two trainings and two runs, none of them twice
    assert without_times(continued) == without_times(whole)
    # Whatever comes from the cache is the same to the last digit, times included.
    again = run(trained, sets, train=counted_training, **kept, **settings)
    assert len(calls) - done == 4
    assert again.to_dict() == continued.to_dict()


def test_what_the_result_depends_on_is_in_the_key(trained, sets, tmp_path):
    class Counting:
        """Counts: a class is known to keys by its name only."""

    def counting(model, forget, retain, *, shift=0.0):
        Counting.runs = getattr(Counting, "runs", 0) + 1
        with torch.no_grad():
            model[0].bias.add_(shift)

    def runs(model=trained, data=sets, **settings):
        before = getattr(Counting, "runs", 0)
        chosen = {"methods": {"m": (counting, {})}, "metrics": ["retain"], "cache": tmp_path, **settings}
        run(model, data, **chosen)
        return Counting.runs - before

    assert runs() == 1
    assert runs() == 0
    assert runs(methods={"renamed": (counting, {})}) == 0
    assert runs(methods={"m": (counting, {"shift": 0.5})}) == 1
    assert runs(seeds=[1]) == 1
    assert runs(metrics=["retain", "forget"]) == 1
    other = copy.deepcopy(trained)
    with torch.no_grad():
        other[0].bias[0] += 1e-6
    assert runs(model=other) == 1
    assert runs(data={**sets, "test": DataLoader(blobs(90, 2), 45)}) == 1
    assert runs(data={**sets, "test": DataLoader(blobs(90, 1), 30)}) == 1
    assert runs(reference=trained, make_model=None, train=None) == 1
    assert runs() == 0


def test_damaged_cache_files_are_replaced(trained, sets, tmp_path):
    whole = run(trained, sets, cache=tmp_path)
    assert {path.suffix for path in tmp_path.iterdir()} == {".json", ".pt"}
    for path in tmp_path.iterdir():
        path.write_bytes(path.read_bytes()[:20])
    again = run(trained, sets, cache=tmp_path)
    assert without_times(again) == without_times(whole)
    assert not list(tmp_path.glob(".*"))


def test_no_flipped_bit_in_the_cache_is_believed(trained, sets, tmp_path):
    run(trained, sets, cache=tmp_path)
    (weights,) = tmp_path.glob("*.pt")
    (first, *_) = (read_row(path, "x") for path in sorted(tmp_path.glob("*.json")))
    path, text = tmp_path / "row.json", row_text(first).encode()
    # The row whole, and as earlier versions wrote it.
    for whole in (text, json.dumps({**json.loads(text), "digest": None}).encode()):
        path.write_bytes(whole)
        assert read_row(path, "x") == first
    for bit in random.Random(0).sample(range(8 * len(text)), 800):
        damaged = bytearray(text)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        assert read_row(path, "x") in (None, first), bit
    path.unlink()
    # And the weights of the retrained model: its figures are those of one that is trained again.
    whole = run(trained, sets, cache=None)
    for row in tmp_path.glob("*.json"):
        row.unlink()
    data = bytearray(weights.read_bytes())
    place = data.index(retrained_bytes(weights)) + 2
    data[place] ^= 1 << 6
    weights.write_bytes(data)
    assert without_times(run(trained, sets, cache=tmp_path)) == without_times(whole)
    assert retrained_bytes(weights) != bytes(data)[place - 2 : place + 14]


def retrained_bytes(path):
    """Sixteen bytes of the first weight of a retrained model."""
    weights = torch.load(path, weights_only=True)["weights"]
    return next(iter(weights.values())).numpy().tobytes()[:16]


def test_failures_are_tried_again(trained, sets, tmp_path):
    state = {"fails": True}

    def shaky(model, forget, retain):
        if state["fails"]:
            raise RuntimeError("busy")

    first = run(trained, sets, methods={"shaky": shaky}, cache=tmp_path, metrics=["retain"])
    state["fails"] = False
    second = run(trained, sets, methods={"shaky": shaky}, cache=tmp_path, metrics=["retain"])
    assert first.measures("shaky")["retain"].why == "RuntimeError: busy"
    assert second.measures("shaky")["retain"].why is None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"methods": ["magic"]}, "methods must be among ssd, .*got 'magic'"),
        ({"methods": "ssd"}, "methods must be a sequence or a mapping"),
        ({"methods": ["ssd", "ssd"]}, "labels must be distinct, got 'ssd' 2 times"),
        ({"methods": {"original": "ssd"}}, "labels must be distinct, got 'original'"),
        ({"methods": [("ssd", 3)]}, "a pair of one and its settings"),
        ({"methods": [3]}, "a method must be a name, a function"),
        ({"seeds": []}, "seeds must be distinct and at least one"),
        ({"seeds": [1, 1]}, "seeds must be distinct"),
        ({"seeds": [1.5]}, r"seeds must be a sequence of whole numbers, got \[1.5\]"),
        ({"seeds": 5}, "seeds must be a sequence of whole numbers, got 5"),
        ({"metrics": ["speed"]}, "metrics must be among retain, forget"),
        ({"metrics": [("retain", len)]}, "names of metrics must be distinct, got 'retain' twice"),
        ({"train": None}, "make_model and train must be given together"),
        ({"reference": nn.Linear(4, 3)}, "reference must not be given together"),
        ({"audit": 3}, "audit must be 0 or at least 4 networks, got 3"),
        ({"audit": -1}, "audit must be a number of networks, or 0 for none, got -1"),
        ({"audit": True}, "audit must be a number of networks"),
        ({"audit": 4, "train": None, "make_model": None}, "make_model and train must be given for an audit"),
        ({"audit": 4, "methods": {"oracles": "ssd"}}, "a label must not be 'oracles'"),
        ({"test": iter([])}, "test must be re-iterable"),
        ({"forget": []}, "forget must hold at least one sample"),
    ],
)
def test_mistakes_are_told_before_anything_runs(trained, sets, settings, message):
    data = {name: settings.pop(name, value) for name, value in sets.items()}

    def never(model, forget, retain):
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        run(trained, data, **{"methods": [never], **settings})


def test_progress_is_a_line_per_row(trained, sets, capsys):
    run(trained, sets, methods=[noisy], seeds=[0, 1], metrics=["retain"], progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 8
    assert lines[0].startswith("1/8 retrained, seed 0: ")
    assert lines[-1].startswith("8/8 random mask, seed 1: ")


def test_json_and_html_are_written_whole(trained, sets, tmp_path):
    table = run(trained, sets, metrics=["retain", "forget"])
    assert table.to_json(tmp_path / "a" / "x.json") + "\n" == (tmp_path / "a" / "x.json").read_text()
    assert table.to_html(tmp_path / "x.html") == (tmp_path / "x.html").read_text()
    parsed = json.loads(table.to_json(), parse_constant=pytest.fail)
    assert parsed["notice"] == report.NOTICE
    assert [row["label"] for row in parsed["table"]] == list(table.labels)


def test_large_settings_are_told_in_short(trained, sets):
    importance = ux.fisher_diagonal(trained, [*sets["forget"], *sets["retain"]])
    given = {"stored": (_by_importance, {"importance": importance})}
    table = run(trained, sets, methods=given, metrics=["retain"])
    (row,) = [row for row in table.rows if row.label == "stored"]
    assert row.why is None
    assert row.settings == {"importance": "Importance of 6"}
    assert len(table.to_json()) < 40_000


def _by_importance(model, forget, retain, *, importance):
    return ux.ssd(model, forget, importance=importance)


def test_mappings_are_compared_too(sets):
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 3)

        def forward(self, x):
            return {"logits": self.inner(x)}

    data = {name: [{"x": x, "labels": y} for x, y in batches] for name, batches in sets.items()}
    table = compare(Named(), **data, methods=["ssd"], make_model=Named, train=lambda model, data: None)
    assert table.measures("ssd")["test_forgotten"].value is not None
    assert table.facts["forget_classes"] == [2]


def test_language_models_are_compared_too():
    generator = torch.Generator().manual_seed(0)

    def batches(n):
        return [{"input_ids": ids, "labels": ids} for ids in torch.randint(7, (n, 4, 6), generator=generator)]

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids))

    sets = batches(2), batches(4), batches(3)
    with pytest.raises(ValueError, match=r"compare: forget: task must say .*ux.tasks.CausalLM\(\)"):
        compare(Language(), *sets, methods=[noisy], reference=Language(), controls=False)
    task = ux.tasks.CausalLM()
    table = compare(Language(), *sets, methods=[noisy], reference=Language(), controls=False, task=task)
    assert table.facts["task"] == "CausalLM(ignore_index=-100)"
    assert table.facts["forget_classes"] is None
    assert table.facts["samples"] == {"forget": 8, "retain": 16, "test": 12}
    for measure in table.measures("noisy").values():
        assert measure.why is None
    (row,) = [row for row in table.rows if row.label == "noisy"]
    assert sum(row.loss_counts["forget"]) == 8


def test_keys_know_functions_by_their_code():
    def made(number):
        def inner(x, y=1):
            return x + number + y

        return inner

    assert fingerprints.key(f=made(1)) == fingerprints.key(f=made(1))
    assert fingerprints.key(f=made(1)) != fingerprints.key(f=made(2))
    assert fingerprints.key(f=lambda x: x + 1) != fingerprints.key(f=lambda x: x + 2)
    with pytest.raises(fingerprints.NoKeyError):
        fingerprints.key(f=object())
    with pytest.raises(fingerprints.NoKeyError):
        fingerprints.key(f=[].append)


def test_loaders_and_importances_have_keys(trained, sets):
    importance = ux.fisher_diagonal(trained, sets["forget"])
    longer = ux.fisher_diagonal(trained, [*sets["forget"], *sets["forget"]])
    assert fingerprints.key(i=importance) == fingerprints.key(i=ux.fisher_diagonal(trained, sets["forget"]))
    assert fingerprints.key(i=importance) != fingerprints.key(i=longer)
    assert fingerprints.key(d=sets["retain"]) == fingerprints.key(d=sets["retain"])
    assert fingerprints.key(d=sets["retain"]) != fingerprints.key(d=sets["forget"])


def test_sample_hashes_stand_for_samples_in_any_order():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1, 2])
    whole = sum(fingerprints.sample_hashes((a, b)))
    assert whole == sum(fingerprints.sample_hashes((a.flip(0), b.flip(0))))
    assert whole != sum(fingerprints.sample_hashes((a, b.flip(0))))
    assert whole != sum(fingerprints.sample_hashes((a.double(), b)))
    assert len(list(fingerprints.sample_hashes((torch.empty(2, 0), b)))) == 2
    shared = [{"x": a, "shift": torch.tensor(value)} for value in (0.0, 1.0)]
    assert sum(fingerprints.sample_hashes(shared[0])) != sum(fingerprints.sample_hashes(shared[1]))


def test_seeded_puts_everything_back():
    loader = DataLoader(range(4), shuffle=True, generator=torch.Generator().manual_seed(9))
    state, own = torch.get_rng_state(), loader.generator.get_state()
    orders = []
    for _ in range(2):
        with seeding.seeded(5, loader):
            orders.append([int(x) for x in loader])
    assert orders[0] == orders[1]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(loader.generator.get_state(), own)


# ---- what the cache takes for the same

MODULE = """
import dataclasses
import helper

RATE = 0.5


@dataclasses.dataclass
class Recipe:
    steps: int = 3


recipe = Recipe()


def inner():
    return RATE + helper.SHARE


def method(model, forget, retain):
    inner()
    return recipe.steps


class Bound:
    def __init__(self, scale):
        self.scale = scale

    def method(self, model, forget, retain):
        return self.scale
"""


@pytest.fixture
def imported(tmp_path, monkeypatch):
    """Return a function that writes and imports the user's module afresh."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)

    def load(text=MODULE, share=0.25):
        (tmp_path / "users.py").write_text(text)
        (tmp_path / "helper.py").write_text(f"SHARE = {share}\n")
        for name in ("users", "helper"):
            sys.modules.pop(name, None)
        importlib.invalidate_caches()
        return importlib.import_module("users")

    yield load
    for name in ("users", "helper"):
        sys.modules.pop(name, None)


def test_keys_know_the_globals_that_a_function_uses(imported):
    first = fingerprints.key(f=imported().method)
    assert fingerprints.key(f=imported().method) == first
    # Edited on disk: the module's own source, and that of a module of the user's that it uses.
    assert fingerprints.key(f=imported(MODULE.replace("RATE = 0.5", "RATE = 0.7")).method) != first
    assert fingerprints.key(f=imported(share=0.3).method) != first
    # Changed in the running process, where the sources stay.
    for owner, name in (("users", "RATE"), ("recipe", "steps"), ("helper", "SHARE")):
        module = imported()
        changed = {"users": module, "recipe": module.recipe, "helper": module.helper}[owner]
        setattr(changed, name, 7)
        assert fingerprints.key(f=module.method) != first


def test_keys_know_the_source_of_the_defining_module(imported):
    hidden = "RATE = {}\n\ndef method(model, forget, retain):\n    return globals()['RATE']\n"
    keys = [fingerprints.key(f=imported(hidden.format(rate)).method) for rate in (1, 1, 2)]
    assert keys[0] == keys[1] != keys[2]


def test_keys_know_the_object_of_a_bound_method(imported):
    module = imported()
    first = fingerprints.key(f=module.Bound(1).method)
    assert fingerprints.key(f=module.Bound(1).method) == first
    assert fingerprints.key(f=module.Bound(2).method) != first
    with pytest.raises(fingerprints.NoKeyError, match="Bound uses 'scale': a generator"):
        fingerprints.key(f=module.Bound(x for x in ()).method)


def test_keys_know_the_code_of_a_models_class(imported):
    net = "from torch import nn\n\nclass Net(nn.Linear):\n    def forward(self, x):\n        return {} * x\n"
    keys = []
    for factor in (1, 1, 2):
        torch.manual_seed(0)
        keys.append(fingerprints.key(m=imported(net.format(factor)).Net(2, 2)))
    assert keys[0] == keys[1] != keys[2]
    assert fingerprints.key(m=nn.Dropout(0.1)) != fingerprints.key(m=nn.Dropout(0.2))


def test_a_text_of_the_callers_stands_for_code():
    stream = (x for x in ())

    def unknowable(model, forget, retain):
        return stream

    with pytest.raises(fingerprints.NoKeyError, match="closes over 'stream': a generator"):
        fingerprints.key(f=unknowable)
    first = fingerprints.key(code="1", f=unknowable)
    assert fingerprints.key(code="1", f=unknowable) == first
    assert fingerprints.key(code="2", f=unknowable) != first


def test_a_stale_reference_is_not_served(trained, sets, tmp_path, imported):
    recipe = """
import torch
from torch import nn
LR = 0.0

def make_model():
    torch.manual_seed(0)
    return nn.Linear(4, 3)

def train(model, data):
    with torch.no_grad():
        model.weight.add_(LR)
"""
    found = []
    for text in (recipe, recipe, recipe.replace("LR = 0.0", "LR = 0.5")):
        module = imported(text)
        given = {"make_model": module.make_model, "train": module.train, "cache": tmp_path / "cache"}
        table = run(module.make_model(), sets, metrics=["js"], controls=False, **given)
        found.append(table.measures("ssd")["js"].value)
    assert found[0] == found[1] != found[2]


def test_a_row_that_cannot_be_kept_is_told_once_and_before_it_runs(trained, sets, tmp_path):
    stream, events = (x for x in ()), []

    def unknowable(model, forget, retain):
        events.append(stream)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=r"'stream': a generator.*cache_key="):
            run(trained, sets, methods=[unknowable], seeds=[0, 1], metrics=["retain"], cache=tmp_path)
    assert events == []
    with pytest.warns(UserWarning, match="not kept in the cache") as told:
        run(trained, sets, methods=[unknowable, "ssd"], seeds=[0, 1], metrics=["retain"], cache=tmp_path)
    assert len(told) == 1
    assert "ssd" not in str(told[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            given = {"methods": [unknowable], "metrics": ["retain"], "cache": tmp_path, "cache_key": "a"}
            run(trained, sets, **given)
    assert len(events) == 3  # two seeds, then one run and one from the cache


def test_the_folder_of_the_cache_is_made_before_anything_runs(trained, sets, tmp_path):
    (tmp_path / "file").touch()

    def never(model, forget, retain):
        raise AssertionError

    with pytest.raises(OSError, match="file"):
        run(trained, sets, methods=[never], cache=tmp_path / "file" / "cache")
    run(trained, sets, metrics=["retain"], make_model=None, train=None, cache=tmp_path / "new" / "cache")
    assert (tmp_path / "new" / "cache").is_dir()


def test_a_full_disk_costs_no_results(trained, sets, tmp_path, monkeypatch, caplog):
    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    table = run(trained, sets, metrics=["retain"], cache=tmp_path)
    assert all(row.why is None for row in table.rows)
    assert "is not kept: no space left on device" in caplog.text
    assert list(tmp_path.iterdir()) == []


# ---- the registry


def test_a_registered_metric_is_a_column_everywhere(trained, sets, monkeypatch):
    entry = registry.Metric(
        "norm",
        "norm of the weights",
        "number",
        "Euclidean.",
        lambda subject: float(sum(p.detach().square().sum() for p in subject.model.parameters()).sqrt()),
        chosen="asked",
    )
    monkeypatch.setitem(registry.REGISTRY, "norm", entry)
    table = run(trained, sets, methods={"doubled": _double}, metrics=["retain", "norm"])
    assert table.columns == ("retain", "norm", "changed", "seconds")
    expected = torch.cat([p.detach().flatten() for p in trained.parameters()]).norm()
    assert table.measures("original")["norm"].value == pytest.approx(float(expected))
    assert "norm of the weights" in table.to_markdown()
    assert "<dt>norm of the weights</dt>" in table.to_html()


def test_relearning_is_measured_where_it_is_asked_for():
    labels = torch.arange(30) % 3
    inputs = 3 * torch.eye(4)[labels]
    torch.manual_seed(0)
    original, reference = nn.Linear(4, 3), nn.Linear(4, 3)
    with torch.no_grad():
        original.weight.copy_(torch.eye(3, 4))
        reference.weight.copy_(-0.1 * torch.eye(3, 4))
    forget, retain = ([(inputs[chosen], labels[chosen])] for chosen in (labels == 2, labels < 2))

    def pushed(model, forget, retain):
        with torch.no_grad():
            model.weight[2].mul_(-0.05)

    asked = ["relearn_steps", "anamnesis_index"]
    table = compare(original, forget, retain, forget, methods=[pushed], metrics=asked, reference=reference)
    found = table.measures("pushed")
    unlearned = copy.deepcopy(original)
    pushed(unlearned, forget, retain)
    assert found["relearn_steps"].value == metrics.relearn_steps(unlearned, forget, 0.95) > 0
    both = [*retain, *forget]
    assert found["anamnesis_index"].value == pytest.approx(
        metrics.anamnesis_index(unlearned, original, reference, both, forget)
    )
    assert table.measures("original")["relearn_steps"].value == 0
    assert table.measures("retrained")["anamnesis_index"].value == 1


@pytest.mark.parametrize("name", list(registry.REGISTRY))
def test_every_metric_says_what_it_is(name):
    entry = registry.REGISTRY[name]
    assert entry.name == name
    assert entry.title
    assert entry.meaning.endswith(".")
    assert entry.unit in ("percent", "points", "seconds", "number")
    if entry.unit == "percent" and name != "changed":
        assert entry.in_gap
        assert entry.kind == ("forgotten" if "forg" in name else "kept")


# ---- settings


@pytest.mark.parametrize(
    "entry, message",
    [
        (("ssd", {"alpa": 3}), "ssd has no setting 'alpa'; did you mean 'alpha'"),
        (("pgu", {"epoch": 3}), "pgu has no setting 'epoch'; did you mean 'epochs'"),
        (("unsir", {"noise_step": 3}), "unsir has no setting 'noise_step'; did you mean 'noise_steps'"),
        (("ssd", {"model": 3}), "ssd has no setting 'model'"),
        ((noisy, {"scalle": 3}), "noisy has no setting 'scalle'; did you mean 'scale'"),
    ],
)
def test_settings_that_a_method_does_not_have_are_told_before_anything_is_trained(
    trained, sets, entry, message
):
    def never(model, data):
        raise AssertionError

    with pytest.raises(ValueError, match=message):
        run(trained, sets, methods=[entry], train=never)


@pytest.mark.parametrize("name", list(METHODS))
def test_known_settings_are_let_through(name):
    def anything(model, forget, retain, **settings):
        return settings

    recipe = ("make_model", "train") if name == "retrain" else ()
    check_settings("compare", name, METHODS[name], {}, recipe)
    check_settings("compare", "anything", anything, {"x": 1})
    with pytest.raises(ValueError, match=f"{name} has no setting 'no_such_setting'"):
        check_settings("compare", name, METHODS[name], {"no_such_setting": 1}, recipe)


def test_progress_goes_where_logging_is_set_up_to_go(trained, sets, caplog, capsys):
    with caplog.at_level(logging.INFO, logger="unlearn_ext"):
        run(trained, sets, metrics=["retain"], controls=False, progress=True)
    assert [record.levelname for record in caplog.records] == ["INFO", "INFO"]
    assert caplog.records[0].message.startswith("1/2 retrained, seed 0: ")
    assert capsys.readouterr().err == ""
    assert logging.getLogger("unlearn_ext").handlers == []


def test_tracebacks_of_failures_are_logged(trained, sets, caplog):
    def broken(model, forget, retain):
        raise RuntimeError("out of memory")

    with caplog.at_level(logging.DEBUG, logger="unlearn_ext"):
        run(trained, sets, methods=[broken], metrics=["retain"], controls=False)
    (record,) = [record for record in caplog.records if record.exc_info]
    assert record.message == "broken, seed 0 failed"
    assert record.exc_info[1].args == ("out of memory",)


@pytest.mark.parametrize("name", list(METHODS))
def test_methods_of_the_package_have_keys(name):
    assert fingerprints.key(f=METHODS[name]) == fingerprints.key(f=METHODS[name])


def test_an_audit_holds_methods_against_many_retrained_networks(trained, sets, tmp_path, monkeypatch):
    given = []

    def curious(model, forget, retain, *, validation=None):
        given.append(validation)

    methods = {"retrain": "retrain", "noisy": noisy, "curious": curious}
    settings = {"methods": methods, "metrics": ["forget"], "controls": False, "cache": tmp_path}
    table = run(trained, sets, audit=4, **settings)
    assert given == [None] * 5  # test data are no method's business
    scores = table.audit.figures
    assert set(scores) == {"retrain", "noisy", "curious", FLOOR}
    assert scores["curious"]["ulira auc"].value > 0.9  # the original itself: trained on the forget set
    assert scores["retrain"]["klom forget, median"].value < scores["curious"]["klom forget, median"].value
    alone = ux.evaluation.audit(
        {"noisy": noisy},
        forget=sets["forget"],
        retain=sets["retain"],
        validation=sets["test"],
        make_model=make_model,
        train=train,
        model=trained,
        n_models=4,
    )
    assert table.audit.figures["noisy"] == alone.figures["noisy"]

    document = table.to_dict()
    assert document["audit"]["figures"]["noisy"]["score"]["value"] == scores["noisy"]["score"].value
    assert FLOOR in table.to_markdown()
    page = table.to_html()
    assert "Against many retrained networks" in page
    assert "the ceiling" in page
    for limit in table.audit.limits:
        assert limit in html.unescape(page)
    assert "Against many" not in run(trained, sets, **settings).to_html()

    monkeypatch.setattr(margins.Rows, "measured", None)  # all of it is in the cache
    del methods["curious"]  # which is another function since its list has grown
    del scores["curious"]
    assert run(trained, sets, audit=4, **settings).audit.figures == scores


def test_what_an_audit_cannot_run_is_told(trained, sets):
    def failing(model, forget, retain):
        raise RuntimeError("<busy>")

    table = run(trained, sets, methods={"failing": failing}, audit=4, metrics=["forget"], controls=False)
    assert table.audit.failed == {"failing": "RuntimeError: <busy>"}
    assert "failing: RuntimeError: <busy>" in table.to_markdown()
    assert "not run: RuntimeError: &lt;busy&gt;" in table.to_html()


def test_a_goal_that_was_not_reached_is_told(trained, sets):
    def cautious(model, forget, retain):
        return ux.UnlearnResult("cautious", {}, {}, 0.0, {}, (), reached=False)

    table = run(trained, sets, methods=[cautious], metrics=["retain"])
    assert table.measures("cautious")["changed"].note == "goal not reached"
    assert table.measures("original")["changed"].note is None
    assert "goal not reached" in table.to_markdown()
    assert "goal not reached" in table.to_html()
