"""The renditions of published algorithms that the methods are timed against must be those algorithms."""

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from unlearn_ext import METHODS, data, ssd

# The benchmarks are not part of the package.
sys.path.append(str(Path(__file__).parents[1]))

from bench import bench_method_speed as speed
from bench import published
from bench.bench_methods import Batches


@pytest.fixture
def sets():
    torch.manual_seed(0)
    x, y = torch.randn(60, 2, 6, 6), torch.arange(60) % 3
    x[y == 0, :, :, 0] += 2
    forget, retain = data.split(TensorDataset(x, y), classes=0)
    return Batches(TensorDataset(*forget[:]), 10, shuffle=False), Batches(
        TensorDataset(*retain[:]), 10, shuffle=False
    )


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 3),
    )


def assert_same_but_not_as_before(ours, plain, before):
    assert any(not torch.equal(p, q) for p, q in zip(ours.parameters(), before.parameters(), strict=True))
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_dampening(sets):
    model = network()
    ours, plain = copy.deepcopy(model), copy.deepcopy(model)
    ssd(ours, *sets, estimator="batch", alpha=1.2, lambda_=1.0)
    speed.plain_ssd(plain, *sets, 1.2, 1.0)
    assert_same_but_not_as_before(ours, plain, model)


def test_projected_gradients(sets):
    model = network()
    ours, plain = copy.deepcopy(model), copy.deepcopy(model)
    METHODS["pgu"](ours, *sets, epochs=3, leak=None, energy=0.9, until=None)
    speed.plain_pgu(plain, *sets, energy=0.9, epochs=3)
    assert_same_but_not_as_before(ours, plain, model)


def test_published_values_stand_beside_the_measured_ones(tmp_path, monkeypatch):
    path, larger = tmp_path / "cifar10.json", tmp_path / "larger.json"
    monkeypatch.setattr(published, "_MINE", path)
    monkeypatch.setattr(published, "_LARGER", larger)
    assert published.section() == ""
    accuracies = {"test retain": 0.75, "test forget": 0.125}
    runs = [{"kind": "class", "method": "ssd", "accuracies": a} for a in (accuracies, {})]
    path.write_text(json.dumps({"rows": runs}))
    lines = published.section().splitlines()
    assert "| ssd | 85.8 | 4.4 | 75.0 | 12.5 |  |  | Kodge et al. |" in lines
    half = {"kind": "class", "method": "unsir", "accuracies": {"test retain": 0.5, "test forget": 0.25}}
    other = {**half, "target": "5", "accuracies": {"test retain": 0.1, "test forget": 0.1}}
    larger.write_text(json.dumps({"rows": [{**half, "target": "0"}, other]}))
    lines = published.section().splitlines()
    assert "| ssd | 85.8 | 4.4 | 75.0 | 12.5 |  |  | Kodge et al. |" in lines
    assert "| unsir | 92.2 | 10.9 |  |  | 30.0 | 17.5 | Kodge et al. |" in lines  # the mean over classes
