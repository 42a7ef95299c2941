"""Whether samples may influence each other: a forward pass is watched, operator by operator.

A sort over the batch, a running count, a decision taken on a value of the whole batch: whether it matters may
change from batch to batch (an expert's capacity that is exceeded, say), and what comes out may be no
differentiable function, so that the autograd graph shows nothing. The watched pass follows the axis of the
samples through every operator. A model with one that may mix them, or with decisions in Python that depend on
data (but for those of transformers that are known to change nothing), has all samples' losses compared with
those on their own, in every batch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from unlearn_ext.fisher.engine.axis_rules import FACTORIES, rule_for
from unlearn_ext.fisher.engine.sample_axis import MixedError, Operation, SampleAxis
from unlearn_ext.fisher.engine.sample_losses import PerSampleLoss, Samples
from unlearn_ext.tasks.batches import Batch, is_per_sample, tensors_in

Function: TypeAlias = Any  # an operator, or a function of torch's

# Values that Python sees.
_READS = {"__bool__", "__float__", "__index__", "__int__", "item", "numpy", "tolist", "__array__"}
_READS |= {"__dlpack__", "untyped_storage", "data_ptr"}


# Functions of transformers that ask whether a mask hides anything in the batch, and leave it out if not: with
# or without it every sample is computed alike.
_MASK_MODULES = {"transformers.masking_utils", "transformers.modeling_attn_mask_utils"}
_MASK_QUESTIONS = {"_ignore_causal_mask_sdpa", "_ignore_bidirectional_mask_sdpa"}


def _does_not_matter() -> bool:
    # Tasks look at labels to refuse what they cannot mean, and no loss depends on it; nor on such questions.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name in _MASK_MODULES:
            if frame.f_code.co_name in _MASK_QUESTIONS:
                return True
        elif name.partition(".")[0] != "torch" and not name.startswith("unlearn_ext.fisher."):
            return name.startswith("unlearn_ext.tasks")
        frame = frame.f_back
    return False


class _Axes:
    """Where the samples are in the tensors of a pass.

    Args:
        n: Number of samples.
    """

    def __init__(self, n: int) -> None:
        self.n, self.is_mixed = n, False
        self._known: Any = WeakTensorKeyDictionary()
        # A weak reference keeps the memory's name from being given to other memory.
        self._memory: dict[int, StorageWeakRef] = {}

    def set(self, tensor: Tensor, at: SampleAxis) -> None:
        """Note where the samples are; other tensors on the same memory depend on them as well."""
        self._known[tensor] = at
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._memory:
                self._memory[storage._cdata] = StorageWeakRef(storage)  # type: ignore[no-untyped-call]

    def get(self, tensor: Tensor) -> SampleAxis | None:
        at: SampleAxis | None = self._known.get(tensor)
        if at is not None or tensor.layout is not torch.strided:
            return at
        if tensor.untyped_storage()._cdata not in self._memory or not tensor.numel():
            return None
        # Seen through another tensor, or written to in parts.
        sizes = [axis for axis, size in enumerate(tensor.shape) if size == self.n]
        if len(sizes) != 1:
            raise MixedError("memory that is used in several ways")
        return SampleAxis(sizes[0])


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self, axes: _Axes) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._axes = axes
        self.is_suspended = False

    def __torch_dispatch__(
        self,
        function: Function,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if self._axes.is_mixed or self.is_suspended:
            return function(*args, **(kwargs or {}))
        before = args
        if function.overloadpacket.__name__.endswith("_") and args and isinstance(args[0], Tensor):
            # What is written over is looked at as it was.
            before = (args[0].clone(), *args[1:]) if self._is_to_be_written(args) else args
        result = function(*args, **(kwargs or {}))
        if not self._axes.is_mixed and not self.is_suspended:
            try:
                self._follow(function, before, kwargs or {}, result)
            except Exception:  # also what a rule did not expect
                self._axes.is_mixed = not _does_not_matter()
        return result

    def _is_to_be_written(self, args: tuple[Any, ...]) -> bool:
        try:
            return self._axes.get(args[0]) is None
        except MixedError:
            return False

    def _follow(
        self, function: Function, args: tuple[Any, ...], kwargs: dict[str, Any], result: object
    ) -> None:
        axes: dict[int, SampleAxis] = {}
        for value in (*args, *kwargs.values()):
            for entry in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(entry, Tensor):
                    at = self._axes.get(entry)
                    if at is not None:
                        axes[id(entry)] = at
        if not axes:
            return
        packet = function.overloadpacket.__name__
        name = packet[:-1] if packet.endswith("_") and not packet.endswith("__") else packet
        if name.startswith(FACTORIES) or name.endswith("_like"):
            return
        rule = rule_for(name, function.tags)
        if rule is None or function.namespace not in ("aten", "prims") or "out" in kwargs:
            raise MixedError(name)
        named = {a.name: a.default_value for a in function._schema.arguments if a.has_default_value()}
        named = dict(zip((a.name for a in function._schema.arguments), args, strict=False)) | {
            key: value
            for key, value in (named | kwargs).items()
            if key not in {a.name for a in function._schema.arguments[: len(args)]}
        }
        found = rule(Operation(name, named, result, self._axes.n, axes))
        results: list[Any] = list(result) if isinstance(result, (tuple, list)) else [result]
        for tensor, at in zip(results, found if isinstance(found, list) else [found], strict=True):
            if at is None or not isinstance(tensor, Tensor):
                continue
            self._axes.set(tensor, at)


def _one_hot(axes: _Axes, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    tensor = args[0] if args else kwargs["tensor"]
    number = args[1] if len(args) > 1 else kwargs.get("num_classes", -1)
    at = axes.get(tensor)
    if at is not None:
        axes.is_mixed |= number == -1
        axes.set(result, at)


def _embedding_bag(axes: _Axes, args: tuple[Any, ...], kwargs: dict[str, Any], result: Tensor) -> None:
    indices = args[0] if args else kwargs["input"]
    every = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    at = axes.get(indices)
    if any(axes.get(value) is not None for value in every):
        if indices.ndim != 2 or at is None or at.axis or kwargs.get("scale_grad_by_freq"):
            axes.is_mixed = True
        else:
            axes.set(result, at)


# Functions that look at their arguments' values to refuse wrong ones.
_WHOLE: dict[str, Callable[[_Axes, tuple[Any, ...], dict[str, Any], Tensor], None]] = {
    "one_hot": _one_hot,
    "embedding_bag": _embedding_bag,
}


class _Functions(TorchFunctionMode):
    def __init__(self, axes: _Axes, operators: _Operators) -> None:
        super().__init__()
        self._axes, self._operators = axes, operators

    def __torch_function__(
        self,
        function: Function,
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        name = getattr(function, "__name__", "")
        if name in _READS and args and isinstance(args[0], Tensor) and not self._axes.is_mixed:
            try:
                is_read = self._axes.get(args[0]) is not None
            except MixedError:
                is_read = True
            self._axes.is_mixed |= is_read and args[0].numel() > 0 and not _does_not_matter()
        whole = _WHOLE.get(name)
        if whole is None or self._operators.is_suspended:
            return function(*args, **(kwargs or {}))
        self._operators.is_suspended = True
        try:
            result = function(*args, **(kwargs or {}))
        finally:
            self._operators.is_suspended = False
        whole(self._axes, args, kwargs or {}, result)
        return result


class Watch:
    """Watches a forward pass, for what may let samples influence each other.

    Args:
        batch: The batch that the pass is over.
        n: Its number of samples.
        is_leading: They lie along a leading dimension. If not, nobody knows which tensors hold samples.

    Attributes:
        is_mixed: They might influence each other; also set where a pass cannot be watched.
    """

    def __init__(self, batch: Batch, n: int, *, is_leading: bool = True) -> None:
        self.is_mixed = not is_leading
        self._axes = _Axes(n)
        self._stack = ExitStack()
        for tensor in tensors_in(batch):
            if is_per_sample(tensor, n):
                self._axes.set(tensor, SampleAxis(0))

    def __enter__(self) -> Watch:
        if not self.is_mixed and self._axes.n > 1:
            operators = _Operators(self._axes)
            self._stack.enter_context(_Functions(self._axes, operators))
            self._stack.enter_context(operators)
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self.is_mixed |= self._axes.is_mixed


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
    watch = Watch(samples.batch, samples.n, is_leading=samples.is_leading)
    try:
        with watch:
            loss.losses(samples.batch, samples.n)
    except Exception:
        return True
    return samples.n > 1 and watch.is_mixed
