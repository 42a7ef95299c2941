"""Optimizers that change only what they may: masked SGD and AdamW, and projected SGD.

Each is a ``torch.optim.Optimizer``: parameter groups, learning-rate schedulers, ``GradScaler``, gradient
clipping, ``add_param_group`` and ``state_dict`` work as they do with ``torch.optim.SGD`` and
``torch.optim.AdamW``, and a checkpoint of those two can be loaded. What is added is one constraint per
parameter, found by the parameter's name: a mask of the scalars that may change, or a basis of the directions
that may not.

Two things differ from ``torch.optim`` on purpose. State is float32 (float64 for double parameters) also where
the parameter is float16 or bfloat16, and it stays so through ``load_state_dict``. Constraints are not part of
``state_dict``: like the parameters themselves, they are given again when a run is resumed.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from unlearn_ext import ops

__all__ = ["MaskedAdamW", "MaskedSGD", "ProjectedSGD"]

_STATE_DTYPES = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float64,
}

# Columns of a basis may be this far from orthonormal, max |U^T U - I|. A float32 eigendecomposition stays
# within about 1e-6; a basis that was kept in half precision, or never orthonormalised, does not pass.
_ORTHONORMAL_TOLERANCE = 1e-4

_Order = tuple[int, ...] | None


class _Constraint(NamedTuple):
    """What binds one parameter, arranged for one memory order of it."""

    tensor: Tensor  # packed mask [ceil(numel / 8)], or basis [d, k] or [q, d, k]
    order: _Order = None  # the parameter's dimensions from the outermost inwards; None is row-major
    onto: bool = False  # bases: the tensor spans the free space, not the protected one


# Note [Memory order]
# Mask bits and basis rows count the parameter's scalars row-major. A channels_last parameter lies in another
# order, and an op that followed the row-major count would jump through its memory on every step. So the
# constraint is rearranged once, and the op is handed permuted views of parameter, gradient and state: the
# same scalars, in memory order.


def _view(tensor: Tensor, order: _Order) -> Tensor:
    return tensor if order is None else tensor.permute(order)


def _moves(present: _Order, wanted: _Order, dim: int) -> list[int]:
    """Return the permutation that takes a view in one order to a view in another."""
    row_major = tuple(range(dim))
    return [(present or row_major).index(d) for d in wanted or row_major]


def _columns(rows: Sequence[tuple[Tensor, ...]]) -> list[list[Tensor]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _zeros_like(param: Tensor) -> Tensor:
    return torch.zeros_like(param, dtype=_STATE_DTYPES[param.dtype])


def _packed_size(param: Tensor) -> int:
    return (param.numel() + 7) // 8


def _plain(name: str) -> str:
    # torch.compile inserts this into the parameter names of a module it wraps.
    return name.replace("_orig_mod.", "")


class _ConstrainedOptimizer(Optimizer):
    """One constraint per parameter, found by name; state that keeps its precision; steps all or nothing."""

    _keyword: str  # the constructor's argument and the parameter group's key: "masks" or "bases"
    _state_keys: tuple[str, ...]  # what a parameter's state consists of

    def __init__(self, params: ParamsT, defaults: dict[str, Any], given: Mapping[str, Tensor] | None) -> None:
        self._given = given
        self._constraints: dict[Tensor, _Constraint] = {}
        super().__init__(params, defaults)
        # A group that is added later brings its own; None, "nothing is constrained", goes on to hold.
        self._given = None if given is None else {}

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_given": self._given, "_constraints": self._constraints}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Groups that come from a checkpoint of torch.optim lack the options that only these classes have.
        for group in self.param_groups:
            for key, default in self.defaults.items():
                group.setdefault(key, default)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as ``torch.optim.Optimizer`` does.

        Args:
            param_group: Parameters under ``"params"``, their options, and their masks or bases under
                ``"masks"`` or ``"bases"``.

        Raises:
            ValueError: If the group does not pass the checks of the constructor; it has not been added then.
            TypeError: Likewise, for dtypes.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
            constraints = self._constraints_of(group, group.get(self._keyword, self._given))
        except Exception:
            self.param_groups.pop()
            raise
        group.pop(self._keyword, None)
        self._constraints.update(constraints)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of its ``torch.optim`` counterpart.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            ValueError: If it does not fit the parameters; the optimizer is as it was then.
        """
        # torch would cast the loaded state to the parameter's dtype, which rounds the float32 state of a
        # bfloat16 parameter, and would share memory with the checkpoint where no cast is needed. The two
        # hooks enclose that: they run after the user's last change to the checkpoint and before the user's
        # first look at the result.
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, checkpoint: dict[str, Any]) -> None:
            self._check_checkpoint(checkpoint)
            loaded.update(checkpoint)

        before = self.register_load_state_dict_pre_hook(check)
        after = self.register_load_state_dict_post_hook(lambda _: self._restore(loaded), prepend=True)
        try:
            super().load_state_dict(state_dict)
        finally:
            before.remove()
            after.remove()

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Perform one update.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The closure's loss; None without a closure.

        Raises:
            ValueError: If a gradient is sparse or its parameter lacks a mask; nothing has been updated then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.no_grad():
            # All groups are looked through before the first is updated.
            for update in [self._plan(group) for group in self.param_groups]:
                update()
        return loss

    @abstractmethod
    def _plan(self, group: dict[str, Any]) -> Callable[[], None]:
        """Collect a group's tensors; the call that is returned updates them and stores new state."""

    @abstractmethod
    def _constrain(self, param: Tensor, label: str, value: Tensor) -> _Constraint:
        """Check what was given for a parameter, and prepare it."""

    @abstractmethod
    def _rearrange(self, constraint: _Constraint, param: Tensor, order: _Order) -> Tensor:
        """Arrange a constraint for another memory order of its parameter."""

    def _missing(self, param: Tensor, label: str) -> None:
        """Raise if this parameter may not go without a constraint."""

    def _constraints_of(
        self, group: dict[str, Any], given: Mapping[str, Tensor] | None
    ) -> dict[Tensor, _Constraint]:
        if given is None:
            return {}
        if "param_names" not in group:
            condition = f"be named_parameters(), since {self._keyword} are found by name"
            raise ValueError(self._error("params", condition, "parameters without names"))
        by_name = {_plain(name): value for name, value in given.items()}
        constraints = {}
        for name, param in zip(group["param_names"], group["params"], strict=True):
            label = f"{self._keyword}[{name!r}]"
            value = by_name.get(_plain(name))
            if value is None:
                self._missing(param, label)
            else:
                constraints[param] = self._constrain(param, label, value)
        return constraints

    def _error(self, what: str, condition: str, got: object) -> str:
        return f"{type(self).__name__}: {what} must {condition}, got {got}"

    def _label(self, group: dict[str, Any], index: int) -> str:
        names = group.get("param_names")
        return repr(names[index]) if names else str(index)

    def _check_group(self, group: dict[str, Any]) -> None:
        for key in ("lr", "momentum", "weight_decay", "eps"):
            if key in group and not 0 <= float(group[key]) < math.inf:
                raise ValueError(self._error(key, "be finite and >= 0", group[key]))
        for beta in group.get("betas", ()):
            if not 0 <= float(beta) < 1:
                raise ValueError(self._error("betas", "lie in [0, 1)", group["betas"]))
        if not math.isfinite(group.get("dampening", 0.0)):
            raise ValueError(self._error("dampening", "be finite", group["dampening"]))
        if group.get("nesterov") and not (group["momentum"] > 0 and group["dampening"] == 0):
            got = f"momentum={group['momentum']}, dampening={group['dampening']}"
            raise ValueError(self._error("nesterov", "have momentum and no dampening", got))
        if len(set(group["params"])) < len(group["params"]):
            raise ValueError(self._error("params", "hold every parameter once", "a repeated one"))
        for index, param in enumerate(group["params"]):
            if param.dtype not in _STATE_DTYPES:
                condition = "be float32, float64, float16 or bfloat16"
                raise TypeError(self._error(f"params[{self._label(group, index)}]", condition, param.dtype))

    def _rows(self, group: dict[str, Any]) -> Iterator[tuple[int, Tensor, Tensor, _Constraint | None]]:
        # Index, parameter, gradient and constraint of every parameter that has a gradient.
        for index, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if grad.layout != torch.strided:
                what = f"the gradient of params[{self._label(group, index)}]"
                raise ValueError(self._error(what, "be dense (an embedding's: sparse=False)", grad.layout))
            constraint = self._constraints.get(param)
            if constraint is not None and not (
                constraint.tensor.device == param.device and _view(param, constraint.order).is_contiguous()
            ):
                # A channels_last parameter's first step, or the model was moved or converted since the last.
                order = self._memory_order(param)
                constraint = constraint._replace(tensor=constraint.tensor.to(param.device))
                if order != constraint.order:
                    tensor = self._rearrange(constraint, param, order)
                    constraint = constraint._replace(tensor=tensor, order=order)
                self._constraints[param] = constraint
            yield index, param, grad, constraint

    def _memory_order(self, param: Tensor) -> _Order:
        if param.is_contiguous():
            return None
        # By decreasing stride; a tensor with gaps or overlaps has no order that helps.
        order = tuple(sorted(range(param.dim()), key=param.stride, reverse=True))
        return order if param.permute(order).is_contiguous() else None

    def _saved(self, checkpoint: dict[str, Any]) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        # Every parameter that has state in a checkpoint, and that state.
        ids = chain.from_iterable(group["params"] for group in checkpoint["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(ids, params, strict=False):  # torch reports unequal lengths
            if saved := checkpoint["state"].get(key):
                yield param, saved

    def _check_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        for param, saved in self._saved(checkpoint):
            for key in self._state_keys:
                if key not in saved:
                    raise ValueError(
                        self._error("state_dict", f"hold {key} of every parameter", sorted(saved))
                    )
                value = saved[key]
                if key != "step" and value is not None and value.shape != param.shape:
                    condition = f"have the parameter's shape {list(param.shape)}"
                    raise ValueError(self._error(f"{key} in state_dict", condition, list(value.shape)))

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        for param, saved in self._saved(checkpoint):
            for key in self._state_keys:
                if key != "step" and saved[key] is not None:
                    self.state[param][key] = _zeros_like(param).copy_(saved[key])


class _MaskedOptimizer(_ConstrainedOptimizer):
    """Constraints are packed masks; without any, masks whose bits are all set."""

    _keyword = "masks"

    def _constrain(self, param: Tensor, label: str, value: Tensor) -> _Constraint:
        condition = f"be bool {list(param.shape)} or packed uint8 [{_packed_size(param)}]"
        got = f"{value.dtype} {list(value.shape)}"
        if value.dtype not in (torch.bool, torch.uint8):
            raise TypeError(self._error(label, condition, got))
        shape = param.shape if value.dtype == torch.bool else torch.Size([_packed_size(param)])
        if value.shape != shape:
            raise ValueError(self._error(label, condition, got))
        value = value.to(param.device)
        # A copy of its own: the caller may go on to use the memory of a mask for something else.
        return _Constraint(ops.pack_mask(value) if value.dtype == torch.bool else value.clone())

    def _missing(self, param: Tensor, label: str) -> None:
        if param.requires_grad:
            raise ValueError(self._error(label, "be given, as for every trainable parameter", "no mask"))

    def _constraints_of(
        self, group: dict[str, Any], given: Mapping[str, Tensor] | None
    ) -> dict[Tensor, _Constraint]:
        if given is not None:
            return super()._constraints_of(group, given)
        # One run of set bits, as long as the longest parameter needs, serves a whole group.
        sizes = {param: _packed_size(param) for param in group["params"]}
        ones = {
            device: torch.full((max(sizes.values()),), 255, dtype=torch.uint8, device=device)
            for device in {param.device for param in sizes}
        }
        return {param: _Constraint(ones[param.device][:size]) for param, size in sizes.items()}

    def _rearrange(self, constraint: _Constraint, param: Tensor, order: _Order) -> Tensor:
        mask = ops.unpack_mask(constraint.tensor, list(_view(param, constraint.order).shape))
        return ops.pack_mask(mask.permute(_moves(constraint.order, order, param.dim())))

    def _masked_rows(self, group: dict[str, Any]) -> Iterator[tuple[Tensor, Tensor, _Constraint]]:
        for index, param, grad, mask in self._rows(group):
            if mask is None:  # the parameter was frozen when its group was added
                label = f"masks[{self._label(group, index)}]"
                raise ValueError(self._error(label, "be given, now that there is a gradient", "no mask"))
            yield param, grad, mask


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
            ``select_mask`` and ``ops.pack_mask`` return them, uint8 ``[ceil(numel / 8)]``. Every trainable
            parameter must have one; further names are ignored. None: everything may change.
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
            row = (_view(param, mask.order), _view(grad, mask.order), mask.tensor)
            if momentum == 0:
                calls[dampening].append(row)
                continue
            buffer = self.state.get(param, {}).get("momentum_buffer")
            if buffer is None:
                new[param] = buffer = _zeros_like(param)
            calls[0.0 if param in new else dampening].append((*row, _view(buffer, mask.order)))

        def update() -> None:
            for damped, rows in calls.items():
                params, grads, masks, *buffers = _columns(rows)
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
    equally often share one ``step`` tensor in their state.

    Args:
        params: ``model.named_parameters()``, or parameter groups with such pairs under ``"params"``. Plain
            parameters will do where there are no masks. A group may bring its own ``"masks"``; one that is
            added later must, unless the optimizer was built without masks.
        lr: Learning rate, >= 0; a float, or a tensor with one element.
        betas: Decay rates of the two averages, in [0, 1).
        eps: Added to the denominator, >= 0.
        weight_decay: Decoupled weight decay, >= 0.
        masks: What may change, by parameter name: bool tensors of the parameter's shape, or packed ones as
            ``select_mask`` and ``ops.pack_mask`` return them, uint8 ``[ceil(numel / 8)]``. Every trainable
            parameter must have one; further names are ignored. None: everything may change.
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
                    "exp_avg": _zeros_like(param),
                    "exp_avg_sq": _zeros_like(param),
                }
            key = id(state["step"]) if group["capturable"] else int(state["step"])
            state["step"], rows = calls.setdefault(key, (state["step"], []))
            tensors = (param, grad, state["exp_avg"], state["exp_avg_sq"])
            rows.append((*(_view(tensor, mask.order) for tensor in tensors), mask.tensor))
        idle = [self.state[p] for p in group["params"] if p.grad is None and self.state.get(p)]
        if any(p.is_cuda for p in group["params"]) and not group["capturable"]:
            _refuse_capture()

        def update() -> None:
            beta1, beta2 = group["betas"]
            for step, rows in calls.values():
                params, grads, exp_avgs, exp_avg_sqs, masks = _columns(rows)
                ops.masked_adamw_(
                    params,
                    grads,
                    exp_avgs,
                    exp_avg_sqs,
                    masks,
                    step=step + 1 if group["capturable"] else int(step) + 1,
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


class ProjectedSGD(_ConstrainedOptimizer):
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
        known = {_plain(name) for group in groups for name in group["param_names"]}
        unknown = [name for name in bases if _plain(name) not in known]
        if unknown:
            condition = "be keyed by names of parameters (such as 'fc.weight')"
            raise ValueError(self._error("bases", condition, unknown[:3]))

    def _check_group(self, group: dict[str, Any]) -> None:
        super()._check_group(group)
        if group["others"] not in ("freeze", "train"):
            raise ValueError(self._error("others", "be 'freeze' or 'train'", repr(group["others"])))

    def _constraints_of(
        self, group: dict[str, Any], given: Mapping[str, Tensor] | None
    ) -> dict[Tensor, _Constraint]:
        constraints = super()._constraints_of(group, given)
        if group.get("bases"):
            self._check_names(group["bases"], [group])
        return constraints

    def _constrain(self, param: Tensor, label: str, value: Tensor) -> _Constraint:
        if not value.is_floating_point():
            raise TypeError(self._error(label, "be floating point", value.dtype))
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
        basis = value.detach().to(param.device, _STATE_DTYPES[param.dtype], copy=True)
        k = basis.shape[-1]
        identity = torch.eye(k, dtype=basis.dtype, device=basis.device)
        if k > 0:
            deviation = float((basis.mT @ basis - identity).abs().max())
            if not deviation <= _ORTHONORMAL_TOLERANCE:
                raise ValueError(
                    self._error(label, "have orthonormal columns", f"max |U^T U - I| = {deviation:.2g}")
                )
        if 2 * k <= d:
            return _Constraint(basis)
        # In double precision: every later step inherits the error of this decomposition.
        complete = torch.linalg.qr(basis.double(), mode="complete").Q
        return _Constraint(complete[..., k:].to(basis.dtype).contiguous(), onto=True)

    def _memory_order(self, param: Tensor) -> _Order:
        # The view must still begin with the outputs, or its rows would not be what the basis acts on.
        order = super()._memory_order(param)
        return order if order is not None and order[0] == 0 else None

    def _rearrange(self, constraint: _Constraint, param: Tensor, order: _Order) -> Tensor:
        *groups, _, k = constraint.tensor.shape
        sizes = _view(param, constraint.order).shape[1:]
        moves = _moves(constraint.order, order, param.dim())[1:]
        rows = constraint.tensor.reshape(*groups, *sizes, k)
        rows = rows.permute(*range(len(groups)), *(len(groups) - 1 + move for move in moves), -1)
        return rows.reshape(constraint.tensor.shape)

    def _plan(self, group: dict[str, Any]) -> Callable[[], None]:
        params: list[Tensor] = []
        grads: list[Tensor] = []
        bases: list[_Constraint | None] = []
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
                    (_view(update, basis.order), basis.tensor)
                    for update, basis in zip(updates, bases, strict=True)
                    if basis is not None and basis.onto is onto and basis.tensor.shape[-1] > 0
                ]
                if rows:
                    project(*_columns(rows))
            torch._foreach_add_(params, updates, alpha=-float(group["lr"]))

        return update

    def _sgd_updates(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        # What plain SGD would subtract, in tensors that may be written: the momentum, or temporaries.
        momentum, dampening = float(group["momentum"]), float(group["dampening"])
        weight_decay = float(group["weight_decay"])
        raw = [grad.to(_STATE_DTYPES[grad.dtype]) for grad in grads]
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
                buffer = self.state[param]["momentum_buffer"] = _zeros_like(param).copy_(tensor)
            else:
                old.append((buffer, tensor))
            buffers.append(buffer)
        if old:
            old_buffers, old_raw = _columns(old)
            torch._foreach_mul_(old_buffers, momentum)
            torch._foreach_add_(old_buffers, old_raw, alpha=1 - dampening)
        return list(torch._foreach_add(raw, buffers, alpha=momentum)) if group["nesterov"] else buffers
