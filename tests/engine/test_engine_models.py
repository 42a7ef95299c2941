"""Exactness of the per-sample engine on whole architectures."""

import pytest
import torch
from oracle import assert_exact, errors, one_by_one, split

from bench.models import MODELS
from unlearn_ext import fisher_diagonal

SMALL = {
    "mlp": ({"hidden": 40, "inputs": 30}, {"inputs": 30}),
    "cnn": ({"width": 4}, {}),
    "resnet18": ({"width": 4}, {}),
    "vit": ({"width": 24, "depth": 2, "heads": 2, "size": 16}, {"size": 16}),
    "gpt": (
        {"width": 16, "depth": 2, "heads": 2, "length": 12, "vocabulary": 40},
        {"length": 12, "vocabulary": 40},
    ),
}


def small(name, n=8):
    torch.manual_seed(0)
    model, batch = SMALL[name]
    return MODELS[name].build(**model), MODELS[name].batch(n, **batch)


@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_is_fused_and_exact(name, power):
    model, batch = small(name)
    assert_exact(model, batch, power=power, tolerance=1e-5 if power == 2 else 2e-5)


@pytest.mark.parametrize("name", SMALL)
def test_neither_the_batch_size_nor_the_order_matters(name):
    model, batch = small(name, n=33)
    reference = fisher_diagonal(model, split(batch, 32))
    for size in (1, 7):
        assert max(errors(fisher_diagonal(model, split(batch, size)), reference).values()) <= 2e-6
    order = torch.randperm(33)
    shuffled = tuple(tensor[order] for tensor in batch)
    assert max(errors(fisher_diagonal(model, split(shuffled, 32)), reference).values()) <= 2e-6


@pytest.mark.slow
@pytest.mark.parametrize("power", [2, 1])
@pytest.mark.parametrize("name", MODELS)
def test_networks_in_full_size(name, power):
    """No further from float64 than a loop in float32, which units at the edge of a ReLU keep from 1e-5."""
    torch.manual_seed(0)
    model, batch = MODELS[name].build(), MODELS[name].batch(6)
    expected = one_by_one(model, batch, power=power)
    loop = errors(one_by_one(model, batch, power=power, dtype=torch.float32), expected, power)
    found = fisher_diagonal(model, [batch], power=power)
    assert set(found.coverage.values()) == {"fused"}
    for parameter, error in errors(found, expected, power).items():
        assert error <= max(1e-5, 3 * loop[parameter]), parameter
