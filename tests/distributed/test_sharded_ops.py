"""Ops and optimizers on DTensors: to the bit those on whole tensors, or refused where there is no meaning."""

import pytest

CHECKS = "sharded_ops"


@pytest.mark.parametrize("seed", [0, 1])
def test_selections_are_those_of_the_whole(two_ranks, seed):
    assert two_ranks.run(CHECKS, "selections", 50, seed) == [0, 0]


def test_ops_work_on_shards(two_ranks):
    two_ranks.run(CHECKS, "in_place")


def test_what_is_refused(two_ranks):
    one, other = two_ranks.run(CHECKS, "refusals")
    assert one == other
    assert "sharded alike" in one[0]
    assert "added up" in one[2]


def test_optimizers_of_sharded_models(two_ranks):
    two_ranks.run(CHECKS, "optimizers")


def test_three_ranks(three_ranks):
    assert three_ranks.run(CHECKS, "selections", 20, 2) == [0, 0, 0]
    three_ranks.run(CHECKS, "in_place")
