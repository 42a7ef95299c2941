"""What a model answers to data, batch by batch, read through its task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_ext.tasks import CausalLM, Classification, Task, resolve
from unlearn_ext.tasks.batches import Batch, Batches, check_batches, device_of, read_batches, tensors_in


def task_for(who: str, task: Task | None, shift: bool | None = None) -> Task:
    """Return the task that a metric reads answers by.

    Args:
        who: Name of the metric, for messages.
        task: What the caller passed; None infers it from the model and each batch.
        shift: The older way to say it: True for a causal language model, False for labels at their own
            positions.

    Returns:
        The task.

    Raises:
        ValueError: If both are given.
    """
    if shift is None:
        return resolve(task, who=who)
    if task is not None:
        raise ValueError(f"{who}: shift must not be given together with task, got {shift}")
    return CausalLM() if shift else Classification()


def answers(
    who: str, model: nn.Module, task: Task, data: Batches, *, name: str = "data", progress: bool = False
) -> Iterator[tuple[Batch, Any]]:
    """Run a model on data.

    Args:
        who: Name of the metric, for messages.
        model: The model, borrowed by the caller.
        task: Calls it.
        data: Re-iterable batches.
        name: What the data is called in messages.
        progress: Show a progress bar, where tqdm is installed.

    Yields:
        Each batch that holds a sample, on the model's device, and the model's outputs.

    Raises:
        FloatingPointError: If an output is NaN: no measure of it would mean anything.
    """
    reader = read_batches(check_batches(data, name), device_of(model), description=who, progress=progress)
    for index, batch in enumerate(reader):
        if not _is_empty(task, batch):
            yield batch, checked(who, task.forward(model, batch), f"batch {index} of {name}")


def _is_empty(task: Task, batch: Batch) -> bool:
    try:
        return task.count(batch) == 0
    except ValueError:  # the model's answer, or the refusal of its batch, says more
        return False


def checked(who: str, outputs: Any, where: str) -> Any:  # noqa: ANN401 - a task's own
    """Return a model's outputs if they are numbers.

    Args:
        who: Name of the metric, for messages.
        outputs: What a task's ``forward`` returned.
        where: Which batch, for the message.

    Returns:
        The outputs.

    Raises:
        FloatingPointError: If one is NaN.
    """
    for tensor in tensors_in(outputs):
        if tensor.is_floating_point() and bool(torch.isnan(tensor).any()):
            raise FloatingPointError(f"{who}: the model's outputs must be numbers, got NaN in {where}")
    return outputs


def log_probabilities(who: str, task: Task, outputs: Any, batch: Batch) -> Tensor:  # noqa: ANN401
    """Return the logarithms of the probabilities that a model gives to the classes.

    Args:
        who: Name of the metric, for messages.
        task: Reads the outputs.
        outputs: What its ``forward`` returned.
        batch: The batch.

    Returns:
        float64 ``[N, ..., C]``, classes last.

    Raises:
        NotImplementedError: If the task has no classes.
    """
    try:
        return task.log_scores(outputs, batch).double()
    except NotImplementedError as error:
        raise NotImplementedError(
            f"{who}: task must have classes, whose probabilities are compared here, got {task!r}"
        ) from error
