"""SGD and AdamW whose masked-out scalars, and their state, stay bitwise as they are."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from unlearn_ext import ops
from unlearn_ext._internal.dtensors import is_dtensor, layout_of, local_of, part_of, refusal
from unlearn_ext.optim.constrained import (
    ConstrainedOptimizer,
    Constraint,
    Order,
    axis_moves,
    is_fake,
    packed_size,
    state_like,
    transposed,
    view_of,
)


class _MaskedOptimizer(ConstrainedOptimizer):
    """Constraints are packed masks; without any, masks whose bits are all set."""

    _keyword = "masks"

    def _constrain(self, param: Tensor, label: str, value: Tensor) -> Constraint:
        if is_dtensor(param):
            return self._constrain_sharded(param, label, value)
        condition = f"be bool {list(param.shape)} or packed uint8 [{packed_size(param)}]"
        got = f"{value.dtype} {list(value.shape)}"
        if value.dtype not in (torch.bool, torch.uint8):
            raise TypeError(self._error(label, condition, got))
        shape = param.shape if value.dtype == torch.bool else torch.Size([packed_size(param)])
        if value.shape != shape:
            raise ValueError(self._error(label, condition, got))
        # A copy of its own: the caller may go on to use the memory of a mask for something else. Flags are
        # copied when they are packed, together, where they are: a byte per scalar need not be moved.
        return Constraint(value if value.dtype == torch.bool else value.to(param.device, copy=True))

    def _constrain_sharded(self, param: Tensor, label: str, value: Tensor) -> Constraint:
        # Packed masks are refused: those of a shard and of the whole may be equally long.
        condition = (
            f"be bool {list(param.shape)}, whole on every rank or a DTensor sharded like the parameter"
        )
        if value.dtype != torch.bool or value.shape != param.shape:
            raise ValueError(self._error(label, condition, f"{value.dtype} {list(value.shape)}"))
        if why := refusal(param):
            raise NotImplementedError(self._error(label, "belong to a sharded or replicated parameter", why))
        if is_dtensor(value) and layout_of(value) != layout_of(param):
            raise ValueError(self._error(label, condition, f"a DTensor with {layout_of(value)}"))
        own = local_of(value) if is_dtensor(value) else value[part_of(param)]
        return Constraint(own)

    def _sharded(self, param: Tensor, label: str, constraint: Constraint) -> Constraint:
        whole = ops.unpack_mask(constraint.tensor.to(param.device), list(param.shape))
        (constraint,) = _all_packed({param: self._constrain(param, label, whole)}).values()
        return constraint

    def _missing(self, param: Tensor, label: str) -> None:
        if param.requires_grad:
            raise ValueError(self._error(label, "be given, as for every trainable parameter", "no mask"))

    def _constraints_of(
        self, group: dict[str, Any], given: Mapping[str, Tensor] | None
    ) -> dict[Tensor, Constraint]:
        if given is not None:
            return _all_packed(super()._constraints_of(group, given))
        # One run of set bits, as long as the longest parameter needs, serves a whole group.
        sizes = {param: packed_size(local_of(param)) for param in group["params"]}
        ones = {
            device: torch.full((max(sizes.values()),), 255, dtype=torch.uint8, device=device)
            for device in {param.device for param in sizes}
        }
        return {param: Constraint(ones[param.device][:size]) for param, size in sizes.items()}

    def _rearrange(self, constraint: Constraint, param: Tensor, order: Order) -> Tensor:
        mask = ops.unpack_mask(constraint.tensor, list(view_of(param, constraint.order).shape))
        return ops.pack_mask(mask.permute(axis_moves(constraint.order, order, param.dim())))

    def _masked_rows(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, Constraint]]:
        for index, param, grad, mask in self._rows(group):
            if mask is None:  # the parameter was frozen when its group was added
                label = f"masks[{self._label(group, index)}]"
                raise ValueError(self._error(label, "be given, now that there is a gradient", "no mask"))
            yield param, grad, mask


def _all_packed(constraints: Mapping[Tensor, Constraint]) -> dict[Tensor, Constraint]:
    # Those that are flags, together.
    flags = {param: found.tensor for param, found in constraints.items() if found.tensor.dtype == torch.bool}
    packed = dict(zip(flags, ops.pack_mask(list(flags.values())), strict=True))
    return {
        param: found._replace(tensor=packed[param].to(local_of(param).device)) if param in packed else found
        for param, found in constraints.items()
    }


class MaskedSGD(_MaskedOptimizer):
    """SGD that changes only the scalars its masks let through.

    A scalar whose mask bit is 1 follows ``torch.optim.SGD``::

        g <- gradient + weight_decay * theta        (minus the gradient if maximize)
        b <- momentum * b + (1 - dampening) * g     (b <- g on the first step)
        theta <- theta - lr * b                     (g + momentum * b instead of b if nesterov)

    A scalar whose mask bit is 0 keeps its bits, and so does its momentum: under weight decay, too, and with
    momentum from a time when it was free.

    Args:
        params: ``model.named_parameters()``, or parameter groups with such pairs under ``"params"``. Plain
            parameters will do where there are no masks. A group may bring its own ``"masks"``; one that is
            added later must, unless the optimizer was built without masks.
        lr: Learning rate, >= 0; a float, or a tensor with one element.
        momentum: Momentum factor, >= 0.
        dampening: Dampening of the momentum, from a parameter's second step on.
        weight_decay: L2 penalty, >= 0.
        nesterov: Use Nesterov momentum; needs momentum and no dampening.
        masks: What may change, by parameter name: bool tensors of the parameter's shape, or packed ones as
            ``select_mask`` and ``ops.pack_mask`` return them, uint8 ``[ceil(numel / 8)]``. Of a sharded
            parameter (DTensor): bool, whole on every rank or sharded alike. Every trainable parameter must
            have one; further names are ignored. None: everything may change.
        maximize: Ascend instead of descend.

    Raises:
        ValueError: If a mask is missing or has another shape, a hyperparameter is out of range, masks come
            without parameter names, or a parameter occurs twice.
        TypeError: If a parameter is not floating point, or a mask is neither bool nor uint8.

    Example:
        >>> import torch
        >>> from unlearn_ext.optim import MaskedSGD
        >>> model = torch.nn.Linear(3, 2)
        >>> masks = {"weight": torch.tensor([[True] * 3, [False] * 3]), "bias": torch.tensor([True, False])}
        >>> optimizer = MaskedSGD(model.named_parameters(), lr=0.1, momentum=0.9, masks=masks)
        >>> before = model.weight.detach().clone()
        >>> (model(torch.ones(4, 3)) - 7).square().sum().backward()
        >>> optimizer.step()
        >>> (model.weight != before).any(dim=1)
        tensor([ True, False])
    """

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
        masks: Mapping[str, Tensor] | None = None,
        maximize: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
        }
        super().__init__(params, defaults, masks)

    def _plan(self, group: dict[str, Any]) -> Callable[[], None]:
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        # The first momentum of a parameter is its gradient: zero momentum, and a call without dampening.
        calls: defaultdict[float, list[tuple[Tensor, ...]]] = defaultdict(list)
        new: dict[Tensor, Tensor] = {}
        for param, grad, mask in self._masked_rows(group):
            row = (view_of(param, mask.order), view_of(grad, mask.order), mask.tensor)
            if momentum == 0:
                calls[dampening].append(row)
                continue
            buffer = self.state.get(param, {}).get("momentum_buffer")
            if buffer is None:
                new[param] = buffer = state_like(param)
            calls[0.0 if param in new else dampening].append((*row, view_of(buffer, mask.order)))

        def update() -> None:
            for damped, rows in calls.items():
                params, grads, masks, *buffers = transposed(rows)
                ops.masked_sgd_(
                    params,
                    grads,
                    buffers[0] if buffers else [],
                    masks,
                    lr=float(group["lr"]),
                    momentum=momentum,
                    dampening=damped,
                    weight_decay=float(group["weight_decay"]),
                    nesterov=group["nesterov"],
                    maximize=group["maximize"],
                )
            for param, buffer in new.items():
                self.state[param]["momentum_buffer"] = buffer

        return update


class MaskedAdamW(_MaskedOptimizer):
    """AdamW that changes only the scalars its masks let through.

    A scalar whose mask bit is 1 follows ``torch.optim.AdamW``, g being the gradient (minus it if maximize)::

        theta <- theta * (1 - lr * weight_decay)
        m <- beta1 * m + (1 - beta1) * g
        v <- beta2 * v + (1 - beta2) * g^2
        theta <- theta - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    A scalar whose mask bit is 0 keeps its bits, and so do its two averages. Parameters that have been stepped
    equally often share one ``step`` tensor in their state; in ``state_dict()`` each has its own, so that
    ``torch.optim.AdamW`` can go on from there.

    Args:
        params: ``model.named_parameters()``, or parameter groups with such pairs under ``"params"``. Plain
            parameters will do where there are no masks. A group may bring its own ``"masks"``; one that is
            added later must, unless the optimizer was built without masks.
        lr: Learning rate, >= 0; a float, or a tensor with one element.
        betas: Decay rates of the two averages, in [0, 1).
        eps: Added to the denominator, >= 0.
        weight_decay: Decoupled weight decay, >= 0.
        masks: What may change, by parameter name: bool tensors of the parameter's shape, or packed ones as
            ``select_mask`` and ``ops.pack_mask`` return them, uint8 ``[ceil(numel / 8)]``. Of a sharded
            parameter (DTensor): bool, whole on every rank or sharded alike. Every trainable parameter must
            have one; further names are ignored. None: everything may change.
        maximize: Ascend instead of descend.
        capturable: Keep ``step`` on the parameters' device, so that a step can be captured in a CUDA graph.
            The learning rate of the capture is part of the graph.

    Raises:
        ValueError: If a mask is missing or has another shape, a hyperparameter is out of range, masks come
            without parameter names, or a parameter occurs twice.
        TypeError: If a parameter is not floating point, or a mask is neither bool nor uint8.

    Source:
        Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019.

    Example:
        >>> import torch
        >>> from unlearn_ext.optim import MaskedAdamW
        >>> model = torch.nn.Linear(3, 2)
        >>> masks = {"weight": torch.eye(2, 3, dtype=torch.bool), "bias": torch.zeros(2, dtype=torch.bool)}
        >>> optimizer = MaskedAdamW(model.named_parameters(), lr=0.1, masks=masks)
        >>> before = model.weight.detach().clone()
        >>> (model(torch.ones(4, 3)) - 7).square().sum().backward()
        >>> optimizer.step()
        >>> model.weight != before
        tensor([[ True, False, False],
                [False,  True, False]])
    """

    _state_keys = ("step", "exp_avg", "exp_avg_sq")

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        masks: Mapping[str, Tensor] | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "maximize": maximize,
            "capturable": capturable,
        }
        super().__init__(params, defaults, masks)

    # Note [Shared steps]
    # The op takes one step number per call, so parameters with the same number go into one call and share one
    # tensor. While a CUDA graph is captured, numbers cannot be read: then only those that share already, as
    # all do that started together. A parameter that sits a step out gets a tensor of its own.
    def _plan(self, group: dict[str, Any]) -> Callable[[], None]:
        calls: dict[int, tuple[Tensor, list[tuple[Tensor, ...]]]] = {}
        new: dict[Tensor, dict[str, Tensor]] = {}
        first: dict[torch.device, Tensor] = {}
        for param, grad, mask in self._masked_rows(group):
            state = self.state.get(param)
            if not state:
                device = _step_device(param, group)
                step = first.setdefault(device, torch.zeros((), dtype=torch.float32, device=device))
                new[param] = state = {
                    "step": step,
                    "exp_avg": state_like(param),
                    "exp_avg_sq": state_like(param),
                }
            unread = group["capturable"] or is_fake(state["step"])
            key = id(state["step"]) if unread else int(state["step"])
            state["step"], rows = calls.setdefault(key, (state["step"], []))
            tensors = (param, grad, state["exp_avg"], state["exp_avg_sq"])
            rows.append((*(view_of(tensor, mask.order) for tensor in tensors), mask.tensor))
        idle = [self.state[p] for p in group["params"] if p.grad is None and self.state.get(p)]
        if any(p.is_cuda for p in group["params"]) and not group["capturable"]:
            _refuse_capture()

        def update() -> None:
            beta1, beta2 = group["betas"]
            for step, rows in calls.values():
                params, grads, exp_avgs, exp_avg_sqs, masks = transposed(rows)
                ops.masked_adamw_(
                    params,
                    grads,
                    exp_avgs,
                    exp_avg_sqs,
                    masks,
                    step=step + 1 if group["capturable"] or is_fake(step) else int(step) + 1,
                    lr=float(group["lr"]),
                    beta1=float(beta1),
                    beta2=float(beta2),
                    eps=float(group["eps"]),
                    weight_decay=float(group["weight_decay"]),
                    maximize=group["maximize"],
                )
            counted = {id(step) for step, _ in calls.values()}
            for state in idle:
                if id(state["step"]) in counted:
                    state["step"] = state["step"].clone()
            for step, _ in calls.values():
                step.add_(1)
            for param, state in new.items():
                self.state[param].update(state)

        return update

    def state_dict(self) -> dict[str, Any]:
        """Return the state as ``torch.optim.AdamW`` keeps it.

        Returns:
            ``state`` and ``param_groups``. The averages are shared with the optimizer, as in torch; every
            ``step`` is a copy.
        """
        # Whoever steps parameter after parameter, as torch.optim does, would count a shared step many times.
        found = super().state_dict()
        found["state"] = {
            key: {**state, "step": state["step"].clone()} if "step" in state else state
            for key, state in found["state"].items()
        }
        return found

    def _check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super()._check_checkpoint(checkpoint)
        for group in checkpoint["param_groups"]:
            if group.get("amsgrad") or not group.get("decoupled_weight_decay", True):
                raise ValueError(self._error("state_dict", "be AdamW's without amsgrad", "another variant's"))

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        super()._restore(checkpoint)
        for group in self.param_groups:
            shared: dict[tuple[float, torch.device], Tensor] = {}
            for param in group["params"]:
                if state := self.state.get(param):
                    number, device = float(state["step"]), _step_device(param, group)
                    step = torch.tensor(number, dtype=torch.float32, device=device)
                    state["step"] = shared.setdefault((number, device), step)


def _refuse_capture() -> None:
    # A step number that is read on the CPU would be frozen into the graph.
    if torch.cuda.is_current_stream_capturing():
        raise RuntimeError("MaskedAdamW: capturable must be True while a CUDA graph is captured, got False")


def _step_device(param: Tensor, group: dict[str, Any]) -> torch.device:
    # As in torch.optim: on the CPU, where reading it costs no synchronisation, unless it must not be read.
    return param.device if group["capturable"] else torch.device("cpu")
