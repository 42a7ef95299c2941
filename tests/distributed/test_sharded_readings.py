"""Loaders that yield other samples in a later pass, of models that FSDP2 has sharded."""

import pytest

CHECKS = "sharded_readings"


@pytest.mark.parametrize("sizes", [[[4, 1, 3], [2, 2]], [[3], []]])
@pytest.mark.parametrize("make", ["images", "texts"])
def test_a_reading_is_that_of_one_process(two_ranks, make, sizes):
    if make == "texts":
        pytest.importorskip("transformers")
    one, other = two_ranks.run(CHECKS, "as_alone", make, sizes)
    assert one == other


@pytest.mark.parametrize(
    "what, says",
    [("labels", "its labels differ"), ("fewer", "16 samples in the first pass and 11 in a later")],
)
def test_other_samples_on_one_rank_are_warned_of_on_every_rank(two_ranks, what, says):
    one, other = two_ranks.run(CHECKS, "others_on_one_rank", what)
    assert one == other
    (told,), notes = one
    assert says in told
    assert "the retain set" in told
    assert not notes


def test_other_inputs_on_one_rank_are_noted_on_every_rank(two_ranks):
    one, other = two_ranks.run(CHECKS, "others_on_one_rank", "inputs")
    assert one == other
    told, (note,) = one
    assert not told
    assert "the retain set had other inputs, with the same labels" in note


def test_while_a_goal_is_watched_it_is_told_once(two_ranks):
    one, other = two_ranks.run(CHECKS, "goal_watched")
    assert one == other
    assert len(one) == 1
    assert one[0].startswith("gradient_masking: the forget set had other samples")


def test_loaders_that_shuffle_and_such_that_draw_anew(two_ranks):
    assert two_ranks.run(CHECKS, "shuffled", -1) == ["", ""]
    one, other = two_ranks.run(CHECKS, "shuffled", 1)
    assert one == other
    assert "a sampler with replacement draws them anew" in one


def test_what_cannot_be_taken_up_ends_the_call_on_all_ranks(two_ranks):
    assert two_ranks.run(CHECKS, "failing_on_one_rank") == [12, 12]
