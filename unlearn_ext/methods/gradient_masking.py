"""Masked unlearning: train only the scalars or neurons that answer for the forget set, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unlearn_ext import ops
from unlearn_ext._internal.borrow import Tables
from unlearn_ext._internal.dtensors import local_of, totals
from unlearn_ext._internal.names import parameters_by_name, with_plain_names
from unlearn_ext.distributed import Group, MeshRanks, Ranks, lockstep_on_mesh, ranks_of
from unlearn_ext.masks.saliency import Score, scored
from unlearn_ext.masks.selection import Granularity, select_mask
from unlearn_ext.methods.common import (
    Paired,
    check_count,
    check_weights,
    epochs_of,
    facts_of,
    prepared,
    relabelling,
    required,
    train_with_fixed_statistics,
    trainable,
    values_of,
    what_a_task_must_have,
)
from unlearn_ext.methods.goal import ClosedLoop
from unlearn_ext.methods.loop import SEGMENT, Objective, Terms, train
from unlearn_ext.methods.recorded import recorded
from unlearn_ext.methods.rows_only import RowsOnly
from unlearn_ext.methods.run import unlearning
from unlearn_ext.methods.sharded import sharded_mask
from unlearn_ext.methods.until import Until
from unlearn_ext.optim.masked import MaskedAdamW, MaskedSGD
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches, check_batches
from unlearn_ext.tasks.losses import LossFn

Goal: TypeAlias = Literal["random_relabel", "ascend", "relabel", "finetune", "joint", "alternate"]
GOALS: tuple[Goal, ...] = ("random_relabel", "ascend", "relabel", "finetune", "joint", "alternate")

# Goals that read the retain set in training, and those of them with passes of their own over it.
_NEED_RETAIN = ("finetune", "joint", "alternate")
_RETAIN_PASSES = ("finetune", "alternate")


class _Usual(NamedTuple):
    """What a goal takes where nothing is given; at least ``steps`` steps, and ten epochs."""

    density: float = 0.05
    lr: float = 0.003
    steps: int = 0


# To put right what a network has learnt by heart takes more scalars and more, larger steps than to spoil it.
_USUAL = {"ascend": _Usual(lr=0.03), "relabel": _Usual(density=0.2, lr=0.02, steps=100)}

# In -log(1 - p + offset), whose slope is 1 / offset where the model is certain: what it is multiplied by.
_ASCEND_OFFSET = 0.05


@lockstep_on_mesh
@recorded
def gradient_masking(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    score: Score = "ratio",
    density: float | None = None,
    granularity: Granularity = "neuron",
    min_depth: float = 0.5,
    objective: Goal = "random_relabel",
    epochs: int | None = None,
    lr: float | None = None,
    optimizer: Literal["sgd", "adamw"] = "sgd",
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    retain_weight: float | None = None,
    freeze_norm_stats: bool = True,
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
    """Find the small part of the model that answers for the forget set, and train that part alone.

        scores = saliency(model, forget, retain, score)
        masks  = the units with the highest scores in the deeper layers
        train on the objective; what the masks leave out keeps its bits

    "Keeps its bits" holds for parameters under momentum and weight decay, and for buffers: normalisation
    layers use their statistics and do not move them (``freeze_norm_stats``). Dropout is active.

    Objectives, each a mean over the batch; CE stands for the task's loss:

        random_relabel   CE on the forget set with random wrong labels, drawn anew every epoch
        ascend           -0.05 log(1 - p + 0.05) on the forget set, p the probability of the true label (of
                         the mean log-odds, where a sample has several): bounded, and so is its slope
        relabel          CE on ``forget``, which holds the *corrected* labels: mislabelled data, class bias
        finetune         CE on the retain set
        joint            random_relabel, and an error where the retain set is missing
        alternate        every epoch one pass of random_relabel, then one over the retain set, as in SalUn

    Where a retain set is given, every step on the forget set also minimises CE on a batch of the retain set
    (``retain_weight``). Random labels go on pulling at the neurons after the class is forgotten, and large
    forget sets make many steps: this is what keeps the rest in place.

    Where whole neurons are selected, weight gradients are computed for their rows only, and nothing is
    propagated below the lowest selected layer. This is checked against plain autograd on the first batch;
    where they disagree, full gradients are computed and masked instead, and the record says so.

    ``python -m bench.bench_methods`` measures the defaults. A forgotten class, of scikit-learn's digits or of
    CIFAR-10, falls to 0 % or next to it, and the other classes keep their accuracy on digits; on CIFAR-10,
    with a hundred times the images and hence many more steps, they lose a few points.
    ``score="random"`` is the control with the same number of units: on digits it forgets much less, but the
    hundreds of steps on CIFAR-10 teach random labels to almost any neurons. What the score buys there is not
    accuracy. Ten passes over a few hundred random samples are too few steps to forget them; corrected labels
    are learnt nearly all, on either data set.

    Args:
        model: The model, changed in place.
        forget: The forget set.
        retain: The retain set: for ``score="ratio"`` and for the objectives that train on it.
        masks: What may change, by parameter name, bool or packed, for every trainable parameter; then
            ``score``, ``density``, ``granularity`` and ``min_depth`` are not used.
        score: See ``saliency``.
        density: Share of units to train, of those that ``min_depth`` leaves. None: 0.2 for ``"relabel"``,
            0.05 for the others.
        granularity: ``"element"``, ``"neuron"`` or ``"layer"``.
        min_depth: Leave the first layers alone, this share of them: what they compute serves all data, and
            below the lowest layer that is trained no gradient is computed.
        objective: See above.
        epochs: Passes over the forget set (the retain set for ``"finetune"``). None: 10, and for
            ``"relabel"`` as many more as 100 steps take.
        lr: Learning rate, falling to a tenth along a cosine. None: 0.02 for ``"relabel"``, 0.03 for
            ``"ascend"``, 0.003 for the others.
        optimizer: ``"sgd"`` or ``"adamw"``; only masked scalars have state that moves.
        momentum: Of SGD.
        weight_decay: Of either.
        retain_weight: Weight of CE on a batch of the retain set in every step on the forget set. None: 1
            where a retain set is given, but 0 for ``"finetune"`` and ``"alternate"``, which have passes over
            it anyway.
        freeze_norm_stats: Keep all buffers as they are. False lets normalisation statistics move.
        until: Stop at a goal: ``"forgotten"`` (accuracy on the forget set at most 1 %), ``"unseen"`` (no
            higher than on ``validation``), an accuracy, or a function of the model that says whether it will
            do. None: go on to the end, whatever comes of it.
        budget: Retain accuracy that reaching the goal may cost, as a share.
        validation: Data that the model never saw, for ``until="unseen"``.
        strict: Raise ``UnlearningFailed`` where the goal is not reached within the budget, not warn. The
            model is as it was either way.
        task: What the model is for; None tells it from the model and the batches, or refuses.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``, instead of the task's; ``"ascend"`` has its
            own.
        generator: Decides every random choice.
        progress: Show a progress bar, where tqdm is installed.
        include: Parameters that may change: names of them or of their modules, the last parts of such names,
            or regular expressions that match a whole name. None: all that are trainable.
        exclude: Parameters that may not change, likewise.
        process_group: Ranks that call this together, each with its own share of every set, perhaps none. A
            step is that of the batches of all ranks together; every rank ends with the same weights, which is
            verified. Random choices are each rank's own. See ``docs/processes.md``. None for a model that
            ``fully_shard`` has sharded, of which all ranks of its mesh call this: ``docs/sharded.md``.

    Returns:
        The record. Its history begins with what was selected, layer by layer.

    Raises:
        ValueError: If a choice is unknown or out of range, the retain set is needed and missing, a set is
            empty or a one-shot iterator, ``masks`` lacks a trainable parameter, selects nothing or part of an
            embedding with ``max_norm``, whose look-up rewrites whole rows, or labels to be redrawn are no
            classes.
        NotImplementedError: If the task has no other labels, or no log-odds, and the objective needs them.
        FloatingPointError: If a loss is NaN or infinite. The model is then as it was.

    Source:
        After Sharjeel Masood, seminar, Centre for Image Analysis, Uppsala University, 15 December 2025. From
        its abstract: that small parts of a network are mainly responsible for given data, that a gradient
        mask restricts training to a small set of neurons and leaves the rest untouched, and what that is for
        (privacy, class bias, corrected labels, pruning). Everything else is our design: scores, the choice
        of neurons, objectives and defaults, after Fan et al., "SalUn", ICLR 2024, and its neighbours.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 20), nn.ReLU(), nn.Linear(20, 2))
        >>> forget = [(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(8, 4), torch.ones(8, dtype=torch.long))]
        >>> result = gradient_masking(model, forget, retain, epochs=2)
        >>> sorted(result.seconds)
        ['mask', 'training']
    """
    ranks = ranks_of(process_group, "gradient_masking")
    chosen = prepared("gradient_masking", model, task, loss_fn, ranks)
    required("gradient_masking", forget=forget)
    usual = _USUAL.get(objective, _Usual())
    density = usual.density if density is None else density
    lr = usual.lr if lr is None else lr
    if epochs is None:
        epochs = max(10, epochs_of(usual.steps, forget, ranks))
    _check("gradient_masking", objective, optimizer, epochs, density)
    if retain is not None:
        check_batches(retain, "retain")
    elif objective in _NEED_RETAIN or (masks is None and score == "ratio"):
        what = f"the objective {objective!r}" if objective in _NEED_RETAIN else "the score 'ratio'"
        raise ValueError(f"gradient_masking: retain must be given for {what}, got None")
    if retain_weight is None:
        retain_weight = float(retain is not None and objective not in _RETAIN_PASSES)
    check_weights("gradient_masking", retain_weight=retain_weight)
    if retain_weight and retain is None:
        raise ValueError(
            f"gradient_masking: retain must be given for retain_weight {retain_weight}, got None"
        )
    hyperparameters: dict[str, object] = {
        **(
            {"masks": "given"}
            if masks is not None
            else {"score": score, "density": density, "granularity": granularity, "min_depth": min_depth}
        ),
        "objective": objective,
        "epochs": epochs,
        "lr": lr,
        "optimizer": optimizer,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "retain_weight": retain_weight,
        "freeze_norm_stats": freeze_norm_stats,
        **facts_of(task, loss_fn),
    }
    if objective == "relabel" and until is not None and not callable(until):
        raise ValueError(
            "gradient_masking: until must be None or a function of the model for objective='relabel', whose "
            f"forget set holds the labels to be learnt, got {until!r}"
        )
    goal = ClosedLoop(
        "gradient_masking", model, forget, retain, until, budget, validation, strict, chosen, ranks
    )
    return _run(
        "gradient_masking",
        model,
        forget,
        retain,
        hyperparameters,
        masks,
        chosen,
        generator,
        progress,
        goal,
        trainable(model, "gradient_masking", include, exclude),
        ranks,
    )


@lockstep_on_mesh
@recorded
def salun(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    density: float = 0.5,
    epochs: int = 10,
    lr: float = 0.03,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    masks: Mapping[str, Tensor] | None = None,
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
    """Saliency unlearning: random labels for the forget set, trained into the salient half of the weights.

        m = the ``density`` share of scalars with the largest |gradient| of the forget loss
        every epoch:  one pass over the forget set with random labels, one over the retain set,
                      SGD on the scalars in m alone

    The preset of ``gradient_masking`` with ``score="grad"``, ``granularity="element"`` and
    ``objective="alternate"``. Normalisation statistics move, as in the authors' code; where a BatchNorm gets
    a single value per channel, as from a batch of one sample, it uses its statistics and leaves them.

    From the authors' code: the score, the half that is trained, the order of the passes, SGD, its momentum
    and its weight decay. Ours: labels are redrawn among the *other* classes (theirs may draw the true one),
    the gradient is the mean over samples, the learning rate is 0.03, falling to a tenth along a cosine
    (0.013, constant, in the authors' README: too little in the few steps that a small data set makes),
    and what the mask leaves out really keeps its bits: in the code until February 2026 weight decay and
    momentum moved it.

    Args:
        model: The model, changed in place.
        forget: The forget set.
        retain: The retain set.
        density: Share of scalars that may change.
        epochs: Passes over both sets.
        lr: Learning rate.
        momentum: Of SGD.
        weight_decay: Of SGD.
        masks: Masks of your own, by parameter name.
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
            verified. Random choices are each rank's own. See ``docs/processes.md``. None for a model that
            ``fully_shard`` has sharded, of which all ranks of its mesh call this: ``docs/sharded.md``.

    Returns:
        The record.

    Raises:
        ValueError: As for ``gradient_masking``.
        FloatingPointError: If a loss is NaN or infinite. The model is then as it was.

    Source:
        Fan, Liu, Zhang, Wong, Wei & Liu, "SalUn: Empowering Machine Unlearning via Gradient-based Weight
        Saliency in Both Image Classification and Generation", ICLR 2024, and the authors' code.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> forget = [(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(8, 4), torch.arange(8) % 2 + 1)]
        >>> round(salun(model, forget, retain, epochs=2).changed, 1)
        0.5
    """
    ranks = ranks_of(process_group, "salun")
    chosen = prepared("salun", model, task, loss_fn, ranks)
    _check("salun", "alternate", "sgd", epochs, density)
    required("salun", forget=forget, retain=retain)
    hyperparameters: dict[str, object] = {
        **(
            {"masks": "given"}
            if masks is not None
            else {"score": "grad", "density": density, "granularity": "element", "min_depth": 0.0}
        ),
        "objective": "alternate",
        "epochs": epochs,
        "lr": lr,
        "optimizer": "sgd",
        "momentum": momentum,
        "weight_decay": weight_decay,
        "retain_weight": 0.0,
        "freeze_norm_stats": False,
        **facts_of(task, loss_fn),
    }
    goal = ClosedLoop("salun", model, forget, retain, until, budget, validation, strict, chosen, ranks)
    return _run(
        "salun",
        model,
        forget,
        retain,
        hyperparameters,
        masks,
        chosen,
        generator,
        progress,
        goal,
        trainable(model, "salun", include, exclude),
        ranks,
    )


def _check(who: str, objective: str, optimizer: str, epochs: int, density: float) -> None:
    if objective not in GOALS:
        raise ValueError(f"{who}: objective must be one of {', '.join(GOALS)}, got {objective!r}")
    if optimizer not in ("sgd", "adamw"):
        raise ValueError(f"{who}: optimizer must be 'sgd' or 'adamw', got {optimizer!r}")
    check_count(who, "epochs", epochs)
    if not 0 <= density <= 1:
        raise ValueError(f"{who}: density must lie in [0, 1], got {density}")


def _run(
    method: str,
    model: nn.Module,
    forget: Batches,
    retain: Batches | None,
    settings: Mapping[str, Any],
    masks: Mapping[str, Tensor] | None,
    task: Task,
    generator: torch.Generator | None,
    progress: bool,
    goal: ClosedLoop,
    parameters: Mapping[str, nn.Parameter],
    ranks: Ranks,
) -> UnlearnResult:
    settings = {**settings, **goal.facts}
    with unlearning(
        model,
        method,
        settings,
        generator=generator,
        data=(forget, retain),
        changes=(),
        ranks=ranks,
        goal=goal,
    ) as run:
        with run.phase("mask"):
            if masks is None:
                names = list(parameters)
                scores = scored(
                    method, model, forget, retain, task, settings["score"], names, progress, ranks=ranks
                )
                masks = select_mask(
                    scores,
                    settings["density"],
                    granularity=settings["granularity"],
                    min_depth=settings["min_depth"],
                )
                run.coverage = dict(scores.coverage)
                del scores
            chosen = _selected(parameters, method, masks, ranks)
            _refuse_parts_of_tables(model, method, chosen)
            run.keep(chosen)
            # The optimizer leaves the others alone in any case; marked as frozen they cost no memory for what
            # their gradients would need. The run puts the marks back, whatever happens. Of many ranks the
            # model may be in a wrapper that has hooks on its parameters, and the marks stay.
            for name, parameter in parameters_by_name(model).items():
                if name not in chosen and parameter.requires_grad and not ranks.are_many:
                    parameter.requires_grad_(False)
        kind = settings["objective"]
        objective = _objective(method, model, kind, forget, task, settings["retain_weight"], ranks)
        optimizer = _optimizer(model, chosen, settings)
        with _training_mode(model, settings["freeze_norm_stats"]):
            paired = settings["retain_weight"] != 0
            data = _Tagged(method, kind, forget, retain, ranks, paired=paired)
            saving = RowsOnly(run, chosen, objective)
            run.record("mask", **_facts(model, chosen))
            train(
                run,
                "training",
                data,
                saving,
                optimizer,
                parameters=saving.parameters.values(),
                epochs=settings["epochs"],
                schedule=lambda epoch: _cosine(settings["lr"], epoch, settings["epochs"]),
                progress=progress,
                task=task,
            )
            run.record("gradients", **saving.facts)
    return goal.result(run)


def _cosine(lr: float, epoch: int, epochs: int) -> float:
    half = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * epoch / max(1, epochs)))))
    return lr * (0.1 + 0.9 * half)


def _selected(
    parameters: Mapping[str, nn.Parameter], method: str, masks: Mapping[str, Tensor], ranks: Ranks
) -> dict[str, Tensor]:
    # The masks of the parameters of which something is selected: packed; of a sharded model bool, cut alike.
    given = with_plain_names(masks)
    chosen: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        if name not in given:
            raise ValueError(f"{method}: masks must name every trainable parameter, got none for {name!r}")
        if isinstance(ranks, MeshRanks):
            mask = sharded_mask(method, name, given[name], parameter)
            if totals([float(local_of(mask).any())], [parameter])[0]:
                chosen[name] = mask
            continue
        mask = given[name].to(parameter.device)
        if mask.dtype == torch.bool:
            if mask.shape != parameter.shape:
                raise ValueError(
                    f"{method}: masks[{name!r}] must have the parameter's shape {list(parameter.shape)}, "
                    f"got {list(mask.shape)}"
                )
            mask = ops.pack_mask(mask)
        if mask.dtype != torch.uint8 or mask.shape != ((parameter.numel() + 7) // 8,):
            got = f"{mask.dtype} {list(mask.shape)}"
            raise ValueError(f"{method}: masks[{name!r}] must be bool or packed uint8, got {got}")
        if bool(mask.any()):
            chosen[name] = mask
    if not chosen:
        raise ValueError(f"{method}: masks must select at least one scalar, got none")
    return chosen


def _refuse_parts_of_tables(model: nn.Module, method: str, chosen: Mapping[str, Tensor]) -> None:
    # Looking up a row whose norm is too large writes to all of it, selected or not.
    tables = Tables(model).ids
    for name, parameter in parameters_by_name(model).items():
        if name not in chosen or id(parameter) not in tables:
            continue
        mask = chosen[name]
        if mask.dtype != torch.bool:
            mask = ops.unpack_mask(mask, list(parameter.shape))
        if not bool(mask.all()):
            raise ValueError(
                f"{method}: the mask of {name} must select all or nothing, as the table has a max_norm and "
                "its look-up rewrites whole rows; leave it out by exclude, or set max_norm to None"
            )


def _facts(model: nn.Module, chosen: Mapping[str, Tensor]) -> dict[str, object]:
    parameters = parameters_by_name(model)
    own = [
        float(
            (
                local_of(mask)
                if mask.dtype == torch.bool
                else ops.unpack_mask(mask, list(parameters[name].shape))
            ).sum()
        )
        for name, mask in chosen.items()
    ]
    counts = dict(zip(chosen, map(int, totals(own, [parameters[name] for name in chosen])), strict=True))
    total = sum(p.numel() for p in parameters.values())
    return {
        "selected": sum(counts.values()) / max(1, total),
        "selected_per_parameter": {name: n / parameters[name].numel() for name, n in counts.items()},
    }


def _optimizer(model: nn.Module, chosen: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Optimizer:
    parameters = [(name, p) for name, p in parameters_by_name(model).items() if name in chosen]
    lr, decay = settings["lr"], settings["weight_decay"]
    if settings["optimizer"] == "adamw":
        return MaskedAdamW(parameters, lr, weight_decay=decay, masks=chosen)
    return MaskedSGD(parameters, lr, settings["momentum"], weight_decay=decay, masks=chosen)


@contextmanager
def _training_mode(model: nn.Module, freeze: bool) -> Iterator[None]:
    # Training mode in which, with `freeze`, buffers keep their bits.
    if not freeze:
        model.train()
        yield
        return
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    train_with_fixed_statistics(model)
    yield
    with torch.no_grad():
        for buffer, value in before:  # those of normalisations that are not torch's
            buffer.copy_(value)


class _Tagged:
    """Batches with what they are for: ``("forget", batch)``, ``("retain", batch)``, ``("both", f, r)``."""

    def __init__(
        self,
        method: str,
        goal: Goal,
        forget: Batches,
        retain: Batches | None,
        ranks: Ranks,
        *,
        paired: bool,
    ) -> None:
        self._goal, self._forget, self._retain = goal, forget, retain
        self._pairs = (
            Paired(method, forget, ranks=ranks, retain=retain) if paired and retain is not None else None
        )

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        if self._goal == "finetune":
            pass
        elif self._pairs is not None:
            for forget, retain in self._pairs:
                yield "both", forget, retain
        else:
            for batch in self._forget:
                yield "forget", batch
        if self._retain is not None and self._goal in _RETAIN_PASSES:
            yield SEGMENT  # type: ignore[misc]
            for batch in self._retain:
                yield "retain", batch


def _objective(
    method: str,
    model: nn.Module,
    goal: Goal,
    forget: Batches,
    task: Task,
    retain_weight: float,
    ranks: Ranks,
) -> Objective:
    instead = "objective='relabel' (labels of your own) and objective='finetune' work for any task"
    redraws = goal in ("random_relabel", "joint", "alternate")
    relabel = relabelling(method, model, forget, task, instead, ranks) if redraws else lambda batch: batch

    def on_forget(model: nn.Module, batch: Batch) -> Tensor:
        if goal == "ascend":
            with what_a_task_must_have(method, instead):
                log_odds = task.log_odds(task.forward(model, batch), batch)
            # 1 - p of log-odds, exact also where p is next to 1.
            return -_ASCEND_OFFSET * (torch.sigmoid(-log_odds) + _ASCEND_OFFSET).log()
        return task.sample_losses(model, relabel(batch))

    def objective(model: nn.Module, tagged: Batch) -> Tensor | Terms:
        kind, batch, *others = tagged
        if kind == "both":
            forgotten = on_forget(model, batch)
            return [
                (1.0, forgotten),
                (retain_weight, values_of(others[0], lambda batch: task.sample_losses(model, batch))),
            ]
        return on_forget(model, batch) if kind == "forget" else task.sample_losses(model, batch)

    return objective
