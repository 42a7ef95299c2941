"""Shares of labels that a model predicts."""

from __future__ import annotations

import torch
from torch import nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext.tasks.batches import Batches, check_batches, device_of, read_batches
from unlearn_ext.tasks.outputs import scores_and_labels


def accuracy(model: nn.Module, data: Batches, *, shift: bool | None = None, progress: bool = False) -> float:
    """Return the share of labels that the model predicts.

    Correct over total, not a mean over batches. Where a sample has a label per position (language models,
    segmentation) every position counts; positions with a negative label are left out.

    Args:
        model: The model; run in eval mode, left as it was.
        data: Re-iterable batches with integer labels.
        shift: As in ``losses.cross_entropy``: whether position ``t`` predicts the label of position ``t +
            1``.
        progress: Show a progress bar on a terminal, where tqdm is installed.

    Returns:
        A number in [0, 1].

    Raises:
        ValueError: If there is no label to predict.

    Example:
        >>> accuracy(nn.Identity(), [(torch.eye(4), torch.tensor([0, 1, 2, 0]))])
        0.75
    """
    correct = total = 0
    with borrowed(model), torch.no_grad():
        for batch in read_batches(
            check_batches(data), device_of(model), description="accuracy", progress=progress
        ):
            scores, labels = scores_and_labels(model, batch, shift=shift)
            counted = labels >= 0
            correct += int(((scores.argmax(-1) == labels) & counted).sum())
            total += int(counted.sum())
    if total == 0:
        raise ValueError("accuracy: data must hold at least one label, got none")
    return correct / total
