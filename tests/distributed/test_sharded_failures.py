"""Data that one rank of a sharded model cannot use: the call ends on all ranks, and nobody waits."""

import time

import many
import pytest
import sharded_failures
from sharded_failures import CALLS, FAULTS

CHECKS = "sharded_failures"
INSIDE = ("other sizes", "other dtype")
TIMEOUT = 8.0  # longer than a rank on a busy machine is late
WITHOUT_LABELS = ("unequal lengths", "no labels", "no classes", "other labels")


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("fault", [name for name in FAULTS if name not in INSIDE])
def test_every_call_ends_on_both_ranks_and_the_shards_are_as_they_were(two_ranks, fault, place):
    one, other = two_ranks.run(CHECKS, "all_failing", fault, place)
    for call in CALLS:
        (kind, text, kept), (own_kind, own_text, own_kept) = one[call], other[call]
        needs_nothing = call == "activation_gram" and fault in WITHOUT_LABELS
        if needs_nothing or (call, fault) == ("measure", "not finite"):
            assert kind == own_kind == "returned", call
            continue
        assert "returned" not in (kind, own_kind), call
        assert kept and own_kept, call  # noqa: PT018
        told = "another rank" in text or text.startswith("rank 1: ") or text == own_text
        assert told, (call, text, own_text)
        assert fault != "unreadable" or own_text == "disk on fire", call


def test_what_fails_when_a_run_is_over_puts_every_rank_back(two_ranks):
    one, other = two_ranks.run(CHECKS, "failing_at_the_end")
    assert one == ("OSError", "rank 1: no memory left", True)
    assert other == ("OSError", "no memory left", True)


def _inside(rank, world, call):
    ended = sharded_failures.failing(call, "other sizes", 1)
    if rank == 1 and call == "activation_gram":
        time.sleep(TIMEOUT + 3)  # its end would be noticed at once
    return ended


@pytest.mark.parametrize("call", ["fisher_diagonal", "activation_gram", "gradient_masking, masks given"])
def test_what_fails_inside_a_model_is_told_the_others_by_the_timeout_with_what_to_do(call):
    one, other = many.run(_inside, 2, call, timeout=TIMEOUT)
    assert "mat1 and mat2" in other[1]
    assert one[0] == "RuntimeError"
    for part in ("init_process_group(timeout=...)", "its own message says why", "End the processes"):
        assert part in one[1], one[1]
    assert one[2]
    assert other[2]
