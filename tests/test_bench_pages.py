"""The page of all results, and its plot."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).parents[1]
# The benchmarks are not part of the package.
sys.path.append(str(ROOT))

from bench import roofline, table  # noqa: E402


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results, with the page beside it."""
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    (tmp_path / "results").mkdir()
    return tmp_path / "results"


def test_results_say_that_nothing_ran_on_a_gpu_until_something_did(results):
    assert "Not yet run on a GPU." in table.write_results().read_text()
    # A record beside its page is not mistaken for one of pytest-benchmark's.
    (results / "gpu-some-card.json").write_text("{}")
    (results / "gpu-some-card.md").write_text("## GPU: some card\n")
    text = table.write_results().read_text()
    assert "## GPU: some card" in text
    assert "Not yet run" not in text


def entry(group, **extra):
    contender = {"contender": "ours", "bytes_moved": 1e6} | extra
    return {
        "group": f"{group}/cpu",
        "extra_info": contender,
        "stats": {"median": 2.0, "min": 2.0, "iqr": 0.0},
    }


def test_points_are_operations_per_byte_and_per_second():
    layer = next(layer for layer in roofline.LAYERS if layer.name == "gpt2 qkv")
    found = roofline.points(
        [
            entry("fisher_accumulate_/tiny/float32", bytes_moved=462_840.0),
            entry("fisher_accumulate_/tiny/float32", contender="torch._foreach"),
            entry("fisher_accumulate_/tiny/bfloat16"),
            entry("fisher_linear_/gpt2 qkv/float32", operations=layer.operations),
        ]
    )
    # 38,570 scalars are read twice and written once; a square, a product and a sum each.
    assert found[0] == ("list ops", "fisher_accumulate_ tiny", 0.25, 3 * 38_570 / 2.0)
    moved = 4 * (2 * 512 * 768 + 2 * 512 * 2304 + 2 * 768 * 2304)
    assert found[1] == (
        "Fisher kernels",
        "fisher_linear_ gpt2 qkv",
        2 * 2 * 512 * 768 * 2304 / moved,
        layer.operations / 2.0,
    )
    assert len(found) == 2


def test_the_plot_is_drawn_where_both_roofs_are_known(results):
    pytest.importorskip("matplotlib")
    document = json.loads((ROOT / "bench" / "results" / "cpu.json").read_text())
    document["machine_info"].pop("ceilings", None)
    (results / "cpu.json").write_text(json.dumps(document))
    assert "roofline" not in table.write_results().read_text()
    document["machine_info"]["ceilings"] = {"bytes_per_second": 5e10, "operations_per_second": 3e11}
    (results / "cpu.json").write_text(json.dumps(document))
    assert "(results/roofline-cpu.svg)" in table.write_results().read_text()
    drawn = (results / "roofline-cpu.svg").read_bytes()
    assert b"50 GB/s" in drawn
    table.write_results()
    assert (results / "roofline-cpu.svg").read_bytes() == drawn
