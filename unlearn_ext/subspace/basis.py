"""The leading directions of a Gram matrix: what of a layer's input space a data set uses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

Criterion: TypeAlias = Literal["energy", "singular"]

# Eigenvalues below this multiple of d * eps * (the largest) are rounding.
_ROUNDING = 10.0


@dataclass(frozen=True, slots=True)
class Protected:
    """What of a layer's input space a data set uses.

    Attributes:
        basis: Orthonormal columns ``[d, k]``, or ``[groups, d, k]``; for an embedding a bool ``[tokens]``.
        kept: Share of the criterion's sum that the k directions hold; the least over the groups.
        clamped: Sum of the negative eigenvalues, as a share of the positive ones.
    """

    basis: Tensor
    kept: float
    clamped: float

    @property
    def d(self) -> int:
        """Number of directions, in each group."""
        return self.basis.shape[0] if self.basis.dtype == torch.bool else self.basis.shape[-2]

    @property
    def k(self) -> int:
        """Number of protected ones, in each group."""
        return int(self.basis.sum()) if self.basis.dtype == torch.bool else self.basis.shape[-1]


def protected(gram: Tensor, energy: float, criterion: Criterion = "energy") -> Protected:
    """Choose the leading directions of a Gram matrix.

    k is the smallest number of leading eigenvectors that hold a share ``energy`` of the sum of the
    eigenvalues (``"energy"``), or of their square roots, the singular values of X (``"singular"``: what the
    published code does, far stricter). Groups share one k, the largest that any of them needs. Negative
    eigenvalues, and those within rounding of 0, count as 0 and are not protected. Of an embedding every token
    that occurs is protected, whatever the energy: a token's row is all that a sample has of it.

    Args:
        gram: ``[d, d]``, ``[groups, d, d]`` or ``[tokens]``, float64.
        energy: In (0, 1]; 1 protects everything that the data uses at all.
        criterion: ``"energy"`` or ``"singular"``.

    Returns:
        The directions, float64.

    Raises:
        ValueError: If ``energy`` or ``criterion`` is out of range.

    Example:
        >>> protected(torch.diag(torch.tensor([90.0, 9.0, 1.0]).double()), 0.95).k
        2
    """
    if not 0 < energy <= 1:
        raise ValueError(f"protected: energy must lie in (0, 1], got {energy}")
    if criterion not in get_args(Criterion):
        raise ValueError(f"protected: criterion must be 'energy' or 'singular', got {criterion!r}")
    if gram.ndim == 1:
        lost = gram.clamp(max=0).sum().abs() / gram.clamp(min=0).sum().clamp(min=1)
        return Protected(gram > 0.5, 1.0, float(lost))
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    values, vectors = values.flip(-1), vectors.flip(-1)
    rounding = _ROUNDING * gram.shape[-1] * torch.finfo(gram.dtype).eps * values[..., :1]
    positive = torch.where(values > rounding.clamp(min=0), values, 0.0)
    sizes = positive.sqrt() if criterion == "singular" else positive
    sums = sizes.cumsum(-1)
    # The last sum is compared with itself, so that energy 1 reaches it in spite of rounding.
    needed = ((sums < energy * sums[..., -1:]).sum(-1) + 1).clamp(max=gram.shape[-1])
    needed = torch.where(sums[..., -1] > 0, needed, 0)
    k = int(needed.max())
    held = torch.where(sums[..., -1] > 0, sizes[..., :k].sum(-1) / sums[..., -1], 1.0)
    total = float(values.clamp(min=0).sum())
    clamped = abs(float(values.clamp(max=0).sum()))
    return Protected(
        vectors[..., :k].contiguous(),
        min(1.0, float(held.min())),
        clamped / total if total > 0 else (float("inf") if clamped > 0 else 0.0),
    )
