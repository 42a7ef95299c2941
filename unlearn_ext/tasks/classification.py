"""One label of C per sample, or per position of a sample."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from typing_extensions import override

from unlearn_ext.tasks.base import Outputs
from unlearn_ext.tasks.batches import Batch
from unlearn_ext.tasks.categorical import Categorical
from unlearn_ext.tasks.fields import Inputs, Labels, described
from unlearn_ext.tasks.mistaken import refuse_probabilities
from unlearn_ext.tasks.positions import is_transformed

# How far the class probabilities of a sample may add up to something other than 1.
_SUM_TOLERANCE = 1e-2


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
        if outputs.ndim < 2:
            raise ValueError(
                f"outputs must be [N, C] and labels [N], got {list(outputs.shape)} and {list(labels.shape)}; "
                "samples come in batches: give the DataLoader a batch_size"
            )
        if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
            raise ValueError(self._not_integers(labels, outputs))
        logits = outputs if outputs.ndim == 2 and labels.ndim == 1 else self._classes_last(outputs, labels)
        if logits.shape[:-1] != labels.shape:
            raise ValueError(
                f"labels must have the shape of the logits without the class dimension, got labels "
                f"{list(labels.shape)} for logits {list(outputs.shape)}; {_FLOATS}"
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
        refuse_probabilities(outputs)
        return -(F.log_softmax(outputs, dim=-1) * labels).sum(-1)

    @override
    def log_scores(self, outputs: Outputs, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        if outputs.ndim == 2:
            if outputs.shape[-1] == 1:
                raise ValueError(_ONE_LOGIT.format(shape=list(outputs.shape)))
            refuse_probabilities(outputs)
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
