"""Borrowing a user's model: whatever a pass or a training run changes about it is put back."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from unlearn_ext._internal.seeding import random_states_kept
from unlearn_ext._internal.undo import Undone


@contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Let anything be done with a model and, on the way out, restore all that is not a tensor's value.

    Restored, also after an exception or an interrupt: the training flag of every module, ``requires_grad``
    and ``.grad`` of every parameter (the same tensor with the same content), and the global random states of
    torch (CPU and the model's CUDA devices), NumPy and Python. Inside, gradients are None and autograd
    works even where the caller has turned it off.

    Args:
        model: The user's model.

    Yields:
        Nothing.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> with restored(model):
        ...     model.eval()(torch.ones(1, 2)).sum().backward()
        >>> model.training, model.weight.grad
        (True, None)
    """
    training = {module: module.training for module in model.modules()}
    parameters = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    devices = {p.device.index for p, _, _ in parameters if p.device.type == "cuda"}

    def put_back() -> None:
        # train() first, for modules that do more in it than set the flag (merging adapters, say).
        with suppress(NotImplementedError):  # of an exported module, which has said so before
            model.train(training[model])
        for module, flag in training.items():
            if module.training != flag:
                module.training = flag
        for parameter, requires_grad, grad in parameters:
            if parameter.requires_grad != requires_grad:
                parameter.requires_grad_(requires_grad)
            parameter.grad = grad

    with (
        random_states_kept(devices=devices),
        torch.inference_mode(False),
        torch.enable_grad(),
        Undone(put_back),
    ):
        for parameter, _, _ in parameters:
            parameter.grad = None
        yield


class Buffers:
    """A model's buffers as they are now.

    Args:
        model: The user's model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known = [
            (module, name, buffer, None if buffer is None else buffer.detach().clone())
            for module in model.modules()
            for name, buffer in module._buffers.items()
        ]

    def put_back(self) -> None:
        """Give every buffer its identity and value again; one that has its value is not written."""
        with torch.no_grad():
            for module, name, buffer, value in self._known:
                module._buffers[name] = buffer
                if buffer is not None and value is not None and not _same_values(buffer, value):
                    buffer.copy_(value)

    def differ(self) -> bool:
        """Say whether one has another value, or is another tensor, than when this was made.

        Returns:
            True if so.
        """
        return any(
            module._buffers.get(name) is not buffer
            or (buffer is not None and value is not None and not _same_values(buffer, value))
            for module, name, buffer, value in self._known
        )

    def finite_no_more(self) -> list[str]:
        """Say which running statistics hold NaN or infinity where they held numbers.

        Returns:
            Their names within their modules, with the kind of module. Other buffers may: masks, say.
        """
        return [
            f"{name} of {type(module).__name__}"
            for module, name, buffer, value in self._known
            if isinstance(module, _NormBase)
            and buffer is not None
            and value is not None
            and bool((torch.isfinite(value) & ~torch.isfinite(buffer)).any())
        ]


class Tables:
    """The weights of embeddings with a largest norm, as they are now: looking rows up writes to them.

    Args:
        model: The user's model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known: list[tuple[nn.Parameter, torch.Tensor]] = []
        for module in model.modules():
            # Most modules have no such attribute, and nn.Module takes its time to say so.
            if "max_norm" not in vars(module) and not hasattr(type(module), "max_norm"):
                continue
            weight = module._parameters.get("weight")
            if module.max_norm is not None and weight is not None and not hasattr(weight, "placements"):
                self._known.append((weight, weight.detach().clone()))

    @property
    def ids(self) -> set[int]:
        """``id`` of each of the weights."""
        return {id(weight) for weight, _ in self._known}

    def put_back(self, changing: Collection[int] = ()) -> None:
        """Give every table its values again; one that has them is not written.

        Args:
            changing: ``id`` of those that are to stay as they are.
        """
        with torch.no_grad():
            for weight, value in self._known:
                if id(weight) not in changing and not torch.equal(weight, value):
                    weight.copy_(value)


@contextmanager
def borrowed(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode and, on the way out, restore everything but its parameters' values.

    Restored, also after an exception or an interrupt: what ``restored`` restores, identity and values of
    every buffer, and tables that their look-up shortens rows of (``max_norm``). Inside, gradients are None
    and autograd works even where the caller has turned it off.

    Args:
        model: The user's model.

    Yields:
        Nothing; the model is ready for a pass.

    Raises:
        TypeError: If it has no eval mode, as an exported one.

    Example:
        >>> model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout())
        >>> with borrowed(model):
        ...     model.training
        False
        >>> model.training
        True
    """
    with Undone(Tables(model).put_back), Undone(Buffers(model).put_back), restored(model):
        try:
            model.eval()
        except NotImplementedError as error:
            raise TypeError(
                f"model must have a train and an eval mode, got {type(model).__name__} ({error}); pass the "
                "module that torch.export was given"
            ) from error
        yield


def _same_values(a: torch.Tensor, b: torch.Tensor) -> bool:
    # NaN counts as equal to NaN: an unchanged buffer must not be written.
    if a.layout is not torch.strided:  # for which PyTorch has no comparison
        a, b = a.to_dense(), b.to_dense()
    return torch.equal(a, b) or bool(((a == b) | ((a != a) & (b != b))).all())
