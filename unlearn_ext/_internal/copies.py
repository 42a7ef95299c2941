"""Copies of a user's model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy

import torch
from torch import Tensor, nn


def copied(model: nn.Module) -> nn.Module:
    """Copy a model, with all that its modules keep.

    What a forward pass has left in an attribute with its graph (features that are kept for later, the weight
    that ``torch.nn.utils.weight_norm`` or ``prune`` computes) is copied without it, where ``copy.deepcopy``
    refuses.

    Args:
        model: The model.

    Returns:
        The copy.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> model.kept = model(torch.ones(1, 2))
        >>> torch.equal(copied(model).kept, model.kept)
        True
    """
    graphs = [value for module in model.modules() for value in _tensors(vars(module)) if not value.is_leaf]
    memo = {id(value): value.detach().clone() for value in graphs}
    with torch.no_grad():  # else the parameters of a scripted module are copied with a graph
        copy = deepcopy(model, memo)
    for parameter, original in zip(copy.parameters(), model.parameters(), strict=True):
        if parameter.requires_grad != original.requires_grad:
            parameter.requires_grad_(original.requires_grad)
    return copy


def frozen_copy(model: nn.Module) -> nn.Module:
    """Copy a model to answer as it does now: in eval mode, without gradients.

    Args:
        model: The model.

    Returns:
        The copy.
    """
    copy = copied(model).eval()
    for parameter in copy.parameters():
        parameter.requires_grad_(False)
    return copy


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from _tensors(each)
