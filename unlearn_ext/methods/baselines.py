"""What unlearning methods are compared with: retraining, fine-tuning, gradient ascent, random labels.

All have the form ``method(model, forget, retain, **settings)`` and change the model in place. Where a loss is
driven up it is capped: the published versions, which are not, end in NaN or with a model that knows nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import cast

import torch
from torch import Tensor, nn

from unlearn_ext._internal.names import parameters_by_name, with_plain_names
from unlearn_ext._internal.plain import callable_name
from unlearn_ext.distributed import Group, Ranks, lockstep, ranks_of
from unlearn_ext.methods import loop
from unlearn_ext.methods.common import (
    Paired,
    check_count,
    epochs_of,
    facts_of,
    n_classes,
    prepared,
    refuse_group,
    relabelling,
    required,
    train_with_fixed_statistics,
    trainable,
    values_of,
    what_a_task_must_have,
)
from unlearn_ext.methods.goal import ClosedLoop
from unlearn_ext.methods.recorded import recorded
from unlearn_ext.methods.run import unlearning
from unlearn_ext.methods.until import Until
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches, device_of
from unlearn_ext.tasks.losses import LossFn

# Of gradient ascent: it spoils the more the longer it goes on, whatever the size of the forget set.
_STEPS, _MOST_EPOCHS = 100, 30


@lockstep
@recorded
def retrain(
    model: nn.Module,
    forget: Batches | None,
    retain: Batches | None = None,
    *,
    make_model: Callable[[], nn.Module] | None = None,
    train: Callable[[nn.Module, Batches], nn.Module | None] | None = None,
    task: Task | None = None,
    generator: torch.Generator | None = None,
    process_group: Group = None,
) -> UnlearnResult:
    """Train a new model on the retain set alone and put its weights into this one: the reference.

        theta <- train(make_model(), retain)

    Args:
        model: The model; gets the new parameters and buffers, in place.
        forget: Not read.
        retain: The retain set.
        make_model: Makes an untrained model of the same architecture, all of it initialised afresh.
        train: ``train(new_model, retain)``: the recipe of the original model. Trains in place, or returns the
            trained model.
        task: Recorded only: ``train`` knows what the model is for.
        generator: Decides the global random state in which both are called.
        process_group: Refused unless None.

    Returns:
        The record of the run.

    Raises:
        ValueError: If something is missing, or the new model has other parameters or buffers, or shares them
            with the model.
        FloatingPointError: If a new weight is NaN or infinite.

    Source:
        The definition of exact unlearning. Some published code starts from the trained weights in all but the
        last layer; a warning tells if ``make_model`` does.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> result = retrain(
        ...     model, None, [], make_model=lambda: nn.Linear(2, 2), train=lambda new, retain: new
        ... )
        >>> result.changed
        1.0
    """
    prepared("retrain", model, task, None)
    refuse_group("retrain", process_group, "``train`` alone knows how it is spread over ranks")
    required("retrain", retain=retain)
    assert retain is not None
    if make_model is None or train is None:
        missing = "make_model" if make_model is None else "train"
        raise ValueError(f"retrain: {missing} must be given, got None")
    settings: dict[str, object] = {"make_model": callable_name(make_model), "train": callable_name(train)}
    if task is not None:
        settings["task"] = repr(task)
    with (
        unlearning(model, "retrain", settings, generator=generator, data=(retain,)) as run,
        run.phase("train"),
    ):
        new = make_model().to(device_of(model))
        _check_new(model, new)
        new.train()
        _take_over(model, train(new, retain) or new)
    return run.result()


@lockstep
@recorded
def finetune(
    model: nn.Module,
    forget: Batches | None,
    retain: Batches | None = None,
    *,
    epochs: int = 5,
    lr: float = 0.2,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
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
    """Go on training on the retain set alone, with SGD and a learning rate that falls to 0.

        min   CE(retain)

    Nothing here acts against the forget set: it is forgotten only as far as the weights drift. The published,
    constant learning rate of 0.02 leaves a small network close to where it was. The default is ten times as
    high, enough for it to drift away from a class, and falls with every epoch, so that the rest recovers.

    Args:
        model: The model, changed in place; in train mode, so BatchNorm statistics move. Where one gets a
            single value per channel, as from a batch of one sample, it uses its statistics and leaves them.
        forget: Not read.
        retain: The retain set.
        epochs: Passes over it.
        lr: Learning rate of the first epoch.
        momentum: Momentum.
        weight_decay: Weight decay.
        until: Stop at a goal: ``"forgotten"`` (accuracy on the forget set at most 1 %), ``"unseen"`` (no
            higher than on ``validation``), an accuracy, or a function of the model that says whether it will
            do. None: go on to the end, whatever comes of it.
        budget: Retain accuracy that reaching the goal may cost, as a share.
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
        process_group: Ranks that call this together, each with its own share of every set, perhaps none. A
            step is that of the batches of all ranks together; every rank ends with the same weights, which is
            verified. Random choices are each rank's own. See ``docs/processes.md``.

    Returns:
        The record of the run.

    Source:
        Epochs, momentum and weight decay of the code published with SSD (Foster, Schoepf & Brintrup, AAAI
        2024).

    Example:
        >>> model = nn.Linear(2, 2)
        >>> retain = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> len(finetune(model, None, retain, epochs=2).history)
        2
    """
    ranks = ranks_of(process_group, "finetune")
    chosen = prepared("finetune", model, task, loss_fn)
    required("finetune", retain=retain)
    assert retain is not None
    check_count("finetune", "epochs", epochs)
    parameters = trainable(model, "finetune", include, exclude)
    settings = {
        "epochs": epochs,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        **facts_of(task, loss_fn),
    }
    goal = ClosedLoop("finetune", model, forget, retain, until, budget, validation, strict, chosen, ranks)
    settings |= goal.facts
    with unlearning(
        model,
        "finetune",
        settings,
        generator=generator,
        goal=goal,
        changes=parameters,
        ranks=ranks,
        data=(retain,),
    ) as run:
        model.train()
        optimizer = torch.optim.SGD(parameters.values(), lr=lr, momentum=momentum, weight_decay=weight_decay)
        loop.train(
            run,
            "finetune",
            retain,
            chosen.sample_losses,
            optimizer,
            parameters=parameters.values(),
            epochs=epochs,
            schedule=lambda epoch: lr * (1 - epoch / epochs),
            progress=progress,
        )
    return goal.result(run)


@lockstep
@recorded
def gradient_ascent(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    epochs: int | None = None,
    lr: float = 1e-3,
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
    """Climb the loss of the forget set with SGD, up to a cap.

        max   mean_n min(CE_n(forget), cap)

    Nothing here holds on to what is to be kept, so the price differs from class to class and grows with the
    number of steps: ``python -m bench.bench_methods`` shows it for classes of scikit-learn's digits and of
    CIFAR-10. A higher cap costs more, a lower one forgets less.

    Args:
        model: The model, changed in place; BatchNorm statistics stay.
        forget: The forget set.
        retain: Not read.
        epochs: Passes over the forget set; fewer if every sample reaches the cap. None: as many as 100 steps
            take, but at most 30.
        lr: Learning rate.
        cap: Samples with a higher loss do not count. By default half of log(number of classes), and at least
            1: the label has lost to others then, mostly, with 37 % or less. Must be given for tasks without
            classes.
        until: Stop at a goal: ``"forgotten"`` (accuracy on the forget set at most 1 %), ``"unseen"`` (no
            higher than on ``validation``), an accuracy, or a function of the model that says whether it will
            do. None: go on to the end, whatever comes of it.
        budget: Retain accuracy that reaching the goal may cost, as a share.
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
        process_group: Ranks that call this together, each with its own share of every set, perhaps none. A
            step is that of the batches of all ranks together; every rank ends with the same weights, which is
            verified. Random choices are each rank's own. See ``docs/processes.md``.

    Returns:
        The record of the run.

    Source:
        NegGrad of Golatkar, Achille & Soatto, "Eternal Sunshine of the Spotless Net", CVPR 2020, without a
        cap.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> gradient_ascent(model, forget).method
        'gradient_ascent'
    """
    ranks = ranks_of(process_group, "gradient_ascent")
    chosen = prepared("gradient_ascent", model, task, loss_fn)
    required("gradient_ascent", forget=forget)
    if epochs is None:
        epochs = min(_MOST_EPOCHS, epochs_of(_STEPS, forget, ranks))
    check_count("gradient_ascent", "epochs", epochs)
    parameters = trainable(model, "gradient_ascent", include, exclude)
    if cap is None:
        cap = max(1.0, _log_classes("gradient_ascent", model, forget, chosen, ranks) / 2)
    limit = cap
    settings = {"epochs": epochs, "lr": lr, "cap": limit, **facts_of(task, loss_fn)}
    goal = ClosedLoop(
        "gradient_ascent", model, forget, retain, until, budget, validation, strict, chosen, ranks
    )
    settings |= goal.facts
    with unlearning(
        model,
        "gradient_ascent",
        settings,
        generator=generator,
        goal=goal,
        changes=parameters,
        ranks=ranks,
        data=(forget,),
    ) as run:
        train_with_fixed_statistics(model)
        # No momentum: it would carry on after the cap has been reached.
        optimizer = torch.optim.SGD(parameters.values(), lr=lr)
        loop.train(
            run,
            "ascent",
            forget,
            lambda model, batch: -chosen.sample_losses(model, batch).clamp(max=limit),
            optimizer,
            parameters=parameters.values(),
            epochs=epochs,
            after_epoch=lambda _: cast("float", run.history[-1]["loss"]) <= -limit * (1 - 1e-6),
            progress=progress,
        )
    return goal.result(run)


@lockstep
@recorded
def neg_grad_plus(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    retain_weight: float = 0.95,
    epochs: int = 10,
    lr: float = 0.01,
    momentum: float = 0.9,
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
    """Descend on the retain set while climbing on the forget set, batch beside batch, with SGD.

        min   a CE(retain) - (1 - a) mean_n min(CE_n(forget), cap)      a = retain_weight

    Args:
        model: The model, changed in place; BatchNorm statistics stay.
        forget: The forget set; started again whenever it ends. Batches of the retain set's size weigh its
            samples as published.
        retain: The retain set.
        retain_weight: Weight of the retain set, in [0, 1].
        epochs: Passes over the retain set.
        lr: Learning rate.
        momentum: Momentum.
        cap: Forget samples with a higher loss do not count. By default log(number of classes): a label less
            likely than a guess is certain not to be predicted. Must be given for tasks without classes.
        until: Stop at a goal: ``"forgotten"`` (accuracy on the forget set at most 1 %), ``"unseen"`` (no
            higher than on ``validation``), an accuracy, or a function of the model that says whether it will
            do. None: go on to the end, whatever comes of it.
        budget: Retain accuracy that reaching the goal may cost, as a share.
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
        process_group: Ranks that call this together, each with its own share of every set, perhaps none. A
            step is that of the batches of all ranks together; every rank ends with the same weights, which is
            verified. Random choices are each rank's own. See ``docs/processes.md``.

    Returns:
        The record of the run.

    Raises:
        ValueError: If ``retain_weight`` is out of range or a set is empty.

    Source:
        NegGrad+ of Kurmanji, Triantafillou, Hayes & Triantafillou, "Towards Unbounded Machine Unlearning",
        NeurIPS 2023, without a cap.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(4, 2), torch.ones(4, dtype=torch.long))]
        >>> neg_grad_plus(model, forget, retain).method
        'neg_grad_plus'
    """
    ranks = ranks_of(process_group, "neg_grad_plus")
    chosen = prepared("neg_grad_plus", model, task, loss_fn)
    required("neg_grad_plus", forget=forget, retain=retain)
    assert retain is not None
    if not 0 <= retain_weight <= 1:
        raise ValueError(f"neg_grad_plus: retain_weight must lie in [0, 1], got {retain_weight}")
    check_count("neg_grad_plus", "epochs", epochs)
    parameters = trainable(model, "neg_grad_plus", include, exclude)
    limit = _log_classes("neg_grad_plus", model, forget, chosen, ranks) if cap is None else cap

    def objective(model: nn.Module, pair: Batch) -> loop.Terms:
        kept, forgotten = cast("tuple[Batch, Batch]", pair)
        climbed = values_of(forgotten, lambda batch: chosen.sample_losses(model, batch).clamp(max=limit))
        return [(retain_weight, chosen.sample_losses(model, kept)), (retain_weight - 1, climbed)]

    settings = {
        "retain_weight": retain_weight,
        "epochs": epochs,
        "lr": lr,
        "momentum": momentum,
        "cap": limit,
        **facts_of(task, loss_fn),
    }
    goal = ClosedLoop(
        "neg_grad_plus", model, forget, retain, until, budget, validation, strict, chosen, ranks
    )
    settings |= goal.facts
    with unlearning(
        model,
        "neg_grad_plus",
        settings,
        generator=generator,
        goal=goal,
        changes=parameters,
        ranks=ranks,
        data=(forget, retain),
    ) as run:
        train_with_fixed_statistics(model)
        optimizer = torch.optim.SGD(parameters.values(), lr=lr, momentum=momentum)
        loop.train(
            run,
            "both",
            Paired("neg_grad_plus", retain, ranks=ranks, forget=forget),
            objective,
            optimizer,
            parameters=parameters.values(),
            epochs=epochs,
            progress=progress,
        )
    return goal.result(run)


@lockstep
@recorded
def random_label(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    epochs: int = 3,
    lr: float = 1e-3,
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
    """Learn wrong labels for the forget set beside the right ones for the retain set, with Adam.

        min   CE(retain) + CE(forget, y')      y' != y drawn uniformly, anew for every batch

    Args:
        model: The model, changed in place; BatchNorm statistics stay.
        forget: The forget set; started again whenever it ends.
        retain: The retain set.
        epochs: Passes over the retain set.
        lr: Learning rate.
        until: Stop at a goal: ``"forgotten"`` (accuracy on the forget set at most 1 %), ``"unseen"`` (no
            higher than on ``validation``), an accuracy, or a function of the model that says whether it will
            do. None: go on to the end, whatever comes of it.
        budget: Retain accuracy that reaching the goal may cost, as a share.
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
        process_group: Ranks that call this together, each with its own share of every set, perhaps none. A
            step is that of the batches of all ranks together; every rank ends with the same weights, which is
            verified. Random choices are each rank's own. See ``docs/processes.md``.

    Returns:
        The record of the run.

    Raises:
        ValueError: If a set is missing, or the model has one class only.
        NotImplementedError: If the task has no other labels, as regression.

    Source:
        Random labels of Graves, Nagisetty & Ganesh, "Amnesiac Machine Learning", AAAI 2021, in the form
        of Chundawat, Tarun, Mandal & Kankanhalli (AAAI 2023), who draw the labels once, shuffle both sets
        together and use Adam at 1e-4.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(4, 2), torch.ones(4, dtype=torch.long))]
        >>> random_label(model, forget, retain).method
        'random_label'
    """
    ranks = ranks_of(process_group, "random_label")
    chosen = prepared("random_label", model, task, loss_fn)
    required("random_label", forget=forget, retain=retain)
    assert retain is not None
    check_count("random_label", "epochs", epochs)
    parameters = trainable(model, "random_label", include, exclude)
    relabel = relabelling("random_label", model, forget, chosen, "finetune works for such tasks", ranks)

    def objective(model: nn.Module, pair: Batch) -> loop.Terms:
        kept, forgotten = cast("tuple[Batch, Batch]", pair)
        right = chosen.sample_losses(model, kept)
        wrong = values_of(forgotten, lambda batch: chosen.sample_losses(model, relabel(batch)))
        return [(1.0, right), (1.0, wrong)]

    settings = {"epochs": epochs, "lr": lr, **facts_of(task, loss_fn)}
    goal = ClosedLoop("random_label", model, forget, retain, until, budget, validation, strict, chosen, ranks)
    settings |= goal.facts
    with unlearning(
        model,
        "random_label",
        settings,
        generator=generator,
        goal=goal,
        changes=parameters,
        ranks=ranks,
        data=(forget, retain),
    ) as run:
        train_with_fixed_statistics(model)
        optimizer = torch.optim.Adam(parameters.values(), lr=lr)
        loop.train(
            run,
            "relabel",
            Paired("random_label", retain, ranks=ranks, forget=forget),
            objective,
            optimizer,
            parameters=parameters.values(),
            epochs=epochs,
            progress=progress,
        )
    return goal.result(run)


def _log_classes(who: str, model: nn.Module, data: Batches, task: Task, ranks: Ranks) -> float:
    with what_a_task_must_have(who, "cap must be given for a task without classes"):
        return math.log(n_classes(who, model, data, task, ranks))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return with_plain_names({**dict(model.named_parameters()), **dict(model.named_buffers())})


def _check_new(model: nn.Module, new: nn.Module) -> None:
    old, fresh = _state(model), _state(new)
    if any(old[name] is tensor for name, tensor in fresh.items() if name in old):
        raise ValueError(
            "retrain: make_model must make a new model, got one that shares tensors with the old"
        )
    for name, p in parameters_by_name(model).items():
        # Biases and scales start from constants, which a trained model may still have.
        same = name in fresh and p.ndim > 1 and p.requires_grad and torch.equal(p, fresh[name])
        if same and p.numel() > 1 and bool((p != p.flatten()[0]).any()):
            warnings.warn(
                f"retrain: make_model must initialise all weights afresh, got {name} as it is in the model",
                stacklevel=5,
            )
            return


@torch.no_grad()
def _take_over(model: nn.Module, new: nn.Module) -> None:
    old, fresh = _state(model), _state(new)
    for name in {**old, **fresh}:
        have, want = ([*state[name].shape] if name in state else None for state in (fresh, old))
        if have != want:
            raise ValueError(
                f"retrain: make_model must make a model of the same form, got {have} for {name} of {want}"
            )
    for name, tensor in fresh.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FloatingPointError(f"retrain: the new {name} must be finite, got NaN or infinity")
        old[name].copy_(tensor)
