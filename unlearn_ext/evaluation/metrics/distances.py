"""How far a model's parameters have moved."""

from __future__ import annotations

import math

import torch
from torch import nn

from unlearn_ext._internal.modules import check_made
from unlearn_ext._internal.names import parameters_by_name


def layer_distance(model: nn.Module, reference: nn.Module, *, relative: bool = True) -> dict[str, float]:
    """Return how far every parameter has moved from a reference.

    Args:
        model: A model, perhaps compiled or wrapped.
        reference: One of the same parameters: the original, or the retrained one.
        relative: Divide by the reference's norm.

    Returns:
        Parameter name to Euclidean distance; where the reference is zero, the relative one is 0 or infinite.

    Raises:
        ValueError: If the parameters differ in name or shape.

    Example:
        >>> a, b = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> with torch.no_grad():
        ...     _ = a.weight.fill_(3.0), b.weight.fill_(2.0), a.bias.fill_(1.0), b.bias.fill_(1.0)
        >>> layer_distance(a, b)
        {'weight': 0.5, 'bias': 0.0}
    """
    check_made(model, "layer_distance")
    ours, theirs = parameters_by_name(model), parameters_by_name(reference)
    if {n: p.shape for n, p in ours.items()} != {n: p.shape for n, p in theirs.items()}:
        raise ValueError("layer_distance: model and reference must have the same parameters")
    distances = {}
    with torch.no_grad():
        for name, p in ours.items():
            wide = torch.complex128 if p.is_complex() else torch.float64
            other = theirs[name].to(p.device, wide)
            distance, norm = float((p.to(wide) - other).norm()), float(other.norm())
            distances[name] = distance if not relative or distance == 0 else _ratio(distance, norm)
    return distances


def _ratio(distance: float, norm: float) -> float:
    return distance / norm if norm > 0 else math.inf
