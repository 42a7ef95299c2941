"""A checksum of a tensor's bits, on the tensor's own device."""

from __future__ import annotations

import torch
from torch import Tensor


def checksum(tensor: Tensor) -> int:
    # A hash of the bits that needs no copy to the host and does not rely on version counters, which writes
    # through .data and raw memory do not advance. Each word is mixed with its position (the constants are
    # those of splitmix64, as signed integers), then summed modulo 2^64; pieces keep the temporaries small.
    words = tensor.detach().contiguous().flatten()
    sizes = {1: torch.int8, 2: torch.int16, 4: torch.int32}  # one byte: what quantised models keep
    words = words.view(sizes.get(words.element_size(), torch.int64))
    total = 0
    piece = 1 << 20
    for start in range(0, words.numel(), piece):
        mixed = words[start : start + piece].to(torch.int64)
        mixed = mixed + torch.arange(start, start + mixed.numel(), device=mixed.device) * -7046029254386353131
        mixed = (mixed ^ (mixed >> 30)) * -4658895280553007687
        mixed = (mixed ^ (mixed >> 27)) * -7723592293110705685
        total += int((mixed ^ (mixed >> 31)).sum())
    return total % 2**64
