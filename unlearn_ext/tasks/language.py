"""A label per token: language models and taggers. A sample is a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn
from typing_extensions import override

from unlearn_ext.tasks.base import Yardstick
from unlearn_ext.tasks.batches import Batch
from unlearn_ext.tasks.categorical import Categorical
from unlearn_ext.tasks.fields import Inputs, Labels


class _Tokens(Categorical):
    """Outputs ``[N, T, C]`` and labels ``[N, T]``.

    Args:
        ignore_index: The label of tokens that do not count.
        classes: Number of classes, for ``relabel``; found out from the model where it is needed.
        inputs: See ``Task``.
        labels: See ``Task``. With ``labels="input_ids"`` padding, as ``attention_mask`` tells it, is ignored.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        *,
        classes: int | None = None,
        inputs: Inputs = None,
        labels: Labels = None,
    ) -> None:
        super().__init__(ignore_index=ignore_index, classes=classes, inputs=inputs, labels=labels)

    def labels(self, batch: Batch) -> Tensor:
        if self.fields.labels != "input_ids" or not isinstance(batch, Mapping):
            return super().labels(batch)
        if "labels" in batch:  # with_labels has put them there
            return cast("Tensor", batch["labels"])
        labels = super().labels(batch)
        mask = batch.get("attention_mask")
        return labels if mask is None else labels.masked_fill(mask == 0, self.ignore_index)

    def with_labels(self, batch: Batch, labels: Tensor) -> Batch:
        if self.fields.labels == "input_ids" and isinstance(batch, Mapping):
            return {**batch, "labels": labels}  # the inputs stay what they are
        return super().with_labels(batch, labels)

    def aligned(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        labels = self.labels(batch)
        if outputs.ndim != 3 or outputs.shape[:-1] != labels.shape or labels.is_floating_point():
            raise ValueError(
                f"{type(self).__name__}: labels must be integers [N, T] for outputs [N, T, C], got "
                f"{labels.dtype} {list(labels.shape)} for {list(outputs.shape)}"
            )
        labels = labels.long()
        self.check_labels(labels, outputs.shape[-1], outputs)
        return outputs, labels

    def unlabelled(self, outputs: Tensor) -> Tensor:
        return outputs


class TokenClassification(_Tokens):
    """One label of C per token, at the token's own position: outputs ``[N, T, C]``, labels ``[N, T]``.

    Example:
        >>> task = TokenClassification()
        >>> task.correct(torch.eye(3)[None], {"labels": torch.tensor([[0, 1, -100]])})
        (tensor([2]), tensor([2]))
    """


class _Words(_Tokens):
    """Tokens of texts, many of which are right whatever the text: commas, endings, what everybody writes."""

    @override
    def yardstick(self, model: nn.Module) -> Yardstick:
        return "loss"


class MaskedLM(_Words):
    """The words behind the masked tokens; labels of all others are ``ignore_index``."""


class Sequence2Sequence(_Words):
    """The target sequence of an encoder-decoder, at its own positions: the decoder's inputs are shifted."""


class CausalLM(_Words):
    """Each token from those before it: the output at position ``t`` belongs to the label of ``t + 1``.

    A sample's loss is the mean over its tokens that are not ignored, so a short sequence weighs as much as a
    long one.

    Example:
        >>> task = CausalLM()
        >>> batch = {"labels": torch.tensor([[2, 0, 1]])}
        >>> task.correct(torch.eye(3)[None], batch)     # 0 and 1 are predicted after 2 and 0
        (tensor([2]), tensor([2]))
    """

    @override
    def aligned(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        logits, labels = super().aligned(outputs, batch)
        return logits[:, :-1], labels[:, 1:]

    @override
    def unlabelled(self, outputs: Tensor) -> Tensor:
        return outputs[:, :-1]

    @override
    def unaligned(self, labels: Tensor, batch: Batch) -> Tensor:
        return torch.cat([self.labels(batch)[:, :1].to(labels), labels], dim=1)


def says_nothing(model: nn.Module) -> str:
    """Return the message for labels per token of a model that does not say what they mean.

    Args:
        model: The model.

    Returns:
        Which tasks to choose from.
    """
    return (
        f"task must say whether labels [N, T] belong to their own tokens or to the next: "
        f"{type(model).__name__} does not; pass task=ux.tasks.CausalLM() (the next), "
        "ux.tasks.TokenClassification() or ux.tasks.MaskedLM()"
    )
