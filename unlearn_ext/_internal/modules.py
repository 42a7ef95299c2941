"""What a user's model is: kinds of it that must be told apart, or refused."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


def is_hf_conv1d(module: nn.Module) -> bool:
    """Say whether a module is the transformers library's ``Conv1D``.

    Args:
        module: A module.

    Returns:
        True for that linear layer, whose weight is ``[inputs, outputs]``.
    """
    return kind_of(module) == "Conv1D" and hasattr(module, "nf")


def kind_of(module: nn.Module) -> str:
    """Return the name of a module's class.

    Args:
        module: A module.

    Returns:
        The name; of one that ``fully_shard`` was applied to that of the class it had before.
    """
    own, *bases = type(module).__mro__
    return bases[1].__name__ if bases[0].__name__ == "FSDPModule" else own.__name__


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled modules eagerly inside: compiled code calls no hooks, and function modes do not see it.

    Yields:
        Nothing.
    """
    if "torch._dynamo" not in sys.modules:  # then nothing is compiled
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def check_model(model: nn.Module, who: str, *, may_be_sharded: bool = False) -> None:
    """Refuse models whose parameters are not all here, or are kept equal to copies elsewhere.

    Args:
        model: The user's model.
        who: Whose message it is.
        may_be_sharded: Parameters may be DTensors.

    Raises:
        TypeError: If it is no module.
        NotImplementedError: If it or a part of it is wrapped in ``DistributedDataParallel``, ``DataParallel``
            or ``FullyShardedDataParallel``, or a parameter is a ``DTensor``, has not been made yet (lazy
            modules), is on the meta device, where it has no values, or is trainable in MKLDNN's layout.

    Example:
        >>> check_model(nn.DataParallel(nn.Linear(2, 2)), "ssd")
        Traceback (most recent call last):
        NotImplementedError: ssd: model must not be wrapped in DataParallel; pass what it wraps, model.module
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"{who}: model must be a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        _check_module(name, module, who)
    check_made(model, who)
    tensors = sys.modules.get("torch.distributed.tensor")
    for name, parameter in model.named_parameters():
        if not may_be_sharded and tensors is not None and isinstance(parameter, tensors.DTensor):
            raise NotImplementedError(
                f"{who}: model must not be sharded, got the DTensor {name}; call it on an unsharded model "
                "with the full state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                "full_state_dict=True), and load the result back"
            )
        if parameter.device.type == "meta":
            raise NotImplementedError(
                f"{who}: model must have its parameters in memory, got {name} on the meta device; load the "
                "weights, without offloading them to CPU or disk (device_map=None)"
            )
        if parameter.layout is torch._mkldnn and parameter.requires_grad:  # type: ignore[attr-defined]
            raise NotImplementedError(
                f"{who}: model must have no trainable parameter in MKLDNN's layout, for which torch computes "
                f"no gradients, got {name}; give it an nn.Parameter of its to_dense(), or freeze it"
            )


def check_made(model: nn.Module, who: str) -> None:
    """Refuse models of lazy modules that have not been called yet.

    Args:
        model: The user's model.
        who: Whose message it is.

    Raises:
        NotImplementedError: If a parameter has not been made.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise NotImplementedError(
                f"{who}: model must have made its parameters, got the lazy {name}; call the model once on a "
                "batch"
            )


def _check_module(name: str, module: nn.Module, who: str) -> None:
    what = f"its part {name}" if name else "model"
    kind = type(module).__name__
    if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        inner = f"model.{name}.module" if name else "model.module"
        is_many = not isinstance(module, nn.DataParallel)
        then = ", on one rank, and send the result to the others" if is_many else ""
        raise NotImplementedError(
            f"{who}: {what} must not be wrapped in {kind}; pass what it wraps, {inner}{then}"
        )
    _check_not_flattened(name, module, who)


def check_not_flattened(model: nn.Module, who: str) -> None:
    """Refuse models whose parameters ``FullyShardedDataParallel`` puts others in the place of.

    Args:
        model: The user's model.
        who: Whose message it is.

    Raises:
        NotImplementedError: If it or a part of it is wrapped so.
    """
    for name, module in model.named_modules():
        _check_not_flattened(name, module, who)


def _check_not_flattened(name: str, module: nn.Module, who: str) -> None:
    what = f"its part {name}" if name else "model"
    kind = type(module).__name__
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is not None and isinstance(module, fsdp.FullyShardedDataParallel):
        raise NotImplementedError(
            f"{who}: {what} must not be wrapped in {kind}; call it on an unsharded model with the full state "
            "dict (FullyShardedDataParallel.state_dict_type with FULL_STATE_DICT), and load the result back"
        )
