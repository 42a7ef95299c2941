"""Settings of PyTorch for the time of a pass: what a user's model needs for its graph to be readable."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from unlearn_ext._internal.borrow import Tables
from unlearn_ext._internal.undo import Undone, handles
from unlearn_ext.fisher.engine import checkpoints


class _Shared:
    """A change of the process's state that is in force while anybody, in any thread, is inside.

    Args:
        change: Makes the change and takes it back.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[None]]) -> None:
        self._change, self._lock = change, threading.RLock()
        self._inside: set[object] = set()
        self._is_made, self._stack = False, ExitStack()

    def enter(self, who: object) -> None:
        """Come in.

        Args:
            who: To leave by.
        """
        with self._lock:
            self._inside.add(who)
            if not self._is_made:
                self._stack.enter_context(self._change())
                self._is_made = True

    def leave(self, who: object) -> None:
        """Go; who is not inside, and who has been interrupted while going, may do so again.

        Args:
            who: As for ``enter``.
        """
        with self._lock:
            if self._inside <= {who}:
                self._is_made = False
                self._stack.close()
            self._inside.discard(who)

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Be inside.

        Yields:
            Nothing.
        """
        who = object()
        with Undone(lambda: self.leave(who)):
            self.enter(who)
            yield


@contextmanager
def _readable() -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(checkpoints.patched())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield


@contextmanager
def _plain_operators() -> Iterator[None]:
    # The fused kernels are one opaque node to autograd, and that of cuDNN has no backward in eval mode. The
    # setters below the public flags, which a program may have frozen.
    saved = torch._C._get_cudnn_enabled(), torch._C._get_mkldnn_enabled()

    def put_back() -> None:
        torch._C._set_cudnn_enabled(saved[0])
        torch._C._set_mkldnn_enabled(saved[1])

    with Undone(put_back):
        torch._C._set_cudnn_enabled(False)
        torch._C._set_mkldnn_enabled(False)
        yield


_shared_readable, _shared_plain = _Shared(_readable), _Shared(_plain_operators)


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Run compiled models eagerly, recurrent ones with plain operators, and checkpoints in a readable way.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(_shared_readable.inside())
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                _run_plainly(module, stack)
        yield


def _run_plainly(module: nn.RNNBase, stack: ExitStack) -> None:
    entered: list[object] = []

    def before(*_: object) -> None:
        entered.append(object())
        _shared_plain.enter(entered[-1])

    def after(*_: object) -> None:
        if entered:
            _shared_plain.leave(entered[-1])
            entered.pop()

    def rest() -> None:
        while entered:
            after()

    stack.enter_context(Undone(rest))
    hooks = stack.enter_context(handles())
    hooks.append(module.register_forward_pre_hook(before))
    hooks.append(module.register_forward_hook(after, always_call=True))


class ParameterGuard(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices what is written to a model's parameters, and keeps what was there.

    Without copies of all parameters, and by storage: writing to ``weight.data`` leaves no other trace.

    Args:
        model: The model.
        announced: Ids of the parameters that may be written to.
    """

    def __init__(self, model: nn.Module, announced: Collection[int] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        # Parameters may also be given other memory.
        self._memory = [
            (name, parameter, parameter.detach(), parameter._version)
            for name, parameter in model.named_parameters()
            if id(parameter) not in announced and not parameter.is_inference()
        ]
        self._before: dict[int, tuple[Tensor, Tensor]] = {}

    @functools.cached_property
    def _own(self) -> dict[int, list[Tensor]]:
        # Made where something is written to, by the memory that the parameters had.
        own: dict[int, list[Tensor]] = {}
        for _, parameter, memory, _ in self._memory:
            if memory.device.type != "meta" and memory.layout is torch.strided:
                own.setdefault(_storage_of(memory), []).append(parameter)
        return own

    def __torch_dispatch__(
        self,
        function: Any,  # noqa: ANN401 - an operator
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> object:
        if function._schema.is_mutable:
            arguments = function._schema.arguments
            given = [*zip(arguments, args, strict=False)]
            given += [(a, kwargs[a.name]) for a in arguments if kwargs and a.name in kwargs]
            for argument, value in given:
                is_written = argument.alias_info is not None and argument.alias_info.is_write
                if is_written and isinstance(value, Tensor) and value.layout is torch.strided:
                    self._keep(_storage_of(value))
        return function(*args, **(kwargs or {}))

    def _keep(self, storage: int) -> None:
        for parameter in self._own.get(storage, ()):
            if id(parameter) not in self._before:
                self._before[id(parameter)] = parameter, parameter.detach().clone()

    def put_back(self) -> str | None:
        """Give the parameters the values they had.

        Returns:
            The name of one that was written to, if any.
        """
        written = None
        with torch.no_grad():
            for name, parameter, memory, version in self._memory:
                kept = self._before.get(id(parameter))
                is_written = kept is not None or parameter._version != version
                has_memory = memory.layout is torch.strided  # a sparse tensor has that of its parts
                if has_memory and (
                    parameter.data_ptr() != memory.data_ptr() or parameter.dtype != memory.dtype
                ):
                    # A router that is converted to float32 in every pass, say, keeps its values.
                    is_written |= not torch.equal(memory.to(parameter.dtype), parameter)
                    parameter.data = memory
                if kept is not None:
                    parameter.copy_(kept[1])
                written = written or (name if is_written else None)
        return written


def _storage_of(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def unwritten(model: nn.Module) -> Iterator[ParameterGuard]:
    """Put back what a forward pass writes into a model's parameters, and drop buffers that it registers.

    Args:
        model: The model.

    Yields:
        What has to be entered around a forward pass for the values before it to be known.

    Raises:
        RuntimeError: If the model wrote to a parameter that nothing announced it would write to.
    """
    # Embeddings with a largest norm shorten the rows that are looked up, in the table itself.
    tables = Tables(model)
    guard = ParameterGuard(model, tables.ids)
    buffers = {module: set(module._buffers.keys()) for module in model.modules()}
    written: list[str] = []

    def put_back() -> None:
        tables.put_back()
        written.extend(filter(None, [guard.put_back()]))
        for module, names in buffers.items():
            for name in set(module._buffers.keys()) - names:
                module._non_persistent_buffers_set.discard(name)
                del module._buffers[name]

    with Undone(put_back):
        yield guard
    if written:
        raise RuntimeError(
            f"fisher_diagonal: the forward pass must not write to parameters, got a model that writes to "
            f"{written[0]}; take that out of its forward method"
        )
