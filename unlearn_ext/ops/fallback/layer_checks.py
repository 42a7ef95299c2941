"""The checks of csrc/torch in Python, of the ops that take one layer: see checks.py."""

# ruff: noqa: DOC501 (every function raises ValueError, or TypeError for a dtype)

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn_ext.ops.fallback.checks import (
    accumulator_dtype,
    dtype_name,
    require,
    require_dtype,
    require_finite,
    require_float,
    require_no_aliases,
    require_power,
    require_strided,
    require_writable,
    sizes,
)

# Of one axis: sums and products of such numbers fit into 64 bits.
_MOST_STEPS = 2**31
_MAX_SPATIAL = 3


def require_layer(
    op: str, fisher: Tensor, read_name: str, read: Tensor, grads: Tensor, weight: float, power: int
) -> None:
    """Check what every Fisher op of a layer takes.

    Args:
        op: The op.
        fisher: The total.
        read_name: Name of what it reads beside the gradients.
        read: What it reads; the gradients where there is nothing else.
        grads: Gradients of the layer's outputs.
        weight: Factor of the new term.
        power: Of the gradients.
    """
    every = (("fisher", fisher), (read_name, read), ("grad_outputs", grads))
    for name, tensor in every:
        require_strided(op, name, tensor)
    require_float(op, "grad_outputs", grads)
    wanted = accumulator_dtype(grads.dtype)
    require_dtype(
        fisher.dtype == wanted,
        f"{op}: fisher must be {dtype_name(wanted)} for {dtype_name(grads.dtype)} gradients, got "
        f"{dtype_name(fisher.dtype)}",
    )
    for name, tensor in every:
        require(
            tensor.device == fisher.device,
            f"{op}: {name} must be on {fisher.device} like fisher, got {tensor.device}",
        )
    require_finite(op, "weight", weight)
    require_power(op, power)
    require_writable(op, "fisher", fisher)
    require_no_aliases(op, ((name, 0, tensor, tensor is fisher) for name, tensor in every))


def require_like_gradients(op: str, name: str, tensor: Tensor, grads: Tensor) -> None:
    """Check that a tensor has the gradients' dtype.

    Args:
        op: The op.
        name: Of the tensor.
        tensor: The tensor.
        grads: Gradients of the layer's outputs.
    """
    require_dtype(
        tensor.dtype == grads.dtype,
        f"{op}: {name} must be {dtype_name(grads.dtype)} like grad_outputs, got {dtype_name(tensor.dtype)}",
    )


def require_linear(fisher: Tensor, inputs: Tensor, grads: Tensor) -> None:
    """Check the shapes of ``fisher_linear_``.

    Args:
        fisher: The total.
        inputs: Of the layer.
        grads: Gradients of its outputs.
    """
    op = "fisher_linear_"
    require_like_gradients(op, "inputs", inputs, grads)
    require(inputs.dim() >= 2, f"{op}: inputs must have shape [N, ..., I], got {sizes(inputs)}")
    require(
        grads.dim() == inputs.dim() and grads.shape[:-1] == inputs.shape[:-1],
        f"{op}: grad_outputs must have the leading shape of inputs {sizes(inputs)}, got {sizes(grads)}",
    )
    outputs, width = grads.shape[-1], inputs.shape[-1]
    require(
        fisher.shape == (outputs, width),
        f"{op}: fisher must have shape [O, I] = [{outputs}, {width}], got {sizes(fisher)}",
    )


def require_convolution(
    fisher: Tensor,
    inputs: Tensor,
    grads: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Check the shapes of ``fisher_conv_``.

    Args:
        fisher: The total.
        inputs: Of the layer.
        grads: Gradients of its outputs.
        stride: Step of the kernel.
        padding: Zeros around the input.
        dilation: Spacing of the kernel's elements.
        groups: Number of groups of channels.
    """
    op = "fisher_conv_"
    require_like_gradients(op, "inputs", inputs, grads)
    require(
        3 <= fisher.dim() <= 2 + _MAX_SPATIAL and math.prod(fisher.shape[2:]) > 0,
        f"{op}: fisher must have shape [O, C / groups, kernel] with 1 to 3 positive kernel sizes, got "
        f"{sizes(fisher)}",
    )
    outputs, kernel = fisher.shape[0], fisher.shape[2:]
    out = require_patches(op, inputs, kernel, stride, padding, dilation, groups)
    channels = inputs.shape[1] // groups
    require(
        fisher.shape[1] == channels,
        f"{op}: fisher must have shape [O, C / groups = {channels}, kernel], got {sizes(fisher)}",
    )
    require(outputs % groups == 0, f"{op}: groups must divide the {outputs} outputs, got {groups}")
    wanted = [inputs.shape[0], outputs, *out]
    require(
        list(grads.shape) == wanted,
        f"{op}: grad_outputs must have shape {wanted} as the convolution's output, got {sizes(grads)}",
    )


def channel_axis(op: str, fisher: Tensor, grads: Tensor, channel_dim: int) -> int:
    """Check the axis of the channels, and that the total has one entry per channel.

    Args:
        op: The op.
        fisher: The total.
        grads: Gradients of the layer's outputs.
        channel_dim: The axis, from either end.

    Returns:
        The axis from the front.
    """
    dims = grads.dim()
    axis = channel_dim + dims if channel_dim < 0 else channel_dim
    require(
        dims >= 2, f"{op}: grad_outputs must have a sample and a channel dimension, got shape {sizes(grads)}"
    )
    require(
        1 <= axis < dims,
        f"{op}: channel_dim must lie in [1, {dims}) or be negative alike (0 is the samples), got "
        f"{channel_dim}",
    )
    require(
        fisher.shape == (grads.shape[axis],),
        f"{op}: fisher must have shape [{grads.shape[axis]}], one per channel of grad_outputs, got "
        f"{sizes(fisher)}",
    )
    return axis


def require_affine(normalized: Tensor, grads: Tensor) -> None:
    """Check what ``fisher_affine_`` reads.

    Args:
        normalized: Inputs of the scale.
        grads: Gradients of its outputs.
    """
    op = "fisher_affine_"
    require_like_gradients(op, "normalized", normalized, grads)
    require(
        normalized.shape == grads.shape,
        f"{op}: normalized must have the shape {sizes(grads)} of grad_outputs, got {sizes(normalized)}",
    )


def require_embedding(fisher: Tensor, indices: Tensor, grads: Tensor, padding_idx: int) -> None:
    """Check the shapes of ``fisher_embedding_``, and on the CPU its indices.

    Args:
        fisher: The total.
        indices: Rows that were looked up.
        grads: Gradients of what was found there.
        padding_idx: Row without gradient, or -1.
    """
    op = "fisher_embedding_"
    require_dtype(
        indices.dtype in (torch.int64, torch.int32),
        f"{op}: indices must be int64 or int32, got {dtype_name(indices.dtype)}",
    )
    require(
        indices.dim() >= 1 and grads.dim() == indices.dim() + 1 and grads.shape[:-1] == indices.shape,
        f"{op}: grad_outputs must have shape [N, ..., D] for indices [N, ...] of shape {sizes(indices)}, got "
        f"{sizes(grads)}",
    )
    require(
        fisher.dim() == 2 and fisher.shape[1] == grads.shape[-1],
        f"{op}: fisher must have shape [V, D = {grads.shape[-1]}], got {sizes(fisher)}",
    )
    n_rows = fisher.shape[0]
    require(-1 <= padding_idx < n_rows, f"{op}: padding_idx must lie in [-1, {n_rows}), got {padding_idx}")
    if indices.numel() and indices.device.type == "cpu":
        least, most = (int(end) for end in torch.aminmax(indices))
        require(
            least >= 0 and most < n_rows,
            f"{op}: indices must lie in [0, {n_rows}), got {least if least < 0 else most}",
        )


def require_patches(
    op: str,
    inputs: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> list[int]:
    """Check the geometry of a convolution.

    Args:
        op: The op.
        inputs: Of the convolution.
        kernel_size: Per dimension.
        stride: Per dimension.
        padding: Per dimension, or two (before, after).
        dilation: Per dimension.
        groups: Number of groups of channels.

    Returns:
        The number of positions per dimension.
    """
    n_dims = len(kernel_size)
    kernel_size, stride, padding, dilation = map(list, (kernel_size, stride, padding, dilation))
    require(
        1 <= n_dims <= _MAX_SPATIAL, f"{op}: kernel_size must have 1 to 3 entries, got {kernel_size}"
    )
    require(
        inputs.dim() == n_dims + 2,
        f"{op}: inputs must have shape [N, C, {n_dims} spatial], got {sizes(inputs)}",
    )
    for name, entries in (("stride", stride), ("dilation", dilation)):
        require(len(entries) == n_dims, f"{op}: {name} must have {n_dims} entries, got {entries}")
    require(
        len(padding) in (n_dims, 2 * n_dims),
        f"{op}: padding must have {n_dims} entries, or two per dimension, got {padding}",
    )
    channels = inputs.shape[1]
    require(
        groups >= 1 and channels % groups == 0,
        f"{op}: groups must be at least 1 and divide the {channels} channels, got {groups}",
    )
    before_after = (
        list(zip(padding[::2], padding[1::2], strict=True))
        if len(padding) == 2 * n_dims
        else [(amount, amount) for amount in padding]
    )
    out = []
    for axis, (before, after) in enumerate(before_after):
        for name, entries in (("kernel_size", kernel_size), ("stride", stride), ("dilation", dilation)):
            require(entries[axis] >= 1, f"{op}: {name} must be positive, got {entries}")
        require(min(before, after) >= 0, f"{op}: padding must be non-negative, got {padding}")
        steps = {
            "kernel_size": kernel_size[axis],
            "stride": stride[axis],
            "dilation": dilation[axis],
            "padding": max(before, after),
        }
        for name, value in steps.items():
            require(value < _MOST_STEPS, f"{op}: {name} must be below {_MOST_STEPS}, got {value}")
        room = inputs.shape[axis + 2] + before + after - dilation[axis] * (kernel_size[axis] - 1) - 1
        require(
            room >= 0,
            f"{op}: inputs must be at least as large as the dilated kernel, got {sizes(inputs)} for "
            f"kernel_size {kernel_size} and dilation {dilation}",
        )
        out.append(room // stride[axis] + 1)
    scalars = (channels // groups) * inputs.shape[0] * math.prod(kernel_size) * math.prod(out)
    require(
        scalars < 2**63,
        f"{op}: the patches must have fewer than 2^63 scalars, got kernel_size {kernel_size}, padding "
        f"{padding} for inputs {sizes(inputs)}",
    )
    return out


def require_gram(op: str, gram: Tensor, inputs: Tensor) -> None:
    """Check what both Gram ops take.

    Args:
        op: The op.
        gram: The total.
        inputs: Of the layer.
    """
    require(
        gram.layout == torch.strided and inputs.layout == torch.strided,
        f"{op}: gram and inputs must be dense (strided), got layouts {gram.layout} and {inputs.layout}",
    )
    require_dtype(
        gram.dtype in (torch.float32, torch.float64),
        f"{op}: gram must be float32 or float64, got {dtype_name(gram.dtype)}",
    )
    require_float(op, "inputs", inputs)
    require(
        gram.device == inputs.device,
        f"{op}: inputs must be on {gram.device} like gram, got {inputs.device}",
    )


def require_gram_memory(op: str, gram: Tensor, inputs: Tensor) -> None:
    """Check that a Gram matrix can be written.

    Args:
        op: The op.
        gram: The total.
        inputs: Of the layer.
    """
    require_writable(op, "gram[0]", gram)
    require_no_aliases(op, (("gram", 0, gram, True), ("inputs", 0, inputs, False)))


def require_projection(op: str, grad: Tensor, basis: Tensor, index: int) -> None:
    """Check a gradient and the basis it is projected with.

    Args:
        op: The op.
        grad: The gradient.
        basis: Its basis.
        index: In their lists.
    """
    require_strided(op, f"grad[{index}]", grad)
    require_strided(op, f"basis[{index}]", basis)
    require_float(op, f"grad[{index}]", grad)
    half = grad.dtype in (torch.float16, torch.bfloat16)
    require_dtype(
        basis.dtype == grad.dtype or (basis.dtype == torch.float32 and half),
        f"{op}: basis[{index}] must be {dtype_name(grad.dtype)} like its gradient"
        f"{' or float32' if half else ''}, got {dtype_name(basis.dtype)}",
    )
    require(
        basis.device == grad.device,
        f"{op}: basis[{index}] must be on {grad.device} like its gradient, got {basis.device}",
    )
    require(grad.dim() >= 1, f"{op}: grad[{index}] must have at least 1 dimension, got a scalar")
    require(
        basis.dim() in (2, 3),
        f"{op}: basis[{index}] must have shape [d, k] or [groups, d, k], got {sizes(basis)}",
    )
    groups, outputs = basis.shape[0] if basis.dim() == 3 else 1, grad.shape[0]
    require(
        groups >= 1 and outputs % groups == 0,
        f"{op}: basis[{index}] must have a number of groups that divides the {outputs} rows of its gradient, "
        f"got {sizes(basis)}",
    )
    d = math.prod(grad.shape[1:])
    require(
        basis.shape[-2] == d,
        f"{op}: basis[{index}] must have {d} rows for a gradient of shape {sizes(grad)}, got {sizes(basis)}",
    )
    require(
        basis.shape[-1] <= d,
        f"{op}: basis[{index}] must have at most {d} columns, got {sizes(basis)}",
    )
