"""Numbers instead of classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from unlearn_ext.tasks.base import Outputs, Task, check_shape
from unlearn_ext.tasks.batches import Batch
from unlearn_ext.tasks.fields import Inputs, Labels

_LOSSES: dict[str, Callable[..., Tensor]] = {
    "squared": F.mse_loss,
    "absolute": F.l1_loss,
    "huber": F.huber_loss,
}


class Regression(Task):
    """One or several numbers per sample: outputs and labels ``[N]``, ``[N, 1]`` or ``[N, ...]``.

    There are no classes: what needs log-odds, other labels or probabilities (SSD by log-odds, random labels,
    distillation, membership attacks by confidence) is refused.

    Args:
        loss: ``"squared"``, ``"absolute"`` or ``"huber"`` error, a mean over a sample's numbers.
        tolerance: An answer counts as right if every number is at most so far off; None: nothing is right or
            wrong, and there is no accuracy.
        inputs: See ``Task``.
        labels: See ``Task``.

    Example:
        >>> task = Regression(tolerance=0.5)
        >>> outputs, batch = torch.tensor([[1.0], [4.0]]), (None, torch.tensor([1.5, 2.0]))
        >>> task.losses(outputs, batch), task.correct(outputs, batch)[0]
        (tensor([0.2500, 4.0000]), tensor([1, 0]))
    """

    def __init__(
        self,
        loss: Literal["squared", "absolute", "huber"] = "squared",
        *,
        tolerance: float | None = None,
        inputs: Inputs = None,
        labels: Labels = None,
    ) -> None:
        super().__init__(inputs=inputs, labels=labels)
        if loss not in _LOSSES:
            raise ValueError(f"Regression: loss must be one of {', '.join(_LOSSES)}, got {loss!r}")
        if tolerance is not None and not tolerance >= 0:
            raise ValueError(f"Regression: tolerance must be >= 0, got {tolerance}")
        self.kind, self.tolerance = loss, tolerance

    @override
    def settings(self) -> dict[str, object]:
        own: dict[str, object] = {} if self.kind == "squared" else {"loss": self.kind}
        if self.tolerance is not None:
            own["tolerance"] = self.tolerance
        return {**own, **super().settings()}

    def _matched(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        # [N] beside [N, 1] would broadcast to [N, N].
        labels = self.labels(batch)
        plain = outputs.squeeze(1) if outputs.ndim == 2 and outputs.shape[1] == 1 else outputs
        given = labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
        check_shape(self, "labels", given, plain.shape, outputs)
        return plain, given.to(plain.dtype)

    @override
    def losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        outputs, labels = self._matched(outputs, batch)
        values = _LOSSES[self.kind](outputs, labels, reduction="none")
        return values.reshape(values.shape[0], -1).mean(1)

    @override
    def correct(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        if self.tolerance is None:
            raise NotImplementedError(
                "Regression has no right and wrong answers without a tolerance: task=ux.tasks.Regression("
                "tolerance=...)"
            )
        outputs, labels = self._matched(outputs, batch)
        error = (outputs - labels).abs().reshape(outputs.shape[0], -1).amax(1)
        return (error <= self.tolerance).long(), torch.ones_like(error, dtype=torch.long)
