"""Tasks with classes: one label of many, one logit, several labels at a time."""

from __future__ import annotations

from copy import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from unlearn_ext.tasks.base import Outputs, Task, check_shape
from unlearn_ext.tasks.batches import Batch
from unlearn_ext.tasks.fields import Inputs, Labels, described
from unlearn_ext.tasks.positions import is_transformed, mean_over_positions, sums_over_positions

# How far the class probabilities of a sample may add up to something other than 1.
_SUM_TOLERANCE = 1e-2


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
        values = F.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=self.ignore_index, reduction="none"
        )
        return mean_over_positions(values.view(labels.shape), labels != self.ignore_index)

    @override
    def log_odds(self, outputs: Outputs, batch: Batch) -> Tensor:
        logits, labels = self.aligned(outputs, batch)
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
        shift = torch.randint(1, self.classes, labels.shape, generator=generator, device=_home(generator))
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


class Classification(Categorical):
    """One label of C per sample, or per position of a sample.

    Labels are integers ``[N]`` or ``[N, ...]``, or class probabilities ``[N, C]``; outputs are ``[N, C]``,
    ``[N, ..., C]`` or ``[N, C, ...]``.

    Args:
        ignore_index: The label of positions that do not count.
        class_dim: The dimension of the outputs that holds the classes, 1 or -1. None: the one that the shape
            of the labels leaves; where both would do (C as long as the positions) it has to be given.
        classes: Number of classes, for ``relabel``; found out from the model where it is needed.
        inputs: See ``Task``.
        labels: See ``Task``.

    Example:
        >>> task = Classification()
        >>> task.losses(torch.zeros(2, 4), (None, torch.tensor([0, -100])))
        tensor([1.3863, 0.0000])
    """

    def __init__(
        self,
        ignore_index: int = -100,
        class_dim: int | None = None,
        *,
        classes: int | None = None,
        inputs: Inputs = None,
        labels: Labels = None,
    ) -> None:
        super().__init__(ignore_index=ignore_index, classes=classes, inputs=inputs, labels=labels)
        if class_dim not in (None, 1, -1):
            raise ValueError(f"Classification: class_dim must be 1, -1 or None, got {class_dim}")
        self.class_dim = class_dim

    @override
    def settings(self) -> dict[str, object]:
        own: dict[str, object] = {} if self.class_dim is None else {"class_dim": self.class_dim}
        return {**own, **super().settings()}

    @override
    def aligned(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = self.labels(batch)
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
            raise ValueError(self._not_integers(labels, outputs))
        logits = outputs if outputs.ndim == 2 and labels.ndim == 1 else self._classes_last(outputs, labels)
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels must have the shape of the logits without the class dimension, got labels "
                f"{list(labels.shape)} for logits {list(outputs.shape)}"
            )
        labels = labels.long()
        self._check_one_logit(labels, logits)
        self.check_labels(labels, logits.shape[-1], outputs)
        return logits, labels

    @override
    def unlabelled(self, outputs: Tensor) -> Tensor:
        if outputs.ndim == 2 or self.class_dim == -1:
            return outputs
        if self.class_dim == 1:
            return outputs.movedim(1, -1)
        raise ValueError(
            f"Classification: class_dim must be given for outputs {list(outputs.shape)} without labels: "
            "task=ux.tasks.Classification(class_dim=1) or (class_dim=-1), or ux.tasks.Segmentation()"
        )

    @override
    def losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        labels = self.labels(batch)
        if not labels.is_floating_point():
            return super().losses(outputs, batch)
        self._check_probabilities(labels, outputs)
        return -(F.log_softmax(outputs, dim=-1) * labels).sum(-1)

    @override
    def log_scores(self, outputs: Outputs, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        if outputs.ndim == 2:
            if outputs.shape[-1] == 1:
                raise ValueError(_ONE_LOGIT.format(shape=list(outputs.shape)))
            return F.log_softmax(outputs / temperature, dim=-1)
        return super().log_scores(outputs, batch, temperature=temperature)

    @override
    def counted(self, outputs: Outputs, batch: Batch) -> Tensor:
        if self._has_labels(batch) and self.labels(batch).is_floating_point():
            self._check_probabilities(self.labels(batch), outputs)
            return torch.ones(outputs.shape[:1], dtype=torch.bool, device=outputs.device)
        return super().counted(outputs, batch)

    def _classes_last(self, outputs: Tensor, labels: Tensor) -> Tensor:
        last = outputs.shape[:-1] == labels.shape
        second = outputs.ndim > 2 and outputs.shape[:1] + outputs.shape[2:] == labels.shape
        if last and second and self.class_dim is None:
            raise ValueError(
                f"Classification: class_dim must be given for outputs {list(outputs.shape)} and labels "
                f"{list(labels.shape)}, where the classes may lie in dimension 1 or last: "
                "task=ux.tasks.Classification(class_dim=1) or (class_dim=-1)"
            )
        wanted = self.class_dim if self.class_dim is not None else 1 if second and not last else -1
        return outputs.movedim(1, -1) if wanted == 1 and outputs.ndim > 2 else outputs

    def _check_one_logit(self, labels: Tensor, logits: Tensor) -> None:
        if logits.shape[-1] == 1:
            raise ValueError(_ONE_LOGIT.format(shape=list(logits.shape)))

    def _check_probabilities(self, labels: Tensor, outputs: Tensor) -> None:
        if outputs.shape != labels.shape or outputs.ndim != 2 or outputs.shape[-1] == 1:
            raise ValueError(
                f"class probabilities must have the logits' shape [N, C] with C > 1, got "
                f"{list(labels.shape)} for logits {list(outputs.shape)}; {_FLOATS}"
            )
        if is_transformed() or not labels.numel():
            return
        sums = labels.sum(-1)
        if bool((labels < 0).any() | ((sums - 1).abs() > _SUM_TOLERANCE).any()):
            worst = float(sums[(sums - 1).abs().argmax()])
            raise ValueError(
                f"float targets must be class probabilities, non-negative with rows that add up to 1, got "
                f"values from {float(labels.min()):.4g} to {float(labels.max()):.4g} and a row of sum "
                f"{worst:.4g}; {_FLOATS}"
            )

    def _not_integers(self, labels: Tensor, outputs: Tensor) -> str:
        return f"labels must be integers, got {described(labels)} for logits {list(outputs.shape)}; {_FLOATS}"


_FLOATS = (
    "pass task=ux.tasks.Regression() for numbers, task=ux.tasks.MultiLabel() for several labels at a time, "
    "or task=ux.tasks.Binary() for one logit"
)
_ONE_LOGIT = (
    "a model with one logit (outputs {shape}) has no classes to choose from; pass task=ux.tasks.Binary() for "
    "two classes, or task=ux.tasks.Regression() for a number"
)


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
        home = _home(generator)
        flips = torch.randint(0, 2, labels.shape, generator=generator, device=home).bool()
        one = torch.rand(labels.shape, generator=generator, device=home)
        flips, one = flips.to(labels.device), one.to(labels.device)
        counted = labels != self.ignore_index
        flips &= counted
        chosen = F.one_hot(one.masked_fill(~counted, -1.0).argmax(-1), labels.shape[-1]).bool()
        flips |= chosen & counted & ~flips.any(-1, keepdim=True)
        other = ~labels if labels.dtype == torch.bool else 1 - labels
        return self.with_labels(batch, torch.where(flips, other, labels))


def _home(generator: torch.Generator | None) -> torch.device:
    return torch.device("cpu") if generator is None else generator.device
