"""A sample of the random models; ``python tests/engine/random_models.py 3000`` tries many."""

import os

import pytest
from random_models import attempt

COUNT = int(os.environ.get("UNLEARN_RANDOM_MODELS", "150"))


@pytest.mark.parametrize("first", range(0, COUNT, 25))
def test_random_models_whose_structure_depends_on_their_data(first):
    fused = names = 0
    for seed in range(first, min(first + 25, COUNT)):
        result = attempt(seed)
        if result is None:
            continue
        error, coverage, text = result
        assert error <= 1, f"seed {seed}: {text}: {coverage}"
        fused += sum(how == "fused" for how in coverage.values())
        names += len(coverage)
    assert fused > names / 2
