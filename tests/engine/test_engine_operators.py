"""Every operator of torch's own test suite, inside a model: right, or computed sample by sample.

A few samples of each operator that fit into a few seconds by default; all of them with ``--slow``.
"""

import sys
import types
import unittest
import warnings
import zlib

import pytest
import torch
from oracle import errors
from torch import nn

import unlearn_ext as ux

# torch's list of operators lies beside base classes of its tests, and one of those comes from a package that
# nothing else here needs.
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
from torch.testing._internal.common_methods_invocations import op_db  # noqa: E402

# Importing it forbids the whole process to set flags of backends, which other tests do.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

# Operators a share of which is tried by default, and how many of their sample inputs.
SHARE, FEW, MANY = 4, 2, 12
LARGEST = 4096
# Draw numbers, keep state, or leave parts of what they return as they find it.
NOT_FUNCTIONS = ("dropout", "rand", "normal", "bernoulli", "multinomial", "empty", "exponential", "cauchy")
NOT_FUNCTIONS += ("lu_unpack",)  # ends the process where the pivots are those of another sample
NOT_FUNCTIONS += ("uniform", "log_normal", "geometric", "poisson", "rrelu", "svd_lowrank", "pca_lowrank")


class Operator(nn.Module):
    """An operator on what a first layer makes of the data, with its other numbers as weights."""

    def __init__(self, op, x, given, which):
        super().__init__()
        self.op, self.given, self.which = op, given, which
        self.scale = nn.Parameter(torch.rand(x.shape[1:], dtype=x.dtype) / 4 + 1)
        self.weights = nn.ParameterDict(
            {
                f"at{place}": nn.Parameter(value.detach().clone())
                for place, value in enumerate(tensors(given))
                if place != which and value.is_floating_point()
            }
        )

    def forward(self, x):
        names = iter(range(len(list(tensors(self.given)))))

        def replaced(value):
            if isinstance(value, (list, tuple)) and any(isinstance(v, torch.Tensor) for v in value):
                return type(value)(replaced(v) for v in value)
            if not isinstance(value, torch.Tensor):
                return value
            place = next(names)
            if place == self.which:
                return x * self.scale
            return self.weights.get(f"at{place}", value)

        first, *rest = [replaced(value) for value in (self.given.input, *self.given.args)]
        named = {key: replaced(value) for key, value in self.given.kwargs.items()}
        return self.op(first, *rest, **named)


def tensors(given):
    for value in (given.input, *given.args, *given.kwargs.values()):
        for entry in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(entry, torch.Tensor):
                yield entry


def per_sample(out, n):
    """One number for each of n samples, wherever they are."""
    outputs = [o for o in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(o, torch.Tensor)]
    total = 0
    for o in outputs:
        if not o.requires_grad:
            continue
        o = torch.view_as_real(o.resolve_conj()) if o.is_complex() else o
        o = o.to_dense() if o.layout is not torch.strided else o
        axis = next(d for d in range(o.ndim) if o.shape[d] == n)
        total = total + o.movedim(axis, 0).reshape(n, -1).double().sin().sum(1)
    return total


def loss_fn(model, batch):
    return per_sample(model(batch[0]), len(batch[0]))


def alone(model, batches):
    """The mean of single samples' squared gradients; None if the operator takes none on its own."""
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    samples = [sample[None] for (batch,) in batches for sample in batch]
    for sample in samples:
        value = loss_fn(model, (sample,))
        if not isinstance(value, torch.Tensor) or value.shape != (1,) or not value.requires_grad:
            return None
        grads = torch.autograd.grad(value.sum(), list(model.parameters()), allow_unused=True)
        for entry, grad in zip(total.values(), grads, strict=True):
            if grad is not None:
                entry += grad.square() / len(samples)
    return total


def attempt(op, given, which):
    """Compare; None if the operator maps no batch of samples to numbers."""
    x = list(tensors(given))[which].detach()
    if (
        x.layout is not torch.strided
        or not x.is_floating_point()
        or x.ndim < 2
        or len(x) < 2
        or not 0 < x.numel() <= LARGEST
    ):
        return None
    model = Operator(op, x, given, which)
    batches = [(x.clone(),), (x.flip(0) * 0.9,)]
    try:
        expected = alone(model, batches)
        together = loss_fn(model, batches[0])
        if expected is None or together.shape != (len(x),) or not together.requires_grad:
            return None
        torch.autograd.grad(together.sum(), list(model.parameters()), allow_unused=True)
        finite = torch.stack([torch.isfinite(v).all() for v in (together, *expected.values())])
    except Exception:  # whatever it does not take
        return None
    if not bool(finite.all()) or not any(bool(value.any()) for value in expected.values()):
        return None
    found = ux.fisher_diagonal(model, batches, loss_fn=loss_fn)
    wrong = {name: error for name, error in errors(found, expected).items() if error > 1e-7}
    return wrong, found.coverage


def check(info, most):
    seed = zlib.crc32(f"{info.name}.{info.variant_test_name}".encode())
    torch.manual_seed(seed)
    tried = fused = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, given in enumerate(info.sample_inputs("cpu", torch.float64, requires_grad=False)):
            if number >= most:
                break
            for which in range(min(3, len(list(tensors(given))))):
                result = attempt(info.op, given, which)
                if result is not None:
                    wrong, coverage = result
                    assert not wrong, f"input {number}, data {which}: {wrong}, {coverage}"
                    tried += 1
                    fused += set(coverage.values()) == {"fused"}
    if not tried:
        pytest.skip("maps no batch of samples to numbers")
    return tried, fused


def operators(share):
    for info in op_db:
        name = f"{info.name}.{info.variant_test_name}".rstrip(".")
        usable = info.supports_autograd and torch.float64 in info.dtypes
        if (
            usable
            and not any(part in name for part in NOT_FUNCTIONS)
            and zlib.crc32(name.encode()) % share == 0
        ):
            yield pytest.param(info, id=name)


@pytest.mark.parametrize("info", list(operators(SHARE)))
def test_operators_of_torch(info):
    check(info, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("info", list(operators(1)))
def test_all_operators_of_torch(info):
    check(info, MANY)
