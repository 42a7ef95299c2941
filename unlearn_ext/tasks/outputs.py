"""What a model answers to a batch, and the labels that go with it, for code without a task."""

from __future__ import annotations

from torch import Tensor, nn

from unlearn_ext.tasks.batches import Batch
from unlearn_ext.tasks.categorical import Categorical
from unlearn_ext.tasks.fields import Fields, logits_in
from unlearn_ext.tasks.losses import task_of


def targets(batch: Batch) -> Tensor:
    """Return the labels of a batch: the second entry of a tuple, ``labels`` (or ``label``) of a mapping.

    Args:
        batch: A batch in either form.

    Returns:
        The labels, as they are.
    """
    return Fields().labels_of(batch)


def with_targets(batch: Batch, labels: Tensor) -> Batch:
    """Return the batch with other labels; the batch itself is left alone.

    Args:
        batch: A batch in either form that holds labels.
        labels: What to put in their place.

    Returns:
        A batch of the same form.
    """
    return Fields().with_labels(batch, labels)


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Run the model on a batch and return its logits.

    A tuple's first entry is the only argument; a mapping's entries are keyword arguments, without ``labels``
    (the package computes its own loss, per sample). An encoder-decoder model that gets no
    ``decoder_input_ids`` derives them from the labels, so it is given these too.

    Args:
        model: The model; its output is a tensor, an object or mapping with ``logits``, or a tuple that starts
            with them.
        batch: A batch in either form, on the model's device.

    Returns:
        The logits: ``[N, C]``, ``[N, T, C]`` or ``[N, C, ...]``; float32 for half-precision models.
    """
    return logits_in(Fields().call(model, batch))


def scores_and_labels(model: nn.Module, batch: Batch, *, shift: bool | None = None) -> tuple[Tensor, Tensor]:
    """Run the model and line its logits up with the labels, classes in the last dimension.

    Args:
        model: The model.
        batch: A batch with integer labels.
        shift: Whether position ``t`` predicts the label of position ``t + 1``. None asks the model; for a
            mapping with labels ``[N, T]`` of a model that does not tell, it must be given.

    Returns:
        Scores ``[N, ..., C]`` (float32 for half-precision models) and labels ``[N, ...]``.

    Raises:
        ValueError: If there are no integer labels, their shape does not go with the logits, or what the model
            predicts is no class.
    """
    task = task_of(model, batch, shift)
    if not isinstance(task, Categorical):
        raise ValueError(f"the model must predict classes, got the task {task!r}")
    return task.aligned(task.forward(model, batch), batch)
