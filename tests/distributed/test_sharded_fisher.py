"""Importances of models that FSDP2 has sharded, against a loop over single samples in one process."""

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
