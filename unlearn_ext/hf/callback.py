"""A callback of the Trainer that puts masks on whatever optimizer there is."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_ext import ops
from unlearn_ext._internal.dtensors import is_dtensor
from unlearn_ext._internal.names import parameters_by_name
from unlearn_ext.hf.naming import masks_by_parameter


def mask_callback(masks: Mapping[str, Tensor]) -> Any:  # noqa: ANN401 - a class of an optional package
    """Make a ``TrainerCallback`` under which scalars that may not change keep their bits.

    For optimizers of any kind: torch's own, Adafactor, Muon, 8-bit ones. Gradients of masked scalars are set
    to zero as they arrive, so that the Trainer's ``max_grad_norm`` is about the free ones. Whatever the
    optimizer does to masked scalars all the same (weight decay, momentum from earlier) is taken back right
    after its step, bit by bit, and so is what it does to their state, where that has the parameter's shape.
    ``masked_adamw`` does the same without the copies that this takes: of the parameters and their state,
    during the step.

    Not for optimizers that step inside the backward pass (LOMO, layer-wise GaLore), nor under FSDP.

    Args:
        masks: What may change, by parameter name, bool or packed, for every trainable parameter; names from
            before the model was compiled, wrapped or given adapters will do.

    Returns:
        The callback, for ``Trainer(callbacks=[...])``. When training begins it raises ValueError for a mask
        that is missing or has another shape, TypeError for one that is neither bool nor uint8, and
        NotImplementedError for a sharded model.

    Raises:
        ImportError: If transformers is not installed.
    """
    return _callback_class()(masks)


@functools.cache
def _callback_class() -> Any:  # noqa: ANN401 - a class of an optional package
    from transformers import TrainerCallback

    class MaskCallback(TrainerCallback):  # type: ignore[misc]
        """See ``mask_callback``."""

        def __init__(self, masks: Mapping[str, Tensor]) -> None:
            self._guard = _Guard(masks)

        def on_train_begin(self, *_: object, **given: Any) -> None:  # noqa: ANN401 - what the Trainer has
            self._guard.enter(given["model"])

        def on_pre_optimizer_step(self, *_: object, **given: Any) -> None:  # noqa: ANN401
            self._guard.keep(given["optimizer"])

        def on_optimizer_step(self, *_: object, **given: Any) -> None:  # noqa: ANN401
            self._guard.put_back(given["optimizer"])

        def on_train_end(self, *_: object, **__: object) -> None:
            self._guard.leave()

    return MaskCallback


class _Guard:
    """Holds the masked scalars of a model, and their state, where they are.

    Args:
        masks: What may change, by parameter name.
    """

    def __init__(self, masks: Mapping[str, Tensor]) -> None:
        self._masks = dict(masks)
        self._frees: dict[nn.Parameter, Tensor] = {}
        self._handles: list[Any] = []
        self._kept: list[tuple[nn.Parameter, Tensor, dict[str, Tensor]]] = []

    def enter(self, model: nn.Module) -> None:
        """Look up the masks, and zero gradients from now on.

        Args:
            model: The model.

        Raises:
            ValueError: If a mask is missing or has another shape.
            TypeError: If a mask is neither bool nor uint8.
        """
        self.leave()
        found = masks_by_parameter(model, self._masks, "mask_callback")
        parameters = parameters_by_name(model)
        frees = {parameters[name]: _packed(mask, parameters[name], name) for name, mask in found.items()}
        self._frees = frees
        for parameter in frees:
            handle = parameter.register_post_accumulate_grad_hook(self._zero)  # type: ignore[no-untyped-call]
            self._handles.append(handle)

    def leave(self) -> None:
        """Let gradients be."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._kept.clear()

    @torch.no_grad()
    def keep(self, optimizer: Any) -> None:  # noqa: ANN401 - one of torch, or accelerate's wrapper of one
        """Copy what is to be held, before a step.

        Args:
            optimizer: The optimizer.
        """
        self._kept = [
            (parameter, parameter.detach().clone(), _state_like(optimizer, parameter, copy=True))
            for parameter in self._frees
        ]

    @torch.no_grad()
    def put_back(self, optimizer: Any) -> None:  # noqa: ANN401
        """Put it back, after the step.

        Args:
            optimizer: The optimizer.
        """
        for parameter, value, before in self._kept:
            free = ops.unpack_mask(self._frees[parameter], list(parameter.shape))
            parameter.copy_(torch.where(free, parameter, value))
            for key, held in _state_like(optimizer, parameter, copy=False).items():
                held.copy_(torch.where(free, held, before.get(key, torch.zeros_like(held))))
        self._kept = []

    def _zero(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is not None and grad.layout == torch.strided:
            mask = self._frees[parameter]  # type: ignore[index]
            if grad.is_contiguous():
                ops.apply_mask_([grad], [mask])
            else:
                free = ops.unpack_mask(mask, list(grad.shape))
                grad.masked_fill_(~free, 0)


def _packed(mask: Tensor, parameter: Tensor, name: str) -> Tensor:
    if is_dtensor(parameter):
        raise NotImplementedError(
            f"mask_callback: parameters must not be sharded, got the DTensor {name}; ux.hf.masked_adamw and "
            "masked_sgd take sharded models"
        )
    packed = (parameter.numel() + 7) // 8
    what = f"mask_callback: masks[{name!r}] must be bool {list(parameter.shape)} or packed uint8 [{packed}]"
    if mask.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"{what}, got {mask.dtype} {list(mask.shape)}")
    if mask.shape != (parameter.shape if mask.dtype == torch.bool else torch.Size([packed])):
        raise ValueError(f"{what}, got {mask.dtype} {list(mask.shape)}")
    mask = mask.to(parameter.device)
    return ops.pack_mask(mask) if mask.dtype == torch.bool else mask.clone()


def _state_like(optimizer: Any, parameter: Tensor, *, copy: bool) -> dict[str, Tensor]:  # noqa: ANN401
    # What an optimizer keeps scalar by scalar.
    return {
        key: value.clone() if copy else value
        for key, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, Tensor) and value.shape == parameter.shape and value.dim()
    }
