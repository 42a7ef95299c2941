"""How fast a model learns again what it has forgotten."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unlearn_ext._internal.copies import copied
from unlearn_ext._internal.seeding import seeded
from unlearn_ext.evaluation.metrics.accuracy import accuracy
from unlearn_ext.tasks import Task, resolve
from unlearn_ext.tasks.batches import Batches, check_batches, device_of, read_batches
from unlearn_ext.tasks.losses import LossFn


def relearn_steps(
    model: nn.Module,
    data: Batches,
    target: float,
    *,
    evaluate: Batches | None = None,
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None,
    task: Task | None = None,
    loss_fn: LossFn | None = None,
    every: int = 1,
    most: int = 1000,
    seed: int = 0,
) -> float:
    """Count the steps of training after which a copy of the model knows something again.

    All floating-point parameters are trained; integer ones stay. Where a batch has one value per channel for
    a BatchNorm layer (a last batch of one sample), which has no variance, that layer uses its running
    statistics for it.

    Args:
        model: The unlearned model; a copy is trained.
        data: What to train on: the forget set, or the full set for the anamnesis index.
        target: Accuracy to reach, in [0, 1].
        evaluate: Where to measure accuracy; ``data`` by default.
        optimizer: Makes the optimizer of the copy; Adam with learning rate 1e-3 by default.
        task: What the model is for; None infers it from the model and the batch. See ``ux.tasks``.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``, one loss per sample, in place of the task's.
        every: Steps between two measurements.
        most: Give up after so many.
        seed: Of every random choice: loaders (their own generators too), dropout, NumPy and Python.

    Returns:
        Steps, 0 if the target is met at once; infinity if it was not reached.

    Raises:
        ValueError: If a count is not positive, ``data`` is empty or the model has nothing to train.
        FloatingPointError: If a loss is NaN or infinite.
    """
    if every < 1 or most < 1:
        raise ValueError(f"relearn_steps: every and most must be positive, got {every} and {most}")
    check_batches(data)
    judge = resolve(task, loss_fn, who="relearn_steps")
    copy = copied(model)
    parameters = [p for p in copy.parameters() if p.is_floating_point() or p.is_complex()]
    if not parameters:
        raise ValueError("relearn_steps: model must have a floating-point parameter, got none")
    for parameter in parameters:
        parameter.requires_grad_(True)
    _allow_single_values(copy)
    judged = data if evaluate is None else evaluate
    device, steps = device_of(copy), 0
    with seeded(seed, data, judged), torch.inference_mode(False), torch.enable_grad():
        if accuracy(copy, judged, task=task) >= target:
            return 0
        trained = torch.optim.Adam(parameters, lr=1e-3) if optimizer is None else optimizer(copy)
        while True:
            before = steps
            for batch in read_batches(data, device):
                copy.train()
                trained.zero_grad()
                loss = judge.sample_losses(copy, batch).mean()
                if not bool(torch.isfinite(loss)):
                    raise FloatingPointError(
                        f"relearn_steps: the loss must be finite, got {loss.item()} in step {steps + 1}"
                    )
                torch.autograd.backward(loss)
                trained.step()
                steps += 1
                if (steps % every == 0 or steps == most) and accuracy(copy, judged, task=task) >= target:
                    return steps
                if steps == most:
                    return math.inf
            if steps == before:
                raise ValueError("relearn_steps: data must hold at least one batch, got none")


def _allow_single_values(model: nn.Module) -> None:
    def before(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        values = inputs[0] if inputs else None
        if not module.training or not isinstance(values, Tensor) or values.ndim < 2:
            return
        if values.numel() == values.shape[1]:  # one value per channel
            module.eval()
            module.__dict__["_single_value"] = True

    def after(module: nn.Module, inputs: tuple[Any, ...], output: object) -> None:
        if module.__dict__.pop("_single_value", False):
            module.train()

    for module in model.modules():
        if isinstance(module, _BatchNorm) and module.track_running_stats:
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after, always_call=True)


def anamnesis_index(
    model: nn.Module,
    original: nn.Module,
    retrained: nn.Module,
    data: Batches,
    forget: Batches,
    *,
    margin: float = 0.05,
    task: Task | None = None,
    **settings: Any,  # noqa: ANN401 - passed on
) -> float:
    """Return the anamnesis index: relearning steps of the unlearned model over those of the retrained one.

    Steps of ordinary training until the accuracy on the forget set is back within ``margin`` of the original
    model's. 1 is ideal; far below 1, the forget set was still in the model; far above, it was pushed out so
    hard that its absence shows.

    Args:
        model: The unlearned model.
        original: The model before unlearning.
        retrained: A model trained without the forget set.
        data: What to train on, the forget set included.
        forget: Where to measure.
        margin: Share of the original accuracy that may be missing, in [0, 1).
        task: What the models are for; None infers it. See ``ux.tasks``.
        **settings: For ``relearn_steps``.

    Returns:
        The index; infinity if only the retrained model relearned.

    Raises:
        ValueError: If the retrained model did not relearn, or knew the forget set at once.

    Source:
        Chundawat et al., "Zero-Shot Machine Unlearning", IEEE TIFS 2023.
    """
    if not 0 <= margin < 1:
        raise ValueError(f"anamnesis_index: margin must lie in [0, 1), got {margin}")
    target = (1 - margin) * accuracy(original, forget, task=task)
    ours, theirs = (
        relearn_steps(subject, data, target, evaluate=forget, task=task, **settings)
        for subject in (model, retrained)
    )
    if theirs == 0 or math.isinf(theirs):
        raise ValueError(
            "anamnesis_index: the retrained model must relearn the forget set in a positive number of steps, "
            f"got {theirs}"
        )
    return ours / theirs
