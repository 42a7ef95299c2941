"""Shares of answers that are right."""

from __future__ import annotations

import torch
from torch import nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext.distributed import Group, lockstep, ranks_of
from unlearn_ext.evaluation.metrics.answers import answers, task_for
from unlearn_ext.tasks import Task
from unlearn_ext.tasks.batches import Batches


@lockstep
def accuracy(
    model: nn.Module,
    data: Batches,
    *,
    task: Task | None = None,
    shift: bool | None = None,
    progress: bool = False,
    process_group: Group = None,
) -> float:
    """Return the share of the model's answers that are right, as its task counts them.

    Right over counted, not a mean over batches. Where a sample has a label per position (language models,
    segmentation) every position counts that the task does not ignore; of several labels at a time each one
    counts; a number is right within the task's tolerance.

    Args:
        model: The model; run in eval mode, left as it was.
        data: Re-iterable batches with labels.
        task: What the model is for; None infers it from the model and the batch. See ``ux.tasks``.
        shift: The older way to say it: True for ``ux.tasks.CausalLM()``, False for
            ``ux.tasks.Classification()``.
        progress: Show a progress bar, where tqdm is installed.
        process_group: Ranks that call this together, each with its own share of the data, perhaps none: the
            figure is that of all data, and the same on every rank.

    Returns:
        A number in [0, 1].

    Raises:
        FloatingPointError: If an output of the model is NaN.
        NotImplementedError: If the task has no right and wrong answers.
        ValueError: If there is no label to predict, or the labels are not the task's.

    Example:
        >>> accuracy(nn.Identity(), [(torch.eye(4), torch.tensor([0, 1, 2, 0]))])
        0.75
    """
    judge = task_for("accuracy", task, shift)
    right = counted = 0
    with borrowed(model), torch.no_grad():
        for batch, outputs in answers("accuracy", model, judge, data, progress=progress):
            hits, total = judge.correct(outputs, batch)
            right += int(hits.sum())
            counted += int(total.sum())
    right, counted = ranks_of(process_group, "accuracy").total("answers", right, counted)
    if counted == 0:
        raise ValueError("accuracy: data must hold at least one label, got none")
    return float(right / counted)
