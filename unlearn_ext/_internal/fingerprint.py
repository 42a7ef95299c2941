"""A fingerprint of a model's weights that costs next to nothing, on the weights' own device."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from unlearn_ext._internal.dtensors import (
    counts_here,
    flat_indices,
    is_dtensor,
    local_of,
    meshes_of,
    sum_over_mesh,
)
from unlearn_ext._internal.names import with_plain_names

_SMALL = 1 << 16
_COLUMNS = 64


def weights_fingerprint(model: nn.Module) -> str:
    """Tell weights apart from other weights: of another model, or from before a training step.

    It covers names (without what wrappers put in), dtypes, shapes and bits of parameters and buffers,
    whatever device and memory layout. Sharded weights, of which all ranks call it, have the fingerprint of
    the whole ones. A change of one word always changes it. It is no cryptographic hash:
    ``weights_digest`` is, at several times the cost and with a copy of all weights to the host.

    Args:
        model: The model.

    Returns:
        32 hexadecimal digits.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = weights_fingerprint(model)
        >>> weights_fingerprint(nn.Sequential(model)[0]) == before
        True
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(1)
        >>> weights_fingerprint(model) == before
        False
    """
    named = with_plain_names({**dict(model.named_parameters()), **dict(model.named_buffers())})
    tensors = dict(sorted(named.items()))
    # Small tensors are joined, and all sums of a device read at once: both save time per tensor.
    small: dict[str, list[Tensor]] = {}
    totals: list[Tensor] = []
    is_sharded = any(is_dtensor(tensor) for tensor in tensors.values())
    for tensor in () if is_sharded else tensors.values():
        plain = tensor.detach()
        words = (plain if plain.layout is torch.strided else plain.to_dense()).flatten()
        if not words.numel():
            continue
        if words.numel() < _SMALL:
            parts = small.setdefault(str(words.dtype), [])
            at_home = not parts or words.device == parts[0].device
            parts.append(words if at_home else words.to(parts[0].device))
        else:
            totals.append(_weighted_sum(words))
    totals += [_weighted_sum(_joined(parts)) for _, parts in sorted(small.items())]
    if is_sharded:
        totals = _sharded_sums(list(tensors.values()))
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}\0{tensor.dtype}{list(tensor.shape)}\n".encode())
    if totals:
        device = totals[0].device
        digest.update(f"{torch.stack([total.to(device) for total in totals]).tolist()}".encode())
    return digest.hexdigest()[:32]


def _joined(parts: Sequence[Tensor]) -> Tensor:
    # With the zeros that _weighted_sum would append, by one copy instead of two.
    missing = _missing(parts[0], sum(part.numel() for part in parts))
    return torch.cat([*parts, parts[0].new_zeros(missing)])


def _missing(like: Tensor, numel: int) -> int:
    # What makes a table of so many scalars whole.
    size = like.element_size()
    return -(numel * size) % (8 * _COLUMNS) // size


def _weighted_sum(words: Tensor) -> Tensor:
    # The sums of all columns and of all rows of a table of words, times odd numbers, modulo 2^64. Odd numbers
    # have inverses, so that no single change is lost; words that change places show in one of the two.
    words = torch.view_as_real(words).flatten() if words.is_complex() else words
    size = words.element_size()
    missing = _missing(words, words.numel())
    if missing:
        words = torch.cat([words, words.new_zeros(missing)])
    elif words.storage_offset() * size % 8:
        words = words.clone()
    table = words.view(torch.int64).view(-1, _COLUMNS)
    rows, columns = table.sum(1), table.sum(0)
    return (rows * _odd_numbers(rows)).sum() + (columns * _odd_numbers(columns)).sum() * (2 * len(rows) + 1)


def _sharded_sums(tensors: Sequence[Tensor]) -> list[Tensor]:
    # The same sums: they are linear in the words, so that every rank adds up its own scalars.
    (mesh,) = meshes_of(tensors)
    is_first = not any(mesh.get_coordinate())
    sums, small = [], dict[str, list[Tensor]]()
    for tensor in tensors:
        if tensor.numel() >= _SMALL:
            sums.append(_own_sum([tensor], is_first))
        elif tensor.numel():
            small.setdefault(str(tensor.dtype), []).append(tensor)
    sums += [_own_sum(parts, is_first) for _, parts in sorted(small.items())]
    device = next(local_of(tensor).device for tensor in tensors if is_dtensor(tensor))
    total = torch.stack([each.to(device) for each in sums])
    if device.type != mesh.device_type:
        total = total.to(mesh.device_type)
    return list(sum_over_mesh(total, mesh))


def _own_sum(tensors: Sequence[Tensor], is_first: bool) -> Tensor:
    # ``_weighted_sum`` of the tensors joined, as far as this rank counts their scalars.
    size = tensors[0].element_size()
    rows = -(-sum(tensor.numel() for tensor in tensors) * size // (8 * _COLUMNS))
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    total = torch.zeros((), dtype=torch.int64, device=local_of(tensors[0]).device)
    before = 0
    for tensor in tensors:
        # What is not sharded at all every rank of the mesh has: its first one counts it.
        if counts_here(tensor) and (is_dtensor(tensor) or is_first):
            flat = local_of(tensor).detach().reshape(-1).view(words)
            for start in range(0, len(flat), _SMALL):
                part = flat[start : start + _SMALL].to(torch.int64)
                part = part & ((1 << 8 * size) - 1) if size < 8 else part
                at = (flat_indices(tensor, start, start + len(part)) + before) * size
                factor = 2 * (at // (8 * _COLUMNS)) + 1 + (2 * (at // 8 % _COLUMNS) + 1) * (2 * rows + 1)
                factor = factor * 2 ** (at % 8 * 8)
                total += (part * factor).sum().to(total.device)
        before += tensor.numel()
    return total


def _odd_numbers(like: Tensor) -> Tensor:
    return torch.arange(1, 2 * len(like), 2, device=like.device)
