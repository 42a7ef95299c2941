"""When projected-gradient unlearning holds back, and when it stops."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from unlearn_ext.methods.pgu_weights import FreeWeight
from unlearn_ext.methods.run import Run
from unlearn_ext.methods.until import Measured, Watch, measure
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches

# What leaks adds up from layer to layer: of more layers than this each may leak less.
_LAYERS = 5

# Halvings of the way back to the original weights, where the way out cost too much.
_HALVINGS = 6


class Bound:
    """Holds the change of what each layer answers to the retain set within a share; called after epochs.

    Args:
        run: The run; told how much leaks.
        free: The weights that change.
        leak: The share; of n > 5 layers each has 5 / n of it.
    """

    def __init__(self, run: Run, free: list[FreeWeight], leak: float) -> None:
        self._run, self._leak = run, leak * min(1.0, _LAYERS / len(free))
        self._squares = {part.name: part.answers(part.weight.detach()) for part in free}
        self._free = [part.of_changes() for part in free if self._squares[part.name]]

    @torch.no_grad()
    def __call__(self, epoch: int) -> bool:
        """Scale back what leaks too much.

        Args:
            epoch: For the record.

        Returns:
            Whether anything was.
        """
        leaks: dict[str, float] = {}
        for part in self._free:
            original = self._run.original(part.name)
            leak = part.answers(part.weight - original) / self._squares[part.name]
            leaks[part.name] = min(leak, self._leak)
            if leak > self._leak:  # which is quadratic in the change
                part.weight.copy_(torch.lerp(original, part.weight, math.sqrt(self._leak / leak)))
        worst = max(leaks, key=leaks.__getitem__, default=None)
        if worst is None:
            return False
        held_back = sum(leak == self._leak for leak in leaks.values())
        self._run.record("leak", epoch=epoch, parameter=worst, leak=leaks[worst], held_back=held_back)
        return held_back > 0


class GapRule:
    """Stop once the forget set is known less well than held-out data; called after every epoch.

    Args:
        run: The run; told what was measured.
        weights: What changes.
        forget: The forget set.
        validation: Held-out data.
        task: What the model is for.
    """

    def __init__(
        self, run: Run, weights: list[nn.Parameter], forget: Batches, validation: Batches, task: Task
    ) -> None:
        self._run, self._weights = run, weights
        self._sets = {"forget": forget, "validation": validation}
        self._task = task
        self._gap = self._measure(-1)
        self._before = self._weights_now()
        self._reason = "the rule held before the first epoch: nothing was changed" if self.holds else ""

    @property
    def holds(self) -> bool:
        """Whether the forget set is known less well."""
        return self._gap > 0

    def __call__(self, epoch: int) -> bool:
        """Measure.

        Args:
            epoch: For the record.

        Returns:
            Whether to stop.
        """
        previous, self._gap = self._gap, self._measure(epoch)
        if self.holds:
            self._reason = f"the rule held after epoch {epoch}"
            if abs(previous) < abs(self._gap):
                with torch.no_grad():
                    for weight, value in zip(self._weights, self._before, strict=True):
                        weight.copy_(value)
                self._reason += "; the model before it was closer and was kept"
        self._before = self._weights_now()
        return self.holds

    def conclude(self) -> None:
        """Say why the run ended."""
        if not self._reason:
            self._reason = "the rule never held; the last model was kept"
        if not self.holds:
            warnings.warn(f"pgu: {self._reason}", stacklevel=4)
        self._run.record("stop", reason=self._reason)

    def _measure(self, epoch: int) -> float:
        values = {
            name: measure(self._run.model, data, self._task, ranks=self._run.ranks).accuracy
            for name, data in self._sets.items()
        }
        self._run.record("gap", epoch=epoch, **{f"accuracy_{name}": value for name, value in values.items()})
        return values["validation"] - values["forget"]

    def _weights_now(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self._weights]


class GoalRule:
    """Stop once the goal is reached, and go back as far as the budget asks; called after every epoch.

    Args:
        run: The run; told what was measured.
        weights: What changes.
        watch: Measures and judges.

    Attributes:
        after: What was measured last of each set.
        reached: Whether the goal is reached, within the budget once concluded.
        is_short: Whether the goal was not reached at any cost.
        reason: Why the run ended.
    """

    def __init__(self, run: Run, weights: list[tuple[str, nn.Parameter]], watch: Watch) -> None:
        self._run, self._weights, self._watch = run, weights, watch
        self._forget = watch.before("forget")
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
            Whether the goal is reached.
        """
        self._forget = self._watch.now("forget")
        self._run.record("goal", epoch=epoch, forget_accuracy=self._forget.accuracy)
        self.reached = self._watch.reached(self._forget)
        return self.reached

    def conclude(self) -> None:
        """Keep what reaches the goal within the budget, or put the weights back; say which."""
        self.is_short = not self.reached
        watch = self._watch
        if not self.reached:
            self._put_back()
            least = f"the accuracy on the forget set was {self._forget.accuracy:.2%} at the end"
            self.reason = f"the goal was not reached ({watch.goal}): {least}"
        elif not watch.has_retain:
            self.after["forget"] = self._forget
            self.reason = "the goal was reached; nothing watched the rest: there are no retain data"
        else:
            self._within_budget()
        self._run.record("stop", reason=self.reason)

    def _within_budget(self) -> None:
        # The change leaks less the shorter it is: look for a part of it that still reaches the goal.
        watch, target = self._watch, {name: p.detach().clone() for name, p in self._weights}
        forget, share, step = self._forget, 1.0, 0.5
        best: tuple[float, dict[str, Measured]] | None = None
        costs: list[float] = []
        for _ in range(_HALVINGS):
            if watch.reached(forget):
                retain = watch.now("retain")
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
            forget = watch.now("forget")
        if best is None:
            self._put_back()
            self.reached = False
            self.reason = (
                f"the goal was reached at a cost of {100 * min(costs):.2f} points of retain accuracy or "
                f"more, beyond the budget of {100 * watch.budget:g}"
            )
            return
        self.after = best[1]
        lost = 100 * watch.lost(best[1]["retain"])
        part = "" if best[0] == 1 else f"with {best[0]:.3g} of the change, "
        self.reason = f"the goal was reached, {part}{lost:.2f} points of retain accuracy lost"

    @torch.no_grad()
    def _set(self, target: dict[str, Tensor], share: float) -> None:
        for name, weight in self._weights:
            weight.copy_(torch.lerp(self._run.original(name), target[name], share))

    @torch.no_grad()
    def _put_back(self) -> None:
        for name, weight in self._weights:
            weight.copy_(self._run.original(name))
