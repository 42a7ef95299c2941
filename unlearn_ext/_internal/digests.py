"""Digests of weights and tensors."""

from __future__ import annotations

import hashlib
from typing import Protocol

import torch
from torch import Tensor, nn

from unlearn_ext._internal.names import with_plain_names


class Digest(Protocol):
    """A hash that takes its input in pieces, as those of ``hashlib`` do."""

    def update(self, data: bytes | memoryview, /) -> None:
        """Take the next piece.

        Args:
            data: The piece.
        """


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 of a model's parameters and buffers.

    It covers names (without what wrappers put in), dtypes, shapes and bits, in the order of the names,
    whatever the device and the memory layout: equal digests mean equal weights, to the bit.

    Args:
        model: The model.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> before = weights_digest(model)
        >>> with torch.no_grad():
        ...     _ = model.bias.add_(1)
        >>> weights_digest(model) == before
        False
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(with_plain_names(model.state_dict()).items()):
        digest.update(f"{name}\0".encode())
        if isinstance(tensor, Tensor):
            update_digest(digest, tensor)
        else:  # what a module keeps besides tensors
            digest.update(repr(tensor).encode())
    return digest.hexdigest()


def update_digest(digest: Digest, tensor: Tensor) -> None:
    """Feed dtype, shape and values of a tensor to a hash.

    Args:
        digest: A hash of ``hashlib``.
        tensor: The tensor, on any device, in any layout.
    """
    digest.update(f"{tensor.dtype}{list(tensor.shape)}".encode())
    plain = tensor.detach()
    if plain.layout is not torch.strided:  # sparse, or in a layout of MKLDNN, whose memory cannot be read
        plain = plain.to_dense()
    plain = plain.cpu().contiguous().reshape(-1)
    if plain.numel():
        digest.update(plain.view(torch.uint8).numpy().data)
