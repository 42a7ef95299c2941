"""Unlearning by distillation: a student that follows a teacher on one set and not on the other."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from unlearn_ext._internal.copies import copied, frozen_copy
from unlearn_ext.distributed import Group, Ranks, lockstep, ranks_of
from unlearn_ext.evaluation.metrics.divergences import kl_divergence
from unlearn_ext.methods.common import (
    Paired,
    Portion,
    check_count,
    check_weights,
    facts_of,
    n_classes,
    prepared,
    required,
    train_with_fixed_statistics,
    trainable,
    values_of,
    what_a_task_must_have,
)
from unlearn_ext.methods.goal import ClosedLoop
from unlearn_ext.methods.loop import Terms, train
from unlearn_ext.methods.recorded import recorded
from unlearn_ext.methods.run import unlearning
from unlearn_ext.methods.until import Until
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches
from unlearn_ext.tasks.losses import LossFn, resolve
from unlearn_ext.tasks.positions import mean_over_positions


@lockstep
@recorded
def bad_teacher(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    incompetent: nn.Module | None = None,
    retain_share: float = 0.3,
    epochs: int = 3,
    lr: float = 3e-4,
    temperature: float = 1.0,
    until: Until = None,
    budget: float = 0.02,
    validation: Batches | None = None,
    strict: bool = False,
    task: Task | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    process_group: Group = None,
) -> UnlearnResult:
    """Follow an untrained teacher on the forget set and the original on the retain set, with Adam.

        min   KL(incompetent || student; forget) + KL(original || student; retain)

    An untrained teacher's answers are nearly equal for all labels, and so become the student's: among them
    the forgotten label may still come first. On a class of CIFAR-10 it does so more often than by chance, and
    more steps do not change that (``python -m bench.bench_methods``).

    Args:
        model: The model, changed in place; BatchNorm statistics stay.
        forget: The forget set; of labels all that is read is which count. Started again whenever it ends.
        retain: The retain set.
        incompetent: The untrained teacher. By default a copy of the model in which every layer is
            initialised afresh by its ``reset_parameters``, and N(0, 0.02^2) where there is none.
        retain_share: Share of the retain batches that is used in an epoch, in (0, 1]; the next epoch goes on
            with those that follow.
        epochs: Passes over them.
        lr: Learning rate.
        temperature: Of both distributions, > 0.
        until: Stop at a goal: ``"forgotten"`` (accuracy on the forget set at most 1 %), ``"unseen"`` (no
            higher than on ``validation``), an accuracy, or a function of the model that says whether it will
            do. None: go on to the end, whatever comes of it.
        budget: Retain accuracy that reaching the goal may cost, as a share.
        validation: Data that the model never saw, for ``until="unseen"``.
        strict: Raise ``UnlearningFailed`` where the goal is not reached within the budget, not warn. The
            model is as it was either way.
        task: What the model is for; None tells it from the model and the batches, or refuses.
        generator: Decides every random choice.
        progress: Show a progress bar, where tqdm is installed.
        include: Parameters that may change: names of them or of their modules, the last parts of such names,
            or regular expressions that match a whole name. None: all that are trainable.
        exclude: Parameters that may not change, likewise.
        process_group: Ranks that call this together, each with its own share of every set, perhaps none. A
            step is that of the batches of all ranks together; every rank ends with the same weights, which is
            verified. Random choices are each rank's own. See ``docs/processes.md``.

    Returns:
        The record of the run.

    Raises:
        ValueError: If a setting is out of range or a set is missing or empty.
        NotImplementedError: If the task has no classes.

    Source:
        Chundawat, Tarun, Mandal & Kankanhalli, "Can Bad Teaching Induce Forgetting?", AAAI 2023. One epoch
        at 1e-4 is published, over more data than small sets have. Their code divides the divergence by the
        number of classes; here it is the divergence.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(4, 2), torch.ones(4, dtype=torch.long))]
        >>> bad_teacher(model, forget, retain).method
        'bad_teacher'
    """
    ranks = ranks_of(process_group, "bad_teacher")
    chosen = prepared("bad_teacher", model, task, None)
    required("bad_teacher", forget=forget, retain=retain)
    assert retain is not None
    check_count("bad_teacher", "epochs", epochs)
    parameters = trainable(model, "bad_teacher", include, exclude)
    if not 0 < retain_share <= 1:
        raise ValueError(f"bad_teacher: retain_share must lie in (0, 1], got {retain_share}")
    _check_temperature("bad_teacher", temperature)
    settings: dict[str, object] = {
        "incompetent": "initialised afresh" if incompetent is None else "given",
        "retain_share": retain_share,
        "epochs": epochs,
        "lr": lr,
        "temperature": temperature,
        **({} if task is None else {"task": repr(task)}),
    }
    _check_has_classes("bad_teacher", model, forget, chosen, ranks)
    goal = ClosedLoop("bad_teacher", model, forget, retain, until, budget, validation, strict, chosen, ranks)
    settings |= goal.facts
    with unlearning(
        model,
        "bad_teacher",
        settings,
        generator=generator,
        goal=goal,
        changes=parameters,
        ranks=ranks,
        data=(forget, retain),
    ) as run:
        competent = frozen_copy(model)
        with run.shared_draws():
            ignorant = frozen_copy(_initialised_afresh(model) if incompetent is None else incompetent)

        def objective(model: nn.Module, pair: Batch) -> Terms:
            kept, forgotten = cast("tuple[Batch, Batch]", pair)
            wrong = values_of(
                forgotten, lambda batch: divergence(ignorant, model, batch, temperature, task=chosen)
            )
            return [(1.0, wrong), (1.0, divergence(competent, model, kept, temperature, task=chosen))]

        train_with_fixed_statistics(model)
        optimizer = torch.optim.Adam(parameters.values(), lr=lr)
        train(
            run,
            "distil",
            Paired(
                "bad_teacher",
                Portion("bad_teacher", "retain", retain, retain_share, ranks),
                ranks=ranks,
                forget=forget,
            ),
            objective,
            optimizer,
            parameters=parameters.values(),
            epochs=epochs,
            progress=progress,
        )
    return goal.result(run)


@lockstep
@recorded
def scrub(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    epochs: int = 10,
    forget_epochs: int = 3,
    lr: float = 5e-4,
    weight_decay: float = 0.1,
    ce_weight: float = 1.0,
    kl_weight: float = 0.5,
    temperature: float = 2.0,
    cap: float | None = None,
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
    process_group: Group = None,
) -> UnlearnResult:
    """Disobey the original on the forget set and follow it on the retain set, epoch by epoch, with AdamW.

        max   mean_n min(T^2 KL_n(original || student; forget), cap)            in the first forget_epochs
        min   ce_weight CE(retain) + kl_weight T^2 KL(original || student; retain)           in all epochs

    Args:
        model: The model, changed in place; BatchNorm statistics stay.
        forget: The forget set.
        retain: The retain set.
        epochs: Passes over the retain set.
        forget_epochs: Passes over the forget set, one before each of as many passes over the retain set.
        lr: Learning rate; divided by 10 after 50 %, 80 % and 90 % of the epochs.
        weight_decay: Weight decay, decoupled from the gradients.
        ce_weight: Weight of the labels of the retain set.
        kl_weight: Weight of the original on the retain set.
        temperature: Of both distributions, > 0.
        cap: Forget samples with a higher divergence do not count; by default T^2 log(number of classes).
        until: Stop at a goal: ``"forgotten"`` (accuracy on the forget set at most 1 %), ``"unseen"`` (no
            higher than on ``validation``), an accuracy, or a function of the model that says whether it will
            do. None: go on to the end, whatever comes of it.
        budget: Retain accuracy that reaching the goal may cost, as a share.
        validation: Data that the model never saw, for ``until="unseen"``.
        strict: Raise ``UnlearningFailed`` where the goal is not reached within the budget, not warn. The
            model is as it was either way.
        task: What the model is for; None tells it from the model and the batches, or refuses.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``, instead of the task's CE.
        generator: Decides every random choice.
        progress: Show a progress bar, where tqdm is installed.
        include: Parameters that may change: names of them or of their modules, the last parts of such names,
            or regular expressions that match a whole name. None: all that are trainable.
        exclude: Parameters that may not change, likewise.
        process_group: Ranks that call this together, each with its own share of every set, perhaps none. A
            step is that of the batches of all ranks together; every rank ends with the same weights, which is
            verified. Random choices are each rank's own. See ``docs/processes.md``.

    Returns:
        The record of the run.

    Raises:
        ValueError: If a setting is out of range or a set is missing or empty.
        NotImplementedError: If the task has no classes.

    Source:
        Kurmanji, Triantafillou, Hayes & Triantafillou, "Towards Unbounded Machine Unlearning", NeurIPS 2023,
        without a cap, and with Adam: a weight decay of 0.1 that is coupled dominates its steps wherever the
        gradient is small. Rewinding (SCRUB+R) is left out.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(4, 2), torch.ones(4, dtype=torch.long))]
        >>> sorted(scrub(model, forget, retain).seconds)
        ['max', 'min']
    """
    ranks = ranks_of(process_group, "scrub")
    chosen = prepared("scrub", model, task, loss_fn)
    required("scrub", forget=forget, retain=retain)
    assert retain is not None
    check_count("scrub", "epochs", epochs)
    check_count("scrub", "forget_epochs", forget_epochs)
    parameters = trainable(model, "scrub", include, exclude)
    _check_temperature("scrub", temperature)
    check_weights("scrub", ce_weight=ce_weight, kl_weight=kl_weight)
    n = _check_has_classes("scrub", model, forget, chosen, ranks)
    limit = temperature**2 * math.log(n) if cap is None else cap
    settings: dict[str, object] = {
        "epochs": epochs,
        "forget_epochs": forget_epochs,
        "lr": lr,
        "weight_decay": weight_decay,
        "ce_weight": ce_weight,
        "kl_weight": kl_weight,
        "temperature": temperature,
        "cap": limit,
        **facts_of(task, loss_fn),
    }
    goal = ClosedLoop("scrub", model, forget, retain, until, budget, validation, strict, chosen, ranks)
    settings |= goal.facts
    with unlearning(
        model,
        "scrub",
        settings,
        generator=generator,
        goal=goal,
        changes=parameters,
        ranks=ranks,
        data=(forget, retain),
    ) as run:
        original = frozen_copy(model)

        def disobey(model: nn.Module, batch: Batch) -> Tensor:
            distance = divergence(original, model, batch, temperature, task=chosen)
            return -(temperature**2 * distance).clamp(max=limit)

        def follow(model: nn.Module, batch: Batch) -> Tensor:
            distance = temperature**2 * divergence(original, model, batch, temperature, task=chosen)
            return ce_weight * chosen.sample_losses(model, batch) + kl_weight * distance

        train_with_fixed_statistics(model)
        optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=weight_decay)
        for epoch in range(epochs):
            passed = sum(epoch >= round(share * epochs) for share in (0.5, 0.8, 0.9))
            for group in optimizer.param_groups:
                group["lr"] = lr * 0.1**passed
            if epoch < forget_epochs:
                train(
                    run,
                    "max",
                    forget,
                    disobey,
                    optimizer,
                    parameters=parameters.values(),
                    progress=progress,
                )
            train(run, "min", retain, follow, optimizer, parameters=parameters.values(), progress=progress)
    return goal.result(run)


def divergence(
    teacher: nn.Module,
    student: nn.Module,
    batch: Batch,
    temperature: float = 1.0,
    *,
    task: Task | None = None,
) -> Tensor:
    """Kullback-Leibler divergence of the student's prediction from the teacher's, KL(teacher || student).

    Args:
        teacher: Gets no gradient.
        student: Gets the gradient.
        batch: A batch; positions whose label is ignored do not count.
        temperature: Divides the logits of both.
        task: What the models are for; None tells it from the student and the batch.

    Returns:
        ``[N]``, in nats: the mean over each sample's positions.
    """
    chosen = resolve(task, who="divergence")
    with torch.no_grad():
        goal = chosen.log_scores(chosen.forward(teacher, batch), batch, temperature=temperature)
    outputs = chosen.forward(student, batch)
    logs = chosen.log_scores(outputs, batch, temperature=temperature)
    values = kl_divergence(goal, logs)
    return mean_over_positions(values, chosen.counted(outputs, batch))


def _check_has_classes(who: str, model: nn.Module, data: Batches, task: Task, ranks: Ranks) -> int:
    with what_a_task_must_have(
        who, "it compares class probabilities; finetune works for tasks without classes"
    ):
        return n_classes(who, model, data, task, ranks)


def _check_temperature(who: str, temperature: float) -> None:
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"{who}: temperature must be finite and > 0, got {temperature}")


def _is_fresh(parameter: Tensor, before: Tensor) -> bool:
    # What a weight is computed from (by weight_norm, or a mask of prune) is not what a layer resets. Scales
    # and shifts that are still as they were made are as good as new.
    return not torch.equal(parameter, before) or bool((before == before.flatten()[:1]).all())


def _initialised_afresh(model: nn.Module) -> nn.Module:
    new = copied(model)
    done: set[int] = set()
    for module in new.modules():
        reset = getattr(module, "reset_parameters", getattr(module, "_reset_parameters", None))
        if callable(reset):
            own = [(p, p.detach().clone()) for p in module.parameters(recurse=False)]
            reset()
            done.update(id(p) for p, before in own if _is_fresh(p, before))
    for p in new.parameters():
        if id(p) not in done:
            nn.init.normal_(p, std=0.02)
    return new
