"""Weight gradients for chosen output rows only: what masked training of a few neurons can do without.

The gradient of a linear or convolutional layer's weight costs as much as the layer itself. Where only a few
of its rows may change, those are all that is needed: a small matrix product instead of the large one. Forward
pass and gradients of inputs stay as they are, and so does the model: its calls of ``linear`` and ``conv1d``
to ``conv3d`` are led elsewhere while a ``RowGradients`` is entered, if their weight is one of those named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from unlearn_ext._internal.modules import eager

__all__ = ["RowGradients"]

_CONVS: dict[object, int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}


class RowGradients(TorchFunctionMode):
    """While entered, the named weights get gradients in some rows only; the others are zero.

    Calls it does not know (of attention layers that keep three weights in one, under autocast, with another
    padding) go through untouched and give full gradients, which are right in those rows as well. Compiled
    models run eagerly.

    Args:
        rows: Weight to its rows that count, int64 in ascending order.

    Attributes:
        calls: Number of calls that were led elsewhere.

    Example:
        >>> layer = torch.nn.Linear(3, 4)
        >>> with RowGradients({layer.weight: torch.tensor([2])}) as mode:
        ...     output = layer(torch.ones(5, 3))
        >>> output.sum().backward()
        >>> layer.weight.grad.sum(1), layer.bias.grad, mode.calls
        (tensor([ 0.,  0., 15.,  0.]), tensor([5., 5., 5., 5.]), 1)
    """

    def __init__(self, rows: Mapping[Tensor, Tensor]) -> None:
        super().__init__()
        self._rows = dict(rows)
        self.calls = 0
        self._stack: list[ExitStack] = []

    def __enter__(self) -> RowGradients:
        # Compiled code would not be seen, or would be compiled anew for every pass.
        self._stack.append(ExitStack())
        self._stack[-1].enter_context(eager())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._stack.pop().close()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - whatever func returns
        kwargs = kwargs or {}
        if func is F.linear or func in _CONVS:
            result = self._led(func, args, kwargs)
            if result is not None:
                self.calls += 1
                return result
        return func(*args, **kwargs)

    def _led(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Tensor | None:
        if func is F.linear:
            x, weight, bias = _bound(("input", "weight", "bias"), (None,), args, kwargs)
            options: tuple[Any, ...] = ()
        else:
            names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
            x, weight, bias, *options_ = _bound(names, (None, 1, 0, 1, 1), args, kwargs)
            n_dims = _CONVS[func]
            stride, padding, dilation, groups = options_
            padding = 0 if padding == "valid" else padding
            if isinstance(padding, str) or x.ndim != n_dims + 2:
                return None
            options = (*(_tuple(value, n_dims) for value in (stride, padding, dilation)), groups)
        rows = self._rows.get(weight) if isinstance(weight, Tensor) else None
        if (
            rows is None
            or not torch.is_grad_enabled()
            or not weight.requires_grad
            or torch.is_autocast_enabled(weight.device.type)
        ):
            return None
        function = _RowConv if options else _RowLinear
        result: Tensor = function.apply(x, weight, bias, rows, *options)  # type: ignore[no-untyped-call]
        return result


def _bound(
    names: Sequence[str], defaults: tuple[Any, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> list[Any]:
    padded = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True))
    given = padded | dict(zip(names, args, strict=False)) | dict(kwargs)
    return [given[name] for name in names]


def _tuple(value: Any, n_dims: int) -> tuple[int, ...]:  # noqa: ANN401
    return (value,) * n_dims if isinstance(value, int) else tuple(value) * (n_dims // len(value))


def _scattered(rows: Tensor, values: Tensor, like: Tensor) -> Tensor:
    return torch.zeros_like(like).index_copy_(0, rows, values.to(like.dtype))


def _is_wanted(ctx: Any, index: int) -> bool:  # noqa: ANN401
    # needs_input_grad tells what requires grad; which of that this backward pass was asked for, the engine.
    if not ctx.needs_input_grad[index]:
        return False
    source = ctx.next_functions[index][0]
    is_leaf = hasattr(source, "variable")  # of which the engine does not tell; mostly the bias
    return is_leaf or bool(torch._C._will_engine_execute_node(source))


class _RowLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, weight, rows)
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, rows = ctx.saved_tensors
        grad_x = grad @ weight if _is_wanted(ctx, 0) else None
        grad_bias = grad.flatten(0, -2).sum(0) if _is_wanted(ctx, 2) else None
        some = grad.flatten(0, -2).index_select(1, rows)
        grad_weight = _scattered(rows, some.mT @ x.flatten(0, -2), weight)
        return grad_x, grad_weight, grad_bias, None


class _RowConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Tensor,
        stride: tuple[int, ...],
        padding: tuple[int, ...],
        dilation: tuple[int, ...],
        groups: int,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, rows)
        ctx.options = (stride, padding, dilation)
        ctx.groups = groups
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        x, weight, rows = ctx.saved_tensors
        wants_x, wants_bias = _is_wanted(ctx, 0), _is_wanted(ctx, 2)
        grad_x = (
            _convolution_backward(ctx, grad, x, weight, ctx.groups, (True, False))[0] if wants_x else None
        )
        grad_bias = grad.sum([0, *range(2, grad.ndim)]) if wants_bias else None
        if ctx.groups == 1:
            pieces = grad.index_select(1, rows), x, weight.index_select(0, rows), 1
        elif weight.shape[1] == 1:  # depthwise: row o reads channel o // multiplier
            channels = rows // (weight.shape[0] // x.shape[1])
            pieces = (
                grad.index_select(1, rows),
                x.index_select(1, channels),
                weight.index_select(0, rows),
                len(rows),
            )
        else:
            grad_weight = _convolution_backward(ctx, grad, x, weight, ctx.groups, (False, True))[1]
            return grad_x, grad_weight, grad_bias, *[None] * 5
        some = _convolution_backward(ctx, *pieces, (False, True))[1]
        return grad_x, _scattered(rows, some, weight), grad_bias, *[None] * 5


def _convolution_backward(
    ctx: Any,  # noqa: ANN401
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    groups: int,
    wanted: tuple[bool, bool],
) -> tuple[Tensor, Tensor, Tensor]:
    stride, padding, dilation = ctx.options
    grads: tuple[Tensor, Tensor, Tensor] = torch.ops.aten.convolution_backward.default(
        grad, x, weight, None, stride, padding, dilation, False, [0] * len(stride), groups, [*wanted, False]
    )
    return grads
