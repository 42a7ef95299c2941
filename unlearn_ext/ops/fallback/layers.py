"""Fisher diagonals of layers, in plain PyTorch."""

# ruff: noqa: D103 (what the kernels do stands in the modules that call them)

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn_ext.ops import reference
from unlearn_ext.ops.fallback import layer_checks
from unlearn_ext.ops.fallback.running import as_given, has_float64, parts


def fisher_linear_(
    fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, *, weight: float = 1.0, power: int = 2
) -> None:
    op = "fisher_linear_"
    layer_checks.require_layer(op, fisher, "inputs", inputs, grad_outputs, weight, power)
    layer_checks.require_linear(fisher, inputs, grad_outputs)
    with as_given([fisher]):
        positions = math.prod(inputs.shape[1:-1])
        if positions == 1 and inputs.dtype != torch.float64 and has_float64(inputs.device):
            _add_outer_powers(fisher, inputs, grad_outputs, weight, power)
            return
        for rows, grads in parts(fisher.numel(), inputs, grad_outputs):
            reference.fisher_linear_(fisher, rows, grads, weight=weight, power=power)


def _add_outer_powers(fisher: Tensor, inputs: Tensor, grads: Tensor, weight: float, power: int) -> None:
    """Without positions to sum over, the power of a product is the product of powers.

    In float64, which holds every power of a float32 number: the diagonal takes one product of matrices.
    """
    n = inputs.shape[0]
    rows, columns = (tensor.reshape(n, tensor.shape[-1]).double().abs() ** power for tensor in (grads, inputs))
    fisher += (weight * (rows.T @ columns)).to(fisher.dtype)


def fisher_conv_(
    fisher: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    *,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
    weight: float = 1.0,
    power: int = 2,
) -> None:
    op = "fisher_conv_"
    layer_checks.require_layer(op, fisher, "inputs", inputs, grad_outputs, weight, power)
    layer_checks.require_convolution(fisher, inputs, grad_outputs, stride, padding, dilation, groups)
    patches = inputs.shape[1] * math.prod(fisher.shape[2:]) * math.prod(grad_outputs.shape[2:])
    with as_given([fisher]):
        for seen, grads in parts(fisher.numel() + patches, inputs, grad_outputs):
            reference.fisher_conv_(
                fisher,
                seen,
                grads,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=groups,
                weight=weight,
                power=power,
            )


def fisher_bias_(
    fisher: Tensor, grad_outputs: Tensor, *, channel_dim: int = -1, weight: float = 1.0, power: int = 2
) -> None:
    op = "fisher_bias_"
    layer_checks.require_layer(op, fisher, "grad_outputs", grad_outputs, grad_outputs, weight, power)
    axis = layer_checks.channel_axis(op, fisher, grad_outputs, channel_dim)
    with as_given([fisher]):
        reference.fisher_bias_(fisher, grad_outputs, channel_dim=axis, weight=weight, power=power)


def fisher_affine_(
    fisher: Tensor,
    normalized: Tensor,
    grad_outputs: Tensor,
    *,
    channel_dim: int = -1,
    weight: float = 1.0,
    power: int = 2,
) -> None:
    op = "fisher_affine_"
    layer_checks.require_affine(normalized, grad_outputs)
    layer_checks.require_layer(op, fisher, "normalized", normalized, grad_outputs, weight, power)
    axis = layer_checks.channel_axis(op, fisher, grad_outputs, channel_dim)
    with as_given([fisher]):
        reference.fisher_affine_(
            fisher, normalized, grad_outputs, channel_dim=axis, weight=weight, power=power
        )


def fisher_embedding_(
    fisher: Tensor,
    indices: Tensor,
    grad_outputs: Tensor,
    *,
    padding_idx: int = -1,
    weight: float = 1.0,
    power: int = 2,
) -> None:
    op = "fisher_embedding_"
    layer_checks.require_layer(op, fisher, "indices", indices, grad_outputs, weight, power)
    layer_checks.require_embedding(fisher, indices, grad_outputs, padding_idx)
    with as_given([fisher]):
        n, (n_rows, width) = indices.shape[0], fisher.shape
        samples = torch.arange(n, device=indices.device).view(n, *[1] * (indices.dim() - 1))
        looked_up = (indices >= 0) & (indices < n_rows) & (indices != padding_idx)
        # One row per sample and row of the table that it looked up: no table per sample, as in the reference.
        entries = (samples * n_rows + indices.long())[looked_up]
        grads = grad_outputs[looked_up].to(fisher.dtype)
        found, places = entries.unique(return_inverse=True)
        gradients = grads.new_zeros(found.numel(), width).index_add_(0, places, grads)
        powers = gradients.abs() ** power
        totals = torch.zeros_like(fisher).index_add_(0, found % max(1, n_rows), powers)
        fisher += weight * totals
