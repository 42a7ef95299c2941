"""The ops on DTensors: every rank works on its own shard, and selections are those of the whole.

Tensors that belong together must be laid out alike. Ops that work scalar by scalar then need no
communication. A selection over all tensors (the k largest, a quantile, a count) is taken together by all
ranks of the mesh, and is to the bit that of the gathered tensors: digit by digit, every rank counts what it
holds, and the counts are added up.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from unlearn_ext._internal.dtensors import (
    counts_here,
    flat_indices,
    is_dtensor,
    layout_of,
    local_of,
    meshes_of,
    refusal,
    sum_over_mesh,
)

_DIGIT = 11  # bits that are counted at a time


def has_dtensors(*lists: Iterable[object]) -> bool:
    """Say whether some tensor is a ``DTensor``.

    Args:
        *lists: Lists of tensors.

    Returns:
        False inside a compiled region, where nothing is unwrapped.
    """
    if torch.compiler.is_compiling() or "torch.distributed.tensor" not in sys.modules:
        return False
    return any(is_dtensor(tensor) for tensors in lists for tensor in tensors)


def refuse_dtensors(op: str, *tensors: object) -> None:
    """Refuse DTensors where an op has no meaning for shards.

    Args:
        op: Its name.
        *tensors: Arguments.

    Raises:
        NotImplementedError: If one is a ``DTensor``.
    """
    if has_dtensors(tensors):
        raise NotImplementedError(
            f"{op}: tensors must be plain, got a DTensor; pass to_local() of what is this rank's own, or "
            "full_tensor()"
        )


def local_lists(op: str, *lists: Sequence[Tensor]) -> list[list[Tensor]]:
    """Return this rank's parts of tensors that belong together.

    Args:
        op: Whose message it is.
        *lists: The i-th tensors of all of them are laid out alike; an empty list stands for none.

    Returns:
        The lists with the parts, which share memory with what was given.

    Raises:
        ValueError: If tensors are laid out differently.
        NotImplementedError: If placements are neither ``Shard`` nor ``Replicate``.
    """
    for index, row in enumerate(zip(*(tensors for tensors in lists if tensors), strict=False)):
        first = layout_of(row[0])
        for tensor in row[1:]:
            if layout_of(tensor) != first:
                raise ValueError(
                    f"{op}: tensors that belong together must be sharded alike, got "
                    f"{_described(row[0])} and {_described(tensor)} at {index}"
                )
            if tensor.shape != row[0].shape:
                raise ValueError(
                    f"{op}: tensors that belong together must have one shape, got {list(row[0].shape)} and "
                    f"{list(tensor.shape)} at {index}"
                )
        if why := refusal(row[0]):
            raise NotImplementedError(f"{op}: tensors must be sharded or replicated, got {why} at {index}")
    return [[local_of(tensor) for tensor in tensors] for tensors in lists]


def _described(tensor: Tensor) -> str:
    layout = layout_of(tensor)
    return "a plain tensor" if layout is None else f"placements {layout[1]}"


class _Ranks:
    # The ranks of the one mesh that some tensors lie on, for selections.
    def __init__(self, op: str, tensors: Sequence[Tensor]) -> None:
        meshes = list(meshes_of(tensors))
        if len(meshes) != 1:
            raise ValueError(f"{op}: tensors must lie on one device mesh, got {meshes}")
        self.mesh = meshes[0]
        self.is_first = not any(self.mesh.get_coordinate())
        self.device = next(local_of(tensor).device for tensor in tensors if is_dtensor(tensor))

    def counts(self, tensor: Tensor) -> bool:
        # A plain tensor is the same on all ranks.
        return counts_here(tensor) if is_dtensor(tensor) else self.is_first

    def total(self, numbers: Tensor) -> Tensor:
        # On the mesh's device for the exchange, on the CPU for what follows.
        moved = numbers.to(self.mesh.device_type)
        return sum_over_mesh(moved.clone() if moved is numbers else moved, self.mesh).cpu()


def selected_counts(
    importance_full: Sequence[Tensor],
    importance_forget: Sequence[Tensor],
    count: Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor],
) -> Tensor:
    """Count over all ranks what the plain op counts on each.

    Args:
        importance_full: As for the op.
        importance_forget: As for the op.
        count: The op on plain tensors.

    Returns:
        The counts, the same on every rank.
    """
    ranks = _Ranks("selected_counts", importance_full)
    full, forget = local_lists("selected_counts", importance_full, importance_forget)
    own = count(full, forget)
    counted = [ranks.counts(tensor) for tensor in importance_full]
    own = own * torch.tensor(counted, device=own.device)
    return ranks.total(own).to(own.device)


def ratio_quantile(
    importance_full: Sequence[Tensor], importance_forget: Sequence[Tensor], q: float
) -> Tensor:
    """Compute the quantile of the ratios over all ranks.

    Args:
        importance_full: As for the op.
        importance_forget: As for the op.
        q: As for the op.

    Returns:
        As the op, the same on every rank.

    Raises:
        ValueError: If ``q`` is out of range, or no finite ratio is left on any rank.
        TypeError: If a dtype is not supported.
    """
    if not 0 <= q <= 1:
        raise ValueError(f"ratio_quantile: q must lie in [0, 1], got {q}")
    ranks = _Ranks("ratio_quantile", importance_full)
    dtypes = {tensor.dtype for tensor in (*importance_full, *importance_forget)}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.float64}:
        raise TypeError(f"ratio_quantile: importances must be float32 or float64 throughout, got {dtypes}")
    full, forget = local_lists("ratio_quantile", importance_full, importance_forget)
    keys: list[Tensor] = []
    for whole, below, above in zip(importance_full, full, forget, strict=True):
        ratios = (above / below).flatten()
        keys.append(_keys(ratios[torch.isfinite(ratios) & ranks.counts(whole)]))
    n = int(ranks.total(torch.tensor(sum(len(key) for key in keys))))
    if n == 0:
        raise ValueError("ratio_quantile: importance_full must leave a finite ratio, got none")
    (dtype,) = dtypes
    position = q * (n - 1)
    lower = math.floor(position)
    ends = [_value(_descend(ranks, keys, at, dtype)[0], dtype) for at in (lower, min(lower + 1, n - 1))]
    low, high = (end.double() for end in ends)
    return torch.lerp(low, high, position - lower).to(dtype).to(full[0].device)


def topk_mask(
    scores: Sequence[Tensor], k: int, *, largest: bool, pack: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Mark the k largest (or smallest) scores over all ranks.

    Args:
        scores: As for the op.
        k: As for the op.
        largest: As for the op.
        pack: The op ``pack_mask`` on plain tensors.

    Returns:
        The packed masks of this rank's parts. Together they are what the op gives for the gathered scores,
        ties included.

    Raises:
        ValueError: If ``k`` is out of range, or a score on any rank is NaN.
        TypeError: If dtypes differ.
    """
    ranks = _Ranks("topk_mask", scores)
    if len({score.dtype for score in scores}) > 1:
        raise TypeError(
            f"topk_mask: scores must have one dtype, got {sorted({str(s.dtype) for s in scores})}"
        )
    total = sum(score.numel() for score in scores)
    if not 0 <= k <= total:
        raise ValueError(f"topk_mask: k must lie in [0, {total}], got {k}")
    (parts,) = local_lists("topk_mask", scores)
    if int(ranks.total(torch.tensor(sum(int(part.isnan().any()) for part in parts)))):
        raise ValueError("topk_mask: scores must not be NaN, got NaN")
    if k == 0:
        return [pack(torch.zeros_like(part, dtype=torch.bool)) for part in parts]
    keys = [_keys((-part if largest else part).flatten()) for part in parts]
    counted = [key if ranks.counts(score) else key[:0] for key, score in zip(keys, scores, strict=True)]
    dtype = scores[0].dtype
    key, left = _descend(ranks, counted, k - 1, dtype)
    # left + 1 of those that are equal are taken, from the first tensor on.
    ties = ranks.total(torch.tensor([int((each == key).sum()) for each in counted])).tolist()
    masks, missing = [], left + 1
    for score, part, own, tied in zip(scores, parts, keys, ties, strict=True):
        chosen = own < key
        equal = own == key
        taken = min(missing, tied)
        missing -= taken
        if taken == tied:
            chosen |= equal
        elif taken:
            # All ranks are here, or none: the number of ties is that of all.
            places = _places(score, equal)
            here = places if ranks.counts(score) else places[:0]
            last, _ = _descend(ranks, [here], taken - 1, torch.int64)
            chosen[equal.nonzero().flatten()[places <= last]] = True
        masks.append(pack(chosen.view(part.shape)))
    return masks


def _places(whole: Tensor, marked: Tensor) -> Tensor:
    # Where the marked scalars of this rank's part lie in the whole.
    return flat_indices(whole, 0, len(marked))[marked]


def _bits(dtype: torch.dtype) -> int:
    return 64 if dtype in (torch.float64, torch.int64) else 32


def _keys(values: Tensor) -> Tensor:
    # Integers in the order of the values, in [0, 2^32) or, for float64, any of int64; -0 and +0 are equal.
    if values.dtype == torch.float64:
        bits = (values + 0.0).view(torch.int64)
        return bits ^ ((bits >> 63) & (2**63 - 1))
    wide = (values.float() + 0.0).view(torch.int32).to(torch.int64)
    return (wide ^ ((wide >> 31) & (2**31 - 1))) + 2**31


def _value(key: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.float64:
        bits = torch.tensor(key, dtype=torch.int64)
        return (bits ^ ((bits >> 63) & (2**63 - 1))).view(torch.float64)
    signed = torch.tensor(key - 2**31, dtype=torch.int32)
    return (signed ^ ((signed >> 31) & (2**31 - 1))).view(torch.float32)


def _descend(ranks: _Ranks, keys: Sequence[Tensor], rank: int, dtype: torch.dtype) -> tuple[int, int]:
    """Find the key of a rank among those of all ranks.

    Args:
        ranks: The ranks.
        keys: This rank's.
        rank: From 0, in ascending order.
        dtype: Of the values, which says how many bits there are.

    Returns:
        The key, and how many equal ones come before.
    """
    bits = _bits(dtype)
    # Signed integers in the order of unsigned ones.
    left = [key ^ -(2**63) if bits == 64 else key for key in keys]
    found, shift = 0, bits
    while shift:
        width = min(_DIGIT, shift)
        shift -= width
        digits = [(key >> shift) & (2**width - 1) for key in left]
        counts = torch.zeros(2**width, dtype=torch.int64, device=ranks.device)
        for digit in digits:
            counts += torch.bincount(digit, minlength=2**width)
        cumulated = ranks.total(counts).cumsum(0)
        digit_found = int(torch.searchsorted(cumulated, rank, right=True))
        rank -= int(cumulated[digit_found - 1]) if digit_found else 0
        found |= digit_found << shift
        left = [key[digit == digit_found] for key, digit in zip(left, digits, strict=True)]
    if bits == 64:
        found = found - 2**64 if found >= 2**63 else found
        found ^= -(2**63)
    return found, rank


def project(
    op: str, grads: Sequence[Tensor], bases: Sequence[Tensor], plain: Callable[[Any, Any], None]
) -> None:
    """Project gradients in place, where their rows are whole.

    Args:
        op: Whose message it is.
        grads: Gradients, DTensors or plain.
        bases: Plain bases, the same on every rank.
        plain: The op on lists of plain tensors.

    Raises:
        NotImplementedError: If a gradient is cut along another dimension than its first, or a basis is a
            DTensor or has groups.
    """
    for index, (grad, basis) in enumerate(zip(grads, bases, strict=True)):
        if is_dtensor(basis):
            raise NotImplementedError(f"{op}: bases must be plain, got a DTensor at {index}; gather it")
        layout = layout_of(grad)
        if layout is None:
            continue
        if why := refusal(grad):
            raise NotImplementedError(f"{op}: gradients must be sharded or replicated, got {why} at {index}")
        if any(place.is_shard() and place.dim != 0 for place in layout[1]) or basis.dim() == 3:
            raise NotImplementedError(
                f"{op}: gradients must be cut along their first dimension, and bases have no groups, got "
                f"placements {layout[1]} and a basis {list(basis.shape)} at {index}"
            )
    rows = [
        (local, basis)
        for local, basis in zip((local_of(grad) for grad in grads), bases, strict=True)
        if local.numel()
    ]
    if rows:
        plain([local for local, _ in rows], [basis for _, basis in rows])
