"""What language models' unlearning is compared with: gradient difference, NPO and SimNPO.

All three push forget batches away and hold on to a retain batch beside each of them, with AdamW:

    min   forget_weight L(forget) + retain_weight CE(retain)

They differ in ``L``. A sample is a sequence, ``log p(y)`` the sum over its tokens and ``|y|`` their number;
the same formulas serve every task with classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.copies import frozen_copy
from unlearn_ext.methods import loop
from unlearn_ext.methods.common import (
    Paired,
    check_count,
    check_weights,
    epochs_of,
    facts_of,
    n_classes,
    prepared,
    required,
    train_with_fixed_statistics,
    trainable,
    what_a_task_must_have,
)
from unlearn_ext.methods.goal import ClosedLoop
from unlearn_ext.methods.recorded import recorded
from unlearn_ext.methods.run import unlearning
from unlearn_ext.methods.until import Until
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches, device_of, read_batches
from unlearn_ext.tasks.losses import LossFn

# A small forget set is one batch: ten epochs, as published, would be ten steps.
_STEPS, _LEAST_EPOCHS = 60, 10

Forgetting = Callable[[nn.Module, Batch], Tensor]
"""``L``: one value per sample of a forget batch, or their mean."""


@recorded
def gradient_difference(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    forget_weight: float = 1.0,
    retain_weight: float = 1.0,
    cap: float | None = None,
    epochs: int | None = None,
    lr: float = 1e-4,
    weight_decay: float = 0.01,
    until: Until = None,
    budget: float = 0.02,
    validation: Batches | None = None,
    strict: bool = False,
    task: Task | None = None,
    loss_fn: LossFn | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> UnlearnResult:
    """Climb the loss of the forget set and descend that of the retain set, with AdamW.

        L = -min(CE(forget), cap)

    Args:
        model: The model, changed in place; BatchNorm statistics stay.
        forget: The forget set; an epoch is a pass over it.
        retain: The retain set, a batch beside each of the forget set's; started again whenever it ends.
        forget_weight: Weight of ``L``.
        retain_weight: Weight of the retain set.
        cap: Forget samples with a higher loss do not count. By default log(number of classes), the loss of a
            guess; ``math.inf`` is the published form, which has no bottom. Must be given for tasks without
            classes.
        epochs: Passes over the forget set. None: as many as 60 steps take, at least 10.
        lr: Learning rate of the first epoch; it falls to 0. 1e-5 is published, for models of billions of
            parameters.
        weight_decay: Weight decay, decoupled.
        until: Stop at a goal: ``"forgotten"`` (accuracy on the forget set at most 1 %), ``"unseen"`` (no
            higher than on ``validation``; for texts a loss no lower than there), an accuracy, or a function
            of the model that says whether it will do. None: go on to the end, whatever comes of it.
        budget: What reaching the goal may cost, as a share: of retain accuracy, for texts the rise of the
            retain set's perplexity.
        validation: Data that the model never saw, for ``until="unseen"``.
        strict: Raise ``UnlearningFailed`` where the goal is not reached within the budget, not warn. The
            model is as it was either way.
        task: What the model is for; None tells it from the model and the batches, or refuses.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``, instead of the task's.
        generator: Decides every random choice.
        progress: Show a progress bar, where tqdm is installed.
        include: Parameters that may change: names of them or of their modules, the last parts of such names,
            or regular expressions that match a whole name. None: all that are trainable.
        exclude: Parameters that may not change, likewise.

    Returns:
        The record of the run.

    Raises:
        ValueError: If a set is missing or empty, or a setting is out of range.

    Source:
        Liu, Liu & Stone, "Continual Learning and Private Unlearning", CoLLAs 2022; as language models are
        compared by it: Maini, Feng, Schwarzschild, Lipton & Kolter, "TOFU", COLM 2024. The cap is ours.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(4, 2), torch.ones(4, dtype=torch.long))]
        >>> gradient_difference(model, forget, retain).method
        'gradient_difference'
    """
    chosen = prepared("gradient_difference", model, task, loss_fn)
    required("gradient_difference", forget=forget, retain=retain)
    assert retain is not None
    if cap is None:
        with what_a_task_must_have("gradient_difference", "give cap for tasks without classes"):
            cap = math.log(n_classes("gradient_difference", model, forget, chosen))
    limit = cap
    return _pushed_away(
        "gradient_difference",
        model,
        forget,
        retain,
        lambda model, batch: -chosen.sample_losses(model, batch).clamp(max=limit),
        chosen,
        settings={"cap": limit, **facts_of(task, loss_fn)},
        weights=(forget_weight, retain_weight),
        steps=(epochs, lr, weight_decay),
        generator=generator,
        progress=progress,
        patterns=(include, exclude),
        goal=ClosedLoop(
            "gradient_difference", model, forget, retain, until, budget, validation, strict, chosen
        ),
    )


@recorded
def npo(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    beta: float = 0.1,
    forget_weight: float = 1.0,
    retain_weight: float = 1.0,
    epochs: int | None = None,
    lr: float = 1e-4,
    weight_decay: float = 0.01,
    until: Until = None,
    budget: float = 0.02,
    validation: Batches | None = None,
    strict: bool = False,
    task: Task | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> UnlearnResult:
    """Treat forget samples as answers that are not preferred to the original model's own.

        L = -2/beta log sigmoid(-beta (log p(y) - log p_original(y)))

    It falls as ``p(y)`` does, ever more slowly: with beta to 0 it is gradient ascent. What the original
    answers to forget batches is worked out once where they are a list (of the same order in every pass); a
    loader's come from a frozen copy of the model.

    Args:
        model: The model, changed in place; BatchNorm statistics stay.
        forget: The forget set; an epoch is a pass over it.
        retain: The retain set, a batch beside each of the forget set's; started again whenever it ends.
        beta: Inverse temperature, > 0.
        forget_weight: Weight of ``L``.
        retain_weight: Weight of the retain set; 0 is NPO alone.
        epochs: Passes over the forget set. None: as many as 60 steps take, at least 10.
        lr: Learning rate of the first epoch; it falls to 0. 1e-5 is published, for models of billions of
            parameters.
        weight_decay: Weight decay, decoupled.
        until: Stop at a goal: ``"forgotten"`` (accuracy on the forget set at most 1 %), ``"unseen"`` (no
            higher than on ``validation``; for texts a loss no lower than there), an accuracy, or a function
            of the model that says whether it will do. None: go on to the end, whatever comes of it.
        budget: What reaching the goal may cost, as a share: of retain accuracy, for texts the rise of the
            retain set's perplexity.
        validation: Data that the model never saw, for ``until="unseen"``.
        strict: Raise ``UnlearningFailed`` where the goal is not reached within the budget, not warn. The
            model is as it was either way.
        task: What the model is for; None tells it from the model and the batches, or refuses.
        generator: Decides every random choice.
        progress: Show a progress bar, where tqdm is installed.
        include: Parameters that may change, as in ``gradient_difference``.
        exclude: Parameters that may not change, likewise.

    Returns:
        The record of the run.

    Raises:
        NotImplementedError: If the task does not say which positions count.
        ValueError: If a set is missing or empty, or a setting is out of range.

    Source:
        Zhang, Lin, Bai & Mei, "Negative Preference Optimization: From Catastrophic Collapse to Effective
        Unlearning", COLM 2024, with the retain loss beside it (NPO-RT).

    Example:
        >>> model = nn.Linear(2, 2)
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(4, 2), torch.ones(4, dtype=torch.long))]
        >>> npo(model, forget, retain).method
        'npo'
    """
    chosen = prepared("npo", model, task, None)
    required("npo", forget=forget, retain=retain)
    assert retain is not None
    _check_positive("npo", beta=beta)
    known = isinstance(forget, (list, tuple))
    judged: Batches = _with_original(model, forget, chosen) if known else forget
    original = None if known else frozen_copy(model)

    def objective(model: nn.Module, item: Batch) -> Tensor:
        if original is None:
            batch, before = cast("tuple[Batch, Tensor]", item)
        else:
            batch = item
            with torch.no_grad():
                before = sequence_log_probability(original, batch, chosen)
        ratio = sequence_log_probability(model, batch, chosen) - before
        return -2 / beta * F.logsigmoid(-beta * ratio)

    return _pushed_away(
        "npo",
        model,
        judged,
        retain,
        objective,
        chosen,
        settings={"beta": beta, **({} if task is None else {"task": repr(task)})},
        weights=(forget_weight, retain_weight),
        steps=(epochs, lr, weight_decay),
        generator=generator,
        progress=progress,
        patterns=(include, exclude),
        goal=ClosedLoop("npo", model, forget, retain, until, budget, validation, strict, chosen),
    )


@recorded
def simnpo(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    beta: float = 4.5,
    margin: float = 0.0,
    forget_weight: float = 0.125,
    retain_weight: float = 1.0,
    epochs: int | None = None,
    lr: float = 1e-4,
    weight_decay: float = 0.01,
    until: Until = None,
    budget: float = 0.02,
    validation: Batches | None = None,
    strict: bool = False,
    task: Task | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> UnlearnResult:
    """Lower the probability per token of forget samples, without a reference model.

        L = -2/beta log sigmoid(-beta (log p(y) / |y| + margin))

    Args:
        model: The model, changed in place; BatchNorm statistics stay.
        forget: The forget set; an epoch is a pass over it.
        retain: The retain set, a batch beside each of the forget set's; started again whenever it ends.
        beta: Inverse temperature, > 0.
        margin: Forget samples are pushed until their loss is well above it.
        forget_weight: Weight of ``L``.
        retain_weight: Weight of the retain set.
        epochs: Passes over the forget set. None: as many as 60 steps take, at least 10.
        lr: Learning rate of the first epoch; it falls to 0. 1e-5 is published, for models of billions of
            parameters.
        weight_decay: Weight decay, decoupled.
        until: Stop at a goal: ``"forgotten"`` (accuracy on the forget set at most 1 %), ``"unseen"`` (no
            higher than on ``validation``; for texts a loss no lower than there), an accuracy, or a function
            of the model that says whether it will do. None: go on to the end, whatever comes of it.
        budget: What reaching the goal may cost, as a share: of retain accuracy, for texts the rise of the
            retain set's perplexity.
        validation: Data that the model never saw, for ``until="unseen"``.
        strict: Raise ``UnlearningFailed`` where the goal is not reached within the budget, not warn. The
            model is as it was either way.
        task: What the model is for; None tells it from the model and the batches, or refuses.
        generator: Decides every random choice.
        progress: Show a progress bar, where tqdm is installed.
        include: Parameters that may change, as in ``gradient_difference``.
        exclude: Parameters that may not change, likewise.

    Returns:
        The record of the run.

    Raises:
        ValueError: If a set is missing or empty, or a setting is out of range.

    Source:
        Fan, Liu, Lin, Jia, Zhang, Mei & Liu, "Simplicity Prevails: Rethinking Negative Preference
        Optimization for LLM Unlearning", 2024; beta and the forget set's weight as OpenUnlearning has them.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(4, 2), torch.ones(4, dtype=torch.long))]
        >>> simnpo(model, forget, retain).method
        'simnpo'
    """
    chosen = prepared("simnpo", model, task, None)
    required("simnpo", forget=forget, retain=retain)
    assert retain is not None
    _check_positive("simnpo", beta=beta)
    if not math.isfinite(margin):
        raise ValueError(f"simnpo: margin must be finite, got {margin}")
    return _pushed_away(
        "simnpo",
        model,
        forget,
        retain,
        lambda model, batch: -2 / beta * F.logsigmoid(beta * (chosen.sample_losses(model, batch) - margin)),
        chosen,
        settings={"beta": beta, "margin": margin, **({} if task is None else {"task": repr(task)})},
        weights=(forget_weight, retain_weight),
        steps=(epochs, lr, weight_decay),
        generator=generator,
        progress=progress,
        patterns=(include, exclude),
        goal=ClosedLoop("simnpo", model, forget, retain, until, budget, validation, strict, chosen),
    )


def sequence_log_probability(model: nn.Module, batch: Batch, task: Task) -> Tensor:
    """Return the log-probability of every sample's labels, summed over the positions that count.

    Args:
        model: The model.
        batch: A batch on its device.
        task: What the model is for.

    Returns:
        ``[N]``, differentiable.
    """
    outputs = task.forward(model, batch)
    with what_a_task_must_have("npo"):
        counted = task.counted(outputs, batch)
    losses = task.losses(outputs, batch)
    return -losses if counted.ndim == 1 else -losses * counted.flatten(1).sum(1)


def _with_original(model: nn.Module, forget: Batches, task: Task) -> list[tuple[Batch, Tensor]]:
    device = device_of(model)
    with borrowed(model), torch.no_grad():
        return [
            (batch, sequence_log_probability(model, read, task).cpu() if task.count(read) else torch.zeros(0))
            for batch, read in zip(forget, read_batches(forget, device), strict=True)
        ]


def _pushed_away(
    who: str,
    model: nn.Module,
    forget: Batches,
    retain: Batches,
    objective: Forgetting,
    task: Task,
    *,
    settings: Mapping[str, object],
    weights: tuple[float, float],
    steps: tuple[int | None, float, float],
    generator: torch.Generator | None,
    progress: bool,
    patterns: tuple[str | Iterable[str] | None, str | Iterable[str] | None],
    goal: ClosedLoop,
) -> UnlearnResult:
    push, hold = weights
    check_weights(who, forget_weight=push, retain_weight=hold)
    epochs, lr, weight_decay = steps
    if epochs is None:
        epochs = max(_LEAST_EPOCHS, epochs_of(_STEPS, forget))
    check_count(who, "epochs", epochs)
    parameters = trainable(model, who, *patterns)
    told = {
        "forget_weight": push,
        "retain_weight": hold,
        "epochs": epochs,
        "lr": lr,
        "weight_decay": weight_decay,
    }

    def both(model: nn.Module, pair: Batch) -> loop.Terms:
        forgotten, kept = cast("tuple[Batch, Batch]", pair)
        pushed = [(push, objective(model, forgotten))]
        return [*pushed, (hold, task.sample_losses(model, kept))] if hold else pushed

    facts = {**told, **settings, **goal.facts}
    with unlearning(model, who, facts, generator=generator, data=(forget, retain), goal=goal) as run:
        train_with_fixed_statistics(model)
        optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=weight_decay)
        loop.train(
            run,
            "both",
            Paired(who, forget, retain=retain),
            both,
            optimizer,
            parameters=parameters.values(),
            epochs=epochs,
            schedule=lambda epoch: lr * (1 - epoch / epochs),
            progress=progress,
        )
    return goal.result(run)


def _check_positive(who: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{who}: {name} must be finite and > 0, got {value}")
