"""Indexing operators, where samples may be told by an index: see ``axis_rules``."""

from __future__ import annotations

import torch

from unlearn_ext.fisher.engine.sample_axis import Found, MixedError, Operation, SampleAxis, aligned


class _Indices:
    # The indices of an indexing operator, broadcast against each other.

    def __init__(self, call: Operation) -> None:
        self.call = call
        self.by_dim = {d: index for d, index in enumerate(call.named["indices"]) if index is not None}
        self.every = list(self.by_dim.values())
        if any(index.dtype in (torch.bool, torch.uint8) for index in self.every):
            raise MixedError(call.name)
        self.ndim = max(index.ndim for index in self.every)
        dims = list(self.by_dim)
        is_together = dims == list(range(dims[0], dims[0] + len(dims)))
        # Where the dimensions that the indices have in common begin in the result.
        self.start = dims[0] if is_together else 0

    def follow(self, at: SampleAxis, size: int) -> SampleAxis:
        """Say where the samples of an indexed tensor are in the result.

        Args:
            at: Where they are in the tensor.
            size: The size of that axis.

        Returns:
            Where they are.

        Raises:
            MixedError: If they may be anywhere.
        """
        call, dims = self.call, list(self.by_dim)
        if at.axis not in self.by_dim:
            if any(call.of(index) for index in self.every):
                raise MixedError(call.name)
            before = sum(d < at.axis for d in dims)
            is_before = at.axis < self.start
            return at.moved(at.axis if is_before else at.axis - before + self.ndim)
        # Every sample's own row: an index that counts the samples.
        own = self.by_dim[at.axis]
        counted = [d for d in range(own.ndim) if own.shape[d] == size]
        if call.of(own) is not None or len(counted) != 1 or own.numel() != size:
            raise MixedError(call.name)
        if not torch.equal(own.flatten(), torch.arange(size, device=own.device, dtype=own.dtype)):
            raise MixedError(call.name)
        along = at.moved(counted[0] + self.ndim - own.ndim)
        for index in self.every:
            axis = along.axis - (self.ndim - index.ndim)
            there = call.of(index)
            if index is own or (there is None and axis < 0):
                continue
            if there != along.moved(axis) and (
                there is not None or not call.is_constant(index, along.moved(axis))
            ):
                raise MixedError(call.name)
        return along.moved(along.axis + self.start)


def index(call: Operation) -> Found:
    """Follow the samples through ``tensor[indices]``.

    Args:
        call: The call.

    Returns:
        Where they are in the result.
    """
    tensor, indices = call.named["self"], _Indices(call)
    at = call.of(tensor)
    if at is not None:
        return indices.follow(at, tensor.shape[at.axis])
    found = aligned(call, indices.every, indices.ndim)
    return found.moved(found.axis + indices.start)


def index_put(call: Operation) -> Found:
    """Follow the samples through ``tensor[indices] = values``.

    Args:
        call: The call.

    Returns:
        Where they are in the result.

    Raises:
        MixedError: If they may be anywhere.
    """
    tensor, values, at = call.named["self"], call.named["values"], call.of(call.named["self"])
    given = [chosen for chosen in call.named["indices"] if chosen is not None]
    if len(given) == 1 and given[0].dtype == torch.bool:
        # A mask over leading dimensions, and one value for all that it selects.
        mask = given[0]
        if at is None or values.numel() != 1 or call.of(values) is not None or mask.ndim <= at.axis:
            raise MixedError(call.name)
        if call.named["indices"][0] is None:
            raise MixedError(call.name)
        if call.of(mask) not in (at, None) or (call.of(mask) is None and not call.is_constant(mask, at)):
            raise MixedError(call.name)
        return at
    indices = _Indices(call)
    if at is None:
        sizes = [d for d, size in enumerate(tensor.shape) if size == call.n]
        if len(sizes) != 1 or not call.is_constant(tensor, SampleAxis(sizes[0])):
            raise MixedError(call.name)
        at = SampleAxis(sizes[0])
    along = indices.follow(at, tensor.shape[at.axis])
    axis = along.axis - (tensor.ndim - len(indices.every) + indices.ndim - values.ndim)
    there = call.of(values)
    if there is not None and there != along.moved(axis):
        raise MixedError(call.name)
    if there is None and axis >= 0 and not call.is_constant(values, along.moved(axis)):
        raise MixedError(call.name)
    return at
