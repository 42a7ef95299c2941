"""Means over the positions of a sample that count: pixels, tokens, labels."""

from __future__ import annotations

import torch
from torch import Tensor


def mean_over_positions(values: Tensor, counted: Tensor) -> Tensor:
    """Average each sample's values over the positions that count.

    Args:
        values: ``[N, ...]``, one value per position.
        counted: bool, of the same shape.

    Returns:
        ``[N]``; 0 for a sample of which no position counts. A short sample weighs as much as a long one.

    Example:
        >>> import torch
        >>> counted = torch.tensor([[True, True], [True, False], [False, False]])
        >>> mean_over_positions(torch.tensor([[1.0, 3.0], [5.0, 7.0], [9.0, 9.0]]), counted)
        tensor([2., 5., 0.])
    """
    kept = values.masked_fill(~counted, 0.0)
    if values.ndim == 1:
        return kept
    return kept.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)


def sums_over_positions(right: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Count each sample's right positions, and those that count.

    Args:
        right: bool ``[N, ...]``.
        counted: bool, of the same shape.

    Returns:
        Two int64 ``[N]``.
    """
    n = right.shape[0]
    hits = right & counted
    return hits.reshape(n, -1).sum(1), counted.reshape(n, -1).sum(1)


def is_transformed() -> bool:
    """Say whether this runs inside ``vmap`` or ``grad`` of ``torch.func``, where no value can be looked at.

    Returns:
        True inside; what needs a look has had it outside, on the whole batch.
    """
    return torch._C._functorch.peek_interpreter_stack() is not None


def home_of(generator: torch.Generator | None) -> torch.device:
    """Say where random numbers are drawn.

    Args:
        generator: A generator, or None for the global one.

    Returns:
        Its device; the CPU for None, so that a seed means the same on every device.
    """
    return torch.device("cpu") if generator is None else generator.device
