"""Importances of models that FSDP2 has sharded, against a loop over single samples in one process."""

import re

import pytest

pytest.importorskip("transformers")
CHECKS = "sharded_checks"

LANGUAGE = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "gpt2": ("gpt2", {}),
    "pythia": ("pythia", {}),
    "qwen2": ("qwen2", {}),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_language_models_are_exact_and_fused(two_ranks, name):
    print(two_ranks.run(CHECKS, "language", *LANGUAGE[name]))


@pytest.mark.parametrize("shape", [(2, 1), (1, 2)])
def test_hybrid_meshes(two_ranks, shape):
    two_ranks.run(CHECKS, "language_hsdp", shape)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpoints(two_ranks, use_reentrant):
    two_ranks.run(CHECKS, "language_checkpointed", use_reentrant)


VARIANTS = [
    "language_wrapped_in_checkpoints",
    "language_bf16",
    "language_gathered_throughout",
    "language_offloaded",
    "moe",
    "uneven",
    "uneven_in_float64",
    "without_data_on_a_rank",
    "ignored_and_frozen",
    "sharded_along_the_second_dimension",
    "some_parameters",
    "drawn_targets",
    "as_it_was",
    "gram_matrices",
    "fallbacks",
    "samples_that_influence_each_other",
    "loss_that_is_not_finite",
    "data_that_cannot_be_read",
]


@pytest.mark.parametrize("name", VARIANTS)
def test_variants(two_ranks, name):
    print(two_ranks.run(CHECKS, name))


def test_absolute_values(two_ranks):
    two_ranks.run(CHECKS, "uneven", 1)


REFUSED = {
    "fsdp1": "FullyShardedDataParallel",
    "tensor_parallel": "DTensor",
    "fsdp_of_tensor_parallel": "one or two mesh dimensions|by fully_shard alone|one device mesh",
    "two_meshes": "one device mesh",
    "on_meta": "meta device",
    "mean_of_batches": "estimator 'batch' must be computed on an unsharded model",
}


@pytest.mark.parametrize("make", REFUSED)
def test_what_is_refused_is_refused_on_every_rank(two_ranks, make):
    for message in two_ranks.run(CHECKS, "refusal", make):
        assert re.search(REFUSED[make], message), message


def test_what_answers_for_whole_models_alone_is_refused(two_ranks):
    two_ranks.run(CHECKS, "whole_models_only")


def test_a_callback_that_holds_plain_tensors_refuses_shards(two_ranks):
    pytest.importorskip("transformers")
    two_ranks.run(CHECKS, "masks_of_a_callback")


def test_no_data_anywhere(two_ranks):
    two_ranks.run(CHECKS, "no_data")


def test_three_ranks(three_ranks):
    for name in ("uneven", "without_data_on_a_rank", "fallbacks"):
        three_ranks.run(CHECKS, name)
    three_ranks.run(CHECKS, "language", "llama", {"tie_word_embeddings": True})
