"""Every module of torch's own test suite that maps a batch of samples to numbers."""

import sys
import types
import unittest
import warnings

import pytest
import torch
from oracle import errors
from torch import nn

import unlearn_ext as ux

# torch's list of modules lies beside base classes of its tests, and one of those comes from a package that
# nothing else here needs.
sys.modules.setdefault("expecttest", types.SimpleNamespace(TestCase=unittest.TestCase))
from torch.testing._internal.common_modules import module_db  # noqa: E402

# Importing it forbids the whole process to set flags of backends, which other tests do. The module object
# may be a stand-in, the functions' globals are not.
torch.backends.disable_global_flags.__globals__["__allow_nonbracketed_mutation_flag"] = True

N = 4
SEED = 3


class Adapter(nn.Module):
    """Some layers before and behind, so that the module's own gradients are not the only ones."""

    def __init__(self, inner, wraps):
        super().__init__()
        self.inner, self.shift = inner, nn.Parameter(torch.rand((), dtype=torch.float64))
        self.wraps = wraps

    def forward(self, batch):
        x, rest, names = batch
        out = self.inner(x + self.shift if x.is_floating_point() else x, *rest, **names)
        out = out[0] if isinstance(out, (tuple, list)) else out
        return out


def cases():
    for info in module_db:
        inputs = info.module_inputs_func(
            info, device="cpu", dtype=torch.float64, requires_grad=False, training=False
        )
        for number, given in enumerate(inputs):
            if number < 8 and given.forward_input is not None:
                yield pytest.param(info.module_cls, given, id=f"{info.module_cls.__name__}-{number}")


def usable(kind, given):
    arguments, names = given.forward_input.args, given.forward_input.kwargs
    tensors = [a for a in (*arguments, *names.values()) if isinstance(a, torch.Tensor)]
    if len(tensors) != 1 or not arguments or arguments[0] is not tensors[0]:
        return None
    x = arguments[0]
    if x.ndim < 2 or not x.numel():
        return None
    torch.manual_seed(SEED)
    module = kind(*given.constructor_input.args, **given.constructor_input.kwargs).double().eval()
    return module, x, arguments[1:], names


@pytest.mark.parametrize("kind, given", list(cases()))
def test_modules_of_torch(kind, given):
    torch.manual_seed(SEED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = usable(kind, given)
        if found is None:
            pytest.skip("takes no single batch of numbers")
        module, x, rest, names = found
        model = Adapter(module, rest)
        if x.is_floating_point():
            batches = [torch.randn(N, *x.shape[1:], dtype=x.dtype) for _ in range(2)]
        else:
            batches = [x[torch.randint(len(x), (N,))] for _ in range(2)]

        def loss_fn(model, batch):
            out = model((batch[0], rest, names))
            return out.reshape(len(batch[0]), -1).double().sin().sum(1)

        try:
            alone = [loss_fn(model, (batch[:1],)) for batch in batches]
            together = loss_fn(model, (batches[0],))
        except Exception:
            pytest.skip("takes no batches of one and of several samples")
        if not together.requires_grad or not bool(torch.isfinite(together).all()):
            pytest.skip("nothing to differentiate")
        assert alone[0].shape == (1,)
        total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        for batch in batches:
            for sample in batch:
                value = loss_fn(model, (sample[None],)).sum()
                grads = torch.autograd.grad(value, list(model.parameters()), allow_unused=True)
                for entry, grad in zip(total.values(), grads, strict=True):
                    if grad is not None:
                        entry += grad.square() / (2 * N)
        has_any = any(bool(value.any()) for value in total.values())
        try:
            result = ux.fisher_diagonal(model, [(batch,) for batch in batches], loss_fn=loss_fn)
        except ValueError as error:
            # Softmax2d takes three dimensions for one image without a batch: a sample alone is a constant.
            if has_any or "losses that only samples together have" not in str(error):
                raise
            return
    assert list(result) == list(total)
    if not has_any:
        assert all(float(value.max()) < 1e-20 for value in result.values())
        return
    # Softmax, say, takes a shift away, and leaves rounding.
    wrong = {
        name: error
        for name, error in errors(result, total).items()
        if error > 1e-8 and float(result[name].max()) > 1e-20
    }
    assert not wrong, result.coverage
