"""What a second-order step may cost: how samples are answered before and after, and what is too much."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches, device_of, read_batches

# One-sided: a class that only seems worse by chance passes with 98 %.
_DEVIATIONS = 2.0


class UnlearningFailed(RuntimeError):  # noqa: N818 - named for what happened
    """The goal was not reached within the budget; the model is as it was.

    Args:
        message: What was tried.
        result: The record of the run.

    Attributes:
        result: The record of the run.
    """

    def __init__(self, message: str, result: UnlearnResult) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True)
class Answers:
    """How the samples of a set are answered.

    Attributes:
        right: Right answers, per sample.
        labels: Answers that count, per sample.
        classes: The class of every sample, where it has one.
    """

    right: Tensor
    labels: Tensor
    classes: Tensor | None

    @property
    def counted(self) -> int:
        """Number of samples with a label."""
        return int((self.labels > 0).sum())

    @property
    def accuracy(self) -> float:
        """Share of the labels that are predicted."""
        return float(self.right.sum()) / float(self.labels.sum())


def answers(model: nn.Module, task: Task, data: Batches, name: str) -> Answers:
    """See how a model answers.

    Args:
        model: The model; run in eval mode, left as it was.
        task: What it is for.
        data: Re-iterable batches.
        name: Of the set, for the message.

    Returns:
        What is right.

    Raises:
        ValueError: If there is no label.
    """
    right: list[Tensor] = []
    counted: list[Tensor] = []
    classes: list[Tensor] = []
    with borrowed(model), torch.no_grad():
        for batch in read_batches(data, device_of(model)):
            if task.count(batch) == 0:
                continue
            for found, part in zip(
                (right, counted), task.correct(task.forward(model, batch), batch), strict=True
            ):
                found.append(part.long().cpu())
            own = task.classes_of(batch)
            classes += [] if own is None else [own.cpu()]
    if not counted or not bool(torch.cat(counted).any()):
        raise ValueError(f"newton: {name} must hold at least one label, got none")
    known = len(classes) == len(counted)
    return Answers(torch.cat(right), torch.cat(counted), torch.cat(classes) if known else None)


@dataclass(frozen=True)
class Guard:
    """Budgets: shares of accuracy that may be lost.

    Attributes:
        retain: On the retain set.
        validation: On the validation set.
        classes: On every class of the validation set.

    Raises:
        ValueError: If one is not in [0, 1].
    """

    retain: float
    validation: float
    classes: float

    def __post_init__(self) -> None:
        for name, value in (("", self.retain), ("validation_", self.validation), ("class_", self.classes)):
            if not (math.isfinite(value) and 0 <= value <= 1):
                raise ValueError(f"newton: {name}budget must lie in [0, 1], got {value}")

    def broken(self, before: Mapping[str, Answers], after: Mapping[str, Answers]) -> list[str]:
        """Say which budgets are exceeded.

        Args:
            before: Answers of the untouched model, by set.
            after: Answers after the step.

        Returns:
            A phrase for every one.
        """
        told = []
        for name, allowed in (("retain", self.retain), ("validation", self.validation)):
            if name in before:
                lost = before[name].accuracy - after[name].accuracy
                if lost > allowed:
                    told.append(f"{name} accuracy {100 * lost:.1f} points lower")
        classes = before["validation"].classes
        if classes is not None:
            was, now = before["validation"].right, after["validation"].right
            for label in sorted(set(classes[before["validation"].labels > 0].tolist())):
                change = (was - now)[classes == label]
                net, n = int(change.sum()), len(change)
                # Answers change both ways, the more the further the step. A net loss is one where more got
                # worse than got better by other than chance (the sign test, as a normal deviate).
                deviation = math.sqrt(int(change.abs().sum()))
                if net > self.classes * n and net > _DEVIATIONS * deviation:
                    told.append(f"class {label}: validation accuracy {100 * net / n:.1f} points lower")
        return told
