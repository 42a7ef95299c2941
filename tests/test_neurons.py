"""Which scalars make up a neuron, and what multiplies its output."""

import pytest
import torch
import torch.nn.functional as F
from methods.models import FAMILIES, make
from torch import nn

from unlearn_ext.masks.neurons import module_groups, neuron_groups


def parts(groups):
    return {group.name: [part.name for part in group.parts] for group in groups}


class Convolutional(nn.Module):
    """A convolution whose norm is used by it alone, one with a shared norm, and a norm named out of order."""

    def __init__(self):
        super().__init__()
        self.late = nn.BatchNorm2d(8)
        self.shared = nn.BatchNorm2d(8)
        self.a, self.b = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.c = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8 * 4, 2)

    def forward(self, x):
        x = F.relu(self.late(self.a(x)))
        x = self.shared(self.b(x)) + self.shared(x)
        x = F.max_pool2d(F.relu(self.c(x)), 4)
        return self.head(x.flatten(1))


def test_a_norm_belongs_to_the_layer_whose_output_it_takes_and_to_no_other():
    torch.manual_seed(0)
    data = [(torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 1]))]
    groups = neuron_groups(Convolutional(), data)
    assert parts(groups) == {
        "a": ["a.weight", "a.bias", "late.weight", "late.bias"],
        "shared": ["shared.weight", "shared.bias"],
        "b": ["b.weight", "b.bias"],
        "c": ["c.weight", "c.bias"],
        "head": ["head.weight", "head.bias"],
    }
    found = {group.name: group for group in groups}
    assert [name for name, group in found.items() if group.is_output] == ["head"]
    # a's output passes by b as well, but where b reads it, it is a's alone.
    assert {n: [part.name for part in g.consumers] for n, g in found.items() if g.consumers} == {
        "a": ["b.weight"],
        "c": ["head.weight"],
    }
    # Flattened, a channel has 4 columns of the head.
    (columns,) = found["c"].consumers
    assert columns.spread(torch.arange(8)).reshape(2, 32)[0].tolist() == [
        c for c in range(8) for _ in range(4)
    ]


class Shuffled(nn.Module):
    """Flattened channels last: columns of the head do not come in blocks of one channel each."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 1), nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.conv(x).permute(0, 2, 3, 1).flatten(1))


def test_columns_that_are_not_a_neurons_own_are_not_taken_for_them():
    groups = neuron_groups(Shuffled(), [(torch.randn(2, 1, 2, 2), torch.tensor([0, 1]))])
    assert [group.consumers for group in groups] == [(), ()]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_scalar_belongs_to_one_neuron(family):
    model, forget, _ = make(family)
    model.eval()
    for groups in (list(module_groups(model)), neuron_groups(model, forget)):
        counts = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for group in groups:
            for part in group.parts:
                assert part.size == group.size
                neurons = part.spread(torch.arange(group.size)).reshape(counts[part.name].shape)
                rows = part.rows(neurons)
                assert torch.equal(rows, torch.arange(group.size)[:, None].expand_as(rows))
                counts[part.name] += 1
        assert all(bool((count == 1).all()) for count in counts.values())


def test_neurons_of_other_layers():
    model = nn.ModuleDict(
        {
            "transposed": nn.ConvTranspose2d(4, 6, 3, groups=2),
            "lstm": nn.LSTM(3, 5, bidirectional=True),
            "parametrized": nn.utils.parametrizations.weight_norm(nn.Linear(3, 7)),
        }
    )
    groups = {group.name: group for group in module_groups(model)}
    assert groups["transposed"].size == 6
    weight = groups["transposed"].parts[0]
    neurons = weight.spread(torch.arange(6)).reshape(model["transposed"].weight.shape)
    assert neurons[0, :, 0, 0].tolist() == [0, 1, 2]
    assert neurons[2, :, 0, 0].tolist() == [3, 4, 5]
    assert groups["lstm.l0"].size == groups["lstm.l0_reverse"].size == 5
    assert len(groups["lstm.l0"].parts) == 4
    assert groups["parametrized.parametrizations.weight"].size == 7
