"""What can be known about CUDA where there is no GPU: devices of results, errors, and where things go.

Two kinds of tensors stand in. Those of ``FakeTensorMode`` go through the dispatcher and have shapes, dtypes
and devices. ``Nowhere`` also passes the door that bypasses the dispatcher, as far as the checks in C++.
"""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import CASES, mapped, tensors_of
from test_errors import CASE_OF, VALID
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import unlearn_ext as ux
from unlearn_ext import ops
from unlearn_ext.optim.masked import MaskedAdamW, MaskedSGD

ROOT = Path(__file__).parents[1]
WITH_CUDA = ops.build_info()["cuda"]
with_cuda = pytest.mark.skipif(not WITH_CUDA, reason="built without CUDA")
torch_without_driver = pytest.mark.skipif(
    torch.version.cuda is None or torch.cuda.is_available(), reason="needs torch for CUDA and no driver"
)


class Nowhere(torch.Tensor):
    """A tensor that says to be on a device, without memory."""

    @staticmethod
    def __new__(cls, like, device="cuda:0"):
        return torch.Tensor._make_wrapper_subclass(cls, like.shape, dtype=like.dtype, device=device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function.namespace != "unlearn_ext":
            raise AssertionError(f"{function} was called")
        with torch._C._DisableTorchDispatch():  # to the kernel of its device, as a tensor with memory
            return function(*args, **(kwargs or {}))


def faked(tree, device):
    return mapped(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device=device), tree)


# ---- Ops


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1", "cpu"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.schema)
def test_results_are_on_the_device_of_the_arguments(case, device, generator):
    args, kwargs = case.sample("cpu", case.dtypes[-1], generator, case.variants[0])
    expected = list(tensors_of(getattr(ops, case.name)(*args, **kwargs)))
    with FakeTensorMode():
        args, kwargs = faked(args, device), faked(kwargs, device)
        results = list(tensors_of(getattr(ops, case.name)(*args, **kwargs)))
    assert [(t.shape, t.dtype) for t in results] == [(t.shape, t.dtype) for t in expected]
    assert {t.device for t in results} <= {torch.device(device)}


@pytest.mark.parametrize("other", ["cpu", "cuda:1"])
@pytest.mark.parametrize(
    "schema", [name for name in VALID if "pack_mask" not in name and name != "topk_mask"]
)
def test_tensors_of_one_row_must_be_on_one_device(schema, other):
    # The last argument: those before it have passed their checks by then.
    valid = VALID[schema]()
    name = [name for name, value in valid.items() if list(tensors_of(value)) and name != "step"][-1]
    arguments = mapped(Nowhere, valid) | {name: mapped(lambda tensor: Nowhere(tensor, other), valid[name])}
    # A library without CUDA hands them to the kernels in plain PyTorch, which check them likewise.
    for door in CASE_OF[schema].doors.values():
        with pytest.raises(ValueError, match=rf"^{CASE_OF[schema].name}: .*must be on .*, got {other}"):
            door(**arguments)


@with_cuda
@torch_without_driver
def test_a_missing_driver_is_an_error_that_names_it():
    # In a process of its own: FakeTensorMode puts something else in the place of the missing devices.
    code = """
import torch
from unlearn_ext import _C
NOWHERE
mask = torch.arange(70) % 3 == 0
assert torch.equal(_C.unpack_mask(_C.pack_mask(mask), [70]), mask)
try:
    _C.fisher_accumulate_([Nowhere(torch.empty(0))], [Nowhere(torch.empty(0))])
except RuntimeError as error:
    assert "driver" in str(error), error
else:
    raise AssertionError("no error")
assert torch.equal(_C.unpack_mask(_C.pack_mask(mask), [70]), mask)
"""
    code = code.replace("NOWHERE", inspect.getsource(Nowhere))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 0, run.stderr


# ---- Where the parts built on the ops put things


def parameters(*devices):
    return [nn.Parameter(torch.empty(3, 4, device=device)) for device in devices]


def masked(cls, devices, **options):
    """A step of an optimizer whose masks are given on the CPU."""
    params = parameters(*devices)
    named = [(f"p{i}", p) for i, p in enumerate(params)]
    masks = {name: torch.empty(3, 4, dtype=torch.bool) for name, _ in named}
    optimizer = cls(named, lr=0.1, masks=masks, **options)
    for p in params:
        p.grad = torch.empty_like(p)
    optimizer.step()
    return params, optimizer


# Step counts of AdamW that are read on the CPU have values, which these tensors have not.
@pytest.mark.parametrize(
    "cls, options", [(MaskedSGD, {"momentum": 0.9}), (MaskedAdamW, {"capturable": True})]
)
def test_masks_and_state_are_on_the_devices_of_their_parameters(cls, options):
    devices = ["cuda:0", "cpu", "cuda:1", "cuda:0"]
    with FakeTensorMode():
        params, optimizer = masked(cls, devices, **options)
    for p, device in zip(params, devices, strict=True):
        assert optimizer._constraints[p].tensor.device == torch.device(device)
        assert {t.device for t in optimizer.state[p].values()} == {torch.device(device)}


def test_batches_go_to_the_model():
    with FakeTensorMode():
        model = nn.Module()
        model.register_parameter("weight", *parameters("cuda:1"))
        batches = [(torch.ones(4, 3), torch.zeros(4, dtype=torch.int64))]
        assert ux.data.device_of(model) == torch.device("cuda:1")
        for batch in ux.data.read_batches(batches, ux.data.device_of(model)):
            assert {tensor.device for tensor in batch} == {torch.device("cuda:1")}
