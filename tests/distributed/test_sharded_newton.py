"""Kronecker factors and second-order steps of models that FSDP2 has sharded, against one process."""

import pytest

CHECKS = "sharded_newton"


def test_factors(two_ranks):
    print(two_ranks.run(CHECKS, "factors", "small"))


@pytest.mark.parametrize("kind, settings", [("llama", {"tie_word_embeddings": True}), ("gpt2", {})])
def test_factors_of_language_models(two_ranks, kind, settings):
    pytest.importorskip("transformers")
    print(two_ranks.run(CHECKS, "factors", kind, settings))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints(two_ranks, use_reentrant):
    pytest.importorskip("transformers")
    two_ranks.run(CHECKS, "checkpointed", use_reentrant)


@pytest.mark.parametrize("name", ["of_one_sample", "cut_off", "offloaded", "drawn", "left_out", "step"])
def test_variants(two_ranks, name):
    print(two_ranks.run(CHECKS, name))


def test_a_step_for_texts(two_ranks):
    pytest.importorskip("transformers")
    print(two_ranks.run(CHECKS, "step", "texts"))


def test_with_factors_of_its_own(two_ranks):
    one, other = two_ranks.run(CHECKS, "with_factors_of_its_own")
    assert one == other


def test_failures_end_the_call_on_all_ranks(two_ranks):
    found = two_ranks.run(CHECKS, "failures")
    parts = (
        "loss must be finite",
        "labels must lie in",
        "at least one sample on some rank",
        "checkpoint must be None",
        "process_group must be None",
        "must be finite",
        "labels must lie in",
        "budget must be the same on all ranks",
        "factors must take at most",
    )
    for each in found:
        for text, part in zip(each, parts, strict=True):
            assert part in text
    assert "rank 1: " in found[0][0]
    assert "rank 0: " in found[1][1]


def test_three_ranks(three_ranks):
    three_ranks.run(CHECKS, "factors", "small")
    three_ranks.run(CHECKS, "step")
