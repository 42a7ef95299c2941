"""Calls of operators, and where the samples of a batch are in what they take and return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor


class MixedError(Exception):
    """An operator may mix samples."""


class SampleAxis(NamedTuple):
    """Where samples are in a tensor.

    Attributes:
        axis: The axis that holds them.
        inner: Entries of one sample that follow each other along it. Entry i belongs to sample
            ``i // inner % n``.
    """

    axis: int
    inner: int = 1

    def moved(self, axis: int) -> SampleAxis:
        """Name another axis.

        Args:
            axis: Which one.

        Returns:
            The same along that.
        """
        return SampleAxis(axis, self.inner)


Found: TypeAlias = "SampleAxis | list[SampleAxis | None] | None"


@dataclass
class Operation:
    """A call of an operator.

    Attributes:
        name: The operator's name, without the underscore of those that work in place.
        named: Its arguments by name, defaults included.
        result: What it returned.
        n: Number of samples.
        axes: Where the samples are in those of its tensors that depend on them.
    """

    name: str
    named: Mapping[str, Any]
    result: Any
    n: int
    axes: Mapping[int, SampleAxis]

    def tensors(self) -> Iterator[Tensor]:
        """Go through the arguments.

        Yields:
            The tensors among them, in order.
        """
        for value in self.named.values():
            for entry in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(entry, Tensor):
                    yield entry

    def of(self, tensor: object) -> SampleAxis | None:
        """Say where the samples are in a tensor.

        Args:
            tensor: One of the arguments.

        Returns:
            None if it does not depend on them.
        """
        return self.axes.get(id(tensor))

    @property
    def first(self) -> tuple[Tensor, SampleAxis]:
        """The first argument, which must depend on the samples.

        Raises:
            MixedError: If it does not.
        """
        tensor = next(self.tensors())
        at = self.of(tensor)
        if at is None:
            raise MixedError(self.name)
        return tensor, at

    def dims(self, ndim: int) -> list[int]:
        """Say along which dimensions it works.

        Args:
            ndim: Of how many.

        Returns:
            All of them if it names none.
        """
        for key in ("dim", "dims", "dim0"):
            if key in self.named:
                dims = self.named[key]
                if dims is None or (isinstance(dims, (tuple, list)) and not dims):
                    break
                return [d % max(1, ndim) for d in ([dims] if isinstance(dims, int) else dims)]
        return list(range(ndim))

    def only_first(self) -> tuple[Tensor, SampleAxis]:
        """Take the first argument, where no other one may depend on the samples.

        Returns:
            The tensor, and where the samples are in it.

        Raises:
            MixedError: If another one does.
        """
        tensor, at = self.first
        if any(self.of(other) for other in self.tensors() if other is not tensor):
            raise MixedError(self.name)
        return tensor, at

    def is_constant(self, tensor: Tensor, at: SampleAxis) -> bool:
        """Say whether what samples share is the same for all of them.

        Args:
            tensor: What they share.
            at: Where the samples are in what it is combined with.

        Returns:
            False if samples would meet something else in another place of a batch.
        """
        size = tensor.shape[at.axis]
        if size == 1 or tensor.stride(at.axis) == 0 or not tensor.numel():
            return True
        if size % (self.n * at.inner):
            return False
        sizes = tensor.shape
        split = tensor.reshape(*sizes[: at.axis], -1, self.n, at.inner, *sizes[at.axis + 1 :])
        return torch.equal(split, split.narrow(at.axis + 1, 0, 1).expand_as(split))


def aligned(call: Operation, tensors: Sequence[Tensor], ndim: int) -> SampleAxis:
    """Say where the samples are when operands are broadcast against each other.

    Args:
        call: The call.
        tensors: Its operands.
        ndim: Number of dimensions that they are broadcast to.

    Returns:
        Where the samples are, for all of them.

    Raises:
        MixedError: If they hold the samples along several axes, or one that the samples share says something
            else for every place.
    """
    found: SampleAxis | None = None
    for tensor in tensors:
        at = call.of(tensor)
        if at is not None:
            there = at.moved(at.axis + ndim - tensor.ndim)
            if found is not None and found != there:
                raise MixedError(call.name)
            found = there
    if found is None:
        raise MixedError(call.name)
    for tensor in tensors:
        axis = found.axis - (ndim - tensor.ndim)
        if call.of(tensor) is None and axis >= 0 and not call.is_constant(tensor, found.moved(axis)):
            raise MixedError(call.name)
    return found
