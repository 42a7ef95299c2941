"""The second-order step of ``newton``: its direction, and taking it to some length."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.dtensors import is_dtensor, like, local_of, sharded_like, whole_of
from unlearn_ext._internal.dtensors import totals as sums_over_shards
from unlearn_ext._internal.names import parameters_by_name
from unlearn_ext.distributed import ALONE, MeshRanks, Ranks
from unlearn_ext.fisher.kfac import KroneckerFactors
from unlearn_ext.fisher.kfac_layers import Factored, why_not_factored
from unlearn_ext.fisher.kfac_pass import readable
from unlearn_ext.fisher.sharded_gradients import sharded_mean_gradients
from unlearn_ext.tasks.base import Task, one_per_sample
from unlearn_ext.tasks.batches import Batches, device_of, read_batches
from unlearn_ext.tasks.losses import LossFn


@dataclass(frozen=True)
class _Part:
    parameter: nn.Parameter
    original: Tensor
    change: Tensor


class Step:
    """A direction in the space of some parameters; size 1 doubles the norm of the layer that it changes most.

    Args:
        parts: Parameters with their values and changes.
    """

    def __init__(self, parts: list[_Part]) -> None:
        self._parts = parts

    @torch.no_grad()
    def take(self, size: float) -> None:
        """Go to a distance from where the parameters were.

        Args:
            size: The distance.
        """
        for part in self._parts:
            before, change = local_of(part.original), local_of(part.change)
            torch.add(before, change, alpha=size, out=local_of(part.parameter.detach()))

    def names(self, model: nn.Module) -> list[str]:
        """Name what the step changes.

        Args:
            model: The model.

        Returns:
            Plain names of its parameters.
        """
        changing = {id(part.parameter) for part in self._parts}
        return [name for name, parameter in parameters_by_name(model).items() if id(parameter) in changing]

    @torch.no_grad()
    def take_back(self) -> None:
        """Put back every bit."""
        for part in self._parts:
            local_of(part.parameter.detach()).copy_(local_of(part.original))


def direction(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None,
    factors: KroneckerFactors,
    *,
    task: Task,
    loss_fn: LossFn | None,
    damping: float,
    keep: bool,
    only_trainable: bool = False,
    retain_weight: float = 1.0,
    ranks: Ranks = ALONE,
) -> Step:
    """Work out the step.

    Args:
        model: The model; left as it was.
        forget: The forget set.
        retain: The retain set, where it is at hand.
        factors: Of the retain set.
        task: What the model is for.
        loss_fn: What to raise instead of the weighted log-odds.
        damping: See ``KroneckerFactors.solve``.
        keep: Whether the factors serve again.
        only_trainable: Leave out layers with factors that are not trainable, instead of refusing them.
        retain_weight: What the retain set's gradient is multiplied by before it is subtracted.
        ranks: Those that work it out together.

    Returns:
        The step, scaled so that size 1 is a relative change of 1 of the layer that changes most.

    Raises:
        ValueError: If the factors are not this model's, or the forget set is empty or tells no direction.
        FloatingPointError: If a gradient is NaN or infinite.
    """
    layers = _layers_of(model, factors, only_trainable=only_trainable)
    names = [(name, part) for name, layer in layers.items() for part in layer.parameters]
    tensors = [cast("nn.Parameter", getattr(layers[name].module, part)) for name, part in names]
    totals = _mean_gradient("forget", model, forget, task, loss_fn, tensors, ranks)
    if retain is not None:
        kept = _mean_gradient("retain", model, retain, task, loss_fn, tensors, ranks)
        totals = [a - retain_weight * b for a, b in zip(totals, kept, strict=True)]
    gradients: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for (name, part), total in zip(names, totals, strict=True):
        if not bool(torch.isfinite(local_of(total)).all()):
            raise FloatingPointError(
                f"newton: the gradient of {name}.{part} must be finite, got NaN or infinity"
            )
        gradients[name][part] = total
    ranks.exchange("direction", None)
    parts, largest = [], 0.0
    for name, layer in layers.items():
        # Whole for one layer at a time; of a sharded model every rank keeps its own part of the change.
        wholes = {part: whole_of(total) for part, total in gradients.pop(name).items()}
        change = _solved(layer, wholes, factors, name, damping, keep)
        norm = _norm(layer)
        if norm > 0:
            largest = max(largest, float(change.norm()) / norm)
        for part, own in layer.split(change).items():
            parameter = cast("nn.Parameter", getattr(layer.module, part))
            parts.append((parameter, sharded_like(own, parameter.detach())))
    (largest, *_) = ranks.exchange("scale", largest)
    if largest == 0:
        raise ValueError("newton: forget must have a gradient in a layer with factors, got zero everywhere")
    return Step([_part(parameter, change, largest) for parameter, change in parts])


def _norm(layer: Factored) -> float:
    # Of the weights as one vector.
    own = {part: cast("Tensor", getattr(layer.module, part)).detach() for part in layer.parameters}
    if not any(map(is_dtensor, own.values())):
        return float(layer.matrix({part: value.double() for part, value in own.items()}).norm())
    squares = [float(local_of(value).double().square().sum()) for value in own.values()]
    return math.sqrt(sum(sums_over_shards(squares, list(own.values()))))


def _part(parameter: nn.Parameter, change: Tensor, largest: float) -> _Part:
    own = like((local_of(change) / largest).to(parameter.dtype), parameter.detach())
    return _Part(parameter, parameter.detach().clone(), own)


def _layers_of(model: nn.Module, factors: KroneckerFactors, *, only_trainable: bool) -> dict[str, Factored]:
    modules = dict(model.named_modules())
    layers = {}
    for name, (inputs, outputs) in factors.items():
        module = modules.get(name)
        if module is not None and only_trainable:
            own = [p for key in ("weight", "bias") if (p := module._parameters.get(key)) is not None]
            if not all(parameter.requires_grad for parameter in own):
                continue
        why = "no such module" if module is None else why_not_factored(module)
        if why or module is None:
            raise ValueError(f"newton: factors must be of layers of the model, got {name!r}: {why}")
        layer = Factored(module)
        form = layer.form
        if (outputs.shape[-1], inputs.shape[-1]) != (form[1], form[2]) or outputs.shape[:-2].numel() != form[
            0
        ]:
            raise ValueError(
                f"newton: factors of {name} must be {list(form[1:])}, "
                f"got {[outputs.shape[-1], inputs.shape[-1]]}"
            )
        layers[name] = layer
    if not layers:
        raise ValueError("newton: include and exclude must leave a whole layer with factors, got none")
    return layers


def _weights(odds_losses: Tensor) -> Tensor:
    # Samples that are known best have the least left to give, and the most in common with the rest.
    return torch.sigmoid(odds_losses).sqrt()


def _mean_gradient(
    name: str,
    model: nn.Module,
    data: Batches,
    task: Task,
    loss_fn: LossFn | None,
    tensors: Sequence[Tensor],
    ranks: Ranks,
) -> list[Tensor]:
    # Of what rises along the step on the forget set: a weighted mean over samples.
    if isinstance(ranks, MeshRanks):
        known = {id(p): plain for plain, p in ranks.sharded.shards.items()}
        names = [known[id(tensor)] for tensor in tensors]
        means = sharded_mean_gradients(
            "newton",
            name,
            data,
            task,
            names,
            ranks,
            loss_fn=task.odds_loss if loss_fn is None else loss_fn,
            weigh=_weights if loss_fn is None else torch.ones_like,
        )
        return [means[plain] for plain in names]
    totals = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in tensors]
    weight = torch.zeros((), dtype=torch.float64, device=device_of(model))
    with borrowed(model), readable():
        for batch in read_batches(data, device_of(model)):
            if task.count(batch) == 0:
                continue
            values = one_per_sample(
                task.odds_loss(model, batch) if loss_fn is None else loss_fn(model, batch)
            )
            weights = _weights(values.detach()) if loss_fn is None else torch.ones_like(values.detach())
            found = torch.autograd.grad((weights * values).sum(), tensors, allow_unused=True)
            for total, gradient in zip(totals, found, strict=True):
                if gradient is not None:
                    total += gradient.to_dense()
            weight += weights.sum()
    ranks.sum_("gradients", [*totals, weight])
    if bool(torch.isnan(weight)):
        raise FloatingPointError(f"newton: the log-odds of {name} must be numbers, got NaN")
    if not bool(weight > 0):
        raise ValueError(f"newton: {name} must hold at least one sample, got none")
    return [total / weight for total in totals]


def _solved(
    layer: Factored,
    gradients: dict[str, Tensor],
    factors: KroneckerFactors,
    name: str,
    damping: float,
    keep: bool,
) -> Tensor:
    matrix = layer.matrix(gradients)
    grouped = factors[name].outputs.ndim == 3
    solved = factors.solve(name, matrix if grouped else matrix.squeeze(0), damping=damping, keep=keep)
    return solved if grouped else solved.unsqueeze(0)
