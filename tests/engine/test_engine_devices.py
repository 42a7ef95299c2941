"""Per-sample Fisher diagonals, and the methods on top of them, on every device."""

import copy

import pytest
import torch
from oracle import errors, one_by_one, split
from test_engine_models import SMALL, small

import unlearn_ext as ux
from unlearn_ext import fisher_diagonal


def placed(batches, device):
    return [tuple(tensor.to(device) for tensor in batch) for batch in batches]


@pytest.fixture
def exact_products():
    """No tf32, which torch lets convolutions use unasked."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("name", SMALL)
def test_agrees_with_single_samples_in_float64(name, device):
    model, batch = small(name)
    expected = one_by_one(model, batch)
    found = fisher_diagonal(model.to(device), split(batch, 5))
    assert set(found.coverage.values()) == {"fused"}
    assert {value.device.type for value in found.values()} == {device}
    on_cpu = {parameter: value.cpu() for parameter, value in found.items()}
    # A GPU rounds otherwise, and may switch a unit at the edge of a ReLU.
    assert max(errors(on_cpu, expected).values()) <= (1e-5 if device == "cpu" else 1e-4)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["cnn", "gpt"])
def test_half_precision_errs_as_single_samples_do(name, dtype, device):
    model, (x, y) = small(name)
    model = model.to(dtype)
    batch = (x.to(dtype) if x.is_floating_point() else x, y)
    expected = one_by_one(model, batch)
    loop = max(errors(one_by_one(model, batch, dtype=dtype), expected).values())
    found = fisher_diagonal(model.to(device), [batch])
    on_cpu = {parameter: value.double().cpu() for parameter, value in found.items()}
    assert max(errors(on_cpu, expected).values()) <= 2 * loop + 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_gives_the_same_bits_again(name, device):
    model, batch = small(name)
    model.to(device)
    first, second = (fisher_diagonal(model, split(batch, 4)) for _ in range(2))
    for parameter, value in first.items():
        if device == "cpu" or name == "mlp":
            assert torch.equal(value, second[parameter]), parameter
        else:  # torch's own backward passes of convolutions and attention may add in any order on a GPU
            torch.testing.assert_close(value, second[parameter], rtol=1e-3, atol=1e-6)


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("method", ["ssd", "gradient_masking", "pgu", "unsir"])
def test_methods_do_on_a_device_what_they_do_on_the_cpu(method, device):
    model, (x, y) = small("cnn", 24)
    y = torch.arange(24) % 3
    forget, retain = (split((x[chosen], y[chosen]), 4) for chosen in (y == 0, y != 0))
    # In one shot: in a closed loop an untrained network is refused, and left as it was.
    settings = {
        "ssd": {"alpha": "adaptive"},
        "gradient_masking": {"epochs": 1},
        "pgu": {"epochs": 2, "until": None},
        "unsir": {},
    }[method]
    results = []
    for where in ("cpu", device):
        moved = copy.deepcopy(model).to(where)
        torch.manual_seed(0)
        ux.METHODS[method](moved, placed(forget, where), placed(retain, where), **settings)
        results.append({name: p.detach().cpu() for name, p in moved.named_parameters()})
    before = dict(model.named_parameters())
    assert any(not torch.equal(results[1][name], before[name]) for name in before)
    assert all(bool(p.isfinite().all()) for p in results[1].values())
    if method == "ssd":  # the others draw random numbers, which devices draw differently
        for name, p in results[0].items():
            torch.testing.assert_close(results[1][name], p, rtol=1e-3, atol=1e-4)
