"""What several methods share."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import unlearn_ext as ux
from unlearn_ext._internal.chosen import only_trainable
from unlearn_ext.methods.common import count_batches, epochs_of
from unlearn_ext.methods.pgu import pgu_from_sets


class Stream(IterableDataset):
    def __iter__(self):
        yield from zip(torch.randn(5, 3), torch.zeros(5, dtype=torch.long), strict=True)


class Shuffled:
    """Batches that draw on the global random state, and do not know how many they are."""

    def __init__(self, label):
        self.inputs, self.labels = torch.randn(6, 3), torch.full((6,), label)

    def __iter__(self):
        for index in torch.randperm(6).split(2):
            yield self.inputs[index], self.labels[index]


@pytest.mark.parametrize(
    "data, n",
    [
        ([], 0),
        ([(torch.zeros(1),)] * 3, 3),
        (DataLoader(TensorDataset(torch.zeros(5, 2)), batch_size=2, shuffle=True), 3),
        (DataLoader(Stream(), batch_size=2), 3),
        (Shuffled(0), 3),
    ],
    ids=["empty", "list", "loader", "stream", "iterable"],
)
def test_batches_are_counted_without_a_trace(data, n):
    before = torch.get_rng_state()
    assert count_batches(data) == n
    assert torch.equal(torch.get_rng_state(), before)
    assert epochs_of(7, data) == {0: 7, 3: 3}[n]


def relabel(model, forget, retain):
    return ux.gradient_masking(model, forget, retain, objective="relabel")


@pytest.mark.parametrize("method", [pgu_from_sets, ux.methods.gradient_ascent, relabel])
def test_choosing_the_epochs_leaves_the_random_state_alone(method):
    model = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))
    forget, retain = Shuffled(0), Shuffled(1)
    before = torch.get_rng_state()
    result = method(model, forget, retain)
    assert result.hyperparameters["epochs"] > 10
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("names", [["0.weight", "2.bias"], [], None])
def test_only_what_is_named_is_trainable_for_a_while(names):
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with only_trainable(model, names):
        inside = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    assert inside == (before if names is None else {name: name in names for name in before})
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
