"""Settings of PyTorch for the time of a pass: what a user's model needs for its graph to be readable."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from unlearn_ext.fisher.engine import checkpoints


@contextmanager
def prepared(model: nn.Module) -> Iterator[None]:
    """Run compiled models eagerly, recurrent ones with plain operators, and checkpoints in a readable way.

    Args:
        model: The model.

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        stack.enter_context(checkpoints.patched())
        if "torch._dynamo" in sys.modules:  # else nothing is compiled
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                _run_plainly(module, stack)
        yield


def _run_plainly(module: nn.RNNBase, stack: ExitStack) -> None:
    # The fused kernels are one opaque node to autograd, and that of cuDNN has no backward in eval mode.
    saved: list[tuple[bool, bool]] = []
    backends: Any = torch.backends

    def before(*_: object) -> None:
        saved.append((backends.cudnn.enabled, backends.mkldnn.enabled))
        backends.cudnn.enabled = backends.mkldnn.enabled = False

    def after(*_: object) -> None:
        if saved:
            backends.cudnn.enabled, backends.mkldnn.enabled = saved.pop()

    stack.callback(after)
    stack.callback(module.register_forward_pre_hook(before).remove)
    stack.callback(module.register_forward_hook(after, always_call=True).remove)
