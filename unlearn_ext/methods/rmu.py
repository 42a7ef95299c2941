"""RMU: forget samples are steered towards a random direction inside the model, the others stay in place."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.copies import frozen_copy
from unlearn_ext._internal.seeding import random_states_kept
from unlearn_ext._internal.undo import handles
from unlearn_ext.methods import loop
from unlearn_ext.methods.common import (
    Paired,
    check_count,
    check_weights,
    epochs_of,
    prepared,
    required,
    train_with_fixed_statistics,
    trainable,
)
from unlearn_ext.methods.goal import ClosedLoop
from unlearn_ext.methods.recorded import recorded
from unlearn_ext.methods.run import unlearning
from unlearn_ext.methods.until import Until
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.base import Outputs, Task
from unlearn_ext.tasks.batches import Batch, Batches, device_of, read_batches
from unlearn_ext.tasks.positions import mean_over_positions

_STEPS, _LEAST_EPOCHS = 60, 10


@recorded
def rmu(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    layer: str | None = None,
    steering: float | None = None,
    retain_weight: float = 100.0,
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
    """Steer one layer's activations on the forget set towards a random direction, with AdamW.

        min   ||h(forget) - c u||^2 + retain_weight ||h(retain) - h_original(retain)||^2

    where ``h`` are the layer's activations, ``u`` a random unit vector, and both terms are means over the
    positions that count and over the layer's width. Only what comes before the layer's output changes.

    What is forgotten is the *use* of what the model knows of such inputs, by what follows the layer: the
    forget set's loss can go far beyond that of unseen samples, which tells an attacker as much.

    Args:
        model: The model, changed in place; BatchNorm statistics stay.
        forget: The forget set; an epoch is a pass over it.
        retain: The retain set, a batch beside each of the forget set's; started again whenever it ends.
        layer: Name of the module, as in ``model.named_modules()``, such as ``"model.layers.3"``. It must give
            out ``[N, D]`` or ``[N, T, D]``, alone or as the first of several.
        steering: ``c``. None: twice the mean norm of the layer's activations on the forget set, since norms
            differ from model to model; 6.5 and 20 are published for models of 7 billion parameters.
        retain_weight: Weight of the retain set; 100 to 1200 are published.
        epochs: Passes over the forget set. None: as many as 60 steps take, at least 10.
        lr: Learning rate. 5e-5 is published.
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
        generator: Decides every random choice, the direction among them.
        progress: Show a progress bar, where tqdm is installed.
        include: Parameters that may change: names of them or of their modules, the last parts of such names,
            or regular expressions that match a whole name. None: all that are trainable. The published code
            changes the last linear layer of the MLPs of the layer and the two before it.
        exclude: Parameters that may not change, likewise.

    Returns:
        The record of the run.

    Raises:
        ValueError: If ``layer`` is missing, no module of the model or of an output that is neither, a set is
            missing or empty, or a setting is out of range.

    Source:
        Li, Pan et al., "The WMDP Benchmark: Measuring and Reducing Malicious Use With Unlearning", ICML 2024.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(4, 2), torch.ones(4, dtype=torch.long))]
        >>> rmu(model, forget, retain, layer="0").method
        'rmu'
    """
    chosen = prepared("rmu", model, task, None)
    required("rmu", forget=forget, retain=retain)
    assert retain is not None
    _check(model, layer, steering, retain_weight)
    name = cast("str", layer)
    if epochs is None:
        epochs = max(_LEAST_EPOCHS, epochs_of(_STEPS, forget))
    check_count("rmu", "epochs", epochs)
    parameters = trainable(model, "rmu", include, exclude)
    width, norm = _measured(model, name, forget, chosen)
    length = 2 * norm if steering is None else steering
    settings: dict[str, object] = {
        "layer": layer,
        "steering": length,
        "retain_weight": retain_weight,
        "epochs": epochs,
        "lr": lr,
        "weight_decay": weight_decay,
        **({} if task is None else {"task": repr(task)}),
    }
    goal = ClosedLoop("rmu", model, forget, retain, until, budget, validation, strict, chosen)
    settings |= goal.facts
    original = frozen_copy(model)
    with unlearning(model, "rmu", settings, generator=generator, data=(forget, retain), goal=goal) as run:
        # Uniform in [0, 1), as published, not Gaussian: all coordinates point the same way.
        direction = torch.rand(width)
        aim = (length * direction / direction.norm()).to(device_of(model))

        def objective(model: nn.Module, pair: Batch) -> loop.Terms:
            forgotten, kept = cast("tuple[Batch, Batch]", pair)
            steered = _distances(activations(model, name, forgotten, chosen), aim)
            found = activations(model, name, kept, chosen)
            with torch.no_grad():
                before, _ = activations(original, name, kept, chosen)
            return [(1.0, steered), (retain_weight, _distances(found, before))]

        train_with_fixed_statistics(model)
        optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=weight_decay)
        loop.train(
            run,
            "steer",
            Paired("rmu", forget, retain=retain),
            objective,
            optimizer,
            parameters=parameters.values(),
            epochs=epochs,
            progress=progress,
        )
    return goal.result(run)


def activations(model: nn.Module, layer: str, batch: Batch, task: Task) -> tuple[Tensor, Tensor]:
    """Run a model and look at what one of its modules gives out.

    Args:
        model: The model.
        layer: Name of the module.
        batch: A batch on the model's device.
        task: Calls the model, and says which positions count.

    Returns:
        Activations ``[N, T, D]`` (``T = 1`` where there are no positions) and bool ``[N, T]``, those that
        count.

    Raises:
        ValueError: If the module is not used, or gives out something else.
    """
    caught: list[Tensor] = []

    def hook(module: nn.Module, args: object, output: object) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            caught.append(first)

    with handles() as hooks:
        hooks.append(model.get_submodule(layer).register_forward_hook(hook))
        outputs = task.forward(model, batch)
    shape = list(caught[-1].shape) if caught else None
    if shape is None or len(shape) not in (2, 3) or shape[0] != task.count(batch):
        raise ValueError(f"rmu: layer {layer!r} must give out [N, D] or [N, T, D], got {shape}")
    found = caught[-1] if len(shape) == 3 else caught[-1].unsqueeze(1)
    return found, _positions(found, outputs, batch, task)


def _positions(found: Tensor, outputs: Outputs, batch: Batch, task: Task) -> Tensor:
    counted = torch.ones(found.shape[:2], dtype=torch.bool, device=found.device)
    try:
        labelled = task.counted(outputs, batch)
    except NotImplementedError:  # without classes every position counts
        return counted
    if labelled.ndim == 2 and found.shape[1] - labelled.shape[1] in (0, 1):
        counted[:, labelled.shape[1] :] = False  # the last token of a causal language model predicts nothing
        counted[:, : labelled.shape[1]] = labelled
    return counted


def _distances(found: tuple[Tensor, Tensor], goal: Tensor) -> Tensor:
    values, counted = found
    return mean_over_positions((values - goal).square().mean(-1), counted)


def _measured(model: nn.Module, layer: str, forget: Batches, task: Task) -> tuple[int, float]:
    # The layer's width, and the mean norm of what it gives out.
    norms: list[Tensor] = []
    width = 0
    with borrowed(model), random_states_kept(forget), torch.no_grad():
        for batch in read_batches(forget, device_of(model)):
            if task.count(batch):
                values, counted = activations(model, layer, batch, task)
                width = values.shape[-1]
                norms.append(values[counted].double().norm(dim=-1).cpu())
    if not norms or not torch.cat(norms).numel():
        raise ValueError("rmu: forget must hold at least one sample, got none")
    return width, float(torch.cat(norms).mean())


def _check(model: nn.Module, layer: str | None, steering: float | None, retain_weight: float) -> None:
    known = dict(model.named_modules())
    if layer is None or layer not in known or layer == "":
        names = [name for name in known if name]
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise ValueError(f"rmu: layer must name a module of the model, got {layer!r}; there are {shown}")
    if steering is not None and not math.isfinite(steering):
        raise ValueError(f"rmu: steering must be finite, got {steering}")
    check_weights("rmu", retain_weight=retain_weight)
