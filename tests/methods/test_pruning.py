import functools

import pytest
import torch
from methods.models import FAMILIES, make
from torch import nn
from torch.utils.data import DataLoader

import unlearn_ext as ux
from unlearn_ext import Scores, demo, metrics, prune_neurons


def bottleneck():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(54, 5),
        nn.Sigmoid(),
        nn.Linear(5, 3),
    )
    model[1].running_mean.normal_()
    model[1].weight.data.uniform_(0.5, 2)
    model[1].bias.data.normal_()
    return model.eval(), [(torch.randn(6, 1, 8, 8), torch.arange(6) % 3)]


def without(model, channels, units):
    """The same network with these channels and hidden units left out by hand."""
    keep = [c for c in range(6) if c not in channels]
    hidden = [u for u in range(5) if u not in units]
    columns = [9 * c + p for c in keep for p in range(9)]

    def forward(x):
        y = model[:4](x)[:, keep].flatten(1)
        y = torch.sigmoid(y @ model[5].weight[hidden][:, columns].T + model[5].bias[hidden])
        return y @ model[7].weight[:, hidden].T + model[7].bias

    return forward


def test_what_is_left_computes_what_a_network_without_the_neurons_would():
    model, data = bottleneck()
    x = torch.randn(4, 1, 8, 8)
    traced = ux.saliency(model, data, score="fisher").groups
    assert [group.name for group in traced] == ["0", "5", "7"]
    values = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    for part, neuron in (("0.weight", 1), ("0.weight", 4), ("5.weight", 2)):
        values[part][neuron] = -50.0
    with torch.no_grad():
        expected = without(model, {1, 4}, {2})(x)
    result = prune_neurons(model, Scores(values, traced), 3 / 11)
    torch.testing.assert_close(model(x), expected)
    assert {entry["layer"]: entry["dropped"] for entry in result.history} == {"0": 2, "5": 1}
    for name, rows in (
        ("0.weight", [1, 4]),
        ("0.bias", [1, 4]),
        ("1.weight", [1, 4]),
        ("1.bias", [1, 4]),
        ("5.weight", [2]),
        ("5.bias", [2]),
    ):
        parameter = model.get_parameter(name)
        assert (parameter.flatten(1) if parameter.ndim > 1 else parameter[:, None]).any(
            1
        ).logical_not().nonzero().flatten().tolist() == rows
    # Sigmoid maps 0 to 1/2: only the zeroed column of the head makes the unit vanish.
    assert (model[7].weight == 0).all(0).nonzero().flatten().tolist() == [2]


def test_nothing_else_changes():
    model, data = bottleneck()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    storage = [p.data_ptr() for p in model.parameters()]
    scores = ux.saliency(model, data, score="taylor")
    result = prune_neurons(model, scores, 0.0)
    assert result.changed == 0
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    result = prune_neurons(model, scores, 0.4)
    after = model.state_dict()
    for name, _ in model.named_parameters():
        moved = before[name] != after[name]
        assert result.changed_per_parameter[name] == moved.float().mean()
        assert not bool(after[name][moved].any())
    assert all(torch.equal(before[name], after[name]) for name, _ in model.named_buffers())
    assert [p.data_ptr() for p in model.parameters()] == storage
    assert model.training


@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_layers_keep_a_neuron_and_outputs_stay(family, scope):
    model, forget, _ = make(family)
    scores = ux.saliency(model, forget, score="taylor")
    if family == "lstm":  # its only plain layer makes the outputs
        with pytest.raises(ValueError, match="hidden layer"):
            prune_neurons(model, scores, 0.9, scope=scope)
        return
    head = next(name for name in ("7.weight", "head.weight", "wte.weight") if name in scores)
    before = model.get_parameter(head).clone()
    result = prune_neurons(model, scores, 0.99, scope=scope)
    assert len(result.history) > 3
    assert all(entry["dropped"] < entry["neurons"] for entry in result.history)
    assert sum(entry["dropped"] for entry in result.history) > 0
    rows = (model.get_parameter(head) != before).any(1) & ~before.any(1)
    assert not bool(rows.any())
    assert bool(model.get_parameter(head).any(1).all())


def test_a_plain_dictionary_will_do():
    model, _ = bottleneck()
    magnitudes = {name: p.detach().abs() for name, p in model.named_parameters()}
    before = [model[7].weight.clone(), model[1].weight.clone()]
    result = prune_neurons(model, magnitudes, 0.5, exclude="0")
    assert {entry["layer"]: entry["dropped"] for entry in result.history} == {"5": 2}
    assert torch.equal(before[0], model[7].weight)
    assert torch.equal(before[1], model[1].weight)


@pytest.mark.parametrize(
    "fraction, change, message",
    [
        (1.0, {}, "fraction must lie"),
        (-0.1, {}, "fraction must lie"),
        (0.5, {"0.weight": torch.zeros(2)}, "must fit the model"),
        (0.5, {"nowhere": torch.zeros(2)}, "no such parameter"),
        (0.5, {"0.bias": torch.full((6,), torch.nan)}, "must not be NaN"),
    ],
)
def test_bad_arguments_are_refused(fraction, change, message):
    model, _ = bottleneck()
    scores = {name: p.detach().abs() for name, p in model.named_parameters()} | change
    with pytest.raises(ValueError, match=message):
        prune_neurons(model, scores, fraction)
    with pytest.raises(ValueError, match="scope must be"):
        prune_neurons(model, scores, 0.1, scope="all")


@functools.cache
def curves():
    """Test accuracy on digits by score and share of neurons dropped."""
    train, test = demo.load_digits()
    weights = demo.train(train, epochs=10, seed=0)[0].state_dict()
    model = demo.make_model(0)
    model.load_state_dict(weights)
    some = DataLoader(train, 128)
    obd = ux.saliency(model, some, score="obd")
    scores = {
        "obd": obd,
        "random": ux.saliency(model, some, score="random", generator=torch.Generator().manual_seed(0)),
        "magnitude": Scores({n: model.get_parameter(n).detach().abs() for n in obd}, obd.groups),
    }
    found = {}
    for name in scores:
        for fraction in (0.0, 0.2, 0.3, 0.4):
            model.load_state_dict(weights)
            prune_neurons(model, scores[name], fraction)
            found[name, fraction] = metrics.accuracy(model, DataLoader(test, 512))
    return found


def test_neurons_that_matter_least_are_missed_least():
    accuracies = curves()
    assert accuracies["obd", 0.3] >= accuracies["obd", 0.0] - 0.05
    for other in ("magnitude", "random"):
        for fraction in (0.3, 0.4):
            assert accuracies["obd", fraction] > accuracies[other, fraction] + 0.1
