"""Losses with one value per sample: ``loss_fn(model, batch) -> Tensor[N]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn_ext.tasks.batches import Batch
from unlearn_ext.tasks.outputs import logits, scores_and_labels, targets

LossFn: TypeAlias = Callable[[nn.Module, Batch], Tensor]
"""``loss_fn(model, batch) -> Tensor[N]``: one loss per sample."""


def cross_entropy(
    model: nn.Module, batch: Batch, *, shift: bool | None = None, ignore_index: int = -100
) -> Tensor:
    """Cross entropy of each sample: the mean over its positions that are not ignored.

    Classification has one position per sample; a sequence or an image with a label per position has many. A
    sample all of whose positions are ignored has loss 0. The mean is taken inside each sample, so a short
    sequence weighs as much as a long one.

    Args:
        model: Returns logits ``[N, C]``, ``[N, T, C]`` or ``[N, C, ...]``.
        batch: ``(inputs, targets)``, or a mapping with ``labels``. Labels are integers, ``[N]`` or one per
            position, or class probabilities ``[N, C]``.
        shift: Whether position ``t`` predicts the label of position ``t + 1``. None shifts the form of a
            causal language model only: a mapping with labels ``[N, T]``. For token classification and masked
            language models use ``functools.partial(cross_entropy, shift=False)``.
        ignore_index: The label of positions that do not count.

    Returns:
        ``[N]``, in nats; float32 for half-precision models.

    Raises:
        ValueError: If the batch has no labels, or their shape does not go with the logits.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_(), model.bias.zero_()
        ...     cross_entropy(model, (torch.ones(3, 2), torch.tensor([0, 1, -100])))
        tensor([0.6931, 0.6931, 0.0000])
    """
    labels = targets(batch)
    if labels.is_floating_point():
        scores = _at_least_float32(logits(model, batch))
        if scores.shape != labels.shape or scores.ndim != 2:
            raise ValueError(
                f"class probabilities must have the logits' shape [N, C], got {list(labels.shape)} for "
                f"logits {list(scores.shape)}"
            )
        return -(F.log_softmax(scores, dim=-1) * labels).sum(-1)
    scores, labels = scores_and_labels(model, batch, shift=shift)
    losses = F.cross_entropy(
        scores.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none"
    ).view(labels.shape)
    if labels.ndim == 1:
        return losses
    counted = (labels != ignore_index).flatten(1).sum(1)
    return losses.flatten(1).sum(1) / counted.clamp(min=1)


def log_odds(
    model: nn.Module, batch: Batch, *, shift: bool | None = None, ignore_index: int = -100
) -> Tensor:
    """Minus the log-odds of each sample's label, ``log((1 - p) / p)``: a loss that no sample can saturate.

    Its gradient is that of the cross entropy divided by ``1 - p``. Importances from cross entropy hang on
    the few samples that a well-trained model is unsure of; with this loss every sample counts alike. For
    selective synaptic dampening of well-fitted models, where cross entropy selects too little or too much;
    importances of different losses must not be combined. Our design, after the loss that Carlini et al.,
    "Membership Inference Attacks From First Principles", S&P 2022, use for a similar reason.

    Args:
        model: As for ``cross_entropy``.
        batch: As for ``cross_entropy``, with integer labels.
        shift: As for ``cross_entropy``.
        ignore_index: The label of positions that do not count.

    Returns:
        ``[N]``; float32 for half-precision models.

    Example:
        >>> log_odds(nn.Identity(), (torch.tensor([[3.0, 1.0]]), torch.tensor([0])))
        tensor([-2.])
    """
    scores, labels = scores_and_labels(model, batch, shift=shift)
    counted = labels != ignore_index
    index = labels.where(counted, 0).unsqueeze(-1)
    others = scores.scatter(-1, index, -torch.inf).logsumexp(-1)
    losses = (others - scores.gather(-1, index).squeeze(-1)) * counted
    if labels.ndim == 1:
        return losses
    return losses.flatten(1).sum(1) / counted.flatten(1).sum(1).clamp(min=1)


def logit_norm(model: nn.Module, batch: Batch) -> Tensor:
    """Squared L2 norm of each sample's logits; needs no labels.

    With ``power=1`` this gives the importances of loss-free selective synaptic dampening (LFSSD). Adding a
    constant to all logits changes it, although that changes no prediction.

    Args:
        model: Returns logits ``[N, ...]``.
        batch: A batch in either form, with or without labels.

    Returns:
        ``[N]``; float32 for half-precision models.

    Source:
        Foster, Schoepf & Brintrup, "Loss-Free Machine Unlearning", 2024.

    Example:
        >>> logit_norm(nn.Identity(), (torch.tensor([[3.0, 4.0]]),))
        tensor([25.])
    """
    return _at_least_float32(logits(model, batch)).flatten(1).square().sum(1)


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
