"""What a second-order step may cost: how samples are answered before and after, and what is too much."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext.distributed import ALONE, MeshRanks, Ranks
from unlearn_ext.distributed.fsdp_steps import steps
from unlearn_ext.methods.until import perplexity_rise
from unlearn_ext.tasks.base import Outputs, Task, Yardstick
from unlearn_ext.tasks.batches import Batch, Batches, device_of, read_batches

# See Note [What a small validation set can tell].
_DEVIATIONS, _MANY_DEVIATIONS = 2.0, 3.0
# How many times its share of unseen samples a class's share of the forget set is where it is aimed at.
_CONCENTRATED = 2.0
# How improbable so many samples of a class are where the forget set is not a draw like the unseen samples.
_NOT_BY_CHANCE = 1e-6


@dataclass(frozen=True)
class Answers:
    """How the samples of a set are answered.

    Attributes:
        right: Right answers, per sample.
        labels: Answers that count, per sample.
        classes: The class of every sample, where it has one.
        loss: Mean of the samples' losses.
    """

    right: Tensor
    labels: Tensor
    classes: Tensor | None
    loss: float = math.nan

    @property
    def counted(self) -> int:
        """Number of samples with a label."""
        return int((self.labels > 0).sum())

    @property
    def accuracy(self) -> float:
        """Share of the labels that are predicted."""
        return float(self.right.sum()) / float(self.labels.sum())

    def known(self, yardstick: Yardstick) -> float:
        """Say how well the samples are known.

        Args:
            yardstick: What tells.

        Returns:
            The accuracy, or minus the loss: the higher, the better.
        """
        return -self.loss if yardstick == "loss" else self.accuracy

    def share(self, label: int) -> float:
        """Return the share of samples of a class.

        Args:
            label: The class.

        Returns:
            A number in [0, 1]; 0 where samples have no classes.
        """
        return 0.0 if self.classes is None else float((self.classes == label).double().mean())


def unseen_accuracy(unseen: Answers, forget: Answers) -> float:
    """Say how well samples like those of the forget set are answered that the model never saw.

    A class that is harder than others has fewer right answers among its unseen samples. Where the forget set
    has more of some class than chance explains, the unseen samples count as often as their classes occur in
    it, if that is the lower figure: what is like unseen samples of all classes would not be like those of
    its own.

    Args:
        unseen: Answers on the validation set.
        forget: Answers on the forget set, by the same model.

    Returns:
        An accuracy in [0, 1], at most that of the validation set.

    Example:
        >>> ones = torch.ones(40)
        >>> unseen = Answers(torch.tensor([1, 0] * 10 + [1, 1] * 10), ones, torch.tensor([0] * 20 + [1] * 20))
        >>> unseen.accuracy, unseen_accuracy(unseen, Answers(ones, ones, torch.zeros(40)))
        (0.75, 0.5)
    """
    if unseen.classes is None or forget.classes is None:
        return unseen.accuracy
    mine, theirs = (part.classes[part.labels > 0] for part in (forget, unseen))  # type: ignore[index]
    right = unseen.right[unseen.labels > 0].double()
    total, weight, is_chance = 0.0, 0.0, True
    for label in mine.unique().tolist():
        own, count = theirs == label, int((mine == label).sum())
        is_chance &= _chance_of(count, len(mine), int(own.sum()), len(theirs)) >= _NOT_BY_CHANCE
        if bool(own.any()):
            total, weight = total + count * float(right[own].mean()), weight + count
    return unseen.accuracy if is_chance or weight == 0 else min(unseen.accuracy, total / weight)


def answers(model: nn.Module, task: Task, data: Batches, name: str, ranks: Ranks = ALONE) -> Answers:
    """See how a model answers.

    Args:
        model: The model; run in eval mode, left as it was.
        task: What it is for.
        data: Re-iterable batches.
        name: Of the set, for the message.
        ranks: Those that look together, each at its own share of the set.

    Returns:
        What is right.

    Raises:
        ValueError: If there is no label.
    """
    right: list[Tensor] = []
    counted: list[Tensor] = []
    classes: list[Tensor] = []
    losses: list[Tensor] = []
    with _passing(model, task, data, ranks) as batches, borrowed(model), torch.no_grad():
        for batch, outputs in batches:
            for found, part in zip((right, counted), task.correct(outputs, batch), strict=True):
                found.append(part.long().cpu())
            losses.append(task.losses(outputs, batch).double().cpu())
            own = task.classes_of(batch)
            classes += [] if own is None else [own.cpu()]
    known = all(ranks.exchange("classes", len(classes) == len(counted)))
    none = torch.zeros(0, dtype=torch.long)
    columns = [[none, *part] for part in (right, counted, *([classes] if known else []))]
    joined = ranks.concatenated("answers", [torch.cat(part) for part in (*columns, [none.double(), *losses])])
    if not bool(joined[1].any()):
        raise ValueError(f"newton: {name} must hold at least one label, got none")
    return Answers(joined[0], joined[1], joined[2] if known else None, float(joined[-1].mean()))


def _chance_of(count: int, n: int, others: int, n_others: int) -> float:
    # Fisher's exact test: of all samples of a class, as many or more among these n, were they drawn by lot.
    def choices(of: int, drawn: Tensor) -> Tensor:
        whole = torch.tensor(float(of), dtype=torch.float64)
        return torch.lgamma(whole + 1) - torch.lgamma(drawn + 1) - torch.lgamma(whole - drawn + 1)

    k = torch.arange(count, min(n, count + others) + 1, dtype=torch.float64)
    pairs = choices(count + others, k) + choices(n + n_others - count - others, n - k)
    return float((pairs - choices(n + n_others, torch.tensor(float(n), dtype=torch.float64))).exp().sum())


@contextmanager
def _passing(
    model: nn.Module, task: Task, data: Batches, ranks: Ranks
) -> Iterator[Iterator[tuple[Batch, Outputs]]]:
    if isinstance(ranks, MeshRanks):
        sharded = ranks.begin("answers")
        with sharded.resharded():
            yield _in_step(ranks, task, data)
        return
    batches = (batch for batch in read_batches(data, device_of(model)) if task.count(batch))
    yield ((batch, task.forward(model, batch)) for batch in batches)


def _in_step(ranks: MeshRanks, task: Task, data: Batches) -> Iterator[tuple[Batch, Outputs]]:
    sharded = ranks.sharded
    for step in steps(sharded, data, task, sharded.device):
        with ranks.in_collectives():
            outputs = task.forward(sharded.model, step.batch)
        if step.is_live:
            yield step.batch, outputs
        ranks.exchange("answers of a batch", None)  # what was made of them has come out right on all ranks


@dataclass(frozen=True)
class Guard:
    """Budgets: shares of accuracy that may be lost.

    Attributes:
        retain: On the retain set; by the loss, a share by which the perplexity may rise.
        validation: On the validation set.
        classes: On every class of the validation set.
        yardstick: What is watched on the retain set.

    Raises:
        ValueError: If one is not in [0, 1].
    """

    retain: float
    validation: float
    classes: float
    yardstick: Yardstick = "accuracy"

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
        if "retain" in before and self.yardstick == "loss":
            rise = perplexity_rise(before["retain"].loss, after["retain"].loss)
            told += [f"retain perplexity {100 * rise:.1f} % higher"] if rise > self.retain else []
        elif "retain" in before and before["retain"].accuracy - after["retain"].accuracy > self.retain:
            lost = before["retain"].accuracy - after["retain"].accuracy
            told.append(f"retain accuracy {100 * lost:.1f} points lower")
        was, now = before["validation"], after["validation"]
        change = was.right - now.right
        if _exceeds(change, was.labels, self.validation, _DEVIATIONS):
            lost = was.accuracy - now.accuracy
            told.append(f"validation accuracy {100 * lost:.1f} points lower")
        if was.classes is None:
            return told
        for label in sorted(set(was.classes[was.labels > 0].tolist())):
            own = was.classes == label
            # Harm to a class is to be expected where the request is about that class: no excuses then.
            is_aimed_at = before["forget"].share(label) > _CONCENTRATED * was.share(label)
            deviations = 0.0 if is_aimed_at else _MANY_DEVIATIONS
            if _exceeds(change[own], was.labels[own], self.classes, deviations):
                lost = float(change[own].sum()) / float(was.labels[own].sum())
                told.append(f"class {label}: validation accuracy {100 * lost:.1f} points lower")
        return told


# Note [What a small validation set can tell]
# Answers change both ways, the more the further the step: of 50 samples of a class, a network retrained with
# another seed answers several differently. A loss counts if it exceeds the budget and more answers got worse
# than got better by other than chance: the sign test, as a normal deviate. With many classes some look worse
# by chance, so their bar is higher.
def _exceeds(change: Tensor, counted: Tensor, budget: float, deviations: float) -> bool:
    net, spread = float(change.sum()), math.sqrt(float(change.abs().sum()))
    return net > budget * float(counted.sum()) and net > deviations * spread
