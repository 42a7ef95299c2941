"""The second-order step of ``newton``: its direction, and taking it to some length."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext.fisher.kfac import KroneckerFactors
from unlearn_ext.fisher.kfac_layers import Factored, why_not_factored
from unlearn_ext.tasks import losses
from unlearn_ext.tasks.batches import Batches, count_samples, device_of, read_batches
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
            torch.add(part.original, part.change, alpha=size, out=part.parameter.detach())

    @torch.no_grad()
    def take_back(self) -> None:
        """Put back every bit."""
        for part in self._parts:
            part.parameter.copy_(part.original)


def direction(
    model: nn.Module,
    forget: Batches,
    factors: KroneckerFactors,
    *,
    loss_fn: LossFn | None,
    damping: float,
    keep: bool,
) -> Step:
    """Work out the step.

    Args:
        model: The model; left as it was.
        forget: The forget set.
        factors: Of the retain set.
        loss_fn: What to raise instead of the weighted log-odds.
        damping: See ``KroneckerFactors.solve``.
        keep: Whether the factors serve again.

    Returns:
        The step, scaled so that size 1 is a relative change of 1 of the layer that changes most.

    Raises:
        ValueError: If the factors are not this model's, or the forget set is empty or tells no direction.
        FloatingPointError: If a gradient is NaN or infinite.
    """
    layers = _layers_of(model, factors)
    names = [(name, part) for name, layer in layers.items() for part in layer.parameters]
    tensors = [cast("nn.Parameter", getattr(layers[name].module, part)) for name, part in names]
    totals = [torch.zeros_like(tensor, dtype=torch.float64) for tensor in tensors]
    with borrowed(model):
        for tensor in tensors:
            tensor.requires_grad_(True)
        n_samples = 0
        for batch in read_batches(forget, device_of(model)):
            n = count_samples(batch)
            if n == 0:
                continue
            n_samples += n
            objective = _objective(model, batch, loss_fn)
            found = torch.autograd.grad(objective, tensors, allow_unused=True)
            for total, gradient in zip(totals, found, strict=True):
                if gradient is not None:
                    total += gradient.to_dense()
    if n_samples == 0:
        raise ValueError("newton: forget must hold at least one sample, got none")
    gradients: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
    for (name, part), total in zip(names, totals, strict=True):
        if not bool(torch.isfinite(total).all()):
            raise FloatingPointError(f"newton: the gradient of {name}.{part} must be finite, got NaN or infinity")
        gradients[name][part] = total
    changes, largest = {}, 0.0
    for name, layer in layers.items():
        changes[name] = _solved(layer, gradients[name], factors, name, damping, keep)
        values = layer.matrix({part: getattr(layer.module, part).detach().double() for part in layer.parameters})
        norm = float(values.norm())
        if norm > 0:
            largest = max(largest, float(changes[name].norm()) / norm)
    if largest == 0:
        raise ValueError("newton: forget must have a gradient in a layer with factors, got zero everywhere")
    parts = []
    for name, layer in layers.items():
        for part, change in layer.split(changes[name] / largest).items():
            parameter = cast("nn.Parameter", getattr(layer.module, part))
            parts.append(_Part(parameter, parameter.detach().clone(), change.to(parameter.dtype)))
    return Step(parts)


def _layers_of(model: nn.Module, factors: KroneckerFactors) -> dict[str, Factored]:
    modules = dict(model.named_modules())
    layers = {}
    for name, (inputs, outputs) in factors.items():
        module = modules.get(name)
        why = "no such module" if module is None else why_not_factored(module)
        if why or module is None:
            raise ValueError(f"newton: factors must be of layers of the model, got {name!r}: {why}")
        layer = Factored(module)
        form = layer.matrix({part: cast("Tensor", getattr(module, part)) for part in layer.parameters}).shape
        if (outputs.shape[-1], inputs.shape[-1]) != (form[1], form[2]) or outputs.shape[:-2].numel() != form[0]:
            raise ValueError(
                f"newton: factors of {name} must be {list(form[1:])}, got {[outputs.shape[-1], inputs.shape[-1]]}"
            )
        layers[name] = layer
    return layers


def _objective(model: nn.Module, batch: Mapping[str, object] | object, loss_fn: LossFn | None) -> Tensor:
    """What rises along the step: a sum over samples."""
    if loss_fn is not None:
        return loss_fn(model, batch).sum()  # type: ignore[arg-type]
    against = losses.log_odds(model, batch)  # type: ignore[arg-type]
    # Samples that are known best have the least left to give, and the most directions in common with the rest.
    weights = torch.sigmoid(against.detach()).sqrt()
    return (weights * against).sum()


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
