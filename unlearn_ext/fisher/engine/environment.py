"""Settings of PyTorch for the time of a pass: what a user's model needs for its graph to be readable."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch
from torch import Tensor, nn

from unlearn_ext.fisher.engine import checkpoints


class _Shared:
    """A change of the process's state that is in force while anybody, in any thread, is inside.

    Args:
        change: Makes the change and takes it back.
    """

    def __init__(self, change: Callable[[], AbstractContextManager[None]]) -> None:
        self._change, self._lock = change, threading.RLock()
        self._count, self._stack = 0, ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if not self._count:
                self._stack.enter_context(self._change())
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._count -= 1
            if not self._count:
                self._stack.close()


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
    torch._C._set_cudnn_enabled(False)
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_cudnn_enabled(saved[0])
        torch._C._set_mkldnn_enabled(saved[1])


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
        stack.enter_context(_shared_readable)
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                _run_plainly(module, stack)
        yield


def _run_plainly(module: nn.RNNBase, stack: ExitStack) -> None:
    entered: list[int] = []

    def before(*_: object) -> None:
        _shared_plain.__enter__()
        entered.append(threading.get_ident())

    def after(*_: object) -> None:
        if entered:
            entered.pop()
            _shared_plain.__exit__()

    def rest() -> None:
        while entered:
            after()

    stack.callback(rest)
    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after, always_call=True).remove)


@contextmanager
def unwritten(model: nn.Module) -> Iterator[None]:
    """Put back what a forward pass writes into a model's parameters, and drop buffers that it registers.

    Args:
        model: The model.

    Yields:
        Nothing.

    Raises:
        RuntimeError: If the model wrote to a parameter that nothing announced it would write to.
    """
    # Embeddings with a largest norm shorten the rows that are looked up, in the table itself.
    tables: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if getattr(module, "max_norm", None) is not None and isinstance(weight, Tensor):
            tables[id(weight)] = weight, weight.detach().clone()
    versions = [
        (name, parameter, parameter._version)
        for name, parameter in model.named_parameters()
        if id(parameter) not in tables
    ]
    buffers = {module: set(module._buffers) for module in model.modules()}
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, value in tables.values():
                if not torch.equal(weight, value):
                    weight.copy_(value)
        for module, names in buffers.items():
            for name in set(module._buffers) - names:
                del module._buffers[name]
                module._non_persistent_buffers_set.discard(name)
    for name, parameter, version in versions:
        if not parameter.is_inference() and parameter._version != version:
            raise RuntimeError(
                f"fisher_diagonal: the forward pass must not write to parameters, got a model that writes to "
                f"{name}; the model is changed"
            )
