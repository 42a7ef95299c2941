"""Masked unlearning: train only the scalars or neurons that answer for the forget set, and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unlearn_ext import ops
from unlearn_ext._internal.plain import callable_name
from unlearn_ext.masks.saliency import Score, saliency
from unlearn_ext.masks.selection import Granularity, select_mask
from unlearn_ext.methods.common import Paired, epochs_of, n_classes, train_with_fixed_statistics
from unlearn_ext.methods.loop import Objective, train
from unlearn_ext.methods.pgu import forgetting_loss
from unlearn_ext.methods.run import Run, unlearning
from unlearn_ext.optim.masked import MaskedAdamW, MaskedSGD
from unlearn_ext.optim.row_gradients import RowGradients
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks import losses
from unlearn_ext.tasks.batches import Batch, Batches, check_batches
from unlearn_ext.tasks.losses import LossFn
from unlearn_ext.tasks.outputs import targets, with_targets

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

# Above this share of selected rows the small product saves too little to be worth cutting out its factors.
_MOST_ROWS = 0.5


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
    loss_fn: LossFn = losses.cross_entropy,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> UnlearnResult:
    """Find the small part of the model that answers for the forget set, and train that part alone.

        scores = saliency(model, forget, retain, score)
        masks  = the units with the highest scores in the deeper layers
        train on the objective; what the masks leave out keeps its bits

    "Keeps its bits" holds for parameters under momentum and weight decay, and for buffers: normalisation
    layers use their statistics and do not move them (``freeze_norm_stats``). Dropout is active.

    Objectives, each a mean over the batch:

        random_relabel   CE on the forget set with random wrong labels, drawn anew every epoch
        ascend           -0.05 log(1 - p + 0.05) on the forget set, p the probability of the true label:
                         bounded, and so is its slope
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
            below the lowest layer that is trained no gradient has to be computed.
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
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``; ``"ascend"`` has its own.
        generator: Decides every random choice.
        progress: Show a progress bar on a terminal, where tqdm is installed.

    Returns:
        The record. Its history begins with what was selected, layer by layer.

    Raises:
        ValueError: If a choice is unknown or out of range, the retain set is needed and missing, a set is
            empty or a one-shot iterator, ``masks`` lacks a trainable parameter or selects nothing, or labels
            to be redrawn are no classes.
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
    usual = _USUAL.get(objective, _Usual())
    density = usual.density if density is None else density
    lr = usual.lr if lr is None else lr
    check_batches(forget, "forget")
    if epochs is None:
        epochs = max(10, epochs_of(usual.steps, forget))
    _check(objective, optimizer, epochs, density)
    if retain is not None:
        check_batches(retain, "retain")
    elif objective in _NEED_RETAIN or (masks is None and score == "ratio"):
        what = f"the objective {objective!r}" if objective in _NEED_RETAIN else "the score 'ratio'"
        raise ValueError(f"gradient_masking: retain must be given for {what}, got None")
    if retain_weight is None:
        retain_weight = float(retain is not None and objective not in _RETAIN_PASSES)
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
        "loss_fn": callable_name(loss_fn),
    }
    return _run(
        "gradient_masking", model, forget, retain, hyperparameters, masks, loss_fn, generator, progress
    )


def salun(
    model: nn.Module,
    forget: Batches,
    retain: Batches,
    *,
    density: float = 0.5,
    epochs: int = 10,
    lr: float = 0.03,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    masks: Mapping[str, Tensor] | None = None,
    loss_fn: LossFn = losses.cross_entropy,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> UnlearnResult:
    """Saliency unlearning: random labels for the forget set, trained into the salient half of the weights.

        m = the ``density`` share of scalars with the largest |gradient| of the forget loss
        every epoch:  one pass over the forget set with random labels, one over the retain set,
                      SGD on the scalars in m alone

    The preset of ``gradient_masking`` with ``score="grad"``, ``granularity="element"`` and
    ``objective="alternate"``. Normalisation statistics move, as in the authors' code.

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
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``.
        generator: Decides every random choice.
        progress: Show a progress bar on a terminal, where tqdm is installed.

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
    _check("alternate", "sgd", epochs, density)
    check_batches(forget, "forget")
    check_batches(retain, "retain")
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
        "loss_fn": callable_name(loss_fn),
    }
    return _run("salun", model, forget, retain, hyperparameters, masks, loss_fn, generator, progress)


def _check(objective: str, optimizer: str, epochs: int, density: float) -> None:
    if objective not in GOALS:
        raise ValueError(f"gradient_masking: objective must be one of {', '.join(GOALS)}, got {objective!r}")
    if optimizer not in ("sgd", "adamw"):
        raise ValueError(f"gradient_masking: optimizer must be 'sgd' or 'adamw', got {optimizer!r}")
    if epochs < 0:
        raise ValueError(f"gradient_masking: epochs must be >= 0, got {epochs}")
    if not 0 <= density <= 1:
        raise ValueError(f"gradient_masking: density must lie in [0, 1], got {density}")


def _run(
    method: str,
    model: nn.Module,
    forget: Batches,
    retain: Batches | None,
    settings: Mapping[str, Any],
    masks: Mapping[str, Tensor] | None,
    loss_fn: LossFn,
    generator: torch.Generator | None,
    progress: bool,
) -> UnlearnResult:
    with unlearning(model, method, settings, generator=generator) as run:
        with run.phase("mask"):
            if masks is None:
                scores = saliency(
                    model, forget, retain, score=settings["score"], progress=progress, loss_fn=loss_fn
                )
                masks = select_mask(
                    scores,
                    settings["density"],
                    granularity=settings["granularity"],
                    min_depth=settings["min_depth"],
                )
                del scores
            chosen = _freeze_the_rest(model, method, masks)
        goal = settings["objective"]
        objective = _objective(model, goal, forget, loss_fn, settings["retain_weight"])
        optimizer = _optimizer(model, chosen, settings)
        with _training_mode(model, settings["freeze_norm_stats"]):
            data = _Tagged(goal, forget, retain, paired=settings["retain_weight"] != 0)
            saving = _RowsOnly(run, chosen, objective)
            run.record("mask", **_facts(model, chosen))
            train(
                run,
                "training",
                data,
                saving,
                optimizer,
                epochs=settings["epochs"],
                schedule=lambda epoch: _cosine(settings["lr"], epoch, settings["epochs"]),
                progress=progress,
            )
            run.record("gradients", **saving.facts)
        return run.result()


def _cosine(lr: float, epoch: int, epochs: int) -> float:
    half = 0.5 * (1 + float(torch.cos(torch.tensor(torch.pi * epoch / max(1, epochs)))))
    return lr * (0.1 + 0.9 * half)


def _freeze_the_rest(model: nn.Module, method: str, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # Freezes every parameter of which nothing is selected; the packed masks of the others.
    chosen: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in masks:
            raise ValueError(f"{method}: masks must name every trainable parameter, got none for {name!r}")
        mask = masks[name].to(parameter.device)
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
        else:
            parameter.requires_grad_(False)
    if not chosen:
        raise ValueError(f"{method}: masks must select at least one scalar, got none")
    return chosen


def _facts(model: nn.Module, chosen: Mapping[str, Tensor]) -> dict[str, object]:
    parameters = dict(model.named_parameters())
    counts = {
        name: int(ops.unpack_mask(mask, list(parameters[name].shape)).sum()) for name, mask in chosen.items()
    }
    total = sum(p.numel() for p in parameters.values())
    return {
        "selected": sum(counts.values()) / max(1, total),
        "selected_per_parameter": {name: n / parameters[name].numel() for name, n in counts.items()},
    }


def _optimizer(model: nn.Module, chosen: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Optimizer:
    parameters = [(name, p) for name, p in model.named_parameters() if name in chosen]
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

    def __init__(self, goal: Goal, forget: Batches, retain: Batches | None, *, paired: bool) -> None:
        self._goal, self._forget, self._retain, self._paired = goal, forget, retain, paired

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        if self._goal == "finetune":
            pass
        elif self._paired:
            assert self._retain is not None
            for forget, retain in Paired(self._forget, self._retain):
                yield "both", forget, retain
        else:
            for batch in self._forget:
                yield "forget", batch
        if self._retain is not None and self._goal in _RETAIN_PASSES:
            for batch in self._retain:
                yield "retain", batch


def _objective(
    model: nn.Module, goal: Goal, forget: Batches, loss_fn: LossFn, retain_weight: float
) -> Objective:
    redraws = goal in ("random_relabel", "joint", "alternate")
    classes = n_classes(model, forget) if redraws else 0
    if redraws and classes < 2:
        raise ValueError(f"gradient_masking: random labels need at least 2 classes, got {classes}")

    def on_forget(model: nn.Module, batch: Batch) -> Tensor:
        if goal == "ascend":
            return _ASCEND_OFFSET * forgetting_loss(model, batch, _ASCEND_OFFSET, 0.0)
        return loss_fn(model, batch if goal == "relabel" else _relabelled(batch, classes))

    def objective(model: nn.Module, tagged: Batch) -> Tensor:
        kind, batch, *others = tagged
        if kind == "both":
            return on_forget(model, batch).mean() + retain_weight * loss_fn(model, others[0]).mean()
        return on_forget(model, batch) if kind == "forget" else loss_fn(model, batch)

    return objective


def _relabelled(batch: Batch, classes: int) -> Batch:
    # Every label gets another value, all equally likely; negative labels mark what does not count.
    labels = targets(batch)
    if labels.is_floating_point():
        raise ValueError(f"gradient_masking: labels to be redrawn must be integers, got {labels.dtype}")
    # Drawn on the CPU, so that a seed means the same on every device.
    shift = torch.randint(1, classes, labels.shape).to(labels)
    return with_targets(batch, torch.where(labels < 0, labels, (labels + shift) % classes))


class _RowsOnly:
    """The objective, with weight gradients for selected rows only, once that has proved right.

    Args:
        run: The run.
        chosen: Packed masks of the parameters that are trained.
        objective: What to minimise.

    Attributes:
        facts: For the record: the weights concerned, or why there are none.
    """

    def __init__(self, run: Run, chosen: Mapping[str, Tensor], objective: Objective) -> None:
        self._run, self._chosen, self._objective = run, chosen, objective
        self._parameters = {name: p for name, p in run.model.named_parameters() if name in chosen}
        rows: dict[Tensor, Tensor] = {}
        self._weights: list[str] = []
        for name, p in self._parameters.items():
            if p.ndim < 2:
                continue
            mask = ops.unpack_mask(chosen[name], [p.shape[0], p.numel() // p.shape[0]])
            selected = mask.any(1).nonzero().flatten()
            if len(selected) <= _MOST_ROWS * p.shape[0]:
                rows[p] = selected
                self._weights.append(name)
        self._mode: RowGradients | None = RowGradients(rows) if rows else None
        self._checked = False
        self.facts: dict[str, object] = {"weight_gradients": "full"}
        if not rows:
            self.facts["because"] = "most rows of every weight are selected"

    def __call__(self, model: nn.Module, batch: Batch) -> Tensor:
        if self._mode is not None and not self._checked:
            self._checked = True
            because = self._objection(model, batch, self._mode)
            if because:
                self._mode = None
                self.facts["because"] = because
            else:
                self.facts = {"weight_gradients": "selected rows", "weights": self._weights}
        if self._mode is None:
            return self._objective(model, batch)
        with self._mode:
            return self._objective(model, batch)

    def _objection(self, model: nn.Module, batch: Batch, mode: RowGradients) -> str:
        plain = self._gradients(model, batch)
        try:
            rows = self._gradients(model, batch, mode)
        except Exception as error:  # whatever the reason, plain autograd has just shown that it can
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:100] if str(error) else ''}"
        if mode.calls == 0:
            return "the model has no plain linear or convolutional layer among the selected"
        for name, parameter in self._parameters.items():
            mask = ops.unpack_mask(self._chosen[name], list(parameter.shape))
            expected, got = plain[name][mask].float(), rows[name][mask].float()
            tolerance = 0.1 if parameter.dtype in (torch.float16, torch.bfloat16) else 1e-3
            scale = plain[name].abs().max().float()
            # A NaN is the training loop's to report.
            if bool(((got - expected).abs() > tolerance * scale).any()):
                return f"gradients of {name} disagree with plain autograd"
        return ""

    def _gradients(
        self, model: nn.Module, batch: Batch, mode: RowGradients | None = None
    ) -> dict[str, Tensor]:
        buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
        devices = {p.device.index for p in self._parameters.values() if p.is_cuda}
        with torch.random.fork_rng(devices):  # the same dropout and the same labels every time
            if mode is None:
                loss = self._objective(model, batch).mean()
            else:
                with mode:
                    loss = self._objective(model, batch).mean()
        grads = torch.autograd.grad(loss, list(self._parameters.values()), materialize_grads=True)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
        return dict(zip(self._parameters, grads, strict=True))
