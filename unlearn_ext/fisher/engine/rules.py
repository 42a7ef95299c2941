"""Rules: the kinds of autograd nodes whose inputs and output gradients imply a parameter's gradients.

A rule ``rule(call) -> PerSampleGradients`` reads what the node has saved for its own backward. It knows
nothing of modules: ``F.linear(x, embedding.weight)``, a packed attention projection and an ``nn.Linear``
are all an ``Addmm``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TypeAlias

import torch
from torch import Tensor

from unlearn_ext.fisher.engine.gradients import (
    Channels,
    Convolution,
    Lookup,
    PerSampleGradients,
    Product,
    Stacked,
)
from unlearn_ext.fisher.engine.graph import CASTS, MOVES, Node, is_identity, kind_of
from unlearn_ext.fisher.engine.layout import Axis, Layout, MismatchError, NoRuleError


@dataclass(slots=True)
class Call:
    """A node in a backward pass.

    Attributes:
        node: The node.
        index: Which of its inputs is the tensor in question.
        shape: Shape of that tensor.
        grad: Gradient of the node's output.
        layout: Where the samples are.
    """

    node: Node
    index: int
    shape: tuple[int, ...]
    grad: Tensor
    layout: Layout

    def broadcast(self, grad: Tensor, other: Tensor | None = None) -> PerSampleGradients:
        """Describe a tensor that is broadcast to the output, and added to or multiplied by what is there.

        Args:
            grad: Gradient of the sum or product.
            other: The other factor, if a product.

        Returns:
            The gradients of the tensor.
        """
        if other is not None:
            other = self.layout.broadcast(other.expand(grad.shape), self.shape)
        return Channels(self.layout.broadcast(grad, self.shape), other, self.shape)


Rule: TypeAlias = Callable[[Call], PerSampleGradients]


class Reach(IntEnum):
    """How far to follow a parameter before a node counts as combining it with data.

    NEAR: to the first node that computes something with it.
    DERIVED: through whatever has no rule, and through lookups: weights that are functions of parameters
        (normalised ones, say), embeddings of positions that all samples share.
    BROADCAST: to where something is broadcast over the samples: small networks whose input is no data.
    """

    NEAR = 0
    DERIVED = 1
    BROADCAST = 2


def combines_with_data(node: Node, index: int, shape: tuple[int, ...], reach: Reach, n: int) -> bool:
    """Say whether a node combines something of a parameter with data.

    Args:
        node: A node that takes a parameter, or something made of parameters only.
        index: As which of its inputs.
        shape: That input's shape.
        reach: How far to go.
        n: Number of samples.

    Returns:
        False if the node's output still counts as something made of parameters only.
    """
    kind = kind_of(node)
    if kind in MOVES or kind in CASTS:
        return False
    if kind == "Expand" and n > 1 and is_identity(node, index, shape):
        return False
    if kind in _BROADCAST and not (kind == "Addmm" and index):
        if reach is Reach.NEAR:
            # A batch of one sample does not show that something is broadcast over it.
            is_one = n == 1 and (kind == "Expand" or shape[:1] == (1,))
            return is_one or not is_identity(node, index, shape)
        if kind == "Addmm":
            return reach is Reach.DERIVED
        if kind == "Repeat":
            return bool(node._saved_repeats[0] % n == 0)
        out = tuple(node._input_metadata[0].shape)
        return len(out) > len(shape) or (bool(shape) and shape[0] == 1 and out[0] % n == 0)
    if reach is Reach.NEAR:
        return True
    return reach is Reach.DERIVED and _is_weight(kind, index) and kind not in _LOOKUPS


def read(call: Call) -> PerSampleGradients:
    """Apply the rule for a node.

    Args:
        call: The node and its gradient.

    Returns:
        The per-sample gradients of the tensor in question.

    Raises:
        MismatchError: If the samples are not where they are looked for.
        NoRuleError: If there is no rule for the node.
    """
    kind = kind_of(call.node)
    if not _is_weight(kind, call.index):
        raise NoRuleError(f"no rule for {type(call.node).__name__}")
    return RULES[kind](call)


def _is_weight(kind: str, index: int) -> bool:
    # The first input of these is what a layer is applied to.
    return kind in RULES and (index > 0 or kind not in _APPLIED)


def _addmm(call: Call) -> PerSampleGradients:
    node, grad = call.node, call.grad
    if call.index == 0:
        return call.broadcast(grad if node._saved_beta == 1 else grad * node._saved_beta)
    grad = grad if node._saved_alpha == 1 else grad * node._saved_alpha
    return _product(call, grad, node._saved_mat1 if call.index == 2 else node._saved_mat2)


def _mm(call: Call) -> PerSampleGradients:
    return _product(call, call.grad, call.node._saved_self if call.index else call.node._saved_mat2)


def _bmm(call: Call) -> PerSampleGradients:
    other = call.node._saved_self if call.index else call.node._saved_mat2
    rows = call.grad.shape[1 if call.index else 2]
    parts = [
        _product(replace(call, layout=call.layout.part(rows * b, rows * (b + 1))), grad, data)
        for b, (grad, data) in enumerate(zip(call.grad, other, strict=True))
    ]
    return Stacked(parts)


def _grouped_mm(call: Call) -> PerSampleGradients:
    node = call.node
    data, ends = node._saved_self, node._saved_offs
    if call.index != 1 or ends is None or data.ndim != 2 or len(call.shape) != 3:
        raise NoRuleError("no rule for a grouped product of this form")
    parts, start = [], 0
    for end in ends.tolist():
        layout = call.layout.part(start, end)
        grad, inputs = call.grad[start:end], data[start:end]
        if start == end and layout.axis is not Axis.ROWS:
            grad, inputs = (tensor.new_zeros(layout.n, 1, tensor.shape[1]) for tensor in (grad, inputs))
            parts.append(Product(grad, inputs))
        else:
            parts.append(Product(layout.rows(grad), layout.rows(inputs)))
        start = end
    return Stacked(parts)


def _product(call: Call, grad: Tensor, other: Tensor) -> Product:
    # The matrix stands on the right of the data, [rows, I] @ [I, O], or on the left, [O, I] @ [I, rows].
    rows = call.layout.rows
    on_right = call.index == (2 if kind_of(call.node) == "Addmm" else 1)
    return Product(rows(grad), rows(other)) if on_right else Product(rows(other.mT), rows(grad.mT))


def _mv(call: Call) -> PerSampleGradients:
    if call.index == 0:
        raise NoRuleError("no rule for a matrix times a vector of data")
    data = call.node._saved_self
    return Channels(call.layout.rows(call.grad.unsqueeze(-1).expand_as(data)), call.layout.rows(data))


def _convolution(call: Call) -> PerSampleGradients:
    node, images = call.node, call.layout.images
    if call.index == 2:
        return _channels_second(call)
    grad, inputs = call.grad, node._saved_input
    dims = len(call.shape) - 2
    stride, dilation, before = (
        # One number stands for all dimensions (padding="valid").
        tuple(values) * dims if len(values) == 1 else tuple(values)
        for values in (node._saved_stride, node._saved_dilation, node._saved_padding)
    )
    padding = [(p, p) for p in before]
    if node._saved_transposed:
        # The layer is the backward of a convolution: seen from its output, the roles are swapped.
        after = [p - more for p, more in zip(before, node._saved_output_padding, strict=True)]
        for dim, size in enumerate(after, 2):
            grad = grad.narrow(dim, 0, grad.shape[dim] + min(size, 0))
        padding = [(p, max(size, 0)) for p, size in zip(before, after, strict=True)]
        inputs, grad = grad, inputs
    return Convolution(
        images(inputs),
        images(grad),
        kernel=call.shape[2:],
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=node._saved_groups,
    )


def _embedding(call: Call) -> PerSampleGradients:
    node, rows = call.node, call.layout.rows
    if node._saved_scale_grad_by_freq:
        raise MismatchError("scale_grad_by_freq counts over the batch")
    indices = node._saved_indices
    return Lookup(
        rows(indices.unsqueeze(-1)).squeeze(-1),
        rows(call.grad),
        rows=call.shape[0],
        padding_idx=padding_of(node),
    )


def _index(call: Call) -> PerSampleGradients:
    indices = looked_up(call.node, call.shape)
    if indices is None:
        raise NoRuleError("no rule for an index of this form")
    grad = call.grad.flatten(indices.ndim) if len(call.shape) > 1 else call.grad.unsqueeze(-1)
    rows = call.layout.rows
    return Lookup(rows(indices.unsqueeze(-1)).squeeze(-1), rows(grad), rows=call.shape[0], shape=call.shape)


def looked_up(node: Node, shape: Sequence[int]) -> Tensor | None:
    """Read which rows of a table a node takes: an embedding, or an index of the first dimension alone.

    Args:
        node: A node.
        shape: The table's shape.

    Returns:
        The rows' numbers, none of them negative; None if the node takes something else than rows.
    """
    if kind_of(node) == "Embedding":
        indices: Tensor = node._saved_indices
        return indices
    if kind_of(node) != "Index":
        return None
    first, *others = node._saved_indices
    if first is None or any(other is not None for other in others):
        return None
    if first.dtype not in (torch.int64, torch.int32):  # a mask takes as many rows as the data say
        return None
    return torch.where(first < 0, first + shape[0], first)


def _embedding_bag(call: Call) -> PerSampleGradients:
    node, rows, grad = call.node, call.layout.rows, call.grad
    if node._saved_mode not in (0, 1):
        raise NoRuleError("no rule for the maximum over a bag")
    if node._saved_scale_grad_by_freq:
        raise MismatchError("scale_grad_by_freq counts over the batch")
    indices, padding_idx = node._saved_indices.flatten(), padding_of(node)
    places = torch.arange(len(indices), device=indices.device)
    bags = torch.searchsorted(node._saved_offsets.long(), places, right=True) - 1
    bags = bags.clamp(0, len(grad) - 1)
    if node._saved_mode == 1:
        counts = torch.bincount(bags[indices != padding_idx], minlength=len(grad)).clamp(min=1)
        grad = grad / counts.unsqueeze(-1).to(grad.dtype)
    grads, weights = grad[bags], node._saved_per_sample_weights
    if weights is not None:
        grads = grads * weights.reshape(-1, 1)
    return Lookup(
        rows(indices.unsqueeze(-1)).squeeze(-1), rows(grads), rows=call.shape[0], padding_idx=padding_idx
    )


def padding_of(node: Node) -> int:
    """Read the padding index of a lookup.

    Args:
        node: The node of an embedding, or of an index, which has none.

    Returns:
        The index, -1 for none.
    """
    found = int(getattr(node, "_saved_padding_idx", -1)) % 2**64
    return found if found < 2**63 else -1  # kept as an unsigned number


def _layer_norm(call: Call) -> PerSampleGradients:
    node = call.node
    inputs, dims = node._saved_input, len(node._saved_normalized_shape)
    return _affine(call, lambda: _shifted(inputs, node._saved_result1, node._saved_result2), dims)


def _rms_norm(call: Call) -> PerSampleGradients:
    node = call.node
    dims = len(node._saved_normalized_shape)
    return _affine(call, lambda: node._saved_input * node._saved_result1, dims)


def _affine(call: Call, normalized: Callable[[], Tensor], dims: int) -> PerSampleGradients:
    def rows(tensor: Tensor) -> Tensor:
        return call.layout.rows(tensor.flatten(-dims))

    if call.index == 2:
        return Channels(rows(call.grad), shape=call.shape)
    return Channels(rows(call.grad), rows(normalized().to(call.grad.dtype)), call.shape)


def _group_norm(call: Call) -> PerSampleGradients:
    node = call.node

    def normalized() -> Tensor:
        inputs = node._saved_input
        groups = inputs.reshape(*node._saved_result1.shape, -1)
        mean, rstd = node._saved_result1.unsqueeze(-1), node._saved_result2.unsqueeze(-1)
        return _shifted(groups, mean, rstd).view(inputs.shape)

    return _channels_second(call, normalized)


def _batch_norm(call: Call) -> PerSampleGradients:
    node = call.node
    mean, var = node._saved_running_mean, node._saved_running_var
    if node._saved_training or mean is None:
        raise MismatchError("the norm's statistics are those of the batch")
    eps = node._saved_eps if hasattr(node, "_saved_eps") else node._saved_epsilon

    def normalized() -> Tensor:
        on_cudnn = torch.backends.cudnn.enabled
        return torch.batch_norm(node._saved_input, None, None, mean, var, False, 0.0, eps, on_cudnn)

    return _channels_second(call, normalized)


def _channels_second(call: Call, normalized: Callable[[], Tensor] | None = None) -> PerSampleGradients:
    grad = call.grad
    factor = None if call.index == 2 or normalized is None else normalized().to(grad.dtype)
    if call.layout.maps(grad) is not None:
        return Channels(grad, factor, channel_dim=1)
    return Channels(_last(call, grad), None if factor is None else _last(call, factor))


def _last(call: Call, maps: Tensor) -> Tensor:
    return call.layout.rows(maps.movedim(1, -1))


def _shifted(inputs: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    # (inputs - mean) * rstd in one pass over the inputs
    return torch.addcmul(-mean * rstd, inputs, rstd)


def _add(call: Call) -> PerSampleGradients:
    return call.broadcast(call.grad * call.node._saved_alpha if call.index else call.grad)


def _sub(call: Call) -> PerSampleGradients:
    return call.broadcast(-call.grad * call.node._saved_alpha if call.index else call.grad)


def _rsub(call: Call) -> PerSampleGradients:
    return call.broadcast(-call.grad * call.node._saved_alpha)


def _mul(call: Call) -> PerSampleGradients:
    other = call.node._saved_self if call.index else call.node._saved_other
    return call.broadcast(call.grad, other.to(call.grad.dtype))


def _div(call: Call) -> PerSampleGradients:
    other = call.node._saved_other
    factor = other.reciprocal() if call.index == 0 else -call.node._saved_self / other.square()
    return call.broadcast(call.grad, factor.to(call.grad.dtype))


def _expand(call: Call) -> PerSampleGradients:
    return call.broadcast(call.grad)


def _repeat(call: Call) -> PerSampleGradients:
    repeats: Sequence[int] = call.node._saved_repeats
    sizes = [1] * (len(repeats) - len(call.shape)) + list(call.shape)
    # Every axis as (repeats, entries); the samples are among the repeats of the first axis.
    both = [size for pair in zip(repeats, sizes, strict=True) for size in pair]
    aligned = [size for entries in sizes for size in (1, entries)]
    grad = call.layout.broadcast(call.grad.reshape(both), aligned)
    return Channels(grad, shape=call.shape)


def _where(call: Call) -> PerSampleGradients:
    condition = call.node._saved_condition
    return call.broadcast(call.grad * (condition if call.index == 0 else ~condition))


def _prelu(call: Call) -> PerSampleGradients:
    return call.broadcast(call.grad, call.node._saved_self.clamp(max=0))


_BROADCAST: dict[str, Rule] = {
    "Add": _add,
    "Addmm": _addmm,
    "Div": _div,
    "Expand": _expand,
    "Mul": _mul,
    "PreluKernel": _prelu,
    "Repeat": _repeat,
    "Rsub": _rsub,
    "Sub": _sub,
    "Where": _where,
}

_APPLIED = {
    *("Convolution", "CudnnBatchNorm", "FusedRmsNorm", "MiopenBatchNorm", "NativeBatchNorm"),
    *("NativeGroupNorm", "NativeLayerNorm", "PreluKernel"),
}

_LOOKUPS = {"Embedding", "EmbeddingBag", "Index"}

RULES: dict[str, Rule] = {
    **_BROADCAST,
    "Bmm": _bmm,
    "Convolution": _convolution,
    "CudnnBatchNorm": _batch_norm,
    "Embedding": _embedding,
    "EmbeddingBag": _embedding_bag,
    "FusedRmsNorm": _rms_norm,
    "GroupedMm": _grouped_mm,
    "Index": _index,
    "MiopenBatchNorm": _batch_norm,
    "Mm": _mm,
    "Mv": _mv,
    "NativeBatchNorm": _batch_norm,
    "NativeGroupNorm": _group_norm,
    "NativeLayerNorm": _layer_norm,
}
