"""Operators through which samples may influence each other without a trace in the autograd graph.

A sort over the batch, a running count, a decision taken on a value of the whole batch: what comes out is no
differentiable function, and whether it matters may change from batch to batch (an expert's capacity that is
exceeded, say). A model that runs one of these has all samples' losses compared with those on their own, in
every batch.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from unlearn_ext.fisher.engine.sample_losses import PerSampleLoss, Samples

Function: TypeAlias = Any  # an operator, or a function of torch's

# Along a dimension, the result at one place depends on other places.
_ALONG = {
    *("amax", "amin", "any", "all", "argmax", "argmin", "argsort", "bincount", "cummax", "cummin", "cumprod"),
    *("cumsum", "histc", "index_add", "index_copy", "index_put", "index_reduce", "kthvalue", "logcumsumexp"),
    *("masked_scatter", "max", "median", "min", "mode", "msort", "nanmedian", "quantile", "scatter"),
    *("scatter_add", "scatter_reduce", "sort", "topk", "unique_consecutive", "unique_dim", "_unique2"),
    *("aminmax", "nanquantile", "unique"),
}
# Values that Python sees.
_READS = {"__bool__", "__float__", "__index__", "__int__", "item", "numpy", "tolist", "__array__"}


def _is_own_check() -> bool:
    # Tasks look at labels to refuse what they cannot mean, and no loss depends on it.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name != __name__ and name.partition(".")[0] != "torch":
            return str(name).startswith("unlearn_ext.tasks")
        frame = frame.f_back
    return False


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, n: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n, self.may_couple = n, False

    def __torch_dispatch__(
        self,
        function: Function,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        name = function.overloadpacket.__name__.rstrip("_")
        if _is_own_check():
            pass
        elif name == "_local_scalar_dense":
            self.may_couple = True
        elif name in _ALONG or function.overloadpacket.__name__ in _ALONG:
            self.may_couple |= self._is_along_samples(function, args, kwargs or {})
        return function(*args, **(kwargs or {}))

    def _is_along_samples(self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        named = {argument.name: value for argument, value in zip(function._schema.arguments, args)}  # noqa: B905
        named |= kwargs
        tensor = named.get("self", args[0] if args else None)
        if not isinstance(tensor, Tensor) or tensor.ndim == 0 or tensor.numel() < 2:
            return False
        if tensor.shape[0] % self.n:
            # Samples, if there are any here, lie along another dimension.
            return any(size % self.n == 0 for size in tensor.shape)
        if "indices" in named:
            indices = named["indices"]
            return not indices or indices[0] is not None
        defaults = {a.name: a.default_value for a in function._schema.arguments if a.has_default_value()}
        dims = named.get("dim", defaults.get("dim"))
        if dims is None or (isinstance(dims, (tuple, list)) and not dims):
            return True
        every = [dims] if isinstance(dims, int) else list(dims)
        return any(dim % tensor.ndim == 0 for dim in every)


class _Functions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.may_couple = False

    def __torch_function__(
        self,
        function: Function,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if getattr(function, "__name__", "") in _READS and not _is_own_check():
            tensor = args[0] if args else None
            if isinstance(tensor, Tensor) and tensor.numel() and not isinstance(tensor, torch.nn.Parameter):
                self.may_couple = True
        return function(*args, **(kwargs or {}))


def may_couple(loss: PerSampleLoss, samples: Samples) -> bool:
    """Say whether samples might influence each other in a way that only some batches show.

    Args:
        loss: The model and its loss.
        samples: A batch.

    Returns:
        True if an operator ran through which they might, or if the model cannot be watched.
    """
    if loss.lockstep.most(samples.n) == 1:
        return False
    functions, operators = _Functions(), _Operators(samples.n)
    try:
        with functions, operators:
            loss.losses(samples.batch, samples.n)
    except Exception:  # a model that cannot run while it is watched
        return True
    return samples.n > 1 and (functions.may_couple or operators.may_couple)
