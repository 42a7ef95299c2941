"""How far two models' predictions lie apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext.tasks.batches import Batch, Batches, check_batches, device_of, read_batches
from unlearn_ext.tasks.outputs import logits, scores_and_labels


def zrf(
    model: nn.Module,
    incompetent: nn.Module,
    data: Batches,
    convention: Literal["paper", "release"] = "paper",
) -> float:
    """Return the zero retrain forgetting score: how close predictions are to those of an untrained model.

        paper     1 - mean JS(model, incompetent), in bits: 1 is the same, 0 has nothing in common
        release   1 - mean over samples *and classes* of (KL(m || p) + KL(m || q)) / 2, in nats: what the
                  published code computes; near 1 whatever the models do, and not comparable between
                  different numbers of classes

    Args:
        model: The unlearned model.
        incompetent: A randomly initialised model of the same outputs.
        data: The forget set.
        convention: Which of the two.

    Returns:
        The score, in [0, 1] for ``"paper"``.

    Raises:
        ValueError: If ``data`` is empty or the convention is unknown.

    Source:
        Chundawat et al., "Can Bad Teaching Induce Forgetting?", AAAI 2023.
    """
    if convention not in ("paper", "release"):
        raise ValueError(f"zrf: convention must be paper or release, got {convention!r}")
    if convention == "paper":
        return 1 - js_divergence(model, incompetent, data)

    def reversed_divergence(p: Tensor, q: Tensor) -> Tensor:
        mixed = (p + q) / 2
        return (_divergence(mixed, p) + _divergence(mixed, q)) / (2 * p.shape[-1])

    return 1 - _mean_over_positions("zrf", model, incompetent, data, reversed_divergence)


def js_divergence(model: nn.Module, reference: nn.Module, data: Batches) -> float:
    """Return the mean Jensen-Shannon divergence of two models' predictions, in bits.

    Args:
        model: A model.
        reference: Another of the same outputs, usually the retrained one.
        data: Where to compare them.

    Returns:
        A number in [0, 1]; 0 for equal predictions.

    Raises:
        ValueError: If ``data`` is empty.

    Example:
        >>> certain, other = [(torch.tensor([[30.0, 0.0]]),)], nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = other.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> round(js_divergence(nn.Identity(), other, certain), 3)
        1.0
    """

    def bits(p: Tensor, q: Tensor) -> Tensor:
        mixed = (p + q) / 2
        return (_divergence(p, mixed) + _divergence(q, mixed)) / (2 * math.log(2))

    return _mean_over_positions("js_divergence", model, reference, data, bits)


def activation_distance(model: nn.Module, reference: nn.Module, data: Batches) -> float:
    """Return the mean Euclidean distance of two models' predicted probabilities.

    Args:
        model: A model.
        reference: Another of the same outputs, usually the retrained one.
        data: Where to compare them.

    Returns:
        A number in [0, sqrt(2)].

    Raises:
        ValueError: If ``data`` is empty.

    Source:
        Golatkar, Achille & Soatto, "Forgetting Outside the Box", ECCV 2020.
    """
    return _mean_over_positions(
        "activation_distance", model, reference, data, lambda p, q: (p - q).square().sum(-1).sqrt()
    )


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    # Kullback-Leibler over the last axis, in nats, with 0 log 0 = 0.
    return F.kl_div(q.log(), p, reduction="none").nan_to_num(nan=0.0).sum(-1)


def _mean_over_positions(
    who: str,
    model: nn.Module,
    reference: nn.Module,
    data: Batches,
    distance: Callable[[Tensor, Tensor], Tensor],
) -> float:
    total, count = 0.0, 0
    with borrowed(model), borrowed(reference), torch.no_grad():
        for batch in read_batches(check_batches(data), device_of(model)):
            p = _probabilities(model, batch)
            q = _probabilities(reference, batch).to(p.device)
            if p.shape != q.shape:
                raise ValueError(
                    f"{who}: models must have outputs of one shape, got {list(p.shape)} and {list(q.shape)}"
                )
            values = distance(p, q)
            total, count = total + float(values.sum()), count + values.numel()
    if count == 0:
        raise ValueError(f"{who}: data must hold at least one sample, got none")
    return total / count


def _probabilities(model: nn.Module, batch: Batch) -> Tensor:
    # Labels, where there are any, tell which axis the classes are on.
    try:
        scores, _ = scores_and_labels(model, batch, shift=False)
    except ValueError:
        scores = logits(model, batch)
    return scores.double().softmax(-1)
