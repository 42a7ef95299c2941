"""Gram matrices and projections, in plain PyTorch."""

# ruff: noqa: D103 (what the kernels do stands in the modules that call them)

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from unlearn_ext.ops import reference
from unlearn_ext.ops.fallback import checks, layer_checks
from unlearn_ext.ops.fallback.checks import require
from unlearn_ext.ops.fallback.running import as_given, parts


def gram_accumulate_(gram: Tensor, inputs: Tensor) -> None:
    op = "gram_accumulate_"
    layer_checks.require_gram(op, gram, inputs)
    require(inputs.dim() >= 1, f"{op}: inputs must have at least 1 dimension, got a scalar")
    d = inputs.shape[-1]
    require(
        gram.shape == (d, d),
        f"{op}: gram must have shape [{d}, {d}] for inputs of width {d}, got {checks.sizes(gram)}",
    )
    layer_checks.require_gram_memory(op, gram, inputs)
    with as_given([gram]):
        rows = inputs.reshape(math.prod(inputs.shape[:-1]), d)
        for (part,) in parts(2 * d, rows):
            reference.gram_accumulate_(gram, part)


def gram_conv_accumulate_(
    gram: Tensor,
    inputs: Tensor,
    *,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> None:
    op = "gram_conv_accumulate_"
    layer_checks.require_gram(op, gram, inputs)
    out = layer_checks.require_patches(op, inputs, kernel_size, stride, padding, dilation, groups)
    d = inputs.shape[1] // groups * math.prod(kernel_size)
    fits = gram.shape == (groups, d, d) or (groups == 1 and gram.shape == (d, d))
    wanted = f"[{d}, {d}]" if groups == 1 else f"[groups, d, d] = [{groups}, {d}, {d}]"
    require(fits, f"{op}: gram must have shape {wanted}, got {checks.sizes(gram)}")
    layer_checks.require_gram_memory(op, gram, inputs)
    with as_given([gram]):
        whole = gram[0] if groups == 1 and gram.dim() == 3 else gram
        for (part,) in parts(2 * groups * d * math.prod(out), inputs):
            reference.gram_conv_accumulate_(
                whole,
                part,
                kernel_size=kernel_size,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
            )


def _project_in_place(
    op: str, grads: Sequence[Tensor], bases: Sequence[Tensor], project: Callable[[Tensor, Tensor], Tensor]
) -> None:
    require(
        len(grads) == len(bases),
        f"{op}: bases must have {len(grads)} tensors like grads, got {len(bases)}",
    )
    for index, (grad, basis) in enumerate(zip(grads, bases, strict=True)):
        layer_checks.require_projection(op, grad, basis, index)
        checks.require_writable(op, f"grad[{index}]", grad)
    checks.require_no_aliases(
        op,
        (
            (name, index, tensor, name == "grad")
            for index, row in enumerate(zip(grads, bases, strict=True))
            for name, tensor in zip(("grad", "basis"), row, strict=True)
        ),
    )
    with as_given(grads):
        for grad, basis in zip(grads, bases, strict=True):
            grad.copy_(project(grad, basis))


def _has_tangent(tensor: Tensor) -> bool:
    if forward_ad._current_level < 0:
        return False
    # Kernels run below autograd, which alone can tell.
    nothing = torch._C.DispatchKeySet(torch._C.DispatchKey.Undefined)
    with torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), nothing):
        return torch._unpack_dual(tensor, level=0)[1] is not None


def _project_copy(
    op: str, grad: Tensor, basis: Tensor, project: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    if _has_tangent(grad) or _has_tangent(basis):
        raise NotImplementedError(f"{op}: forward-mode differentiation is not implemented; use reverse mode")
    layer_checks.require_projection(op, grad, basis, 0)
    with as_given():
        return project(grad, basis).clone(memory_format=torch.contiguous_format)


def project_out(grad: Tensor, basis: Tensor) -> Tensor:
    return _project_copy("project_out", grad, basis, reference.project_out)


def project_onto(grad: Tensor, basis: Tensor) -> Tensor:
    return _project_copy("project_onto", grad, basis, reference.project_onto)


def project_out_(grad: Tensor, basis: Tensor) -> None:
    _project_in_place("project_out_", [grad], [basis], reference.project_out)


def project_onto_(grad: Tensor, basis: Tensor) -> None:
    _project_in_place("project_onto_", [grad], [basis], reference.project_onto)


def project_out_list_(grads: Sequence[Tensor], bases: Sequence[Tensor]) -> None:
    _project_in_place("project_out_", grads, bases, reference.project_out)


def project_onto_list_(grads: Sequence[Tensor], bases: Sequence[Tensor]) -> None:
    _project_in_place("project_onto_", grads, bases, reference.project_onto)
