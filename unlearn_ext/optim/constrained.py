"""What optimizers under a constraint per parameter share: names, checks, memory formats, checkpoints."""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer, ParamsT

from unlearn_ext._internal.dtensors import is_dtensor
from unlearn_ext._internal.names import plain_name, with_plain_names
from unlearn_ext._internal.undo import Undone, handles

STATE_DTYPES = {
    torch.float32: torch.float32,
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float64: torch.float64,
}

Order = tuple[int, ...] | None

# What groups of torch.optim's checkpoints say of its own implementations; none of it means anything here.
_OF_TORCH = ("foreach", "fused", "differentiable", "amsgrad", "decoupled_weight_decay")


class Constraint(NamedTuple):
    """What binds one parameter, arranged for one memory order of it."""

    tensor: Tensor  # packed mask [ceil(numel / 8)], or basis [d, k] or [q, d, k]
    order: Order = None  # the parameter's dimensions from the outermost inwards; None is row-major
    onto: bool = False  # bases: the tensor spans the free space, not the protected one


class _Named(NamedTuple):
    # What was given for a name, and for what kind of tensor.
    shape: torch.Size
    is_sharded: bool
    constraint: Constraint


# Note [Memory order]
# Mask bits and basis rows count the parameter's scalars row-major. A channels_last parameter lies in another
# order, and an op that followed the row-major count would jump through its memory on every step. So the
# constraint is rearranged once, and the op is handed permuted views of parameter, gradient and state: the
# same scalars, in memory order.


def view_of(tensor: Tensor, order: Order) -> Tensor:
    """Return a tensor with its axes in memory order.

    Args:
        tensor: A parameter, a gradient or a state.
        order: The axes from the outermost in memory to the innermost; None for row-major.

    Returns:
        A view.
    """
    return tensor if order is None else tensor.permute(order)


def axis_moves(present: Order, wanted: Order, dim: int) -> list[int]:
    """Return the permutation that takes a tensor stored in one memory order to another.

    Args:
        present: The order it is stored in.
        wanted: The order it shall be stored in.
        dim: Number of axes.

    Returns:
        What ``Tensor.permute`` takes.
    """
    row_major = tuple(range(dim))
    return [(present or row_major).index(d) for d in wanted or row_major]


def transposed(rows: Sequence[tuple[Tensor, ...]]) -> list[list[Tensor]]:
    """Turn a row per parameter into a list per argument, as list ops take them.

    Args:
        rows: Tuples of one length.

    Returns:
        One list per entry of a row.
    """
    return [list(column) for column in zip(*rows, strict=True)]


def state_like(param: Tensor) -> Tensor:
    """Make an optimizer state of zeros.

    Args:
        param: The parameter.

    Returns:
        Of its shape and strides, float32 or wider.
    """
    return torch.zeros_like(param, dtype=STATE_DTYPES[param.dtype])


def is_fake(tensor: Tensor) -> bool:
    """Say whether a tensor has no values, as under ``FakeTensorMode``, where memory is estimated.

    Args:
        tensor: Any tensor.

    Returns:
        True if nothing can be read from it.
    """
    module = sys.modules.get("torch._subclasses.fake_tensor")  # where nobody has imported it, none is
    return module is not None and isinstance(tensor, module.FakeTensor)


def packed_size(param: Tensor) -> int:
    """Return the bytes of a parameter's packed mask.

    Args:
        param: The parameter.

    Returns:
        One bit per scalar, rounded up.
    """
    return (param.numel() + 7) // 8


class ConstrainedOptimizer(Optimizer):
    """One constraint per parameter, found by name; state that keeps its precision; steps all or nothing."""

    _keyword: str  # the constructor's argument and the parameter group's key: "masks" or "bases"
    _state_keys: tuple[str, ...]  # what a parameter's state consists of

    def __init__(self, params: ParamsT, defaults: dict[str, Any], given: Mapping[str, Tensor] | None) -> None:
        self._given = given
        self._constraints: dict[Tensor, Constraint] = {}
        self._by_name: dict[str, _Named] = {}
        super().__init__(params, defaults)
        # A group that is added later brings its own; None, "nothing is constrained", goes on to hold.
        self._given = None if given is None else {}

    def __getstate__(self) -> dict[str, Any]:
        own = ("_given", "_constraints", "_by_name")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        known = set(self.defaults) if hasattr(self, "defaults") else set(state["defaults"])
        super().__setstate__(state)
        for key in set(self.defaults) - known:  # torch adds one of its own
            del self.defaults[key]
        # Groups that come from a checkpoint of torch.optim lack the options that only these classes have.
        for group in self.param_groups:
            for key, default in self.defaults.items():
                group.setdefault(key, default)
            for key in _OF_TORCH:
                if key not in self.defaults:
                    group.pop(key, None)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as ``torch.optim.Optimizer`` does.

        Args:
            param_group: Parameters under ``"params"``, their options, and their masks or bases under
                ``"masks"`` or ``"bases"``.

        Raises:
            ValueError: If the group does not pass the checks of the constructor; it has not been added then.
            TypeError: Likewise, for dtypes.
        """
        with self._all_or_nothing():
            super().add_param_group(param_group)
            group = self.param_groups[-1]
            self._check_group(group)
            constraints = self._constraints_of(group, group.get(self._keyword, self._given))
            group.pop(self._keyword, None)
            named = zip(group.get("param_names", ()), group["params"], strict=False)
            self._by_name = self._by_name | {
                name: _Named(param.shape, is_dtensor(param), constraints[param])
                for name, param in named
                if param in constraints
            }
            self._constraints = self._constraints | constraints

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint of this class or of its ``torch.optim`` counterpart.

        Args:
            state_dict: What ``state_dict()`` returned.

        Raises:
            ValueError: If it does not fit the parameters.

        Whatever fails, or interrupts it, leaves the optimizer as it was.
        """
        # torch would cast the loaded state to the parameter's dtype, which rounds the float32 state of a
        # bfloat16 parameter, and would share memory with the checkpoint where no cast is needed. The two
        # hooks enclose that: they run after the user's last change to the checkpoint and before the user's
        # first look at the result.
        loaded: dict[str, Any] = {}

        def check(_: Optimizer, checkpoint: dict[str, Any]) -> None:
            self._check_checkpoint(checkpoint)
            loaded.update(checkpoint)

        def restore(_: Optimizer) -> None:
            self._restore(loaded)

        with self._all_or_nothing(), handles() as hooks:
            hooks.append(self.register_load_state_dict_pre_hook(check))
            hooks.append(self.register_load_state_dict_post_hook(restore, prepend=True))
            super().load_state_dict(state_dict)

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

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        # torch's own code puts other dictionaries in the place of these, and adds groups to the list.
        state, groups, known = self.state, self.param_groups, list(self.param_groups)
        constraints, by_name = self._constraints, self._by_name
        is_done = False

        def put_back() -> None:
            if not is_done:
                groups[:] = known
                self.state, self.param_groups = state, groups
                self._constraints, self._by_name = constraints, by_name

        with Undone(put_back):
            yield
            is_done = True

    @abstractmethod
    def _plan(self, group: dict[str, Any]) -> Callable[[], None]:
        """Collect a group's tensors; the call that is returned updates them and stores new state."""

    @abstractmethod
    def _constrain(self, param: Tensor, label: str, value: Tensor) -> Constraint:
        """Check what was given for a parameter, and prepare it."""

    @abstractmethod
    def _rearrange(self, constraint: Constraint, param: Tensor, order: Order) -> Tensor:
        """Arrange a constraint for another memory order of its parameter."""

    def _missing(self, param: Tensor, label: str) -> None:
        """Raise if this parameter may not go without a constraint."""

    def _constraints_of(
        self, group: dict[str, Any], given: Mapping[str, Tensor] | None
    ) -> dict[Tensor, Constraint]:
        if given is None:
            return {}
        if "param_names" not in group:
            condition = f"be named_parameters(), since {self._keyword} are found by name"
            raise ValueError(self._error("params", condition, "parameters without names"))
        by_name = with_plain_names(given)
        constraints = {}
        for name, param in zip(group["param_names"], group["params"], strict=True):
            label = f"{self._keyword}[{name!r}]"
            value = by_name.get(name, by_name.get(plain_name(name)))
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
        # Of torch.optim's options these change what a step does; unknown keys may stay, as in torch.
        variants = {"amsgrad": False, "differentiable": False}
        if "betas" in group and group["weight_decay"]:  # as of torch.optim.Adam
            variants["decoupled_weight_decay"] = True
        for key, meant in variants.items():
            if group.get(key, meant) != meant:
                raise ValueError(self._error(key, f"be {meant} in every group", group[key]))
        if len(set(group["params"])) < len(group["params"]):
            raise ValueError(self._error("params", "hold every parameter once", "a repeated one"))
        for index, param in enumerate(group["params"]):
            is_fixed = not (param.is_floating_point() or param.is_complex())  # of a quantised layer
            if param.dtype not in STATE_DTYPES and not is_fixed:
                condition = "be float32, float64, float16 or bfloat16"
                raise TypeError(self._error(f"params[{self._label(group, index)}]", condition, param.dtype))

    def _rows(self, group: dict[str, Any]) -> Iterator[tuple[int, Tensor, Tensor, Constraint | None]]:
        # Index, parameter, gradient and constraint of every parameter that has a gradient.
        for index, param in enumerate(group["params"]):
            grad = param.grad
            if grad is None:
                continue
            if grad.layout != torch.strided:
                what = f"the gradient of params[{self._label(group, index)}]"
                raise ValueError(self._error(what, "be dense (an embedding's: sparse=False)", grad.layout))
            if param not in self._constraints:
                self._rebind(group, index)
            yield index, param, grad, self._arranged(param)

    def _arranged(self, param: Tensor) -> Constraint | None:
        # What binds a parameter, arranged for how it lies in memory now.
        constraint = self._constraints.get(param)
        if constraint is not None and not (
            constraint.tensor.device == param.device and view_of(param, constraint.order).is_contiguous()
        ):
            # A channels_last parameter's first step, or the model was moved or converted since the last.
            order = self._memory_order(param)
            constraint = constraint._replace(tensor=constraint.tensor.to(param.device))
            if order != constraint.order:
                tensor = self._rearrange(constraint, param, order)
                constraint = constraint._replace(tensor=tensor, order=order)
            self._constraints[param] = constraint
        return constraint

    def _rebind(self, group: dict[str, Any], index: int) -> None:
        # Libraries that wrap a model after its optimizer was made put other tensors in the parameters' place;
        # what a name was constrained to holds for whichever tensor has the name.
        names, param = group.get("param_names"), group["params"][index]
        if not names:
            return
        known = self._by_name.get(names[index])
        if known is None or known.shape != param.shape:
            return
        constraint = known.constraint
        if is_dtensor(param) and not known.is_sharded:
            label = f"{self._keyword}[{names[index]!r}]"
            constraint = self._sharded(param, label, constraint)
        self._constraints[param] = constraint

    def _sharded(self, param: Tensor, label: str, constraint: Constraint) -> Constraint:
        """Take of what was given for a whole parameter what binds this rank's part of it."""
        condition = "be given after the model was sharded"
        raise NotImplementedError(self._error(label, condition, "a DTensor in the parameter's place"))

    def _memory_order(self, param: Tensor) -> Order:
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
                    self.state[param][key] = state_like(param).copy_(saved[key])
