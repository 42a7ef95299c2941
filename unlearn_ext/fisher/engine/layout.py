"""Where the samples lie in the tensors that a layer sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

from torch import Tensor


class Axis(Enum):
    """Possible layouts of a tensor with the samples of a batch in it; verification decides.

    FIRST: the first axis holds samples, or several entries of every sample one after the other.
    SECOND: the second axis holds samples, as for sequences ``[T, N, E]``; in the rows that a model has
        flattened out of such a tensor, they are the fastest axis.
    INNER: the first axis holds several entries of every sample, the samples fastest.
    """

    FIRST = "samples first"
    SECOND = "samples second"
    INNER = "samples innermost"


class MismatchError(Exception):
    """A tensor has no axis for the samples where the candidate says."""


class NoRuleError(MismatchError):
    """Nothing is known about a node, wherever the samples are."""


class Layout:
    """How to find n samples in tensors.

    Args:
        n: Number of samples.
        axis: The candidate.

    Attributes:
        is_spread: The candidate made a difference: some tensor held more than one entry per sample.
    """

    def __init__(self, n: int, axis: Axis) -> None:
        self.n, self.axis = n, axis
        self.is_spread = False

    def rows(self, tensor: Tensor) -> Tensor:
        """Sort vectors by sample.

        Args:
            tensor: ``[*, C]``.

        Returns:
            ``[n, positions, C]``, a view where strides allow.

        Raises:
            MismatchError: If the shape does not agree with the candidate.
        """
        lead = tensor.ndim - 1
        split = self._split(tensor, self.axis if lead > 1 or self.axis is not Axis.SECOND else Axis.INNER)
        rows = split.flatten(1, -2)
        self.is_spread |= rows.shape[1] > 1
        return rows

    def images(self, tensor: Tensor) -> Tensor:
        """Sort images by sample.

        Args:
            tensor: ``[images, C, *size]``.

        Returns:
            ``[n, C, *size]``, or ``[n, C, images, *size]`` where a sample has several.

        Raises:
            MismatchError: If the shape does not agree with the candidate.
        """
        split = self._split(tensor, Axis.INNER if self.axis is Axis.SECOND else self.axis)
        self.is_spread |= split.shape[1] > 1
        return split.squeeze(1) if split.shape[1] == 1 else split.transpose(1, 2)

    def broadcast(self, tensor: Tensor, shape: Sequence[int]) -> Tensor:
        """Sort the entries of a tensor by sample and by what was broadcast to them.

        Args:
            tensor: What something of shape ``shape`` was broadcast to.
            shape: The shape.

        Returns:
            ``[n, positions, C]`` with C entries in ``shape``.

        Raises:
            MismatchError: If the shape does not agree with the candidate.
        """
        aligned = [1] * (tensor.ndim - len(shape)) + list(shape)
        at = 1 if self.axis is Axis.SECOND else 0
        if tensor.ndim <= at or aligned[at] != 1:
            raise MismatchError(f"a tensor of shape {list(shape)} is not broadcast over the samples")
        split = self._split(tensor, self.axis)  # [n, more, *rest]; `more` is the first axis for SECOND
        kept = [aligned[0] if at else 1, *aligned[at + 1 :]]
        reduced = [d + 1 for d, size in enumerate(kept) if size == 1]
        together = split.permute(0, *reduced, *(d + 1 for d, size in enumerate(kept) if size > 1))
        self.is_spread |= split.shape[1] > 1
        positions = math.prod(split.shape[d] for d in reduced)
        return together.reshape(self.n, positions, math.prod(shape))

    def _split(self, tensor: Tensor, axis: Axis) -> Tensor:
        # The sizes become n, whatever a sample has along the axis, and the rest.
        n, sizes = self.n, tensor.shape
        if axis is Axis.SECOND:
            if tensor.ndim < 2 or sizes[1] != n:
                raise MismatchError(f"the second axis of {list(sizes)} does not hold {n} samples")
            return tensor.transpose(0, 1)
        if tensor.ndim < 1 or sizes[0] % n:
            raise MismatchError(f"the first axis of {list(sizes)} does not hold {n} samples")
        if axis is Axis.FIRST:
            return tensor.reshape(n, sizes[0] // n, *sizes[1:])
        return tensor.reshape(sizes[0] // n, n, *sizes[1:]).transpose(0, 1)
