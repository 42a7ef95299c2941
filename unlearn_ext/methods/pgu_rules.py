"""When projected-gradient unlearning holds back, and when it stops."""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from unlearn_ext.methods.pgu_weights import FreeWeight
from unlearn_ext.methods.run import Run
from unlearn_ext.methods.until import measure
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches

# What leaks adds up from layer to layer: of more layers than this each may leak less.
_LAYERS = 5


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
