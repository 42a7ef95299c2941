"""Masked training of models that FSDP2 has sharded: the masks and the steps of one process on all data."""

import pytest

CHECKS = "sharded_training"


@pytest.mark.parametrize("objective", ["finetune", "relabel", "ascend"])
def test_steps_are_those_of_all_batches_together(two_ranks, objective):
    print(two_ranks.run(CHECKS, "given_masks", objective))


def test_adamw(two_ranks):
    two_ranks.run(CHECKS, "given_masks", "relabel", "images", "adamw")


@pytest.mark.parametrize(
    "name", ["hybrid", "offloaded", "averaged_otherwise", "without_data_on_a_rank", "salun_and_scores"]
)
def test_variants(two_ranks, name):
    print(two_ranks.run(CHECKS, name))


def test_a_language_model(two_ranks):
    pytest.importorskip("transformers")
    two_ranks.run(CHECKS, "given_masks", "relabel", "texts")
    two_ranks.run(CHECKS, "gathered_throughout")


@pytest.mark.parametrize("unit, score", [("neuron", "ratio"), ("element", "obd"), ("layer", "fisher")])
def test_what_is_selected_is_what_one_process_selects(two_ranks, unit, score):
    pytest.importorskip("transformers")
    two_ranks.run(CHECKS, "selected", unit, score)


def test_the_closed_loop(two_ranks):
    one, other = two_ranks.run(CHECKS, "closed_loop")
    assert one == other


def test_failures_end_the_call_on_all_ranks(two_ranks):
    found = two_ranks.run(CHECKS, "failures")
    kinds = [[kind for kind, _ in each] for each in found]
    assert kinds[0] == kinds[1]
    assert kinds[0] == [
        "FloatingPointError",
        "OSError",
        *["ValueError"] * 7,
        *["NotImplementedError"] * 2,
    ]
    one, other = ([text for _, text in each] for each in found)
    assert other[0] in one[0] and one[0].startswith("rank 1: ")  # noqa: PT018
    assert "disk on fire" in one[1] and other[1] == "rank 0: disk on fire"  # noqa: PT018
    assert one[2:8] == other[2:8]
    for text, part in zip(
        one[2:],
        (
            "lr must be the same on all ranks",
            "masks must be the same on all ranks",
            "must be bool",
            "process_group must be None",
            "must hold a batch",
            "forget must hold a sample on some rank, got none in",
            "labels must lie in",
            "must not be sharded while its stem.1 normalises",
            "pgu: model must not be sharded",
        ),
        strict=True,
    ):
        assert part in text


def test_three_ranks(three_ranks):
    for objective in ("finetune", "relabel"):
        three_ranks.run(CHECKS, "given_masks", objective)
    three_ranks.run(CHECKS, "without_data_on_a_rank")
