import json
import sys

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from unlearn_ext import METHODS, demo, fisher_diagonal

pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def trained():
    """The demo's own network and settings; only the retrained one is trained for less long."""
    train_set, test_set = demo.load_digits()
    model, _ = demo.train(train_set, epochs=demo.EPOCHS, seed=0)
    return train_set, test_set, model


SHOWN = [name for name in demo.SHOWN if name in METHODS]


@pytest.fixture(scope="module")
def by_class(trained):
    before = [p.detach().clone() for p in trained[2].parameters()]
    comparison = demo.forget_class(*trained, methods=SHOWN, epochs=2, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(before, trained[2].parameters(), strict=True))
    return comparison


@pytest.mark.parametrize("method", SHOWN)
def test_the_defaults_forget_a_class_and_keep_the_rest(by_class, method):
    original, found = by_class.measures("original"), by_class.measures(method)
    assert original["test_forgotten"].value >= 0.95
    assert found["test_forgotten"].value <= 0.05
    assert found["forget"].value <= 0.05
    assert found["retain"].value >= original["retain"].value - 0.03
    assert found["test_retained"].value >= original["test_retained"].value - 0.03
    assert found["changed"].value > 0
    assert by_class.measures("retrained")["test_forgotten"].value == 0


def test_ssd_changes_little(by_class):
    assert by_class.measures("ssd")["changed"].value < 0.05


def test_controls_are_shown_beside_the_methods(by_class):
    assert by_class.labels == ("original", "retrained", *SHOWN, "random mask")
    text = demo.table("Forget class 3", by_class, "A note.")
    lines = text.splitlines()
    assert lines[0] == "Forget class 3"
    assert [line.split("  ")[0] for line in lines[4 : 4 + len(by_class.labels)]] == list(by_class.labels)
    assert lines[-1] == "A note."
    shown = f"{100 * by_class.measures('ssd')['retain'].value:.1f}"
    assert shown in lines[6]


def test_random_samples_are_reported_as_they_come_out(trained):
    case = demo.forget_samples(*trained, methods=["ssd", "unsir"], epochs=2, seed=0)
    found = case.measures("ssd")
    assert {"retain", "forget", "test"} <= set(case.columns)
    assert found["retain"].value >= case.measures("original")["retain"].value - 0.03
    assert "whole classes only" in case.measures("unsir")["retain"].why
    text = demo.table("Forget 50 random samples", case, demo._SAMPLES_NOTE).replace("\n", " ")
    assert "approximate unlearning often changes little" in text
    assert "whole classes only" in text


def test_every_class_is_tried(trained):
    train_set, test_set, model = trained
    full = fisher_diagonal(model, DataLoader(train_set, demo.BATCH_SIZE))
    sentence = demo.each_class(train_set, test_set, model, full=full)
    assert sentence.startswith(
        "SSD on each of the ten classes in turn: test accuracy on the forgotten class "
    )


def test_a_seed_decides_the_network():
    images, labels = torch.rand(32, 1, 8, 8), torch.arange(32) % 10
    small = TensorDataset(images, labels)
    state = torch.get_rng_state()
    first, again, other = (demo.train(small, epochs=1, seed=seed)[0].state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["0.weight"], other["0.weight"])
    assert torch.equal(torch.get_rng_state(), state)
    assert sum(p.numel() for p in demo.make_model(0).parameters()) == 110_922


def test_it_runs_from_start_to_pages(tmp_path, monkeypatch):
    everything = demo.load_digits()
    monkeypatch.setattr(demo, "load_digits", lambda: tuple(TensorDataset(*part[:200]) for part in everything))
    monkeypatch.setattr(demo, "each_class", lambda *_, **__: "Each class.")
    n_threads, said = torch.get_num_threads(), []
    out = tmp_path / "new"
    comparisons = demo.run(out, methods=["ssd"], epochs=1, say=said.append)
    text = "\n".join(said)
    assert [table.labels[2] for table in comparisons] == ["ssd", "ssd"]
    assert "do not prove" in text.replace("\n", " ")
    names = {"digits_class.html", "digits_samples.html", "digits_class_ssd.json"}
    assert {path.name for path in out.iterdir()} == names
    assert all(name in text for name in names)
    assert "<h1>Handwritten digits: forget class 3</h1>" in (out / "digits_class.html").read_text("utf-8")
    record = json.loads((out / "digits_class_ssd.json").read_text("utf-8"))
    assert record["method"] == "ssd"
    assert record["forget_count"] == comparisons[0].facts["samples"]["forget"]
    assert record["weights_before"] == comparisons[0].facts["weights"]
    assert set(record["metrics"]) == {"retain", "forget", "mia"}
    assert not any("membership inference by the loss" in what for what in record["not_tested"])
    assert torch.get_num_threads() == n_threads


def test_the_four_families_are_shown_by_default(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(demo, "_run", lambda out, methods, *_: seen.append(methods))
    demo.run(tmp_path, say=lambda _: None)
    assert seen == [SHOWN]
    with pytest.raises(ValueError, match=r"methods must be among ssd, .*got 'magic'"):
        demo.run(tmp_path, methods=["magic"])


def test_missing_libraries_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ImportError, match=r"the demo needs scikit-learn: pip install 'unlearn_ext\[demo\]'"):
        demo.load_digits()
