"""Ops and methods on a device that torch knows by name only; test_fallback.py runs this file by itself.

The device is registered in Python, so that device guards find it. Its tensors are wrappers whose kernels are
those of the CPU. Ops of the package go where the dispatcher sends tensors of the device's own key.
"""

import functools
import operator

import pytest
import torch
from op_cases import CASES, assert_same_bits, assert_within, copied, mapped, tensors_of
from test_errors import BAD_CALLS, CASE_OF, VALID
from torch.utils import backend_registration

import unlearn_ext as ux
from unlearn_ext import ops
from unlearn_ext.ops import fallback
from unlearn_ext.ops.fallback import running

backend_registration._setup_privateuseone_for_python_backend(rename="elsewhere")


class Elsewhere(torch.Tensor):
    """A tensor of a device of somebody else's, whose kernels are those of the CPU."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device="elsewhere:0"
        )

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):  # which torch refuses of subclasses
        return self.inner.tolist()

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function.namespace == "unlearn_ext":
            # Where the dispatcher goes with the keys of tensors of that device that are no subclass.
            keys = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.Python)
            there = [torch._C._dispatch_keys(tensor) for tensor in tensors_of([args, kwargs])]
            return function.redispatch(functools.reduce(operator.or_, there) & keys, *args, **kwargs)
        return _run(function, *args, **kwargs)


def _run(function, *args, **kwargs):
    """A kernel of the device: the CPU's."""
    args, kwargs = _home([list(args), kwargs])
    if torch.device(kwargs.get("device") or "cpu").type == "elsewhere":
        kwargs["device"] = torch.device("cpu")
    return _away(function(*args, **kwargs))


# What is called without a tensor of the device, to make one.
_LIBRARY = torch.library.Library("aten", "IMPL")
_LIBRARY.impl("_copy_from", lambda source, to, _=False: _home(to).copy_(_home(source)), "PrivateUse1")
for _factory in (torch.ops.aten.empty.memory_format, torch.ops.aten.empty_strided.default):
    _LIBRARY.impl(_factory, functools.partial(_run, _factory), "PrivateUse1")


def _home(tree):
    return mapped(lambda tensor: tensor.inner if isinstance(tensor, Elsewhere) else tensor, tree)


def _away(tree):
    return mapped(lambda tensor: tensor if isinstance(tensor, Elsewhere) else Elsewhere(tensor), tree)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.schema)
def test_ops_run_on_devices_of_somebody_elses(case, generator):
    variant = "mixed" if "mixed" in case.variants else case.variants[0]
    args, kwargs = case.sample("cpu", case.dtypes[0], generator, variant)
    here = case.run(fallback.KERNELS[case.schema], copied(args), kwargs)
    expected, bounds = case.expect(args, kwargs)
    args, kwargs = _away(args), _away(kwargs)
    result = getattr(ops, case.name)(*args, **kwargs)
    outputs = case.outputs(args, result)
    assert {tensor.device.type for tensor in outputs} == {"elsewhere"}
    assert_within(_home(outputs), expected, bounds)
    if "project" not in case.name:  # which BLAS rounds as its operands happen to lie in memory
        for output, wanted in zip(_home(outputs), here, strict=True):
            assert_same_bits(output, wanted)


@pytest.mark.parametrize("bad", [bad for bad in BAD_CALLS if "of shape" in bad.why][::9], ids=str)
def test_devices_of_somebody_elses_refuse_what_the_cpu_does(bad):
    arguments = _away(bad.arguments())
    with pytest.raises(bad.error, match=f"^{CASE_OF[bad.schema].name}: {bad.message}"):
        CASE_OF[bad.schema].overload(**arguments)


# Lists of masks may lie on several devices.
@pytest.mark.parametrize(
    "schema", [s for s in VALID if "gram" in s or ("list" in s and "pack_mask" not in s)]
)
def test_tensors_of_two_devices_are_refused(schema):
    valid = VALID[schema]()
    last = [name for name, value in valid.items() if list(tensors_of(value))][-1]
    arguments = _away({name: value for name, value in valid.items() if name != last}) | {last: valid[last]}
    with pytest.raises(ValueError, match=r"must be on .*, got cpu"):
        CASE_OF[schema].overload(**arguments)


@pytest.mark.parametrize("name", ["selective_dampen_", "selected_counts", "ratio_quantile", "topk_mask"])
def test_devices_without_float64_decide_as_the_cpu_does(name, monkeypatch, generator):
    case = CASE_OF[name]
    args, kwargs = case.sample("cpu", torch.float32, generator, "mixed")
    expected = case.run(fallback.KERNELS[name], copied(args), kwargs)
    monkeypatch.setattr(running, "has_float64", lambda device: device.type == "cpu")
    away = _away(copied(args))
    result = getattr(ops, name)(*away, **kwargs)
    for output, wanted in zip(_home(case.outputs(away, result)), expected, strict=True):
        assert_same_bits(output, wanted)


def _model(wrap):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.ReLU(), torch.nn.Linear(16, 3))
    for layer in (model[0], model[2]):
        for name, parameter in list(layer.named_parameters()):
            setattr(layer, name, torch.nn.Parameter(wrap(parameter.detach().clone())))
    return model


def _sets(wrap):
    labels = torch.arange(48) % 3
    inputs = torch.randn(48, 6, generator=torch.Generator().manual_seed(1)) + 3 * torch.eye(3, 6)[labels]
    return [[(wrap(inputs[chosen]), wrap(labels[chosen]))] for chosen in (labels == 0, labels != 0)]


def _on_both(run):
    """The parameters after a run, on the CPU and there."""
    results = []
    for wrap in (torch.clone, Elsewhere):
        model = _model(wrap)
        run(model, *_sets(wrap))
        results.append([_home([p.detach()])[0] for p in model.parameters()])
    return results


def test_diagonals_are_those_of_the_cpu():
    diagonals = []
    for wrap in (torch.clone, Elsewhere):
        found = ux.fisher_diagonal(_model(wrap), _sets(wrap)[1])
        diagonals.append(_home(list(found.values())))
    for mine, theirs in zip(*diagonals, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-9)


def test_ssd_changes_what_it_changes_on_the_cpu():
    def run(model, forget, retain):
        ux.ssd(model, forget, retain, alpha=1.0, lambda_=1.0, until=None)

    before = list(_model(torch.clone).parameters())
    mine, theirs = _on_both(run)
    assert any(not torch.equal(a, b) for a, b in zip(before, mine, strict=True))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)


def test_masked_steps_change_what_they_change_on_the_cpu():
    def run(model, forget, retain):
        masks = {name: torch.arange(p.numel()).view(p.shape) % 2 == 0 for name, p in model.named_parameters()}
        optimizer = ux.optim.MaskedSGD(list(model.named_parameters()), lr=0.1, momentum=0.9, masks=masks)
        for inputs, labels in [*retain, *retain]:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(inputs), labels).backward()
            optimizer.step()

    for a, b in zip(*_on_both(run), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
