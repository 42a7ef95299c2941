import pytest
import torch
from methods.models import FAMILIES, make
from torch import nn

import unlearn_ext as ux
from unlearn_ext.methods import msg


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def problem():
    model = nn.Sequential(nn.Linear(4, 10), nn.ReLU(), nn.Linear(10, 3)).double()
    x, y = torch.randn(24, 4, dtype=torch.float64), torch.arange(24) % 3
    return model, [(x[:4], y[:4])], [(x[4:14], y[4:14]), (x[14:], y[14:])]


def test_the_smallest_differences_of_gradients_are_drawn_anew():
    model, forget, retain = problem()
    weights = [model[0].weight, model[2].weight]
    before = [w.detach().clone() for w in weights]

    def gradient(x, y):
        return torch.autograd.grad(nn.functional.cross_entropy(model(x), y), weights)

    differences = [
        (a - b).abs()
        for a, b in zip(gradient(*(t[:4] for t in retain[0])), gradient(*forget[0]), strict=True)
    ]
    result = msg(model, forget, retain, epochs=0)
    for weight, old, difference in zip(weights, before, differences, strict=True):
        k = int(0.3 * weight.numel())
        smallest = difference.flatten().argsort()[:k]
        wanted = torch.zeros(weight.numel(), dtype=torch.bool)
        wanted[smallest] = True
        assert torch.equal((weight != old).flatten(), wanted)
    assert result.history[0]["drawn"] == 12 + 9


def test_what_is_not_drawn_moves_by_a_tenth():
    steps = {}
    for factor in (0.1, 1.0, 0.0):
        model, forget, retain = problem_again()
        torch.manual_seed(5)
        msg(model, forget, retain, epochs=0)
        start = {name: p.detach().clone() for name, p in model.named_parameters()}
        model, forget, retain = problem_again()
        torch.manual_seed(5)
        msg(model, forget, retain[:1], epochs=1, factor=factor, momentum=0.0, weight_decay=0.0)
        steps[factor] = {name: p.detach() - start[name] for name, p in model.named_parameters()}
    torch.testing.assert_close(steps[0.1]["0.bias"], 0.1 * steps[1.0]["0.bias"])
    assert not steps[0.0]["2.bias"].any()
    still = steps[0.0]["0.weight"] == 0
    assert int((~still).sum()) <= 12
    torch.testing.assert_close(steps[0.1]["0.weight"][~still], steps[1.0]["0.weight"][~still])


def problem_again():
    torch.manual_seed(0)
    return problem()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_runs_on_every_family_and_repeats_itself(family):
    task = ux.tasks.CausalLM() if family == "gpt" else None
    found = []
    for _ in range(2):
        model, forget, retain = make(family)
        result = ux.unlearn(
            "msg", model, forget, retain, task=task, generator=torch.Generator().manual_seed(1), epochs=1
        )
        found.append(model.state_dict())
    assert 0 < result.changed <= 1
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert not any(p._backward_hooks for p in model.parameters())


def test_bad_calls_leave_the_model_alone():
    model, forget, retain = problem()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"share must lie in \[0, 1\], got 2"):
        msg(model, forget, retain, share=2)
    with pytest.raises(ValueError, match="factor must be >= 0, got -1"):
        msg(model, forget, retain, factor=-1)
    with pytest.raises(ValueError, match="forget must hold at least one sample"):
        msg(model, [], retain)
    with pytest.raises(ValueError, match="convolution or linear"):
        msg(nn.Sequential(nn.LayerNorm(4)), forget, retain)
    with pytest.raises(FloatingPointError, match="msg"):
        msg(model, [(torch.full((2, 4), torch.nan).double(), torch.tensor([0, 1]))], retain)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
