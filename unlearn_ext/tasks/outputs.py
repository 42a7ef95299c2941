"""What a model answers to a batch, and the labels that go with it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from unlearn_ext.tasks.batches import Batch


def targets(batch: Batch) -> Tensor:
    """Return the labels of a batch: the second entry of a tuple, ``labels`` of a mapping.

    Args:
        batch: A batch in either form.

    Returns:
        The labels, as they are.

    Raises:
        ValueError: If the batch holds no labels.
    """
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            raise ValueError(f"a mapping must hold the tensor 'labels', got the keys {list(batch)}")
        return labels
    labels = batch[1] if len(batch) > 1 else None
    if not isinstance(labels, Tensor):
        kinds = ", ".join(type(entry).__name__ for entry in batch)
        raise ValueError(f"a batch must hold (inputs, targets) with targets a tensor, got ({kinds})")
    return labels


def with_targets(batch: Batch, labels: Tensor) -> Batch:
    """Return the batch with other labels; the batch itself is left alone.

    Args:
        batch: A batch in either form that holds labels.
        labels: What to put in their place.

    Returns:
        A batch of the same form.
    """
    if isinstance(batch, Mapping):
        return {**batch, "labels": labels}
    replaced = [batch[0], labels, *batch[2:]]
    if isinstance(batch, tuple):
        return type(batch)(*replaced) if hasattr(batch, "_fields") else tuple(replaced)
    return replaced


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
        The logits: ``[N, C]``, ``[N, T, C]`` or ``[N, C, ...]``.

    Raises:
        TypeError: If there are no logits in the model's output.
    """
    if isinstance(batch, Mapping):
        needs_labels = _is_encoder_decoder(model) and "decoder_input_ids" not in batch
        output = model(**{key: value for key, value in batch.items() if key != "labels" or needs_labels})
    else:
        output = model(batch[0])
    found = output
    if hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, tuple) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(f"the model must return logits, got {type(output).__name__}")
    return found


def scores_and_labels(model: nn.Module, batch: Batch, *, shift: bool | None = None) -> tuple[Tensor, Tensor]:
    """Run the model and line its logits up with the labels, classes in the last dimension.

    Args:
        model: The model.
        batch: A batch with integer labels.
        shift: Whether position ``t`` predicts the label of position ``t + 1``. None decides by the form: a
            mapping whose logits are ``[N, T, C]`` and whose labels are ``[N, T]`` is a causal language
            model's and is shifted, unless the model's ``config`` says encoder-decoder; a tuple never is.

    Returns:
        Scores ``[N, ..., C]`` (float32 for half-precision models) and labels ``[N, ...]``.

    Raises:
        ValueError: If there are no integer labels, or their shape does not go with the logits.
    """
    labels = targets(batch)
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    scores = logits(model, batch)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    classes_last = scores.shape[:-1] == labels.shape
    if not classes_last and (scores.ndim < 3 or scores.shape[:1] + scores.shape[2:] != labels.shape):
        raise ValueError(
            f"labels must have the shape of the logits without the class dimension, got labels "
            f"{list(labels.shape)} for logits {list(scores.shape)}"
        )
    if shift is None:
        sequences = classes_last and labels.ndim == 2
        shift = sequences and isinstance(batch, Mapping) and not _is_encoder_decoder(model)
    if not classes_last:
        scores = scores.movedim(1, -1)
    return (scores[:, :-1], labels[:, 1:]) if shift else (scores, labels)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
