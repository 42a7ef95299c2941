"""A label per pixel."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import override

from unlearn_ext.tasks.batches import Batch
from unlearn_ext.tasks.categorical import Categorical
from unlearn_ext.tasks.fields import Inputs, Labels


class Segmentation(Categorical):
    """One label of C per pixel: outputs ``[N, C, H, W]`` (or 1D, 3D), labels ``[N, H, W]``.

    Args:
        ignore_index: The label of void pixels: they have no loss, are not counted as right or wrong, and
            stay void when labels are redrawn.
        classes: Number of classes, for ``relabel``; found out from the model where it is needed.
        inputs: See ``Task``.
        labels: See ``Task``.

    Example:
        >>> import torch
        >>> outputs, labels = torch.zeros(1, 3, 1, 2), torch.tensor([[[0, 255]]])
        >>> Segmentation().correct(outputs, (None, labels))
        (tensor([1]), tensor([1]))
    """

    def __init__(
        self,
        ignore_index: int = 255,
        *,
        classes: int | None = None,
        inputs: Inputs = None,
        labels: Labels = None,
    ) -> None:
        super().__init__(ignore_index=ignore_index, classes=classes, inputs=inputs, labels=labels)

    @override
    def aligned(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = self.labels(batch)
        if labels.ndim == outputs.ndim and labels.shape[1] == 1:
            labels = labels.squeeze(1)
        wanted = outputs.shape[:1] + outputs.shape[2:]
        if outputs.ndim < 3 or labels.shape != wanted or labels.is_floating_point():
            raise ValueError(
                f"Segmentation: labels must be integers {list(wanted)} for outputs {list(outputs.shape)}, "
                f"got {labels.dtype} {list(labels.shape)}; the model resizes its outputs itself"
            )
        labels = labels.long()
        self.check_labels(labels, outputs.shape[1], outputs)
        return outputs.movedim(1, -1), labels

    @override
    def unlabelled(self, outputs: Tensor) -> Tensor:
        if outputs.ndim < 3:
            raise ValueError(f"Segmentation: outputs must be [N, C, H, W], got {list(outputs.shape)}")
        return outputs.movedim(1, -1)

    @override
    def unaligned(self, labels: Tensor, batch: Batch) -> Tensor:
        return labels.view(self.labels(batch).shape).to(self.labels(batch).dtype)
