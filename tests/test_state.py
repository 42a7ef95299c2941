import pytest
import torch
from torch import nn

from unlearn_ext._internal.borrow import borrowed


class Counting(nn.Module):
    """Changes its buffers in eval mode too: one in place, one by replacing it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("last", None)
        self.register_buffer("unset", torch.tensor([float("nan"), 1.0]))

    def forward(self, x):
        self.calls = self.calls + 1
        self.last = x
        self.norm.running_mean += 1
        return self.norm(self.linear(x))


def test_a_pass_leaves_no_trace_even_when_it_fails():
    model = Counting()
    model.norm.eval()
    model.linear.bias.requires_grad_(False)
    grad = torch.ones(2, 2)
    model.linear.weight.grad = grad
    calls, unset_version = model.calls, model.unset._version
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()

    def failing_pass():
        with torch.no_grad(), borrowed(model):
            assert not any(module.training for module in model.modules())
            assert model.linear.weight.grad is None
            model.linear.bias.requires_grad_(True)
            model(torch.randn(4, 2)).sum().backward()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        failing_pass()

    assert [model.training, model.linear.training, model.norm.training] == [True, True, False]
    assert model.linear.weight.grad is grad
    assert torch.equal(grad, torch.ones(2, 2))
    assert model.linear.bias.grad is None
    assert not model.linear.bias.requires_grad
    assert model.calls is calls
    assert model.last is None
    assert model.unset._version == unset_version
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(before[name], after[name]) for name in before if name != "unset")
    assert torch.equal(torch.get_rng_state(), random)


def test_a_module_that_acts_on_train_and_eval_is_asked_to_undo_it():
    class Adapter(nn.Linear):
        def train(self, mode=True):
            if mode != self.training:
                with torch.no_grad():
                    self.weight.mul_(0.5 if mode else 2.0)
            return super().train(mode)

    model = nn.Sequential(Adapter(2, 2), nn.Dropout())
    before = model[0].weight.detach().clone()
    with borrowed(model):
        assert torch.equal(model[0].weight, 2 * before)
    assert torch.equal(model[0].weight, before)


def test_autograd_works_inside_where_the_caller_has_turned_it_off():
    model = nn.Linear(2, 2)
    for off in (torch.no_grad(), torch.inference_mode()):
        with off, borrowed(model):
            (grad,) = torch.autograd.grad(model(torch.ones(1, 2)).sum(), [model.weight])
        assert torch.equal(grad, torch.ones(2, 2))
