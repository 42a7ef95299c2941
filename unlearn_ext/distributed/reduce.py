"""Sums over the ranks of a process group, in the order of the ranks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Scalars that travel together: large enough for the network, small beside the totals.
BUCKET = 1 << 22


# Note [Sums that have the same bits everywhere]
# Backends choose how they add up: rings, trees, halving, by size and topology, and floating-point sums
# depend on it. Here every rank gets one slice of all parts, adds them in the order of the ranks, in double
# precision, rounds once, and hands the slice out. The traffic is that of a ring; no rank can get other bits
# than another, and no run other bits than the one before.
@torch.no_grad()
def sum_in_order(tensors: Iterable[Tensor], group: ProcessGroup) -> None:
    """Replace every tensor by its sum over the ranks; all ranks must call it with the same shapes and dtypes.

    Args:
        tensors: Floating-point or integer tensors, written in place.
        group: The process group.
    """
    world = dist.get_world_size(group)
    device = transport_device(group)
    for bucket in _buckets(tensors):
        dtype = bucket[0].dtype
        flat = torch.cat([tensor.detach().reshape(-1).to(device or tensor.device) for tensor in bucket])
        n = flat.numel()
        flat = torch.cat([flat, flat.new_zeros(-n % world)])
        parts = torch.empty_like(flat)
        dist.all_to_all_single(parts, flat, group=group)
        wide = torch.float64 if dtype.is_floating_point else torch.int64
        total = torch.zeros(len(flat) // world, dtype=wide, device=flat.device)
        for part in parts.view(world, -1):
            total += part
        dist.all_gather(list(flat.view(world, -1)), total.to(dtype), group=group)
        start = 0
        for tensor in bucket:
            tensor.copy_(flat[start : start + tensor.numel()].view(tensor.shape))
            start += tensor.numel()


def transport_device(group: ProcessGroup) -> torch.device | None:
    """Say where tensors must be for a group's collectives.

    Args:
        group: The process group.

    Returns:
        The device; None where they may be where they are.
    """
    backend = str(dist.get_backend(group)).lower()
    if "gloo" in backend:
        return torch.device("cpu")
    if "nccl" in backend:
        return torch.device("cuda", torch.cuda.current_device())
    return None


def _buckets(tensors: Iterable[Tensor]) -> Iterator[Sequence[Tensor]]:
    # Runs of one dtype and one device. A tensor larger than a bucket is sent in rows of its flat view.
    bucket: list[Tensor] = []
    size = 0
    for tensor in (piece for whole in tensors for piece in _pieces(whole)):
        is_like = not bucket or (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and (not is_like or size + tensor.numel() > BUCKET):
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    if tensor.numel() == 0:
        return
    if tensor.numel() <= BUCKET or not tensor.is_contiguous():
        yield tensor
        return
    yield from torch.split(tensor.detach().view(-1), BUCKET)
