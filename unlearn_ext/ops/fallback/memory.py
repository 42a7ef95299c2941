"""Which tensors share memory: what an op that writes has to know of its arguments.

Told from strides, sizes and addresses alone, so that it holds on every device.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Where an address is one of memory. Elsewhere it may name a buffer, and two are compared only within one storage.
_ADDRESSED = ("cpu", "cuda")


@dataclass(frozen=True)
class Extent:
    """The bytes between a tensor's first and last.

    Attributes:
        name: Of the argument.
        index: In its list.
        tensor: The tensor.
        written: Whether the op writes it.
        memory: What its addresses count in: that of the process, or a storage.
        begin: First byte.
        end: One past the last byte.
    """

    name: str
    index: int
    tensor: Tensor
    written: bool
    memory: object
    begin: int
    end: int


def extent_of(name: str, index: int, tensor: Tensor, *, written: bool) -> Extent:
    """Say where a tensor lies.

    Args:
        name: Of the argument.
        index: In its list.
        tensor: The tensor, with at least one element.
        written: Whether the op writes it.

    Returns:
        Its extent.
    """
    width = tensor.element_size()
    if tensor.device.type in _ADDRESSED:
        memory: object = None
        begin = int(tensor.const_data_ptr())
    else:
        memory = tensor.untyped_storage()._cdata
        begin = tensor.storage_offset() * width
    return Extent(name, index, tensor, written, memory, begin, begin + _span(tensor) * width)


def overlaps_itself(tensor: Tensor) -> bool:
    """Say whether two elements of a tensor share memory.

    Args:
        tensor: The tensor.

    Returns:
        Whether they do, exactly. Only strides that interleave take a look at every element.
    """
    axes = sorted((stride, size - 1) for stride, size in _axes(tensor) if size > 1)
    if any(stride == 0 for stride, _ in axes):
        return True
    reach = 0
    for stride, steps in axes:
        if stride <= reach:
            return _offsets(tensor).unique().numel() < tensor.numel()
        reach += stride * steps
    return False


def first_shared(extents: Sequence[Extent]) -> tuple[Extent, Extent] | None:
    """Find an argument that is written and shares memory with another.

    Args:
        extents: Of all arguments.

    Returns:
        The written one and the other, or None.
    """
    open_: list[Extent] = []  # those that reach past the current one
    for one in sorted(extents, key=lambda extent: (str(extent.memory), extent.begin)):
        open_ = [other for other in open_ if other.memory == one.memory and other.end > one.begin]
        for other in open_:
            if (one.written or other.written) and _share(one, other):
                return (one, other) if one.written else (other, one)
        open_.append(one)
    return None


def _axes(tensor: Tensor) -> list[tuple[int, int]]:
    return list(zip(tensor.stride(), tensor.shape, strict=True))


def _span(tensor: Tensor) -> int:
    return 1 + sum((size - 1) * stride for stride, size in _axes(tensor))


def _is_dense(tensor: Tensor) -> bool:
    return _span(tensor) == tensor.numel() and not overlaps_itself(tensor)


def _offsets(tensor: Tensor) -> Tensor:
    """Where the elements lie, counted in elements from the first: int64 on the CPU."""
    offsets = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in _axes(tensor):
        offsets = (offsets[:, None] + torch.arange(size, device="cpu") * stride).flatten()
    return offsets


def _share(a: Extent, b: Extent) -> bool:
    """Say whether two extents that intersect have a byte in common."""
    if _is_dense(a.tensor) and _is_dense(b.tensor):
        return True
    begin, end = max(a.begin, b.begin), min(a.end, b.end)
    # The largest unit that no element begins or ends within.
    unit = math.gcd(a.tensor.element_size(), b.tensor.element_size(), a.begin - b.begin)

    def units(extent: Extent) -> Tensor:
        width = extent.tensor.element_size()
        first = extent.begin + _offsets(extent.tensor) * width
        first = first[(first < end) & (first + width > begin)]
        return (first[:, None] + torch.arange(0, width, unit)).flatten()

    return bool(torch.isin(units(a), units(b)).any())
