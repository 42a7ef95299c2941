"""The page of all results, and its plot."""

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
ROOT = Path(__file__).parents[1]
# The benchmarks are not part of the package.
sys.path.append(str(ROOT))

from bench import roofline, table, traffic  # noqa: E402


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


def test_every_list_op_is_predicted_from_a_count():
    assert traffic.card_of("NVIDIA H200") is traffic.CARDS["H200"]
    assert traffic.card_of("NVIDIA GeForce RTX 4090") is None
    card = traffic.CARDS["H100"]
    for op in (*roofline.LIST_OPS, "ratio_quantile", "topk_mask", "pack_mask", "unpack_mask"):
        for dtype in ("float32", "bfloat16"):
            assert traffic.list_seconds(op, dtype, 1e9, 1, card) > 1e9 / card.bytes
    assert traffic.list_seconds("no_such_op", "float32", 1e9, 1, card) is None
    # Four passes: three over the digits, one that writes the mask.
    passes = traffic.counts()["topk_mask f32"]
    want = 1e9 * passes["memory"] / (0.92 * 3.35e12) + passes["launches"] * 3e-6
    assert traffic.list_seconds("topk_mask", "float32", 1e9, 62, card) == pytest.approx(want)


def test_a_layer_is_predicted_from_its_padded_products_or_its_bytes():
    layer = next(layer for layer in roofline.LAYERS if layer.name == "768x768, T = 64")
    card = traffic.CARDS["H100"]
    products = 2 * 64 * 64 * 768 * 768
    seconds = traffic.layer_seconds(layer, "bfloat16", card)
    assert seconds == pytest.approx(products / (989e12 * 0.62 * 0.8) + 3e-6)
    # Four positions are padded to half a step of 16.
    few = next(layer for layer in roofline.LAYERS if layer.name == "768x768, T = 4")
    assert traffic.layer_seconds(few, "bfloat16", card) == pytest.approx(
        2 * 256 * 8 * 768 * 768 / (989e12 * 0.62 * 0.8) + 3e-6
    )


def test_counts_are_shown_beside_those_of_the_first_day():
    text = traffic.section()
    assert "| `fisher_accumulate bf16` | 1 | 1.8 → 1 |" in text
    assert text.count("\n| `") == len(traffic.counts()) + 10
