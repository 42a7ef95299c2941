"""Gram matrices of layer inputs, and projections out of and onto subspaces."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from unlearn_ext.ops import sharded
from unlearn_ext.ops.arguments import flat_padding, per_dimension
from unlearn_ext.ops.library import OPS


def gram_accumulate_(gram: Tensor, inputs: Tensor) -> None:
    """Add the second moment of a layer's inputs to a running total.

    ``gram <- gram + X^T X`` with ``X = inputs`` as rows ``[*, d]``

    Only one triangle is computed and then mirrored. With a float64 total the products are those of the
    inputs' dtype (float32 for float16 and bfloat16) and long streams lose nothing to rounding of the total.

    Args:
        gram: Symmetric total ``[d, d]``, written in place; float32 or float64.
        inputs: Rows ``[*, d]``; float32, float16, bfloat16 or float64.

    Raises:
        ValueError: If shapes or devices do not fit, or written memory overlaps.
        TypeError: If a dtype is not supported.

    Source:
        Saha, Garg & Roy, "Gradient Projection Memory for Continual Learning", ICLR 2021; Hoang, Rana, Gupta &
        Venkatesh, "Learn to Unlearn for Deep Neural Networks", WACV 2024 (as a sum of X^T X).

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> gram = torch.zeros(2, 2)
        >>> ops.gram_accumulate_(gram, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> gram
        tensor([[10., 14.],
                [14., 20.]])
    """
    sharded.refuse_dtensors("gram_accumulate_", gram, inputs)
    OPS.gram_accumulate_.default(gram, inputs)


def gram_conv_accumulate_(
    gram: Tensor,
    inputs: Tensor,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int | tuple[int, int]],
    dilation: int | Sequence[int],
    groups: int = 1,
) -> None:
    """Add the second moment of a convolution's input patches to a running total.

    ``gram <- gram + X^T X`` with one row of X per sample and output position: the patch that the kernel sees
    there, columns ordered (channel, kernel position) as in ``weight.view(out_channels, -1)``. The patches are
    never stored as a whole.

    Args:
        gram: Symmetric total ``[d, d]`` with ``d = channels / groups * prod(kernel_size)``, or ``[groups, d,
            d]`` for more than one group; written in place; float32 or float64.
        inputs: Input of the convolution ``[n, channels, *spatial]`` with 1 to 3 spatial dimensions; float32,
            float16, bfloat16 or float64.
        kernel_size: Size of the kernel, one int for all dimensions or one per dimension.
        stride: Step of the kernel, likewise.
        padding: Zeros around the input: one int, or per dimension an int or a (before, after) pair. All pairs
            may also be given flat, as ``before0, after0, before1, ...``.
        dilation: Spacing of the kernel's elements, one int or one per dimension.
        groups: Number of groups the channels are split into.

    Raises:
        ValueError: If shapes or devices do not fit, a constant is out of range, or written memory overlaps.
        TypeError: If a dtype is not supported.

    Source:
        As ``gram_accumulate_``; the rows are those of the layer's own stride, padding and dilation, where the
        published code assumes stride 1.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> gram, signal = torch.zeros(2, 2), torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> ops.gram_conv_accumulate_(gram, signal, kernel_size=2, stride=1, padding=[(1, 0)], dilation=1)
        >>> gram
        tensor([[ 5.,  8.],
                [ 8., 14.]])
    """
    n_dims = inputs.dim() - 2
    sharded.refuse_dtensors("gram_conv_accumulate_", gram, inputs)
    OPS.gram_conv_accumulate_.default(
        gram,
        inputs,
        kernel_size=per_dimension(kernel_size, n_dims),
        stride=per_dimension(stride, n_dims),
        padding=flat_padding(padding, n_dims),
        dilation=per_dimension(dilation, n_dims),
        groups=groups,
    )


def project_out(grad: Tensor, basis: Tensor) -> Tensor:
    """Remove from each row of a gradient its part inside a subspace.

    ``G - (G U) U^T`` with ``G = grad`` viewed as ``[out, d]`` and ``U = basis``

    Differentiable in ``grad`` to any order; ``basis`` gets no gradient. The map is linear and self-adjoint,
    so its backward is itself.

    Args:
        grad: Weight gradient ``[out, ...]`` with d scalars per output; float32, float16, bfloat16 or float64.
        basis: Orthonormal columns ``[d, k]``, or ``[groups, d, k]`` for a grouped layer, whose ``grad`` is
            viewed as ``[groups, out / groups, d]``; dtype of ``grad``, or float32 beside float16 and
            bfloat16.

    Returns:
        The projection, of the shape and dtype of ``grad``.

    Raises:
        ValueError: If shapes or devices do not fit.
        TypeError: If a dtype is not supported.

    Source:
        Saha, Garg & Roy, "Gradient Projection Memory for Continual Learning", ICLR 2021, equation 6; Hoang,
        Rana, Gupta & Venkatesh, "Learn to Unlearn for Deep Neural Networks", WACV 2024.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> ops.project_out(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
        tensor([[0., 4.]])
    """
    sharded.refuse_dtensors("project_out", grad, basis)
    _refuse_forward_mode("project_out")
    projection: Tensor = OPS.project_out.default(grad, basis)
    return projection


def project_out_(grad: Tensor | Sequence[Tensor], basis: Tensor | Sequence[Tensor]) -> None:
    """Remove from the rows of one or many gradients their part inside a subspace, in place.

    ``G <- G - (G U) U^T`` as ``project_out``, for a tensor and its basis or for two lists of them. DTensors
    that are cut along their first dimension have whole rows, which are projected shard by shard.

    Args:
        grad: Weight gradient ``[out, ...]`` or a sequence of them, written in place; float32, float16,
            bfloat16 or float64.
        basis: Orthonormal columns ``[d, k]`` or ``[groups, d, k]``, or one such tensor per gradient.

    Raises:
        ValueError: If counts, shapes or devices do not fit, or written memory overlaps.
        TypeError: If a dtype is not supported.

    Source:
        As ``project_out``.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> grad = torch.tensor([[3.0, 4.0]])
        >>> ops.project_out_(grad, torch.tensor([[1.0], [0.0]]))
        >>> grad
        tensor([[0., 4.]])
    """
    if sharded.has_dtensors(_listed(grad), _listed(basis)):
        sharded.project("project_out_", _listed(grad), _listed(basis), OPS.project_out_.list)
        return
    op = OPS.project_out_.default if isinstance(grad, Tensor) else OPS.project_out_.list
    op(grad, basis)


def project_onto(grad: Tensor, basis: Tensor) -> Tensor:
    """Keep of each row of a gradient only its part inside a subspace.

    ``(G V) V^T`` with ``G = grad`` viewed as ``[out, d]`` and ``V = basis``. The cheaper form of
    ``project_out`` when the space to leave has more than d/2 dimensions: project onto its complement.

    Differentiable in ``grad`` to any order; ``basis`` gets no gradient.

    Args:
        grad: Weight gradient ``[out, ...]`` with d scalars per output; float32, float16, bfloat16 or float64.
        basis: Orthonormal columns ``[d, k]``, or ``[groups, d, k]`` for a grouped layer, whose ``grad`` is
            viewed as ``[groups, out / groups, d]``; dtype of ``grad``, or float32 beside float16 and
            bfloat16.

    Returns:
        The projection, of the shape and dtype of ``grad``.

    Raises:
        ValueError: If shapes or devices do not fit.
        TypeError: If a dtype is not supported.

    Source:
        As ``project_out``.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> ops.project_onto(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
        tensor([[3., 0.]])
    """
    sharded.refuse_dtensors("project_onto", grad, basis)
    _refuse_forward_mode("project_onto")
    projection: Tensor = OPS.project_onto.default(grad, basis)
    return projection


def project_onto_(grad: Tensor | Sequence[Tensor], basis: Tensor | Sequence[Tensor]) -> None:
    """Keep of the rows of one or many gradients only their part inside a subspace, in place.

    ``G <- (G V) V^T`` as ``project_onto``, for a tensor and its basis or for two lists of them. DTensors that
    are cut along their first dimension have whole rows, which are projected shard by shard.

    Args:
        grad: Weight gradient ``[out, ...]`` or a sequence of them, written in place; float32, float16,
            bfloat16 or float64.
        basis: Orthonormal columns ``[d, k]`` or ``[groups, d, k]``, or one such tensor per gradient.

    Raises:
        ValueError: If counts, shapes or devices do not fit, or written memory overlaps.
        TypeError: If a dtype is not supported.

    Source:
        As ``project_out``.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> grad = torch.tensor([[3.0, 4.0]])
        >>> ops.project_onto_([grad], [torch.tensor([[1.0], [0.0]])])
        >>> grad
        tensor([[3., 0.]])
    """
    if sharded.has_dtensors(_listed(grad), _listed(basis)):
        sharded.project("project_onto_", _listed(grad), _listed(basis), OPS.project_onto_.list)
        return
    op = OPS.project_onto_.default if isinstance(grad, Tensor) else OPS.project_onto_.list
    op(grad, basis)


def _listed(tensors: Tensor | Sequence[Tensor]) -> Sequence[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else tensors


def _refuse_forward_mode(op: str) -> None:
    if _is_forward_mode():
        raise NotImplementedError(f"{op}: forward-mode differentiation is not implemented; use reverse mode")


def _is_forward_mode() -> bool:
    # torch.func hides its tangents from the op, which would drop them; dual tensors the op itself refuses.
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Jvp for level in stack)


# torch.compiler.assume_constant_result without its import of the compiler, which before torch 2.13 cannot
# read the stack. Called while a graph is traced, the function sees the transforms around the call.
cast("Any", _is_forward_mode)._dynamo_marked_constant = True
