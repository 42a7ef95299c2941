"""The formulas of docs/sharded.md, against what small runs hold and send."""

import pytest


@pytest.mark.parametrize("kind", ["small", "llama"])
def test_formulas_are_what_runs_hold_and_send(two_ranks, kind):
    if kind != "small":
        pytest.importorskip("transformers")
    print(two_ranks.run("sharded_costs", "check", kind))
