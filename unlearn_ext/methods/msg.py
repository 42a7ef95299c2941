"""Masked small gradients: weights that tell forget and retain set apart least are drawn anew, then trained.

    g = grad CE(retain, as many samples as there are to forget) - grad CE(forget)
    R = the 30 % smallest |g| of every convolution and linear weight;  theta[R] <- fresh initial values
    min CE(retain), gradients outside R times 0.1

Source:
    Cadet, Borovykh, Malekzadeh, Ahmadi-Abhari & Haddadi, "Deep Unlearn: Benchmarking Machine Unlearning",
    2024, and the code that goes with it: the second of the NeurIPS 2023 unlearning challenge.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from unlearn_ext import ops
from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.chosen import Params, Patterns, choice, restricted
from unlearn_ext._internal.plain import callable_name
from unlearn_ext._internal.undo import handles
from unlearn_ext.distributed import Group, lockstep
from unlearn_ext.methods import loop
from unlearn_ext.methods.common import count_batches, refuse_group, trainable
from unlearn_ext.methods.goal import ClosedLoop
from unlearn_ext.methods.recorded import recorded
from unlearn_ext.methods.run import unlearning
from unlearn_ext.methods.until import Until
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches, check_batches, device_of, read_batches
from unlearn_ext.tasks.losses import LossFn, resolve


@lockstep
@recorded
def msg(
    model: nn.Module,
    forget: Batches,
    retain: Batches,
    *,
    share: float = 0.3,
    factor: float = 0.1,
    epochs: int = 5,
    lr: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    until: Until = None,
    budget: float = 0.02,
    validation: Batches | None = None,
    strict: bool = False,
    task: Task | None = None,
    loss_fn: LossFn | None = None,
    params: Params = None,
    include: Patterns = None,
    exclude: Patterns = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    process_group: Group = None,
) -> UnlearnResult:
    """Draw anew what tells forget from retain samples least, and train on the retain set.

    The learning rate rises over the first half of the first epoch and falls to 0 until the end.

    Args:
        model: The model, changed in place; in train mode, so BatchNorm statistics move.
        forget: The forget set.
        retain: The retain set.
        share: Share of every convolution's and linear layer's weight that is drawn anew, in [0, 1].
        factor: What the gradients of all other scalars are multiplied by; >= 0.
        epochs: Passes over the retain set.
        lr: Highest learning rate.
        momentum: Momentum of SGD.
        weight_decay: Weight decay.
        until: Stop at a goal: ``"forgotten"`` (accuracy on the forget set at most 1 %), ``"unseen"`` (no
            higher than on ``validation``), an accuracy, or a function of the model that says whether it will
            do. None: go on to the end, whatever comes of it.
        budget: Retain accuracy that reaching the goal may cost, as a share.
        validation: Data that the model never saw, for ``until="unseen"``.
        strict: Raise ``UnlearningFailed`` where the goal is not reached within the budget, not warn. The
            model is as it was either way.
        task: What the model is for; inferred, or refused, where it is not given.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``, instead of the task's.
        params: Names of trainable parameters; ``"adapters"``, those of PEFT's active adapters and of the
            modules that are trained and saved beside them; or ``"base"``, the weights underneath, frozen or
            not, with the adapters in effect. None: all that are trainable.
        include: Parameters that may change: names of them or of their modules, the last parts of such names,
            or regular expressions that match a whole name. None: all of these.
        exclude: Parameters that may not change, likewise.
        generator: Decides every random choice.
        progress: Show a progress bar on a terminal, where tqdm is installed.
        process_group: Refused unless None.

    Returns:
        The record of the run.

    Raises:
        ValueError: If a setting is out of range, a set is empty, or no convolution or linear layer is
            trainable.
        NotImplementedError: If a process group is given.
        FloatingPointError: If a loss or gradient is NaN or infinite.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> forget = [(torch.randn(4, 4), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(8, 4), torch.ones(8, dtype=torch.long))]
        >>> msg(model, forget, retain, epochs=1).history[0]["drawn"]  # 9 of 32 and 4 of 16
        13
    """
    refuse_group("msg", process_group, "its first retain samples are those of one order")
    check_batches(forget, "msg: forget")
    check_batches(retain, "msg: retain")
    if not 0 <= share <= 1:
        raise ValueError(f"msg: share must lie in [0, 1], got {share}")
    if not factor >= 0:
        raise ValueError(f"msg: factor must be >= 0, got {factor}")
    task = resolve(task, loss_fn, who="msg")
    choices = choice(params, include, exclude)
    settings: dict[str, object] = {
        "share": share,
        "factor": factor,
        "epochs": epochs,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "task": repr(task),
        "loss_fn": None if loss_fn is None else callable_name(loss_fn),
        **choices,
    }
    goal = ClosedLoop("msg", model, forget, retain, until, budget, validation, strict, task)
    settings |= goal.facts
    with (
        restricted(model, "msg", **choices),
        unlearning(model, "msg", settings, generator=generator, data=(forget, retain), goal=goal) as run,
    ):
        layers = [module for module in model.modules() if _is_drawn(module)]
        if not layers:
            raise ValueError("msg: model must have a trainable convolution or linear layer, got none")
        with run.phase("draw"):
            chosen = _draw(model, layers, forget, retain, task, share)
        run.record("draw", drawn=sum(int(marks.sum()) for marks in chosen.values()))
        model.train()
        parameters = list(trainable(model, "msg").values())
        scales = [torch.where(chosen[p], 1.0, factor).to(p) if p in chosen else factor for p in parameters]
        with handles() as hooks:
            for p, scale in zip(parameters, scales, strict=True):
                hooks.append(p.register_hook(functools.partial(_scaled, scale)))  # type: ignore[no-untyped-call]
            optimizer = torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
            steps = max(1, epochs * count_batches(retain))
            rates = iter(_rates(lr, steps, max(1, count_batches(retain) // 2)))

            def objective(model: nn.Module, batch: object) -> Tensor:
                for group in optimizer.param_groups:
                    group["lr"] = next(rates)
                return task.sample_losses(model, batch)  # type: ignore[arg-type]

            loop.train(run, "train", retain, objective, optimizer, epochs=epochs, progress=progress)
    return goal.result(run)


def _is_drawn(module: nn.Module) -> bool:
    if not isinstance(module, (nn.Linear, _ConvNd)):
        return False
    weight = module._parameters.get("weight")
    return weight is not None and weight.requires_grad


def _rates(lr: float, steps: int, rise: int) -> Iterator[float]:
    for step in range(steps):
        yield lr * ((step + 1) / rise if step < rise else (steps - step) / max(1, steps - rise))
    while True:  # a loader may make more batches than it said
        yield 0.0


def _draw(
    model: nn.Module,
    layers: list[nn.Module],
    forget: Batches,
    retain: Batches,
    task: Task,
    share: float,
) -> dict[nn.Parameter, Tensor]:
    weights = list(dict.fromkeys(cast("nn.Parameter", layer.weight) for layer in layers))
    against, n = _mean_gradient("forget", model, forget, task, weights, None)
    towards, _ = _mean_gradient("retain", model, retain, task, weights, n)
    chosen: dict[nn.Parameter, Tensor] = {}
    for weight, a, b in zip(weights, towards, against, strict=True):
        packed = ops.topk_mask([(a - b).abs()], int(share * weight.numel()), largest=False)[0]
        chosen[weight] = ops.unpack_mask(packed, list(weight.shape))
    for layer in layers:
        weight = cast("nn.Parameter", layer.weight)
        with torch.no_grad():
            fresh = nn.init.kaiming_normal_(torch.empty_like(weight), nonlinearity="relu")
            weight.copy_(torch.where(chosen[weight], fresh, weight))
    return chosen


def _scaled(scale: Tensor | float, grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad * scale  # None: of a backward function that answers nothing


def _mean_gradient(
    name: str, model: nn.Module, data: Batches, task: Task, weights: list[nn.Parameter], most: int | None
) -> tuple[list[Tensor], int]:
    # The gradient of the mean loss of the first ``most`` samples.
    totals = [torch.zeros_like(weight) for weight in weights]
    n = 0
    with borrowed(model):
        for batch in read_batches(data, device_of(model)):
            count = task.count(batch)
            if count == 0:
                continue
            if most is not None and n + count > most:
                count = most - n
                if count == 0:
                    break
                batch = task.select(batch, range(count))
            found = torch.autograd.grad(task.sample_losses(model, batch).sum(), weights, allow_unused=True)
            for total, grad in zip(totals, found, strict=True):
                if grad is not None:
                    total += grad
            n += count
    if n == 0:
        raise ValueError(f"msg: {name} must hold at least one sample, got none")
    for total in totals:
        if not bool(torch.isfinite(total).all()):
            raise FloatingPointError(
                f"msg: the gradient of the {name} set must be finite, got NaN or infinity"
            )
    return [total / n for total in totals], n
