"""What the retain set leaves free of every weight, and the optimizer that keeps to it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from unlearn_ext._internal.names import modules_by_name, plain_name
from unlearn_ext.methods.run import Run
from unlearn_ext.optim.projected import ProjectedSGD
from unlearn_ext.subspace.basis import Criterion, Protected, protected
from unlearn_ext.subspace.gram import ActivationGram
from unlearn_ext.subspace.layers import Layer, layer_of

# Negative eigenvalues beyond this share say that the two Gram matrices were not measured alike.
_CLAMPED_TOO_MUCH = 0.01


@dataclass(frozen=True, slots=True)
class FreeWeight:
    """A weight with free directions, as the optimizer is to see it: rows that the basis meets on the right.

    ``take`` gives these rows of a tensor of the weight's shape, ``put`` writes them back into one; without
    them the weight itself will do. ``moment`` is the retain set's second moment, ``[d, d]`` or ``[groups, d,
    d]``, of the inputs that meet ``all_rows``; None where only rows change that it does not use.

    Attributes:
        name: The parameter's name.
        weight: The parameter.
        basis: The protected directions.
        moment: See above.
        take: See above.
        put: See above.
        all_rows: Gives all rows of a tensor of the weight's shape.
    """

    name: str
    weight: nn.Parameter
    basis: Tensor
    moment: Tensor | None
    take: Callable[[Tensor], Tensor] | None = None
    put: Callable[[Tensor, Tensor], object] | None = None
    all_rows: Callable[[Tensor], Tensor] = torch.Tensor.detach

    def answers(self, weight: Tensor) -> float:
        """Sum the squares of what a weight makes of the retain set's inputs.

        Args:
            weight: Of the parameter's shape.

        Returns:
            The sum.
        """
        if self.moment is None:
            return 0.0
        d = self.moment.shape[-1]
        moments = self.moment.reshape(-1, d, d)
        rows = self.all_rows(weight).to(moments).reshape(len(moments), -1, d)
        return float((rows @ moments).mul_(rows).sum())

    def of_changes(self) -> FreeWeight:
        """Keep of the moment what counts for a change, which has no part in the protected directions.

        Returns:
            The same with a moment in float32, for ``answers`` of changes only. What the protected directions
            held is taken out first, so that rounding is relative to what is left.
        """
        if self.moment is None:
            return self
        basis = self.basis.to(self.moment)
        inside = basis @ (basis.mT @ self.moment)
        left = self.moment - inside - inside.mT + basis @ (basis.mT @ inside.mT)
        return replace(self, moment=left.float())


def layers_of(model: nn.Module, gram: ActivationGram) -> dict[str, tuple[nn.Module, Layer]]:
    """Look up the layers that Gram matrices belong to.

    Args:
        model: The model.
        gram: By name of the module.

    Returns:
        Name to module and how it uses its weight.

    Raises:
        ValueError: If there is no such layer, or its Gram matrix has another shape.
    """
    modules = modules_by_name(model)
    layers: dict[str, tuple[nn.Module, Layer]] = {}
    for name, total in gram.items():
        layer = layer_of(modules[name]) if name in modules else None
        if layer is None:
            raise ValueError(f"pgu: gram must be keyed by layers of the model, got {name!r}")
        if tuple(total.shape) != layer.gram:
            raise ValueError(
                f"pgu: gram of {name!r} must have shape {list(layer.gram)}, got {list(total.shape)}"
            )
        layers[name] = (modules[name], layer)
    return layers


def free_weights(
    run: Run,
    layers: Mapping[str, tuple[nn.Module, Layer]],
    unlike: Mapping[str, str],
    remaining: ActivationGram,
    gram_forget: ActivationGram,
    energy: float,
    criterion: Criterion,
) -> tuple[list[FreeWeight], float]:
    """Work out what the retain set leaves of every weight.

    Args:
        run: The run; told what was found.
        layers: Of ``layers_of``.
        unlike: Weights that the Gram matrices say nothing of, and why.
        remaining: Second moments of the retain set.
        gram_forget: Of the forget set.
        energy: See ``protected``.
        criterion: See ``protected``.

    Returns:
        The weights with free directions, and how far the best layer sets the forget set apart there.

    Raises:
        ValueError: If no layer has a free direction.
    """
    users_of: dict[nn.Parameter, list[tuple[str, str]]] = {}
    for module_name, module in modules_by_name(run.model).items():
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                users_of.setdefault(parameter, []).append((module_name, attribute))
    free: list[FreeWeight] = []
    most_apart = 0.0
    for name, weight in run.model.named_parameters():
        users = users_of[weight]
        covered = [
            user for user, attribute in users if user in layers and attribute == layers[user][1].weight
        ]
        if not covered:
            continue
        if len(covered) < len(users) or not weight.requires_grad or plain_name(name) in unlike:
            why = unlike.get(plain_name(name), "")
            if len(covered) < len(users):
                why = "it has a use that gram lacks"
            if not weight.requires_grad:
                why = "it is not trainable"
            run.record("subspace", parameter=name, frozen=why)
            continue
        # Uses from one side add up to one space.
        totals: dict[str, Tensor] = {}
        forget_totals: dict[str, Tensor] = {}
        for user in covered:
            side: str = layers[user][1].side
            total, part = (moments[user].to(weight.device) for moments in (remaining, gram_forget))
            if side in totals and totals[side].shape != total.shape:
                side = f"{side} {list(total.shape)}"
            totals[side] = totals[side] + total if side in totals else total
            forget_totals[side] = forget_totals[side] + part if side in forget_totals else part
        spaces = {side: protected(total, energy, criterion) for side, total in totals.items()}
        for side, space in spaces.items():
            apart = _outside(forget_totals[side], space) / max(_outside(totals[side], space), 1e-6)
            if space.k < space.d:
                most_apart = max(most_apart, apart)
            run.record(
                "subspace",
                parameter=name,
                side=side,
                directions=space.d,
                protected=space.k,
                free=space.d - space.k,
                kept=space.kept,
                apart=apart,
                clamped=space.clamped,
            )
        worst = max(space.clamped for space in spaces.values())
        if worst > _CLAMPED_TOO_MUCH:
            warnings.warn(
                f"pgu: {worst:.1%} of the second moment at {name} would be negative after the subtraction: "
                "gram was not measured on the same inputs and weights as the forget set's part",
                stacklevel=4,
            )
        if all(space.k < space.d for space in spaces.values()):
            free_weight = _free_weight(name, weight, spaces, totals)
            if free_weight is None:
                run.record("subspace", parameter=name, frozen=f"used from {' and '.join(spaces)}")
            else:
                free.append(free_weight)
    if not free:
        if not any(layer.weight in module._parameters for module, layer in layers.values()):
            raise ValueError(
                "pgu: gram must have a layer whose weight is a parameter, got computed weights alone "
                "(parametrized ones); torch.nn.utils.parametrize.remove_parametrizations makes them plain"
            )
        told = "".join(f"; {name}: {why}" for name, why in list(unlike.items())[:3])
        raise ValueError(f"pgu: energy must leave a free direction in some layer of gram, got {energy}{told}")
    return free, most_apart


def _outside(moment: Tensor, space: Protected) -> float:
    # The share of a set's second moment that the free directions hold.
    if space.basis.dtype == torch.bool:
        inside, total = moment[space.basis].sum(), moment.sum()
    else:
        rows = space.basis.mT.to(moment)
        inside, total = ((rows @ moment) * rows).sum(), moment.diagonal(dim1=-2, dim2=-1).sum()
    return max(0.0, 1 - float(inside) / float(total)) if float(total) > 0 else 0.0


def _free_weight(
    name: str, weight: nn.Parameter, spaces: Mapping[str, Protected], moments: Mapping[str, Tensor]
) -> FreeWeight | None:
    sides = set(spaces)
    if sides == {"right"}:
        return FreeWeight(name, weight, spaces["right"].basis, moments["right"])
    if sides == {"left"}:
        basis = spaces["left"].basis
        groups, d = (1, *basis.shape)[-3], basis.shape[-2]

        def put_transposed(weight: Tensor, rows: Tensor) -> None:
            weight.copy_(rows.reshape(groups, -1, d).mT.reshape(weight.shape))

        def transposed(tensor: Tensor) -> Tensor:
            return tensor.reshape(groups, d, -1).mT.reshape(-1, d)

        return FreeWeight(
            name, weight, basis, moments["left"], take=transposed, put=put_transposed, all_rows=transposed
        )
    if sides <= {"rows", "right"}:
        # An embedding, or one that is tied to a linear head: the two projections commute.
        absent = (~spaces["rows"].basis).nonzero().flatten()
        nothing = torch.zeros(weight.shape[1], 0, device=weight.device)
        return FreeWeight(
            name,
            weight,
            spaces["right"].basis if "right" in spaces else nothing,
            moments.get("right"),
            take=lambda tensor: tensor[absent],
            put=lambda weight, rows: weight.index_copy_(0, absent, rows),
        )
    return None


def optimizer_of(free: Iterable[FreeWeight], lr: float, momentum: float) -> ProjectedSGD:
    """Make the optimizer.

    Args:
        free: Of ``free_weights``.
        lr: Learning rate.
        momentum: Momentum.

    Returns:
        Steps of gradient descent that leave the protected directions alone.
    """
    parts = list(free)
    variables = [
        part.weight if part.take is None else nn.Parameter(part.take(part.weight.detach()).clone())
        for part in parts
    ]
    optimizer = ProjectedSGD(
        [(part.name, variable) for part, variable in zip(parts, variables, strict=True)],
        lr=lr,
        momentum=momentum,
        bases={part.name: part.basis for part in parts},
    )
    stand_ins = [
        (part.weight, variable, part.take, part.put)
        for part, variable in zip(parts, variables, strict=True)
        if part.take is not None and part.put is not None
    ]

    def before(*_args: object) -> None:
        for weight, variable, take, _put in stand_ins:
            grad, weight.grad = weight.grad, None
            variable.grad = None if grad is None else take(grad.to_dense() if grad.is_sparse else grad)
            with torch.no_grad():
                variable.copy_(take(weight))  # which may have been held back since the last step

    def after(*_args: object) -> None:
        with torch.no_grad():
            for weight, variable, _take, put in stand_ins:
                put(weight, variable)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer
