"""Masked optimizers as the Trainer of transformers takes them: a class, and what to call it with."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from unlearn_ext import ops
from unlearn_ext._internal.names import parameters_by_name
from unlearn_ext.hf.naming import masks_by_parameter
from unlearn_ext.optim import MaskedAdamW, MaskedSGD
from unlearn_ext.optim.clipping import clip_by, free_norm
from unlearn_ext.optim.constrained import ConstrainedOptimizer, Constraint, view_of

Groups: TypeAlias = Iterable[Tensor] | Iterable[dict[str, Any]]


def masked_adamw(
    model: nn.Module,
    *,
    lr: float,
    masks: Mapping[str, Tensor] | None = None,
    clip_free: float | None = 1.0,
    **options: Any,  # noqa: ANN401 - those of MaskedAdamW
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Make what ``Trainer(optimizer_cls_and_kwargs=...)`` takes, for AdamW under masks.

    The Trainer makes its own groups of parameters, with and without weight decay, and hands them over without
    names; these are found in ``model``. Masks hold by name from then on, also where accelerate puts other
    tensors in the place of the parameters.

    Gradients of scalars that may not change are set to zero as they arrive, so that the Trainer's
    ``max_grad_norm`` and ``grad_norm`` are about the free ones, also under DDP. Under FSDP2 they arrive
    behind the optimizer's back: set ``max_grad_norm=0`` there, and let ``clip_free`` clip.

    Args:
        model: The model that the Trainer is given.
        lr: Learning rate. The Trainer passes its own to its own optimizers only; a schedule scales this one.
        masks: What may change, by parameter name, bool or packed, for every trainable parameter; names from
            before the model was compiled, wrapped or given adapters will do. None: everything may change.
        clip_free: Largest norm of the gradient of all free scalars together; None for no bound.
        **options: ``betas``, ``eps``, ``maximize`` and ``capturable`` of ``optim.MaskedAdamW``. Weight decay
            is that of the ``TrainingArguments``.

    Returns:
        Class and keyword arguments.

    Raises:
        ValueError: If a setting is out of range or ``weight_decay`` is passed.

    Example:
        >>> from unlearn_ext import hf
        >>> model = nn.Linear(3, 2)
        >>> masks = {"weight": torch.eye(2, 3) > 0, "bias": torch.tensor([True, False])}
        >>> cls, kwargs = hf.masked_adamw(model, lr=1e-4, masks=masks)
        >>> optimizer = cls([{"params": [model.weight]}, {"params": [model.bias]}], **kwargs)
        >>> [group["param_names"] for group in optimizer.param_groups]
        [['weight'], ['bias']]
    """
    return _TrainerAdamW, _settings("masked_adamw", model, lr, masks, clip_free, options)


def masked_sgd(
    model: nn.Module,
    *,
    lr: float,
    masks: Mapping[str, Tensor] | None = None,
    clip_free: float | None = 1.0,
    **options: Any,  # noqa: ANN401 - those of MaskedSGD
) -> tuple[type[torch.optim.Optimizer], dict[str, Any]]:
    """Make what ``Trainer(optimizer_cls_and_kwargs=...)`` takes, for SGD under masks.

    Args:
        model: See ``masked_adamw``.
        lr: See ``masked_adamw``.
        masks: See ``masked_adamw``.
        clip_free: See ``masked_adamw``.
        **options: ``momentum``, ``dampening``, ``nesterov`` and ``maximize`` of ``optim.MaskedSGD``.

    Returns:
        Class and keyword arguments.

    Raises:
        ValueError: If a setting is out of range or ``weight_decay`` is passed.

    Example:
        >>> from unlearn_ext import hf
        >>> model = nn.Linear(3, 2)
        >>> cls, kwargs = hf.masked_sgd(model, lr=1e-2, momentum=0.9)
        >>> cls(model.parameters(), **kwargs).param_groups[0]["param_names"]
        ['weight', 'bias']
    """
    return _TrainerSGD, _settings("masked_sgd", model, lr, masks, clip_free, options)


def _settings(
    who: str,
    model: nn.Module,
    lr: float,
    masks: Mapping[str, Tensor] | None,
    clip_free: float | None,
    options: dict[str, Any],
) -> dict[str, Any]:
    if "weight_decay" in options:
        raise ValueError(
            f"{who}: weight_decay must be that of TrainingArguments, whose groups of parameters leave out "
            f"biases and norms, got {options['weight_decay']} here"
        )
    if clip_free is not None and not clip_free > 0:
        raise ValueError(f"{who}: clip_free must be positive or None, got {clip_free}")
    return {"lr": lr, "names_from": model, "masks": masks, "clip_free": clip_free, **options}


def _with_names(groups: Groups, model: nn.Module, who: str) -> list[dict[str, Any]]:
    names = {id(parameter): name for name, parameter in parameters_by_name(model).items()}
    entries = list(groups)
    given: list[dict[str, Any]] = [entry for entry in entries if isinstance(entry, dict)]
    if not given:
        given = [{"params": entries}]
    named = []
    for group in given:
        pairs = []
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                raise ValueError(
                    f"{who}: params must be parameters of the model that was given for their names, got one "
                    f"of shape {list(parameter.shape)} that is not; pass the model that is trained"
                )
            pairs.append((name, parameter))
        if pairs:  # torch takes an empty group, as the Trainer makes of adapters, for one without names
            named.append({**group, "params": pairs})
    return named


class _ForTrainer(ConstrainedOptimizer):
    """Names for parameters that come without, and clipping over the free scalars."""

    _masked_rows: Callable[[dict[str, Any]], Iterable[tuple[Tensor, Tensor, Constraint]]]

    def __init__(
        self,
        params: Groups,
        *,
        names_from: nn.Module,
        masks: Mapping[str, Tensor] | None = None,
        clip_free: float | None = None,
        **options: Any,  # noqa: ANN401 - those of the optimizer
    ) -> None:
        who = type(self).__name__.replace("_Trainer", "masked_").lower()
        named = _with_names(params, names_from, who)
        found = None if masks is None else masks_by_parameter(names_from, masks, who)
        self._clip_free = clip_free
        super().__init__(named, masks=found, **options)  # type: ignore[call-arg]
        if masks is not None:
            for group in self.param_groups:
                for parameter in group["params"]:
                    self._watch(parameter)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_clip_free": self._clip_free}

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Clip the gradients of the free scalars, and perform one update.

        Args:
            closure: Reevaluates the model and returns the loss.

        Returns:
            The closure's loss; None without a closure.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if self._clip_free is not None:
            with torch.no_grad():
                rows = [row for group in self.param_groups for row in self._masked_rows(group)]
                free = [(view_of(grad, mask.order), mask.tensor) for _, grad, mask in rows]
                clip_by([grad for grad, _ in free], free_norm(free), self._clip_free)
        super().step()
        return loss

    def _watch(self, parameter: Tensor) -> None:
        # The hook must not keep the optimizer, and with it the state of a finished run, alive.
        optimizer = weakref.ref(self)

        def zero_masked(parameter: Tensor) -> None:
            own = optimizer()
            if own is None:
                handle.remove()
                return
            mask, grad = own._arranged(parameter), parameter.grad
            if mask is not None and grad is not None and grad.layout == torch.strided:
                ops.apply_mask_([view_of(grad, mask.order)], [mask.tensor])

        handle = parameter.register_post_accumulate_grad_hook(zero_masked)  # type: ignore[no-untyped-call]


class _TrainerAdamW(_ForTrainer, MaskedAdamW):  # type: ignore[misc]
    pass


class _TrainerSGD(_ForTrainer, MaskedSGD):  # type: ignore[misc]
    pass
