"""SGD whose steps stay outside a subspace of every layer's inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from unlearn_ext import ops
from unlearn_ext._internal.dtensors import layout_of
from unlearn_ext._internal.names import plain_name
from unlearn_ext.optim.constrained import (
    STATE_DTYPES,
    ConstrainedOptimizer,
    Constraint,
    Order,
    axis_moves,
    is_fake,
    state_like,
    transposed,
    view_of,
)

# Columns of a basis may be this far from orthonormal, max |U^T U - I|. A float32 eigendecomposition stays
# within about 1e-6; a basis that was kept in half precision, or never orthonormalised, does not pass.
_ORTHONORMAL_TOLERANCE = 1e-4


class ProjectedSGD(ConstrainedOptimizer):
    """SGD whose updates stay out of a protected subspace of every layer's inputs.

    With U the layer's basis and its weight viewed as ``[O, d]``::

        g <- gradient + weight_decay * theta        (minus the gradient if maximize)
        b <- momentum * b + (1 - dampening) * g     (b <- g on the first step)
        u <- b - (b U) U^T                          (g + momentum * b instead of b if nesterov)
        theta <- theta - lr * u

    What the layer computes for an input within the span of U does not change. It is the update that is
    projected, after momentum and weight decay, so that momentum from elsewhere, such as a loaded checkpoint,
    cannot lead out of the free space; without nesterov the momentum kept is the projected one. A basis with
    more than d/2 columns is replaced once by its complement V and the update by (b V) V^T, which is cheaper;
    with d columns the parameter is frozen. The projection is as exact as the rounding of b: about 1e-7 of the
    norm of b in float32.

    Args:
        params: ``model.named_parameters()``, or parameter groups with such pairs under ``"params"``. A group
            may bring its own ``"bases"``; one that is added later must, if it is to have any.
        lr: Learning rate, >= 0; a float, or a tensor with one element.
        momentum: Momentum factor, >= 0.
        dampening: Dampening of the momentum, from a parameter's second step on.
        weight_decay: L2 penalty, >= 0. Only its part in the free space takes effect.
        nesterov: Use Nesterov momentum; needs momentum and no dampening.
        bases: The protected directions, by parameter name: ``[d, k]`` with orthonormal columns, d being the
            scalars per output (for a convolution input channels / groups times kernel size), or ``[q, d, k]``
            for a weight in q groups. Every name must be that of a parameter.
        others: What becomes of parameters without a basis. ``"freeze"`` leaves them alone: biases and norms
            are not covered by the subspace argument, and PGU does not move them. ``"train"`` updates them by
            plain SGD. Can be set per group.
        maximize: Ascend instead of descend.

    Raises:
        ValueError: If a basis names no parameter, has another shape or is not orthonormal, a hyperparameter
            is out of range, parameters come without names, or one occurs twice.
        TypeError: If a parameter or a basis is not floating point.

    Source:
        Hoang, Rana, Gupta & Venkatesh, "Learn to Unlearn for Deep Neural Networks: Minimizing Unlearning
        Interference with Gradient Projection", WACV 2024. Its released code projects the gradient and uses no
        momentum; without momentum the two are the same.

    Example:
        >>> import torch
        >>> from unlearn_ext.optim import ProjectedSGD
        >>> model = torch.nn.Linear(3, 2)
        >>> protected = torch.tensor([[1.0], [0.0], [0.0]])
        >>> optimizer = ProjectedSGD(model.named_parameters(), lr=0.1, bases={"weight": protected})
        >>> before = model(protected.T)
        >>> (model(torch.ones(4, 3)) - 7).square().sum().backward()
        >>> optimizer.step()
        >>> torch.equal(model(protected.T), before), torch.equal(model(torch.ones(1, 3)), before)
        (True, False)
    """

    _keyword = "bases"
    _state_keys = ("momentum_buffer",)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        *,
        bases: Mapping[str, Tensor],
        others: Literal["freeze", "train"] = "freeze",
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "others": others,
            "maximize": maximize,
        }
        super().__init__(params, defaults, bases)
        self._check_names(bases, self.param_groups)

    def _check_names(self, bases: Mapping[str, Tensor], groups: list[dict[str, Any]]) -> None:
        known = {plain_name(name) for group in groups for name in group["param_names"]}
        unknown = [name for name in bases if plain_name(name) not in known]
        if unknown:
            condition = "be keyed by names of parameters (such as 'fc.weight')"
            raise ValueError(self._error("bases", condition, unknown[:3]))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["others"] not in ("freeze", "train"):
            raise ValueError(self._error("others", "be 'freeze' or 'train'", repr(group["others"])))

    def _constraints_of(
        self, group: dict[str, Any], given: Mapping[str, Tensor] | None
    ) -> dict[Tensor, Constraint]:
        constraints = super()._constraints_of(group, given)
        if group.get("bases"):
            self._check_names(group["bases"], [group])
        return constraints

    def _constrain(self, param: Tensor, label: str, value: Tensor) -> Constraint:
        if not value.is_floating_point():
            raise TypeError(self._error(label, "be floating point", value.dtype))
        layout = layout_of(param)
        if layout and any(p.is_partial() or (p.is_shard() and p.dim != 0) for p in layout[1]):
            condition = "belong to a parameter that is cut along its first dimension"
            raise NotImplementedError(self._error(label, condition, layout))
        if layout and value.dim() == 3:
            raise NotImplementedError(self._error(label, "have no groups for a sharded parameter", "some"))
        if param.dim() < 2:
            raise ValueError(
                self._error(label, "belong to a parameter of at least 2 dimensions", param.dim())
            )
        outputs, d = param.shape[0], math.prod(param.shape[1:])
        groups = value.shape[0] if value.dim() == 3 else 1
        if (
            value.dim() not in (2, 3)
            or value.shape[-2] != d
            or value.shape[-1] > d
            or groups < 1
            or outputs % groups != 0
        ):
            condition = f"be [{d}, k] or [groups, {d}, k], k at most {d}, for shape {list(param.shape)}"
            raise ValueError(self._error(label, condition, list(value.shape)))
        basis = value.detach().to(param.device, STATE_DTYPES[param.dtype], copy=True)
        k = basis.shape[-1]
        identity = torch.eye(k, dtype=basis.dtype, device=basis.device)
        if k > 0 and not is_fake(basis):
            deviation = float((basis.mT @ basis - identity).abs().max())
            if not deviation <= _ORTHONORMAL_TOLERANCE:
                raise ValueError(
                    self._error(label, "have orthonormal columns", f"max |U^T U - I| = {deviation:.2g}")
                )
        if 2 * k <= d:
            return Constraint(basis)
        # In double precision: every later step inherits the error of this decomposition.
        complete = torch.linalg.qr(basis.double(), mode="complete").Q
        return Constraint(complete[..., k:].to(basis.dtype).contiguous(), onto=True)

    def _memory_order(self, param: Tensor) -> Order:
        # The view must still begin with the outputs, or its rows would not be what the basis acts on.
        order = super()._memory_order(param)
        return order if order is not None and order[0] == 0 else None

    def _rearrange(self, constraint: Constraint, param: Tensor, order: Order) -> Tensor:
        *groups, _, k = constraint.tensor.shape
        sizes = view_of(param, constraint.order).shape[1:]
        moves = axis_moves(constraint.order, order, param.dim())[1:]
        rows = constraint.tensor.reshape(*groups, *sizes, k)
        rows = rows.permute(*range(len(groups)), *(len(groups) - 1 + move for move in moves), -1)
        return rows.reshape(constraint.tensor.shape)

    def _plan(self, group: dict[str, Any]) -> Callable[[], None]:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        bases: list[Constraint | None] = []
        for _, param, grad, basis in self._rows(group):
            frozen = (
                group["others"] == "freeze" if basis is None else basis.onto and basis.tensor.shape[-1] == 0
            )
            if not frozen:
                params.append(param)
                grads.append(grad)
                bases.append(basis)

        def update() -> None:
            if not params:
                return
            updates = self._sgd_updates(group, params, grads)
            for onto, project in ((False, ops.project_out_), (True, ops.project_onto_)):
                rows = [
                    (view_of(update, basis.order), basis.tensor)
                    for update, basis in zip(updates, bases, strict=True)
                    if basis is not None and basis.onto is onto and basis.tensor.shape[-1] > 0
                ]
                if rows:
                    project(*transposed(rows))
            torch._foreach_add_(params, updates, alpha=-float(group["lr"]))

        return update

    def _sgd_updates(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        # What plain SGD would subtract, in tensors that may be written: the momentum, or temporaries.
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        weight_decay = float(group["weight_decay"])
        raw = [grad.to(STATE_DTYPES[grad.dtype]) for grad in grads]
        if group["maximize"]:
            raw = list(torch._foreach_neg(raw))
        if weight_decay != 0:
            raw = list(torch._foreach_add(raw, params, alpha=weight_decay))
        if momentum == 0:
            return [
                tensor.clone() if tensor is grad else tensor for tensor, grad in zip(raw, grads, strict=True)
            ]
        buffers: list[Tensor] = []
        old: list[tuple[Tensor, ...]] = []
        for param, tensor in zip(params, raw, strict=True):
            buffer = self.state[param].get("momentum_buffer")
            if buffer is None:
                buffer = self.state[param]["momentum_buffer"] = state_like(param).copy_(tensor)
            else:
                old.append((buffer, tensor))
            buffers.append(buffer)
        if old:
            old_buffers, old_raw = transposed(old)
            torch._foreach_mul_(old_buffers, momentum)
            torch._foreach_add_(old_buffers, old_raw, alpha=1 - dampening)
        return list(torch._foreach_add(raw, buffers, alpha=momentum)) if group["nesterov"] else buffers
