"""A fingerprint of a model's weights that costs next to nothing, on the weights' own device."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn

from unlearn_ext._internal.names import with_plain_names

_SMALL = 1 << 16
_COLUMNS = 64


def weights_fingerprint(model: nn.Module) -> str:
    """Tell weights apart from other weights: of another model, or from before a training step.

    It covers names (without what wrappers put in), dtypes, shapes and bits of parameters and buffers,
    whatever device and memory layout. A change of one word always changes it. It is no cryptographic hash:
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
    for tensor in tensors.values():
        words = tensor.detach().flatten()
        if not words.numel():
            continue
        if words.numel() < _SMALL:
            parts = small.setdefault(str(words.dtype), [])
            parts.append(words.to(parts[0].device if parts else words.device))
        else:
            totals.append(_weighted_sum(words))
    totals += [_weighted_sum(torch.cat(parts)) for _, parts in sorted(small.items())]
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name}\0{tensor.dtype}{list(tensor.shape)}\n".encode())
    if totals:
        device = totals[0].device
        digest.update(f"{torch.stack([total.to(device) for total in totals]).tolist()}".encode())
    return digest.hexdigest()[:32]


def _weighted_sum(words: Tensor) -> Tensor:
    # The sums of all columns and of all rows of a table of words, times odd numbers, modulo 2^64. Odd numbers
    # have inverses, so that no single change is lost; words that change places show in one of the two.
    words = torch.view_as_real(words).flatten() if words.is_complex() else words
    size = words.element_size()
    n_bytes = words.numel() * size
    missing = -n_bytes % (8 * _COLUMNS) // size
    if missing:
        words = torch.cat([words, words.new_zeros(missing)])
    elif words.storage_offset() * size % 8:
        words = words.clone()
    table = words.view(torch.int64).view(-1, _COLUMNS)
    rows, columns = table.sum(1), table.sum(0)
    return (rows * _odd_numbers(rows)).sum() + (columns * _odd_numbers(columns)).sum() * (2 * len(rows) + 1)


def _odd_numbers(like: Tensor) -> Tensor:
    return torch.arange(1, 2 * len(like), 2, device=like.device)
