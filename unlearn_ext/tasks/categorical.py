"""What tasks with one label of C per position share."""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from unlearn_ext.tasks.base import Outputs, Task
from unlearn_ext.tasks.batches import Batch
from unlearn_ext.tasks.fields import Inputs, Labels
from unlearn_ext.tasks.mistaken import refuse_probabilities
from unlearn_ext.tasks.positions import home_of, is_transformed, mean_over_positions, sums_over_positions


class Categorical(Task):
    """What tasks with one label of C per position share; a subclass lines outputs and labels up.

    Args:
        ignore_index: The label of positions that do not count.
        classes: Number of classes, for ``relabel``; found out from the model where it is needed.
        inputs: See ``Task``.
        labels: See ``Task``.
    """

    def __init__(
        self,
        *,
        ignore_index: int = -100,
        classes: int | None = None,
        inputs: Inputs = None,
        labels: Labels = None,
    ) -> None:
        super().__init__(inputs=inputs, labels=labels)
        self.ignore_index = ignore_index
        self.classes = classes

    @override
    def settings(self) -> dict[str, object]:
        own: dict[str, object] = {"ignore_index": self.ignore_index}
        if self.classes is not None:
            own["classes"] = self.classes
        return {**own, **super().settings()}

    def aligned(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Line the outputs up with the labels.

        Args:
            outputs: The logits.
            batch: The batch.

        Returns:
            Logits ``[N, ..., C]`` and labels ``[N, ...]``.

        Raises:
            ValueError: If their shapes do not go together, or a label is no class.
        """
        raise NotImplementedError

    def unlabelled(self, outputs: Tensor) -> Tensor:
        """Bring the classes of outputs that have no labels beside them last.

        Args:
            outputs: The logits.

        Returns:
            ``[N, ..., C]``.
        """
        raise NotImplementedError

    @override
    def losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        logits, labels = self.aligned(outputs, batch)
        refuse_probabilities(logits)
        values = F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=self.ignore_index, reduction="none"
        )
        return mean_over_positions(values.view(labels.shape), labels != self.ignore_index)

    @override
    def log_odds(self, outputs: Outputs, batch: Batch) -> Tensor:
        logits, labels = self.aligned(outputs, batch)
        refuse_probabilities(logits)
        counted = labels != self.ignore_index
        index = labels.where(counted, 0).unsqueeze(-1)
        others = logits.scatter(-1, index, -torch.inf).logsumexp(-1)
        return mean_over_positions(logits.gather(-1, index).squeeze(-1) - others, counted)

    @override
    def correct(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, labels = self.aligned(outputs, batch)
        return sums_over_positions(logits.argmax(-1) == labels, labels != self.ignore_index)

    @override
    def log_scores(self, outputs: Outputs, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        logits = self.aligned(outputs, batch)[0] if self._has_labels(batch) else self.unlabelled(outputs)
        refuse_probabilities(logits)
        return F.log_softmax(logits / temperature, dim=-1)

    @override
    def counted(self, outputs: Outputs, batch: Batch) -> Tensor:
        if self._has_labels(batch):
            return self.aligned(outputs, batch)[1] != self.ignore_index
        return super().counted(outputs, batch)

    def relabel(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        """Give every position that counts another label, all equally likely.

        Args:
            batch: A batch with integer labels.
            generator: Draws them, on the CPU: a seed means the same on every device.

        Returns:
            A batch of the same form.

        Raises:
            ValueError: If the number of classes is not known or less than 2, or the labels are not integers.
        """
        labels = self.labels(batch)
        if self.classes is None:
            raise ValueError(
                f"{type(self).__name__}: classes must be given to draw other labels, or be settled"
            )
        if self.classes < 2:
            raise ValueError(
                f"{type(self).__name__}: other labels need at least 2 classes, got {self.classes}"
            )
        if labels.is_floating_point():
            raise ValueError(
                f"{type(self).__name__}: labels to be redrawn must be integers, got {labels.dtype}"
            )
        shift = torch.randint(1, self.classes, labels.shape, generator=generator, device=home_of(generator))
        other = (labels + shift.to(labels)) % self.classes
        return self.with_labels(batch, torch.where(labels == self.ignore_index, labels, other))

    @override
    def sampled(
        self,
        outputs: Outputs,
        batch: Batch,
        generator: torch.Generator | None = None,
        *,
        temperature: float = 1.0,
    ) -> Batch:
        logits, given = self.aligned(outputs, batch)
        chances = (logits / temperature).softmax(-1).flatten(0, -2)
        if generator is not None:
            chances = chances.to(generator.device)
        drawn = torch.multinomial(chances, 1, generator=generator).view(given.shape).to(given)
        return self.with_labels(
            batch, self.unaligned(torch.where(given == self.ignore_index, given, drawn), batch)
        )

    def unaligned(self, labels: Tensor, batch: Batch) -> Tensor:
        """Bring labels that are lined up with the outputs into the form of the batch.

        Args:
            labels: As ``aligned`` returns them.
            batch: The batch they come from.

        Returns:
            As the batch holds them.
        """
        return labels

    @override
    def settled(self, model: nn.Module, batch: Batch) -> Task:
        if self.classes is not None:
            return self
        with torch.no_grad():
            outputs = self.forward(model, batch)
            scores = self.log_scores(outputs, batch)
        known = copy(self)
        known.classes = scores.shape[-1]
        return known

    def check_labels(self, labels: Tensor, classes: int, outputs: Tensor) -> None:
        """Refuse labels that are neither classes nor ignored.

        Args:
            labels: Integers.
            classes: Number of classes.
            outputs: The model's outputs, for the message.

        Raises:
            ValueError: If one is something else.
        """
        # Under vmap no value can be looked at; the samples have been looked at in their batch.
        if not labels.numel() or is_transformed():
            return
        wrong = (labels != self.ignore_index) & ((labels < 0) | (labels >= classes))
        if bool(wrong.any()):
            name, found = type(self).__name__, int(labels[wrong][0])
            if classes == 1:
                raise ValueError(
                    f"{name}: labels must be 0 for outputs {list(outputs.shape)} of one class, got {found}; "
                    "one logit for two classes is task=ux.tasks.Binary()"
                )
            what = "Segmentation(ignore_index=255)" if found == 255 else f"{name}(ignore_index={found})"
            raise ValueError(
                f"{name}: labels must lie in [0, {classes}) or be ignore_index={self.ignore_index}, got "
                f"{found}; labels that mean nothing are named by task=ux.tasks.{what}"
            )

    def _has_labels(self, batch: Batch) -> bool:
        try:
            self.labels(batch)
        except ValueError:
            return False
        return True
