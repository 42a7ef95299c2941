"""In which order a model uses its parameters."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext.tasks.batches import Batch
from unlearn_ext.tasks.losses import LossFn


def order_of_use(
    model: nn.Module, parameters: Mapping[str, Tensor], batch: Batch, loss_fn: LossFn
) -> list[str]:
    """Sort parameters by their first use in a forward pass, as the autograd graph of a loss tells it.

    Parameters of one operation keep the order of ``parameters``; one that the loss does not depend on, or
    whose use autograd does not record, follows its predecessor there.

    Args:
        model: The model; run in eval mode, left as it was.
        parameters: Some of its trainable parameters by name.
        batch: What to run it on, on its device.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``.

    Returns:
        The names.

    Example:
        >>> class Backwards(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.last, self.first = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        ...
        ...     def forward(self, x):
        ...         return self.last(self.first(x))
        >>> model = Backwards()
        >>> import torch
        >>> named = dict(model.named_parameters())
        >>> order_of_use(model, named, (torch.ones(1, 2),), lambda model, batch: model(*batch).sum(1))
        ['first.weight', 'last.weight']
    """
    with borrowed(model):
        first = _first_uses(loss_fn(model, batch).sum())
    keys: dict[str, float] = {}
    last = -math.inf
    for name, parameter in parameters.items():
        last = keys[name] = first.get(id(parameter), last)
    return sorted(parameters, key=keys.__getitem__)


def _first_uses(total: Tensor) -> dict[int, float]:
    # Nodes are numbered as they are made; the first that takes a parameter is its first use.
    first: dict[int, float] = {}
    waiting, seen = [total.grad_fn], {total.grad_fn}
    while waiting:
        node = waiting.pop()
        if node is None:
            continue
        for taken, _ in node.next_functions:
            variable = getattr(taken, "variable", None)
            if variable is not None:
                number = float(node._sequence_nr())
                first[id(variable)] = min(number, first.get(id(variable), math.inf))
            elif taken is not None and taken not in seen:
                seen.add(taken)
                waiting.append(taken)
    return first
