"""Closed loop: what a method is to reach, what that may cost, and what was measured before and after.

A *goal* (``until=``) says when the forget set counts as forgotten, a *budget* how much of the retain set's
accuracy may be lost on the way. For texts, most of whose tokens are right whatever the model knows, the loss
stands in for accuracy: ``"unseen"`` is a loss no lower than on unseen texts, and the budget a share by which
the perplexity may rise. Both are judged on the forget and retain data that a method is given (and on
held-out data where the goal is ``"unseen"``); test data are never read.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.seeding import random_states_kept
from unlearn_ext.distributed import ALONE, Ranks
from unlearn_ext.distributed.fsdp import fsdp_modules, reshard
from unlearn_ext.distributed.group import on_all
from unlearn_ext.methods.readings import Reading, Tally, difference
from unlearn_ext.methods.sharded import figures_of, on_all_shards
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches, check_batches, device_of, read_batches
from unlearn_ext.tasks.losses import resolve

if TYPE_CHECKING:
    from unlearn_ext.results import UnlearnResult

Until: TypeAlias = Literal["forgotten", "unseen"] | float | Callable[[nn.Module], bool] | None
"""When to stop: a name, the highest accuracy on the forget set, a test of the model, or None: one shot."""

# Accuracy on the forget set at which a class counts as forgotten.
FORGOTTEN = 0.01


class UnlearningFailed(RuntimeError):  # noqa: N818 - what the public contract calls it
    """The goal was not reached within the budget, and ``strict=True`` was given; the model is as it was.

    Attributes:
        result: The record of the attempt.
    """

    def __init__(self, message: str, result: UnlearnResult) -> None:
        super().__init__(message)
        self.result = result


@dataclass(frozen=True, slots=True)
class Measured:
    """What a model makes of a data set.

    Attributes:
        accuracy: Share of what is counted that it answers rightly; NaN where nothing is counted.
        loss: Mean of the samples' losses.
        samples: Number of samples.
        reading: What tells these samples from others.
    """

    accuracy: float
    loss: float
    samples: int
    reading: Reading | None = field(default=None, compare=False, repr=False)


def measure(
    model: nn.Module,
    data: Batches,
    task: Task | None = None,
    classes_seen: set[int] | None = None,
    ranks: Ranks = ALONE,
) -> Measured:
    """Measure accuracy and mean loss in one forward pass over the data.

    Args:
        model: The model; run in eval mode, left as it was.
        data: Re-iterable batches.
        task: What the model is for; None infers it.
        classes_seen: Takes up the classes of the samples that count, where they have one each.
        ranks: Those that measure together, each on its own share of the data.

    Returns:
        The figures.

    Raises:
        ValueError: If there is no sample.

    Example:
        >>> measure(nn.Identity(), [(torch.eye(4), torch.tensor([0, 1, 2, 0]))]).accuracy
        0.75
    """
    judge = resolve(task, who="measure")
    if fsdp_modules(model):
        accuracy, mean, reading = figures_of(model, check_batches(data), judge, classes_seen, ranks)
        return Measured(accuracy, mean, _at_least_one(reading.samples), reading)
    right = counted = samples = 0
    loss = 0.0
    tally = Tally(model, task, data)
    with borrowed(model), random_states_kept(data), torch.no_grad():
        for batch in read_batches(check_batches(data), device_of(model)):
            n = judge.count(batch)
            if n == 0:
                continue
            outputs = judge.forward(model, batch)
            loss += float(judge.losses(outputs, batch).double().sum())
            samples += n
            tally.add(batch, n)
            try:
                hits, valid = judge.correct(outputs, batch)
            except NotImplementedError:  # there is no right and wrong, as for numbers without a tolerance
                continue
            right, counted = right + int(hits.sum()), counted + int(valid.sum())
            classes = None if classes_seen is None else judge.classes_of(batch)
            if classes_seen is not None and classes is not None:
                classes_seen.update(torch.unique(classes[valid > 0]).tolist())
    right, counted, samples, loss, *sums = ranks.total(
        "measured", right, counted, samples, loss, *tally.sums()
    )
    if classes_seen is not None:
        classes_seen.update(*ranks.exchange("classes", classes_seen))
    _at_least_one(samples)
    return Measured(
        right / counted if counted else math.nan, loss / samples, samples, Reading.of(samples, sums)
    )


def _at_least_one(samples: int) -> int:
    if samples == 0:
        raise ValueError("measure: data must hold at least one sample, got none")
    return samples


class Watch:
    """Measures a model while a method works on it, judges its goal and counts the passes that takes.

    Args:
        who: The method, for messages.
        model: The model.
        forget: The forget set.
        retain: The retain set; None where there is only what was stored of it.
        until: The goal.
        budget: Share of the retain set's accuracy that may be lost, in [0, 1].
        validation: Data that the model never saw, for ``"unseen"``.
        task: What the model is for; None infers it.
        ranks: Those that measure together, each on its own share of the data.

    Attributes:
        budget: As given.
        yardstick: What is watched: ``"accuracy"``, or for texts ``"loss"``.

    Raises:
        TypeError: If the goal is of no known kind.
        ValueError: If the goal or the budget is out of range, or ``validation`` is missing or of no use.
    """

    def __init__(
        self,
        who: str,
        model: nn.Module,
        forget: Batches,
        retain: Batches | None,
        *,
        until: Until,
        budget: float,
        validation: Batches | None = None,
        task: Task | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        check_goal(who, until, budget, validation)
        self.budget = budget
        self._model, self._until, self._validation = model, until, validation
        self._sets = {"forget": forget} if retain is None else {"forget": forget, "retain": retain}
        self._task, self._ranks = task, ranks
        self._who, self._told = who, set[str]()
        self.yardstick = resolve(task, who=who).yardstick(model)
        self._classes: dict[str, set[int]] = {name: set() for name in self._sets}
        self._before = {
            name: measure(model, data, task, self._classes[name], ranks) for name, data in self._sets.items()
        }
        self._read = self._total = sum(part.samples for part in self._before.values())

    @property
    def passes(self) -> float:
        """Forward passes made so far, in passes over all the data that are watched."""
        return self._read / self._total

    @property
    def goal(self) -> str:
        """The goal in words."""
        if callable(self._until):
            return "what until asks of the model"
        if self._until == "unseen" and self.yardstick == "loss":
            return "a loss on the forget set no lower than on the validation set"
        if self._until == "unseen":
            return "accuracy on the forget set no higher than on the validation set"
        return f"accuracy on the forget set at most {self.limit:.2%}"

    @property
    def limit(self) -> float:
        """The highest accuracy on the forget set where the goal is such a number; else NaN."""
        if self._until == "forgotten":
            return FORGOTTEN
        return float(self._until) if isinstance(self._until, (int, float)) else math.nan

    @property
    def has_retain(self) -> bool:
        """Whether there are retain data to watch."""
        return "retain" in self._sets

    @property
    def shared_classes(self) -> list[int]:
        """Classes that have samples in both sets; none where samples have no single class each."""
        return sorted(self._classes["forget"] & self._classes.get("retain", set()))

    def before(self, name: str) -> Measured:
        """Return what was measured before anything was done.

        Args:
            name: ``"forget"`` or ``"retain"``.

        Returns:
            The figures.
        """
        return self._before[name]

    def now(self, name: str) -> Measured:
        """Measure the model as it is.

        Args:
            name: ``"forget"`` or ``"retain"``.

        Returns:
            The figures.
        """
        found = measure(self._model, self._sets[name], self._task, ranks=self._ranks)
        self._read += found.samples
        first = self._before[name].reading
        if name not in self._told and first is not None and found.reading is not None:
            text, are_others = difference(name, first, found.reading)
            if are_others:
                self._told.add(name)
                warnings.warn(f"{self._who}: {text}", stacklevel=3)
        return found

    def count(self, samples: int) -> None:
        """Count a forward pass that was made elsewhere.

        Args:
            samples: Number of samples it read.
        """
        self._read += samples

    def reached(self, forget: Measured) -> bool:
        """Say whether the model as it is has reached the goal.

        Args:
            forget: What was measured of it on the forget set.

        Returns:
            True if it has; False also where the accuracy cannot be told.
        """
        if callable(self._until):
            test = self._until
            if fsdp_modules(self._model) and not self._ranks.are_many:
                return on_all_shards(self._model, bool(test(self._model)))
            will_do = on_all(self._ranks, "until", lambda: bool(test(self._model)))
            reshard(self._model)
            return will_do
        if self._until == "unseen" and self._validation is not None:
            unseen = measure(self._model, self._validation, self._task, ranks=self._ranks)
            self._read += unseen.samples
            if self.yardstick == "loss":
                return forget.loss >= unseen.loss
            return forget.accuracy <= unseen.accuracy
        return forget.accuracy <= self.limit

    def lost(self, retain: Measured) -> float:
        """Say what has been lost on the retain set.

        Args:
            retain: What was measured on it now.

        Returns:
            Accuracy before less accuracy now; for texts the share by which the perplexity has risen.
        """
        before = self._before["retain"]
        if self.yardstick == "loss":
            return perplexity_rise(before.loss, retain.loss)
        return before.accuracy - retain.accuracy

    def knows(self, forget: Measured) -> float:
        """Say how well the forget set is known, for comparing one model with another.

        Args:
            forget: What was measured of it.

        Returns:
            The accuracy; for texts minus the loss.
        """
        return -forget.loss if self.yardstick == "loss" else forget.accuracy

    def known_in_words(self, forget: Measured) -> str:
        """Put into words how well the forget set is known.

        Args:
            forget: What was measured of it.

        Returns:
            A phrase.
        """
        if self.yardstick == "loss":
            return f"the loss on the forget set was {forget.loss:.4g} at the end"
        return f"the accuracy on the forget set was {forget.accuracy:.2%} at the end"

    def in_words(self, lost: float) -> str:
        """Put what was lost into words.

        Args:
            lost: What ``lost`` returned.

        Returns:
            A phrase.
        """
        if self.yardstick == "loss":
            return f"{100 * lost:.2f} % of retain perplexity gained"
        return f"{100 * lost:.2f} points of retain accuracy lost"


def perplexity_rise(before: float, after: float) -> float:
    """Return the share by which the perplexity has risen.

    Args:
        before: Mean loss per token.
        after: The same afterwards.

    Returns:
        ``exp(after - before) - 1``; infinity where that is too large for a number.

    Example:
        >>> round(perplexity_rise(1.0, 1.1), 3)
        0.105
    """
    return math.expm1(after - before) if after - before < 700 else math.inf


def figures(measured: Mapping[str, Measured]) -> dict[str, float]:
    """Lay figures out for the record.

    Args:
        measured: Set to what was measured on it.

    Returns:
        ``forget_accuracy``, ``forget_loss`` and so on.
    """
    return {
        f"{name}_{what}": value
        for name, found in measured.items()
        for what, value in (("accuracy", found.accuracy), ("loss", found.loss))
    }


def check_goal(who: str, until: Until, budget: float, validation: Batches | None) -> None:
    """Refuse a goal that cannot be judged.

    Args:
        who: The method, for messages.
        until: The goal.
        budget: The budget.
        validation: Held-out data.

    Raises:
        TypeError: If the goal is of no known kind.
        ValueError: If a value is out of range, or ``validation`` is missing or of no use.
    """
    number = isinstance(until, (int, float)) and not isinstance(until, bool)
    if not (until is None or isinstance(until, str) or number or callable(until)):
        raise TypeError(
            f"{who}: until must be 'forgotten', 'unseen', a number, a callable or None, got "
            f"{type(until).__name__}"
        )
    if isinstance(until, str) and until not in ("forgotten", "unseen"):
        raise ValueError(f"{who}: until must be 'forgotten' or 'unseen' if it is a name, got {until!r}")
    if isinstance(until, (int, float)) and not 0 <= until <= 1:
        raise ValueError(f"{who}: until must lie in [0, 1] if it is an accuracy, got {until}")
    if isinstance(budget, (str, bool)) or not 0 <= budget <= 1:
        raise ValueError(f"{who}: budget must lie in [0, 1], got {budget!r}")
    if until == "unseen" and validation is None:
        raise ValueError(f"{who}: validation must be given for until='unseen': data that the model never saw")
    if validation is not None:
        check_batches(validation, "validation")
