"""Exactness of the per-sample engine on whole architectures."""

import pytest
import torch
from oracle import assert_exact, errors, one_by_one, split
from torch import nn

from bench.models import MODELS
from unlearn_ext import fisher_diagonal, ops

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
        found = fisher_diagonal(model, split(batch, size))
        assert set(found.coverage.values()) == {"fused"}
        assert max(errors(found, reference).values()) <= 2e-6
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


def test_batches_that_are_added_together(monkeypatch):
    """Few vectors per batch wait for others; the data set may use their memory again."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60, 50), nn.Tanh(), nn.Linear(50, 70), nn.Tanh(), nn.Linear(70, 3))
    x, y = torch.randn(50, 60), torch.randint(3, (50,))
    passes, add = [], ops.fisher_linear_

    def counting(fisher, inputs, grads, **settings):
        passes.append((*fisher.shape, len(inputs)))
        add(fisher, inputs, grads, **settings)

    class Reusing:
        def __iter__(self):
            memory = torch.empty(4, 60)
            for start in range(0, 50, 4):
                part = memory[: min(4, 50 - start)]
                part.copy_(x[start : start + 4])
                yield part, y[start : start + 4]

    expected = one_by_one(model, (x, y))
    fisher_diagonal(model, Reusing())
    monkeypatch.setattr(ops, "fisher_linear_", counting)
    found = fisher_diagonal(model, Reusing())
    assert max(errors(found, expected).values()) <= 1e-5
    # 12 rows of inputs and gradients have at most half as many scalars as the matrix, and 16 have more.
    assert [n for outputs, _, n in passes if outputs == 50] == [16, 16, 16, 2]
    assert [n for outputs, _, n in passes if outputs == 70] == [16, 16, 16, 2]
    assert sum(outputs == 3 for outputs, _, _ in passes) == 13
