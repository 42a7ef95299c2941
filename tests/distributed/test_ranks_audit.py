"""An audit whose networks several ranks share out: the figures of one process, to the bit."""

import pytest

CHECKS = "audits"


def test_the_figures_are_those_of_one_process_and_the_work_is_shared(two_ranks):
    found = two_ranks.run(CHECKS, "alone_and_together")
    for together, alone, _, _ in found:
        assert together == alone
    assert found[0][0] == found[1][0]
    assert [mine for _, _, mine, _ in found] == [6, 4]  # oracles and originals: three of five, and two
    assert [alone for *_, alone in found] == [10, 10]
    assert "ZeroDivisionError: seed 6" in found[0][0][0]


def test_of_one_original(two_ranks):
    one, other = two_ranks.run(CHECKS, "of_one_model")
    assert one == other
    assert one[0] == one[1]


def test_every_rank_goes_on_where_it_was(two_ranks, tmp_path):
    one, other = two_ranks.run(CHECKS, "killed_and_gone_on", str(tmp_path))
    assert "the disk is full" in other[0]
    assert one[0].startswith("rank 1: ")
    assert (one[1], other[1]) == (6, 2)
    # What was kept is not made again: all of rank 0, one of four of rank 1.
    assert one[2] <= 3
    assert other[2] == 3
    assert one[3] == other[3] == one[4] == other[4]


@pytest.mark.parametrize(
    "what, says",
    [
        ("shares", "retain, validation and full, each of them whole, must be the same on all ranks"),
        ("order", "retain, validation and full, each of them whole, must be the same on all ranks"),
        ("n_models", "n_models must be the same on all ranks"),
        ("methods", "methods must be the same on all ranks"),
        ("bad", "n_models must be at least 4, got 1"),
    ],
)
def test_what_differs_is_refused_on_every_rank(two_ranks, what, says):
    for kind, text in two_ranks.run(CHECKS, "refused", what):
        assert kind == "ValueError"
        assert says in text
