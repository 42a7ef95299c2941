"""The experiment on users' texts: every cell is measured once, and an interrupted run goes on."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
# The benchmarks are not part of the package.
sys.path.append(str(Path(__file__).parents[1]))

from bench import table, text_models, texts, texts_page
from bench.user_texts import make_texts

MEASURED = {
    **dict.fromkeys(("forget loss", "others loss", "public loss", "retain loss", "unseen loss"), 2.0),
    **dict.fromkeys(("auc loss", "auc zlib", "auc min_k", "auc min_k++"), 0.5),
    **{"forget accuracy": 50.0, "extraction": 0.1},
}


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Few texts, networks that nobody trains, methods that do nothing, and pages of their own."""
    few = make_texts(users=11, others=4, each=2, public=6, public_unseen=6)
    monkeypatch.setattr(texts, "make_texts", lambda: few)
    monkeypatch.setattr(texts, "learnt", lambda data, seed: (None, float(len(data))))
    monkeypatch.setattr(texts, "figures", lambda model, sets: dict(MEASURED))
    monkeypatch.setattr(texts, "run_method", lambda name, model, *_: (model, {"seconds": 1.0, "note": ""}))
    monkeypatch.setattr(text_models, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(texts, "RESULT", tmp_path / "results" / "methods" / "texts")
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    return tmp_path


def run(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["bench.texts", *words])
    texts.main()


def stopped(name, *_):
    raise KeyboardInterrupt(name)


def test_an_interrupted_run_goes_on_where_it_was(small, monkeypatch):
    words = ("--seeds", "0", "1", "--requests", "user", "ten", "--methods", "gradient_difference", "npo")
    honest = texts.run_method
    seen = []

    def until_the_fourth(name, *others):
        seen.append(name)
        return stopped(name) if len(seen) == 4 else honest(name, *others)

    monkeypatch.setattr(texts, "run_method", until_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, *words)
    # A request that is whole has its table; of the other what was measured is kept.
    assert {row["request"] for row in json.loads(texts.RESULT.with_suffix(".json").read_text())["rows"]} == {
        "user"
    }
    run(monkeypatch, *words)
    assert seen == ["gradient_difference", "npo"] * 2 + ["npo"] + ["gradient_difference", "npo"] * 2
    record = json.loads(texts.RESULT.with_suffix(".json").read_text())
    cells = [(row["request"], row["seed"], row["method"]) for row in record["rows"]]
    assert len(set(cells)) == len(cells) == 2 * 2 * 4

    monkeypatch.setattr(texts, "run_method", stopped)
    run(monkeypatch, *words)  # nothing is left to measure
    assert json.loads(texts.RESULT.with_suffix(".json").read_text())["rows"] == record["rows"]
    run(monkeypatch, *words, "--methods", "npo", "rmu", "--kept")
    record = json.loads(texts.RESULT.with_suffix(".json").read_text())
    assert {row["method"] for row in record["rows"]} == {"original", "retrained", "npo"}
    shown = (small / "RESULTS.md").read_text()
    assert "### Ten texts of ten users" in shown
    assert "| npo | 0, 1 |" in shown
    # Settings are part of what a cell is of.
    monkeypatch.setitem(texts.SETTINGS, "npo", {"epochs": 1})
    with pytest.raises(KeyboardInterrupt, match="npo"):
        run(monkeypatch, *words, "--methods", "npo")


def row(seed, **given):
    reached = dict.fromkeys(texts_page.BARS, True)
    return {"request": "user", "seed": seed, "method": "newton", "note": "", **reached, **given}


def test_bars_are_counted_over_seeds():
    rows = [
        row(0, **{"auc loss": 0.4, "auc loss off": 0.0}),
        row(1, **{"auc loss": 0.6, "auc loss off": -0.2, "near": False}),
        row(2, reached=False, note="newton: the model is as it was: why"),
    ]
    told = texts_page.page({"facts": {}, "rows": rows})
    line = next(line for line in told.splitlines() if line.startswith("| newton"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1] == "0, 1, 2"
    assert "0.50 ± 0.14" in cells
    assert "-0.10 ± 0.14" in cells
    assert cells[-1] == "1 of 3; forget loss (1), refused (1)"
    assert "- newton, seed 2: newton: the model is as it was: why" in told
    failed = texts_page.page({"facts": {}, "rows": [row(0, note="RuntimeError: out of memory")]})
    assert "| 0 of 1; failed |" in failed
