"""The closed loop of methods that train: to a goal, within a budget, or the model is left alone."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unlearn_ext._internal.dtensors import local_of
from unlearn_ext._internal.names import parameters_by_name
from unlearn_ext.distributed import ALONE, Ranks
from unlearn_ext.methods.common import required
from unlearn_ext.methods.until import Measured, UnlearningFailed, Until, Watch, check_goal, figures
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches

if TYPE_CHECKING:
    from unlearn_ext.methods.run import Run
    from unlearn_ext.results import UnlearnResult

# Halvings of the way back to the original weights, where the way out cost too much.
_HALVINGS = 6


class ClosedLoop:
    """What a method that trains is to reach, and what that may cost; without ``until`` nothing is asked.

    ``unlearning`` begins and concludes it, ``loop.train`` asks after every epoch whether to stop.

    Args:
        who: The method.
        model: The model, as it is before.
        forget: The forget set.
        retain: The retain set, where there is one.
        until: The goal.
        budget: Retain accuracy that may be lost, as a share.
        validation: Data that the model never saw, for ``"unseen"``.
        strict: Raise where the goal is not reached, not warn.
        task: What the model is for.
        ranks: Those that run together.

    Raises:
        TypeError: If the goal is of no known kind.
        ValueError: If a setting is out of range, or there is no forget set to watch.
        NotImplementedError: If the task counts no answer as right or wrong.
    """

    def __init__(
        self,
        who: str,
        model: nn.Module,
        forget: Batches | None,
        retain: Batches | None,
        until: Until,
        budget: float,
        validation: Batches | None,
        strict: bool,
        task: Task,
        ranks: Ranks = ALONE,
    ) -> None:
        self._who, self._strict = who, strict
        self._rule: GoalRule | None = None
        self._watch: Watch | None = None
        self._epochs = 0
        self._stopped = False
        self.facts: Mapping[str, object] = {}
        check_goal(who, until, budget, validation)
        if until is None:
            return
        required(who, forget=forget)
        assert forget is not None
        self._watch = Watch(
            who,
            model,
            forget,
            retain,
            until=until,
            budget=budget,
            validation=validation,
            task=task,
            ranks=ranks,
        )
        if math.isnan(self._watch.before("forget").accuracy) and not callable(until):
            raise NotImplementedError(
                f"{who}: until must be None, or a function of the model, for a task that counts no answer as "
                "right or wrong"
            )
        self.facts = {"until": until, "budget": budget}

    def begin(self, run: Run) -> None:
        """Take up the run.

        Args:
            run: The run; told what is measured.
        """
        if self._watch is not None:
            weights = list(parameters_by_name(run.model).items())
            self._rule = GoalRule(run, weights, self._watch, is_patient=True)
            self._stopped = self._rule.reached

    @property
    def stops(self) -> bool:
        """Whether there is nothing left to do."""
        return self._stopped

    def after_epoch(self) -> bool:
        """Measure, where there is a goal.

        Returns:
            Whether to stop.
        """
        if self._rule is not None:
            self._stopped = self._rule(self._epochs)
            self._epochs += 1
        return self._stopped

    def conclude(self) -> None:
        """Keep what reaches the goal within the budget, or put the model back."""
        if self._rule is None:
            return
        if self._rule.reached and self._stopped and self._epochs == 0:
            self._rule.leave()
            return
        if self._epochs == 0:
            self.after_epoch()
        self._rule.conclude()

    def result(self, run: Run) -> UnlearnResult:
        """Return the record of the run, with what was reached.

        Args:
            run: The run, concluded.

        Returns:
            The record.

        Raises:
            UnlearningFailed: If the goal was not reached, and that was to raise.
        """
        result = run.result()
        if self._rule is None or self._watch is None:
            return result
        result = replace(
            result,
            reached=self._rule.reached,
            before=figures({name: self._watch.before(name) for name in self._rule.after}),
            after=figures(self._rule.after),
            passes=self._watch.passes,
        )
        if not self._rule.reached:
            message = f"{self._who}: the model is as it was: {self._rule.reason}"
            if self._strict:
                raise UnlearningFailed(message, result)
            warnings.warn(message, stacklevel=4)
        return result


class GoalRule:
    """Stop once the goal is reached, and go back as far as the budget asks; called after every epoch.

    Args:
        run: The run; told what was measured.
        weights: What changes.
        watch: Measures and judges.
        is_patient: Go on where the goal costs more than the budget: what is lost may be learnt again.

    Attributes:
        after: What was measured last of each set.
        reached: Whether the goal is reached, within the budget once concluded.
        is_short: Whether the goal was not reached at any cost.
        reason: Why the run ended.
    """

    def __init__(
        self, run: Run, weights: list[tuple[str, nn.Parameter]], watch: Watch, *, is_patient: bool = False
    ) -> None:
        self._run, self._weights, self._watch = run, weights, watch
        self._is_patient = is_patient
        self._retain: Measured | None = None  # of the model as it is, where that is known
        self._forget = watch.before("forget")
        # Data without right and wrong answers are no budget's business.
        self._watches = watch.has_retain and not math.isnan(watch.before("retain").accuracy)
        self.after = {
            name: watch.before(name) for name in (("forget", "retain") if watch.has_retain else ("forget",))
        }
        self.reached = watch.reached(self._forget)
        self.is_short = False
        self.reason = f"the goal is met already ({watch.goal})" if self.reached else ""

    def __call__(self, epoch: int) -> bool:
        """Measure the forget set.

        Args:
            epoch: For the record.

        Returns:
            Whether to stop.
        """
        self._forget = self._watch.now("forget")
        self.reached = self._watch.reached(self._forget)
        facts = {"forget_accuracy": self._forget.accuracy}
        stops, self._retain = self.reached, None
        if self.reached and self._is_patient and self._watches:
            self._retain = self._watch.now("retain")
            facts["retain_accuracy"] = self._retain.accuracy
            stops = self._watch.lost(self._retain) <= self._watch.budget
        self._run.record("goal", epoch=epoch, **facts)
        return stops

    def leave(self) -> None:
        """Put the model back: it had reached the goal before anything was done."""
        self._put_back()
        self._run.record("stop", reason=self.reason)

    def conclude(self) -> None:
        """Keep what reaches the goal within the budget, or put the weights back; say which."""
        self.is_short = not self.reached
        watch = self._watch
        if not self.reached:
            self._put_back()
            self.reason = f"the goal was not reached ({watch.goal}): {watch.known_in_words(self._forget)}"
        elif not self._watches:
            self.after["forget"] = self._forget
            self.reason = "the goal was reached; nothing watched the rest: there are no retain data"
            if watch.has_retain:
                self.after["retain"] = watch.now("retain")
                self.reason += " with answers that are right or wrong"
        else:
            self._within_budget()
        self._run.record("stop", reason=self.reason)

    def _within_budget(self) -> None:
        # The change leaks less the shorter it is: look for a part of it that still reaches the goal.
        watch, target = self._watch, {name: p.detach().clone() for name, p in self._weights}
        forget, share, step = self._forget, 1.0, 0.5
        best: tuple[float, dict[str, Measured]] | None = None
        costs: list[float] = []
        # Statistics that moved with the weights do not go with a part of the way.
        for _ in range(1 if self._is_patient and self._run.has_other_buffers() else _HALVINGS):
            if watch.reached(forget):
                retain = watch.now("retain") if self._retain is None else self._retain
                costs.append(watch.lost(retain))
                self._run.record(
                    "goal", share=share, forget_accuracy=forget.accuracy, retain_accuracy=retain.accuracy
                )
                if costs[-1] <= watch.budget:
                    best = (share, {"forget": forget, "retain": retain})
                    break
                share -= step
            else:
                share += step
            step /= 2
            self._set(target, share)
            self._retain = None
            forget = watch.now("forget")
        if best is None:
            self._put_back()
            self.reached = False
            self.reason = (
                f"the goal was reached at a cost, at least, of {watch.in_words(min(costs))}, beyond the "
                f"budget of {100 * watch.budget:g}"
            )
            return
        self.after = best[1]
        lost = watch.in_words(watch.lost(best[1]["retain"]))
        part = "" if best[0] == 1 else f"with {best[0]:.3g} of the change, "
        self.reason = f"the goal was reached, {part}{lost}"

    @torch.no_grad()
    def _set(self, target: dict[str, Tensor], share: float) -> None:
        for name, weight in self._weights:
            before, after = local_of(self._run.original(name)), local_of(target[name])
            local_of(weight).copy_(torch.lerp(before, after, share))

    def _put_back(self) -> None:
        self._run.put_back()
