"""How far two models' predictions lie apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext.distributed import Group, Ranks, lockstep, ranks_of
from unlearn_ext.evaluation.metrics.answers import answers, checked, log_probabilities, task_for
from unlearn_ext.tasks import Task
from unlearn_ext.tasks.batches import Batches


@lockstep
def zrf(
    model: nn.Module,
    incompetent: nn.Module,
    data: Batches,
    convention: Literal["paper", "release"] = "paper",
    *,
    task: Task | None = None,
    process_group: Group = None,
) -> float:
    """Return the zero retrain forgetting score: how close predictions are to those of an untrained model.

        paper     1 - mean JS(model, incompetent), in bits: 1 is the same, 0 has nothing in common
        release   1 - mean over samples *and classes* of (KL(m || p) + KL(m || q)) / 2, in nats: what the
                  published code computes; near 1 whatever the models do, and not comparable between
                  different numbers of classes

    Args:
        model: The unlearned model.
        incompetent: A randomly initialised model of the same outputs.
        data: The forget set, with labels or without.
        convention: Which of the two.
        task: What the models are for; None infers it. See ``ux.tasks``.
        process_group: Ranks that call this together, each with its own share of the data, perhaps none: the
            figure is that of all data, and the same on every rank.

    Returns:
        The score, in [0, 1] for ``"paper"``.

    Raises:
        FloatingPointError: If an output of a model is NaN, or leaves no probabilities, such as infinity.
        NotImplementedError: If the task has no classes.
        ValueError: If ``data`` is empty, the convention is unknown, or the outputs differ in shape.

    Source:
        Chundawat et al., "Can Bad Teaching Induce Forgetting?", AAAI 2023.
    """
    ranks = ranks_of(process_group, "zrf")
    if convention not in ("paper", "release"):
        raise ValueError(f"zrf: convention must be paper or release, got {convention!r}")
    if convention == "paper":
        return 1 - _mean_over_positions(ranks, model, incompetent, data, task, _bits)

    def reversed_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
        mixed = _mixed(log_p, log_q)
        return (kl_divergence(mixed, log_p) + kl_divergence(mixed, log_q)) / (2 * log_p.shape[-1])

    return 1 - _mean_over_positions(ranks, model, incompetent, data, task, reversed_divergence)


@lockstep
def js_divergence(
    model: nn.Module,
    reference: nn.Module,
    data: Batches,
    *,
    task: Task | None = None,
    process_group: Group = None,
) -> float:
    """Return the mean Jensen-Shannon divergence of two models' predictions, in bits.

    Args:
        model: A model.
        reference: Another of the same outputs, usually the retrained one.
        data: Where to compare them, with labels or without. Positions that the task ignores do not count.
        task: What the models are for; None infers it. See ``ux.tasks``.
        process_group: Ranks that call this together, each with its own share of the data, perhaps none: the
            figure is that of all data, and the same on every rank.

    Returns:
        A number in [0, 1]; 0 for equal predictions.

    Raises:
        FloatingPointError: If an output of a model is NaN, or leaves no probabilities, such as infinity.
        NotImplementedError: If the task has no classes.
        ValueError: If ``data`` is empty, or the outputs differ in shape.

    Example:
        >>> certain, other = [(torch.tensor([[30.0, 0.0]]),)], nn.Linear(2, 2, bias=False)
        >>> with torch.no_grad():
        ...     _ = other.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        >>> round(js_divergence(nn.Identity(), other, certain), 3)
        1.0
    """
    ranks = ranks_of(process_group, "js_divergence")
    return _mean_over_positions(ranks, model, reference, data, task, _bits)


@lockstep
def activation_distance(
    model: nn.Module,
    reference: nn.Module,
    data: Batches,
    *,
    task: Task | None = None,
    process_group: Group = None,
) -> float:
    """Return the mean Euclidean distance of two models' predicted probabilities.

    Args:
        model: A model.
        reference: Another of the same outputs, usually the retrained one.
        data: Where to compare them, with labels or without. Positions that the task ignores do not count.
        task: What the models are for; None infers it. See ``ux.tasks``.
        process_group: Ranks that call this together, each with its own share of the data, perhaps none: the
            figure is that of all data, and the same on every rank.

    Returns:
        A number in [0, sqrt(2)].

    Raises:
        FloatingPointError: If an output of a model is NaN, or leaves no probabilities, such as infinity.
        NotImplementedError: If the task has no classes.
        ValueError: If ``data`` is empty, or the outputs differ in shape.

    Source:
        Golatkar, Achille & Soatto, "Forgetting Outside the Box", ECCV 2020.
    """
    ranks = ranks_of(process_group, "activation_distance")

    def distance(log_p: Tensor, log_q: Tensor) -> Tensor:
        return (log_p.exp() - log_q.exp()).square().sum(-1).sqrt()

    return _mean_over_positions(ranks, model, reference, data, task, distance)


def kl_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(p || q) over the last axis, in nats; differentiable in both.

    Args:
        log_p: Logarithms of probabilities ``[..., C]``.
        log_q: Those of others, of the same shape.

    Returns:
        ``[...]``; a class of probability 0 under p contributes nothing.

    Example:
        >>> p = torch.tensor([0.75, 0.25])
        >>> round(float(kl_divergence(p.log(), p.flip(0).log())), 4)  # log(3) / 2
        0.5493
    """
    never = torch.isneginf(log_p)
    # Before the difference, which would be NaN, and so would be its gradient.
    difference = log_p.masked_fill(never, 0.0) - log_q.masked_fill(never, 0.0)
    return (log_p.exp() * difference).sum(-1)


def _mixed(log_p: Tensor, log_q: Tensor) -> Tensor:
    return torch.logaddexp(log_p, log_q) - math.log(2)


def _bits(log_p: Tensor, log_q: Tensor) -> Tensor:
    mixed = _mixed(log_p, log_q)
    # Rounding can bring equal predictions below 0.
    nats = ((kl_divergence(log_p, mixed) + kl_divergence(log_q, mixed)) / 2).clamp(min=0)
    return nats / math.log(2)


def _mean_over_positions(
    ranks: Ranks,
    model: nn.Module,
    reference: nn.Module,
    data: Batches,
    task: Task | None,
    distance: Callable[[Tensor, Tensor], Tensor],
) -> float:
    who = ranks.who
    judge = task_for(who, task)
    total, count = 0.0, 0
    with borrowed(model), borrowed(reference), torch.no_grad():
        for batch, outputs in answers(who, model, judge, data):
            others = checked(who, judge.forward(reference, batch), "the reference's answers")
            log_p = log_probabilities(who, judge, outputs, batch)
            log_q = log_probabilities(who, judge, others, batch).to(log_p.device)
            if log_p.shape != log_q.shape:
                raise ValueError(
                    f"{who}: models must have outputs of one shape, got {list(log_p.shape)} and "
                    f"{list(log_q.shape)}"
                )
            counted = judge.counted(outputs, batch)
            values = distance(log_p, log_q)[counted]
            if bool(torch.isnan(values).any()):
                raise FloatingPointError(
                    f"{who}: outputs must leave probabilities, got infinite ones or none but -inf"
                )
            total, count = total + float(values.sum()), count + values.numel()
    total, count = ranks.total("distances", total, count)
    if count == 0:
        raise ValueError(f"{who}: data must hold at least one sample, got none")
    return float(total / count)
