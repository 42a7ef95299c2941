"""DTensors: what part of the whole a rank holds, and which rank counts it.

Nothing here imports ``torch.distributed.tensor`` before somebody else has: where nobody has, there are none.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

Layout: TypeAlias = "tuple[Any, tuple[Any, ...]] | None"
"""A device mesh and a placement for each of its dimensions; None for a plain tensor."""


def is_dtensor(tensor: object) -> bool:
    """Say whether something is a ``DTensor``.

    Args:
        tensor: Anything.

    Returns:
        False also where nobody has imported them.
    """
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def layout_of(tensor: Tensor) -> Layout:
    """Return how a tensor is laid out over ranks.

    Args:
        tensor: Any tensor.

    Returns:
        Its mesh and placements; None for a plain tensor.
    """
    if not is_dtensor(tensor):
        return None
    sharded = cast("DTensor", tensor)
    return sharded.device_mesh, tuple(sharded.placements)


def local_of(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor.

    Args:
        tensor: Any tensor.

    Returns:
        The shard of a ``DTensor``, sharing its memory; a plain tensor as it is.
    """
    return cast("DTensor", tensor.detach()).to_local() if is_dtensor(tensor) else tensor


def like(local: Tensor, tensor: Tensor) -> Tensor:
    """Put a rank's part into a tensor that is laid out like another one.

    Args:
        local: What this rank holds, of the shape of its part of ``tensor``.
        tensor: Any tensor.

    Returns:
        A ``DTensor`` if ``tensor`` is one, else ``local``.
    """
    if not is_dtensor(tensor):
        return local
    from torch.distributed.tensor import DTensor

    whole = cast("DTensor", tensor)
    return DTensor.from_local(
        local,
        whole.device_mesh,
        whole.placements,
        run_check=False,
        shape=whole.shape,
        stride=_contiguous_strides(whole.shape),
    )


def refusal(tensor: Tensor) -> str:
    """Say why a DTensor's parts cannot be worked on one by one.

    Args:
        tensor: Any tensor.

    Returns:
        What is wrong with its placements; empty for a plain tensor, and where its dimensions are sharded or
        replicated.
    """
    layout = layout_of(tensor)
    if layout is None:
        return ""
    from torch.distributed.tensor import Replicate, Shard

    for place in layout[1]:
        if place.is_partial():
            return f"placements {layout[1]}, whose values are still to be added up (call redistribute first)"
        if type(place) not in (Replicate, Shard):
            return f"placements {layout[1]}, with {type(place).__name__}"
    return ""


def counts_here(tensor: Tensor) -> bool:
    """Say whether this rank counts what it holds: of several copies only the first does.

    Args:
        tensor: Any tensor; a plain one counts.

    Returns:
        False where another rank of the mesh holds the same scalars and counts them.
    """
    layout = layout_of(tensor)
    if layout is None:
        return True
    mesh, places = layout
    coordinate = mesh.get_coordinate()
    return all(place.is_shard() or at == 0 for place, at in zip(places, coordinate, strict=True))


def part_of(tensor: Tensor) -> tuple[slice, ...]:
    """Return which part of the whole this rank holds.

    Args:
        tensor: A ``DTensor`` that ``refusal`` has nothing against, or a plain tensor.

    Returns:
        A slice per dimension.

    Raises:
        NotImplementedError: If it is not cut as ``torch.chunk`` cuts.
    """
    starts, sizes = [0] * tensor.ndim, list(tensor.shape)
    layout = layout_of(tensor)
    if layout is not None:
        mesh, places = layout
        coordinate = mesh.get_coordinate()
        for dim, place in enumerate(places):
            if place.is_shard():
                size = sizes[place.dim]
                chunk = -(-size // mesh.size(dim))
                start = min(coordinate[dim] * chunk, size)
                starts[place.dim] += start
                sizes[place.dim] = min(chunk, size - start)
        own = tuple(local_of(tensor).shape)
        if own != tuple(sizes):
            raise NotImplementedError(
                f"a DTensor of shape {list(tensor.shape)} must be cut into equal chunks, got {list(own)} for "
                f"{sizes} with placements {places}"
            )
    return tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))


def flat_indices(tensor: Tensor, start: int, stop: int) -> Tensor:
    """Return where scalars of this rank's part lie in the whole, both read row by row.

    Args:
        tensor: As ``part_of``.
        start: First scalar of the part.
        stop: One past the last.

    Returns:
        int64 ``[stop - start]``, on the part's device.
    """
    part = part_of(tensor)
    device = local_of(tensor).device
    rest = torch.arange(start, stop, device=device)
    found = torch.zeros_like(rest)
    strides = _contiguous_strides(tensor.shape)
    for where, stride in reversed(list(zip(part, strides, strict=True))):
        size = max(1, where.stop - where.start)
        found += (rest % size + where.start) * stride
        rest = rest // size
    return found


def agreed_by_all(flag: bool, tensors: Iterable[Tensor]) -> bool:
    """Say whether something holds on all ranks that hold parts of some tensors.

    Args:
        flag: Whether it holds here.
        tensors: Any tensors; where none is sharded, this process decides alone.

    Returns:
        The same on all these ranks.
    """
    meshes = list(meshes_of(list(tensors)))
    for mesh in meshes:
        holds = sum_over_mesh(torch.tensor([int(not flag)], device=mesh.device_type), mesh)
        flag = not int(holds)
    return flag


def totals(numbers: Sequence[float], tensors: Sequence[Tensor]) -> list[float]:
    """Add up numbers over the ranks that hold parts of some tensors.

    Args:
        numbers: This rank's, in double precision.
        tensors: One per number; a plain tensor's number is the same everywhere and is not added up.

    Returns:
        The sums, the same on all ranks.
    """
    mesh = next(meshes_of(tensors), None)
    if mesh is None:
        return list(numbers)
    own = [
        number if not is_dtensor(tensor) or counts_here(tensor) else 0.0
        for number, tensor in zip(numbers, tensors, strict=True)
    ]
    summed = sum_over_mesh(torch.tensor(own, dtype=torch.float64, device=mesh.device_type), mesh).tolist()
    return [
        total if is_dtensor(tensor) else number
        for total, number, tensor in zip(summed, numbers, tensors, strict=True)
    ]


def largest_of(tensors: Sequence[Tensor]) -> list[float]:
    """Return the largest scalar of each tensor, over all ranks.

    Args:
        tensors: At least one scalar each.

    Returns:
        The values, the same on all ranks.
    """
    import torch.distributed as dist

    own = [float(part.max()) if (part := local_of(t)).numel() else -math.inf for t in tensors]
    mesh = next(meshes_of(tensors), None)
    if mesh is None:
        return own
    numbers = torch.tensor(own, dtype=torch.float64, device=mesh.device_type)
    for dim in range(mesh.ndim):
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=mesh.get_group(dim))
    return [float(number) for number in numbers.tolist()]


def whole_of(tensor: Tensor) -> Tensor:
    """Gather a tensor; all ranks of its mesh call it together.

    Args:
        tensor: Any tensor.

    Returns:
        The whole on every rank; a plain tensor as it is.
    """
    return cast("DTensor", tensor).full_tensor() if is_dtensor(tensor) else tensor


def sharded_like(whole: Tensor, tensor: Tensor) -> Tensor:
    """Give a tensor the layout of another one.

    Args:
        whole: A plain tensor that every rank has, or one that is laid out already.
        tensor: A tensor of the same shape.

    Returns:
        ``whole`` if the layouts agree; this rank's part of it, as a ``DTensor``, where ``tensor`` is one.

    Raises:
        ValueError: If both are sharded, and differently, or only ``whole`` is.
    """
    wanted, given = layout_of(tensor), layout_of(whole)
    if wanted == given:
        return whole
    if wanted is None or given is not None:
        raise ValueError(f"a tensor with placements {given and given[1]} must have {wanted and wanted[1]}")
    part = whole[part_of(tensor)].to(local_of(tensor).device)
    return like(part.contiguous(), tensor)


def sum_over_mesh(numbers: Tensor, mesh: Any) -> Tensor:  # noqa: ANN401 - a DeviceMesh
    """Add up a tensor over all ranks of a mesh.

    Args:
        numbers: The same shape on all ranks, on the mesh's kind of device; written in place.
        mesh: The mesh.

    Returns:
        ``numbers``.
    """
    import torch.distributed as dist

    for dim in range(mesh.ndim):
        dist.all_reduce(numbers, group=mesh.get_group(dim))
    return numbers


def meshes_of(tensors: Sequence[Tensor]) -> Iterator[Any]:
    """Yield the different meshes of some tensors.

    Args:
        tensors: Any tensors.

    Yields:
        Each mesh once, in the order of the tensors.
    """
    seen: list[Any] = []
    for tensor in tensors:
        layout = layout_of(tensor)
        if layout is not None and layout[0] not in seen:
            seen.append(layout[0])
            yield layout[0]


def _contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, stride = [], 1
    for size in reversed(shape):
        strides.append(stride)
        stride *= max(1, size)
    return tuple(reversed(strides))
