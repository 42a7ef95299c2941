"""Layers as users have them, and what autograd makes of them: an oracle that shares nothing with the ops."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from op_cases import normal
from torch import Tensor


@dataclass(frozen=True)
class LayerCall:
    """What autograd makes of a layer, for one of its parameters.

    Attributes:
        name: Of the op.
        tensors: Its arguments after ``fisher``.
        constants: Its keywords.
        gradients: The parameter's gradients of every sample's own loss ``[n, *parameter]``.
    """

    name: str
    tensors: tuple[Tensor, ...]
    constants: dict
    gradients: Tensor


def _layer_call(
    name: str,
    layer: Callable[[Tensor, Tensor], Tensor],
    parameter: Tensor,
    inputs: Tensor,
    generator: torch.Generator,
    tensors: Callable[[Tensor], tuple[Tensor, ...]],
    **constants,
) -> LayerCall:
    """A call for ``layer(parameter, inputs)``; ``tensors`` makes the op's of the gradients of the outputs."""
    outputs = layer(parameter, inputs)
    grads = normal(outputs.shape, outputs.dtype, str(outputs.device), generator)

    def loss(parameter, one, grad):
        return (layer(parameter, one[None])[0] * grad).sum()

    gradients = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(parameter, inputs, grads)
    return LayerCall(name, tensors(grads), constants, gradients)


def _linear_call(device, generator):
    weight, inputs = (normal(shape, torch.float64, device, generator) for shape in [(6, 7), (5, 4, 7)])
    return _layer_call(
        "fisher_linear_", lambda w, x: F.linear(x, w), weight, inputs, generator, lambda g: (inputs, g)
    )


def _conv_call(shape, weight_shape, *, pairs=None, **constants):
    """``pairs``: padding for the op, if it is not that of torch."""

    def make(device, generator):
        conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(shape) - 2]
        inputs, weight = (normal(one, torch.float64, device, generator) for one in (shape, weight_shape))
        for_op = constants | ({"padding": pairs} if pairs else {})
        return _layer_call(
            "fisher_conv_",
            lambda w, x: conv(x, w, **constants),
            weight,
            inputs,
            generator,
            lambda g: (inputs, g),
            **for_op,
        )

    return make


def _conv_transpose_call(shape, weight_shape, output_padding, padding, **constants):
    """``output_padding`` and a symmetric ``padding``, which the op takes less on one side."""

    def make(device, generator):
        conv = {1: F.conv_transpose1d, 2: F.conv_transpose2d}[len(shape) - 2]
        inputs, weight = (normal(one, torch.float64, device, generator) for one in (shape, weight_shape))
        return _layer_call(
            "fisher_conv_",
            lambda w, x: conv(x, w, padding=padding, output_padding=output_padding, **constants),
            weight,
            inputs,
            generator,
            lambda g: (g, inputs),  # the roles swapped
            padding=[(p, p - extra) for p, extra in zip(padding, output_padding, strict=True)],
            **constants,
        )

    return make


def _embedding_call(padding_idx):
    def make(device, generator):
        table = normal((7, 3), torch.float64, device, generator)
        indices = torch.randint(0, 7, (5, 12), generator=generator).to(device)
        return _layer_call(
            "fisher_embedding_",
            lambda w, i: F.embedding(i, w, padding_idx=padding_idx),
            table,
            indices,
            generator,
            lambda g: (indices, g),
            padding_idx=-1 if padding_idx is None else padding_idx,
        )

    return make


def _norm_call(norm, shape, channel_dim, bias):
    """``norm(inputs, scale, shift)``, of which the scale or the shift is looked at."""

    def make(device, generator):
        inputs = normal(shape, torch.float64, device, generator)
        one, other = (normal((shape[channel_dim],), torch.float64, device, generator) for _ in range(2))
        unit, zero = torch.ones_like(one), torch.zeros_like(one)
        return _layer_call(
            "fisher_bias_" if bias else "fisher_affine_",
            lambda p, x: norm(x, other, p) if bias else norm(x, p, other),
            one,
            inputs,
            generator,
            lambda g: (g,) if bias else (norm(inputs, unit, zero), g),
            channel_dim=channel_dim,
        )

    return make


def _layer_norm(inputs, scale, shift):
    return F.layer_norm(inputs, inputs.shape[-1:], scale, shift)


def _batch_norm(inputs, scale, shift):
    """In eval mode, with statistics of its own."""
    steps = torch.arange(1.0, len(scale) + 1, dtype=scale.dtype, device=scale.device)
    return F.batch_norm(inputs, steps / 7, steps, scale, shift, training=False)


def _group_norm(inputs, scale, shift):
    return F.group_norm(inputs, 2, scale, shift)


# Layers as users have them, in float64: parameter -> ``(device, generator) -> call``.
LAYERS: dict[str, Callable[[str, torch.Generator], LayerCall]] = {
    "linear": _linear_call,
    "conv1d": _conv_call((4, 6, 15), (9, 2, 4), stride=2, padding=3, dilation=2, groups=3),
    "conv2d": _conv_call((3, 5, 9, 8), (7, 5, 3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 3)),
    "conv3d": _conv_call((2, 4, 5, 6, 4), (6, 2, 2, 3, 1), stride=1, padding=(1, 0, 1), dilation=1, groups=2),
    "depthwise": _conv_call((3, 5, 7, 6), (10, 1, 3, 3), stride=1, padding=1, dilation=1, groups=5),
    "conv2d same": _conv_call(
        (3, 2, 6, 5), (3, 2, 4, 2), pairs=[(1, 2), (0, 1)], stride=1, padding="same", dilation=1
    ),
    "conv_transpose1d": _conv_transpose_call(
        (4, 6, 5), (6, 2, 3), [0], [1], stride=[2], dilation=[1], groups=2
    ),
    "conv_transpose2d": _conv_transpose_call(
        (3, 4, 5, 4), (4, 3, 3, 2), [1, 1], [2, 1], stride=[2, 3], dilation=[2, 1], groups=1
    ),
    "embedding": _embedding_call(None),
    "embedding with padding": _embedding_call(2),
    "layer norm, scale": _norm_call(_layer_norm, (4, 5, 6), -1, bias=False),
    "layer norm, shift": _norm_call(_layer_norm, (4, 5, 6), -1, bias=True),
    "batch norm, scale": _norm_call(_batch_norm, (4, 5, 3, 4), 1, bias=False),
    "batch norm, shift": _norm_call(_batch_norm, (4, 5, 3, 4), 1, bias=True),
    "group norm, scale": _norm_call(_group_norm, (4, 6, 7), 1, bias=False),
    "group norm, shift": _norm_call(_group_norm, (4, 6, 7), 1, bias=True),
}
