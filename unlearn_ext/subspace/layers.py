"""How each kind of layer uses its weight, and how the rows it sees are added to a Gram matrix."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn_ext import ops
from unlearn_ext._internal.modules import is_hf_conv1d

Side: TypeAlias = Literal["right", "left", "rows"]


@dataclass(frozen=True, slots=True)
class Layer:
    """How a kind of layer uses its weight.

    Attributes:
        weight: The attribute that holds the weight.
        side: Where the rows meet it: from the right of ``[out, d]``, from the left of ``[d, ...]``, or by
            picking its rows.
        gram: Shape of the total: ``[d, d]``, ``[groups, d, d]`` or ``[tokens]``.
        add: ``add(total, *inputs)`` adds the rows of what the layer was called with.
    """

    weight: str
    side: Side
    gram: tuple[int, ...]
    add: Callable[..., None]


def layer_of(module: nn.Module) -> Layer | None:
    """Say how a module uses its weight.

    Args:
        module: Any module.

    Returns:
        The description, or None for a module that is not covered.

    Example:
        >>> layer_of(nn.Conv2d(4, 6, 3, groups=2)).gram
        (2, 18, 18)
    """
    if isinstance(module, nn.Linear):
        return Layer("weight", "right", square(module.in_features), ops.gram_accumulate_)
    if isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        shape = square(module.in_channels // module.groups, module.groups)
        return Layer("weight", "left", shape, lambda total, inputs: _add_pixels(module, total, inputs))
    if isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        # Not from the weight: a parametrization computes it, and may move its own buffers doing so.
        patch = module.in_channels // module.groups * math.prod(module.kernel_size)
        shape = square(patch, module.groups)
        return Layer("weight", "right", shape, lambda total, inputs: _add_patches(module, total, inputs))
    if isinstance(module, nn.Embedding):
        return Layer("weight", "rows", (module.num_embeddings,), _add_counts)
    if isinstance(module, nn.MultiheadAttention) and module.in_proj_weight is not None:
        return Layer("in_proj_weight", "right", square(module.embed_dim, 3), _add_thirds)
    if is_hf_conv1d(module):  # x W + b
        weight = cast("Tensor", module.weight)
        return Layer("weight", "left", square(weight.shape[0]), ops.gram_accumulate_)
    return None


def square(d: int, groups: int = 1) -> tuple[int, ...]:
    """Return the shape of a Gram matrix.

    Args:
        d: Length of a row.
        groups: Number of groups.

    Returns:
        ``[d, d]``, or ``[groups, d, d]``.
    """
    return (d, d) if groups == 1 else (groups, d, d)


def _add_patches(module: nn.Module, total: Tensor, inputs: Tensor) -> None:
    conv = cast("nn.Conv2d", module)  # or 1d or 3d
    sides = list(conv._reversed_padding_repeated_twice)  # (before, after) from the last dimension on
    if conv.padding_mode != "zeros":
        inputs, sides = F.pad(inputs, sides, mode=conv.padding_mode), [0] * len(sides)
    ops.gram_conv_accumulate_(
        total,
        inputs if inputs.ndim == len(conv.kernel_size) + 2 else inputs.unsqueeze(0),
        kernel_size=conv.kernel_size,
        stride=conv.stride,
        padding=[*reversed(list(itertools.pairwise(sides))[::2])],
        dilation=conv.dilation,
        groups=conv.groups,
    )


def _add_pixels(module: nn.Module, total: Tensor, inputs: Tensor) -> None:
    conv = cast("nn.ConvTranspose2d", module)  # or 1d or 3d
    ops.gram_conv_accumulate_(
        total,
        inputs if inputs.ndim == len(conv.kernel_size) + 2 else inputs.unsqueeze(0),
        kernel_size=1,
        stride=1,
        padding=0,
        dilation=1,
        groups=conv.groups,
    )


def _add_counts(total: Tensor, indices: Tensor) -> None:
    total += torch.bincount(indices.flatten(), minlength=len(total)).to(total)


def _add_thirds(total: Tensor, *inputs: Tensor) -> None:
    for third, rows in zip(total, inputs, strict=True):
        ops.gram_accumulate_(third, rows)
