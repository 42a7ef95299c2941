"""Where the samples lie in the tensors that a layer sees."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import Enum

import torch
from torch import Tensor


class Axis(Enum):
    """Possible layouts of a tensor with the samples of a batch in it; ``proof`` decides which one holds.

    FIRST: the first axis holds samples, or several entries of every sample one after the other.
    SECOND: the second axis holds samples, as for sequences ``[T, N, E]``; in the rows that a model has
        flattened out of such a tensor, they are the fastest axis.
    INNER: the first axis holds several entries of every sample, the samples fastest.
    ROWS: nothing is assumed; every row stands for itself.
    MEASURED: which sample a row belongs to has been measured, row by row.
    """

    FIRST = "samples first"
    SECOND = "samples second"
    INNER = "samples innermost"
    ROWS = "every row on its own"
    MEASURED = "rows as measured"


class MismatchError(Exception):
    """A tensor has no axis for the samples where the layout says."""


class NoRuleError(MismatchError):
    """Nothing is known about a node, wherever the samples are."""


class UnprovenError(MismatchError):
    """Samples are where they may be, and nothing has been proven about that place."""


# Layouts that say something of single rows.
_ROW_BY_ROW = (Axis.ROWS, Axis.MEASURED)


class Layout:
    """How to find n samples in tensors.

    Args:
        n: Number of samples.
        axis: Where they are taken to be.
        samples: For ``MEASURED``: the sample of every row, -1 for rows that have no gradient.
        may_spread: Tensors may hold more than one entry per sample.
        may_be_nonzero: There may be gradients.

    Attributes:
        is_spread: The axis made a difference: some tensor held several entries of every sample along the axis
            that holds the samples, or before it.
        along: How tensors were split into samples in fact: of rows that a model has flattened, ``SECOND`` and
            ``INNER`` say the same.
    """

    def __init__(
        self,
        n: int,
        axis: Axis,
        samples: Tensor | None = None,
        *,
        may_spread: bool = True,
        may_be_nonzero: bool = True,
    ) -> None:
        self.n, self.axis, self.samples = n, axis, samples
        self.may_spread, self.may_be_nonzero = may_spread, may_be_nonzero
        self.is_spread = False
        self.along: set[Axis] = set()
        self._order: Tensor | None = None

    def part(self, start: int, stop: int) -> Layout:
        """Return the layout of some of a node's rows, where it works on several matrices one by one.

        Args:
            start: First row.
            stop: One past the last.

        Returns:
            This layout, unless it says something of single rows.
        """
        if self.samples is None:
            return self
        return Layout(self.n, self.axis, self.samples[start:stop])

    def _note_spread(self, is_spread: bool) -> None:
        self.is_spread |= is_spread
        if self.is_spread and not self.may_spread:
            raise UnprovenError("it is not used as it was when it was verified")

    def _by_sample(self, rows: Tensor) -> Tensor:
        # [rows, ...] as [n, rows of a sample, ...], with zeros behind those of a sample that has fewer.
        samples = self.samples
        if samples is None or len(samples) != len(rows):
            raise MismatchError(f"{len(rows)} rows were not measured")
        if self._order is None:
            order = torch.argsort(samples, stable=True)
            order = order[samples[order] >= 0]
            owners = samples[order]
            counts = torch.bincount(owners, minlength=self.n)
            starts = counts.cumsum(0) - counts
            place = torch.arange(len(order), device=order.device) - starts[owners]
            longest = max(1, int(counts.max()))
            self._order = order.new_full((self.n, longest), len(rows))
            self._order[owners, place] = order
        return torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])[self._order]

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
        if lead and self._is_whole(tensor, lead > 1):
            return tensor.unsqueeze(1) if lead == 1 else tensor if lead == 2 else tensor.flatten(1, -2)
        if self.axis in _ROW_BY_ROW:
            rows = tensor.reshape(-1, 1, tensor.shape[-1])
            return rows if self.axis is Axis.ROWS else self._by_sample(rows.squeeze(1))
        split = self._split(tensor, self.axis if lead > 1 or self.axis is not Axis.SECOND else Axis.INNER)
        rows = split.flatten(1, -2)
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
        if self.axis is Axis.ROWS or self._is_whole(tensor):
            return tensor
        if self.axis is Axis.MEASURED:
            split = self._by_sample(tensor)
        else:
            split = self._split(tensor, Axis.INNER if self.axis is Axis.SECOND else self.axis)
        return split.squeeze(1) if split.shape[1] == 1 else split.transpose(1, 2)

    def maps(self, tensor: Tensor) -> Tensor | None:
        """Take channels that lie second as they are, where the first axis holds one entry of every sample.

        Args:
            tensor: ``[n, C, *size]``.

        Returns:
            The tensor; None if its axes have to be sorted.
        """
        # Sorted, the channels lie last: the second axis is that of a map.
        return tensor if 2 <= tensor.ndim <= 5 and self._is_whole(tensor, tensor.ndim > 2) else None

    def _is_whole(self, tensor: Tensor, may_be_second: bool = False) -> bool:
        # Entry i of the first axis is all that sample i has: most tensors, and there is nothing to sort.
        axis = self.axis
        is_first = axis is Axis.FIRST or axis is Axis.INNER or (axis is Axis.SECOND and not may_be_second)
        return is_first and tensor.shape[0] == self.n and not self.is_spread

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
        if self.axis in _ROW_BY_ROW:
            return self._broadcast_rows(tensor, aligned)
        at = 1 if self.axis is Axis.SECOND else 0
        if tensor.ndim <= at or aligned[at] != 1:
            raise MismatchError(f"a tensor of shape {list(shape)} is not broadcast over the samples")
        split = self._split(tensor, self.axis)  # [n, more, *rest]; `more` is the first axis for SECOND
        kept = [aligned[0] if at else 1, *aligned[at + 1 :]]
        reduced = [d + 1 for d, size in enumerate(kept) if size == 1]
        together = split.permute(0, *reduced, *(d + 1 for d, size in enumerate(kept) if size > 1))
        positions = math.prod(split.shape[d] for d in reduced)
        return together.reshape(self.n, positions, math.prod(shape))

    def _broadcast_rows(self, tensor: Tensor, aligned: Sequence[int]) -> Tensor:
        lead = next((d for d, size in enumerate(aligned) if size != 1), len(aligned))
        if not lead or math.prod(tensor.shape[lead:]) != math.prod(aligned):
            raise MismatchError(f"a tensor of shape {list(aligned)} is not broadcast over rows")
        rows = tensor.reshape(math.prod(tensor.shape[:lead]), 1, math.prod(aligned))
        return rows if self.axis is Axis.ROWS else self._by_sample(rows.squeeze(1))

    def _split(self, tensor: Tensor, axis: Axis) -> Tensor:
        # The sizes become n, whatever a sample has along the axis, and the rest.
        n, sizes = self.n, tensor.shape
        self.along.add(axis)
        if axis is Axis.SECOND:
            if tensor.ndim < 2 or sizes[1] != n:
                raise MismatchError(f"the second axis of {list(sizes)} does not hold {n} samples")
            self._note_spread(sizes[0] > 1)
            return tensor.transpose(0, 1)
        if tensor.ndim < 1 or sizes[0] % n:
            raise MismatchError(f"the first axis of {list(sizes)} does not hold {n} samples")
        self._note_spread(sizes[0] > n)
        if axis is Axis.FIRST:
            return tensor.reshape(n, sizes[0] // n, *sizes[1:])
        return tensor.reshape(sizes[0] // n, n, *sizes[1:]).transpose(0, 1)
