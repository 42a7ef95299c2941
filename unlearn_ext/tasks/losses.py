"""Losses with one value per sample: ``loss_fn(model, batch) -> Tensor[N]``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias, cast

from torch import Tensor, nn

from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch
from unlearn_ext.tasks.classification import Classification
from unlearn_ext.tasks.fields import Fields, logits_in
from unlearn_ext.tasks.infer import INFERRED, infer, interned
from unlearn_ext.tasks.language import CausalLM

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
        shift: Whether position ``t`` predicts the label of position ``t + 1``. None asks the model (Hugging
            Face's classes tell); for a mapping with labels ``[N, T]`` of a model that does not tell, it must
            be given, or a task.
        ignore_index: The label of positions that do not count.

    Returns:
        ``[N]``, in nats; float32 for half-precision models.

    Raises:
        ValueError: If the batch has no labels, their shape does not go with the logits, or they are no
            classes; the message names the task to pass.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 2)
        >>> with torch.no_grad():
        ...     _ = model.weight.zero_(), model.bias.zero_()
        ...     cross_entropy(model, (torch.ones(3, 2), torch.tensor([0, 1, -100])))
        tensor([0.6931, 0.6931, 0.0000])
    """
    return task_of(model, batch, shift, ignore_index).loss(model, batch)


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
        >>> import torch
        >>> log_odds(nn.Identity(), (torch.tensor([[3.0, 1.0]]), torch.tensor([0])))
        tensor([-2.])
    """
    return task_of(model, batch, shift, ignore_index).odds_loss(model, batch)


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
        >>> import torch
        >>> logit_norm(nn.Identity(), (torch.tensor([[3.0, 4.0]]),))
        tensor([25.])
    """
    return _squared_norm(logits_in(Fields().call(model, batch)))


def resolve(task: Task | None, loss_fn: LossFn | None = None, *, who: str = "ux") -> Task:
    """Return the task that a call is about: the one object whose ``loss`` is to be used from then on.

    Args:
        task: What the user passed as ``task``; None infers it from the model and each batch.
        loss_fn: What the user passed as ``loss_fn``; overrides the task's ``losses`` alone.
            ``cross_entropy``, ``log_odds`` and ``logit_norm`` mean the task's own, where a task is given.
        who: For messages.

    Returns:
        The task.

    Raises:
        TypeError: If ``task`` is no task, or ``loss_fn`` cannot be called as ``loss_fn(model, batch)``.
    """
    passed: object = task
    if not isinstance(passed, Task | None):
        hint = "; call it: a task is an object" if isinstance(passed, type) else ""
        raise TypeError(f"{who}: task must be a ux.tasks.Task, got {passed!r}{hint}")
    chosen = INFERRED if task is None else interned(task)
    if loss_fn is None or (loss_fn is cross_entropy and task is not None):
        return chosen
    given: object = loss_fn
    if not callable(given):
        raise TypeError(f"{who}: loss_fn must be a function of model and batch, got {given!r}")
    if isinstance(given, nn.Module) or getattr(loss_fn, "__module__", None) == "torch.nn.functional":
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        raise TypeError(
            f"{who}: loss_fn must be called as loss_fn(model, batch) and return one loss per sample, got "
            f"{name}, which is called as (outputs, targets); pass task=, such as ux.tasks.Classification() "
            "or ux.tasks.Regression(), or a function of model and batch"
        )
    if task is not None and loss_fn is log_odds:
        return chosen.with_loss(chosen.odds_loss)
    if task is not None and loss_fn is logit_norm:
        return chosen.with_loss(_LogitNorm(chosen))
    return chosen.with_loss(loss_fn)


class _LogitNorm:
    """``logit_norm`` through a task's own call of the model."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        return _squared_norm(cast("Tensor", self._task.forward(model, batch)))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _LogitNorm) and other._task is self._task

    def __hash__(self) -> int:
        return hash((_LogitNorm, id(self._task)))


def _squared_norm(logits: Tensor) -> Tensor:
    return logits.flatten(1).square().sum(1)


def task_of(model: nn.Module, batch: Batch, shift: bool | None = None, ignore_index: int = -100) -> Task:
    """Return the task of a model and a batch where no task is given.

    Args:
        model: The model.
        batch: A batch.
        shift: True for a causal language model, False for labels at their own positions; None infers.
        ignore_index: The label of positions that do not count.

    Returns:
        The task.
    """
    if shift is not None:
        return CausalLM(ignore_index) if shift else Classification(ignore_index)
    found = infer(model, batch)
    if getattr(found, "ignore_index", ignore_index) == ignore_index:
        return found
    settings: dict[str, Any] = {**found.settings(), "ignore_index": ignore_index}
    return type(found)(**settings)
