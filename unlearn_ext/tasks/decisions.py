"""Independent two-way decisions, one logit each: two classes, or any number of labels at a time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from unlearn_ext.tasks.base import Outputs, Task, check_shape
from unlearn_ext.tasks.batches import Batch
from unlearn_ext.tasks.fields import Inputs, Labels
from unlearn_ext.tasks.positions import home_of, is_transformed, mean_over_positions, sums_over_positions


class _Logits(Task):
    """Independent two-way decisions, one logit each: what ``Binary`` and ``MultiLabel`` share."""

    def __init__(self, ignore_index: int = -100, *, inputs: Inputs = None, labels: Labels = None) -> None:
        super().__init__(inputs=inputs, labels=labels)
        self.ignore_index = ignore_index

    def settings(self) -> dict[str, object]:
        return {"ignore_index": self.ignore_index, **super().settings()}

    def aligned(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Line the logits up with the labels.

        Args:
            outputs: The logits.
            batch: The batch.

        Returns:
            Logits, labels as numbers in [0, 1], and which of them count, all of one shape ``[N, ...]``.

        Raises:
            ValueError: If their shapes do not go together, or a label lies outside [0, 1].
        """
        labels = self.labels(batch)
        logits, labels = self._matched(outputs, labels)
        counted = labels != self.ignore_index
        values = labels.to(logits.dtype).where(counted, 0.0)
        looked_at = values.numel() and not is_transformed()
        if looked_at and bool(((values < 0) | (values > 1)).any()):
            found = values[(values < 0) | (values > 1)][0].item()
            raise ValueError(
                f"{type(self).__name__}: labels must lie in [0, 1] or be ignore_index={self.ignore_index}, "
                f"got {found:g}"
            )
        return logits, values, counted

    def _matched(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        logits, labels, counted = self.aligned(outputs, batch)
        values = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return mean_over_positions(values, counted)

    def log_odds(self, outputs: Outputs, batch: Batch) -> Tensor:
        logits, labels, counted = self.aligned(outputs, batch)
        return mean_over_positions(torch.where(labels > 0.5, logits, -logits), counted)

    def correct(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, labels, counted = self.aligned(outputs, batch)
        return sums_over_positions((logits > 0) == (labels > 0.5), counted)

    def log_scores(self, outputs: Outputs, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        logits = self._plain(outputs) / temperature
        return torch.stack([F.logsigmoid(-logits), F.logsigmoid(logits)], dim=-1)

    def counted(self, outputs: Outputs, batch: Batch) -> Tensor:
        try:
            self.labels(batch)
        except ValueError:
            return super().counted(outputs, batch)
        return self.aligned(outputs, batch)[2]

    def _plain(self, outputs: Tensor) -> Tensor:
        return outputs

    def sampled(
        self,
        outputs: Outputs,
        batch: Batch,
        generator: torch.Generator | None = None,
        *,
        temperature: float = 1.0,
    ) -> Batch:
        logits, _, counted = self.aligned(outputs, batch)
        chances = (logits / temperature).sigmoid()
        if generator is not None:
            chances = chances.to(generator.device)
        drawn = torch.bernoulli(chances, generator=generator).to(counted.device)
        given = self.labels(batch)
        return self.with_labels(
            batch, torch.where(counted.view(given.shape), drawn.view(given.shape).to(given), given)
        )


class Binary(_Logits):
    """Two classes and one logit: outputs and labels ``[N]`` or ``[N, 1]``.

    Labels are 0 and 1 of any dtype, or probabilities of class 1. The probabilities of ``scores`` are those of
    class 0 and 1, ``[N, 2]``.

    Args:
        ignore_index: The label of samples that do not count.
        inputs: See ``Task``.
        labels: See ``Task``.

    Example:
        >>> task = Binary()
        >>> batch = (None, torch.tensor([1, 0]))
        >>> task.log_odds(torch.tensor([[2.0], [2.0]]), batch)
        tensor([ 2., -2.])
    """

    def _plain(self, outputs: Tensor) -> Tensor:
        if not (outputs.ndim == 1 or (outputs.ndim == 2 and outputs.shape[1] == 1)):
            raise ValueError(
                f"Binary: outputs must be one logit per sample, [N] or [N, 1], got {list(outputs.shape)}; "
                "task=ux.tasks.Classification() takes a logit per class, ux.tasks.MultiLabel() one per label"
            )
        return outputs.view(outputs.shape[0])

    def _matched(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self._plain(outputs)
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        check_shape(self, "labels", labels, logits.shape, outputs)
        return logits, labels

    def relabel(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        """Turn every label around: there is one other.

        Args:
            batch: A batch with labels.
            generator: Not needed.

        Returns:
            A batch of the same form.
        """
        labels = self.labels(batch)
        other = ~labels if labels.dtype == torch.bool else 1 - labels
        return self.with_labels(batch, torch.where(labels == self.ignore_index, labels, other))

    @override
    def classes_of(self, batch: Batch) -> Tensor | None:
        labels = self.labels(batch)
        labels = labels.squeeze(1) if labels.ndim == 2 and labels.shape[1] == 1 else labels
        whole = not labels.is_floating_point() or bool((labels == labels.round()).all())
        return labels.long() if labels.ndim == 1 and whole else None


class MultiLabel(_Logits):
    """Any number of labels at a time: outputs and labels ``[N, C]``, one logit and one 0 or 1 per label.

    A sample's loss, log-odds and accuracy are means over its labels. The probabilities of ``scores`` are
    those of a label's absence and presence, ``[N, C, 2]``.

    Args:
        ignore_index: What stands for an unknown label.
        inputs: See ``Task``.
        labels: See ``Task``.

    Example:
        >>> task = MultiLabel()
        >>> right, counted = task.correct(torch.tensor([[1.0, 1.0]]), (None, torch.tensor([[1.0, 0.0]])))
        >>> right, counted
        (tensor([1]), tensor([2]))
    """

    def _matched(self, outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        check_shape(self, "labels", labels, outputs.shape, outputs)
        return outputs, labels

    def relabel(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        """Draw every sample's labels anew by tossing coins, with at least one that differs.

        Args:
            batch: A batch with labels.
            generator: Tosses, on the CPU: a seed means the same on every device.

        Returns:
            A batch of the same form.
        """
        labels = self.labels(batch)
        home = home_of(generator)
        flips = torch.randint(0, 2, labels.shape, generator=generator, device=home).bool()
        one = torch.rand(labels.shape, generator=generator, device=home)
        flips, one = flips.to(labels.device), one.to(labels.device)
        counted = labels != self.ignore_index
        flips &= counted
        chosen = F.one_hot(one.masked_fill(~counted, -1.0).argmax(-1), labels.shape[-1]).bool()
        flips |= chosen & counted & ~flips.any(-1, keepdim=True)
        other = ~labels if labels.dtype == torch.bool else 1 - labels
        return self.with_labels(batch, torch.where(flips, other, labels))
