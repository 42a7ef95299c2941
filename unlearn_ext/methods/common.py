"""Small parts that several methods share."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext.tasks.batches import Batch, Batches, count_samples, device_of, read_batches
from unlearn_ext.tasks.outputs import scores_and_labels


def trainable(model: nn.Module, method: str) -> list[nn.Parameter]:
    """Return the parameters that may change.

    Args:
        model: The model.
        method: For the message.

    Returns:
        Those that require grad, at least one.

    Raises:
        ValueError: If there is none.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(f"{method}: model must have a trainable parameter, got none")
    return parameters


def train_with_fixed_statistics(model: nn.Module) -> None:
    """Put the model in train mode, but every layer that keeps running statistics in eval mode.

    A batch of the forget set alone has statistics that no later batch has: what is learned under them does
    not carry over to eval mode.

    Args:
        model: The model.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            module.eval()


def n_classes(model: nn.Module, data: Batches) -> int:
    """Ask the model for the number of its classes.

    Args:
        model: The model; left as it was.
        data: Its first non-empty batch is read.

    Returns:
        The size of the logits' class dimension.

    Raises:
        ValueError: If there is no sample.
    """
    with borrowed(model), torch.no_grad():
        for batch in read_batches(data, device_of(model)):
            if count_samples(batch):
                return scores_and_labels(model, batch)[0].shape[-1]
    raise ValueError("data must hold at least one sample, got none")


def count_batches(data: Batches) -> int:
    """Count batches: by ``len`` where that is known, else in a pass that leaves the random state as it was.

    Args:
        data: Re-iterable batches.

    Returns:
        Their number.

    Example:
        >>> count_batches([(torch.zeros(4, 3),), (torch.zeros(1, 3),)])
        2
    """
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:  # a DataLoader of a stream has the method, and no answer
        with torch.random.fork_rng([]):
            return sum(1 for _ in data)


def epochs_of(steps: int, data: Batches) -> int:
    """Return how many passes over the data make at least so many steps.

    Args:
        steps: One per batch.
        data: Re-iterable batches; an empty set counts as one.

    Returns:
        The number of passes.

    Example:
        >>> epochs_of(5, [(torch.zeros(4, 3),), (torch.zeros(1, 3),)])
        3
    """
    return math.ceil(steps / max(1, count_batches(data)))


class Paired:
    """Every batch of one set together with one of another, which starts again when it ends; re-iterable.

    Args:
        first: Read once per pass.
        second: Read as often as it takes.
    """

    def __init__(self, first: Batches, second: Batches) -> None:
        self._first = first
        self._second = second

    def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
        others: Iterator[Batch] = iter([])
        for batch in self._first:
            other = next(others, None)
            if other is None:
                others = iter(self._second)
                other = next(others, None)
                if other is None:
                    raise ValueError("forget must hold a batch, got none")
            yield batch, other
