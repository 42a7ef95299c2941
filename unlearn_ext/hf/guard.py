"""Masks on any optimizer: what may not change is put back after every step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_ext import ops
from unlearn_ext._internal.dtensors import is_dtensor
from unlearn_ext._internal.names import parameters_by_name
from unlearn_ext.hf.naming import masks_by_parameter


class MaskGuard:
    """Holds the masked scalars of a model, and their state, where they are.

    Args:
        masks: What may change, by parameter name.
        who: Whose messages they are.
    """

    def __init__(self, masks: Mapping[str, Tensor], who: str = "mask_callback") -> None:
        self._masks, self._who = dict(masks), who
        self._frees: dict[nn.Parameter, Tensor] = {}
        self._foreign: set[nn.Parameter] = set()  # trained, but not of the model
        self._model: nn.Module = nn.Module()
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
        self._model = model
        found = masks_by_parameter(model, self._masks, self._who)
        parameters = parameters_by_name(model)
        frees = {
            parameters[name]: _packed(mask, parameters[name], name, self._who) for name, mask in found.items()
        }
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

        Raises:
            ValueError: If a parameter that has become trainable since has no mask.
        """
        # Whoever fine-tunes layer after layer unfreezes parameters on the way.
        trained = {p for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        if not trained <= self._frees.keys() | self._foreign:
            self.enter(self._model)
            self._foreign = trained - self._frees.keys()
            self.zero()
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

    @torch.no_grad()
    def zero(self) -> None:
        """Set the gradients of masked scalars to zero, wherever they come from."""
        for parameter in self._frees:
            self._zero(parameter)

    def _zero(self, parameter: Tensor) -> None:
        grad = parameter.grad
        if grad is not None and grad.layout == torch.strided:
            mask = self._frees[parameter]  # type: ignore[index]
            if grad.is_contiguous():
                ops.apply_mask_([grad], [mask])
            else:
                free = ops.unpack_mask(mask, list(grad.shape))
                grad.masked_fill_(~free, 0)


def _packed(mask: Tensor, parameter: Tensor, name: str, who: str) -> Tensor:
    if is_dtensor(parameter):
        raise NotImplementedError(
            f"{who}: parameters must not be sharded, got the DTensor {name}; ux.hf.masked_adamw and "
            "masked_sgd take sharded models"
        )
    packed = (parameter.numel() + 7) // 8
    what = f"{who}: masks[{name!r}] must be bool {list(parameter.shape)} or packed uint8 [{packed}]"
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
