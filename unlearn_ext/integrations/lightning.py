"""For modules of Lightning: masks in the Trainer, and the loss of ``training_step`` for every method.

A ``LightningModule`` is an ``nn.Module``: whatever of the package calls ``model(inputs)`` takes it as it is.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unlearn_ext import ops
from unlearn_ext._internal.digests import update_digest
from unlearn_ext._internal.names import with_plain_names
from unlearn_ext._internal.undo import Undone
from unlearn_ext.hf.guard import MaskGuard
from unlearn_ext.tasks import Task

# Strategies that put other tensors, or flat ones, in the place of the parameters.
_SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "XLAFSDPStrategy")


def mask_callback(masks: Mapping[str, Tensor], *, module: str = "") -> Any:  # noqa: ANN401 - of an optional package
    """Make a ``Callback`` under which scalars that may not change keep their bits.

    For whatever ``configure_optimizers`` returns, one optimizer or several, in automatic and in manual
    optimization: gradients of masked scalars are set to zero before they are clipped, so that
    ``gradient_clip_val`` is about the free ones, and whatever a step does to masked scalars all the same
    (weight decay, momentum from earlier) is taken back right after it, bit by bit. So is what it does to
    their state, where that has the parameter's shape. A step takes copies of parameters and that state.

    Masks are not part of a checkpoint: give the same ones when a run is resumed. Others are refused.

    Args:
        masks: What may change, by parameter name, bool or packed, for every trainable parameter. Names are
            those of the ``LightningModule``, from before it was compiled or wrapped.
        module: Name of the submodule that the names of ``masks`` are about, such as ``"net"`` for masks
            that were made for ``lightning_module.net``.

    Returns:
        The callback, for ``Trainer(callbacks=[...])``. When training begins it raises ValueError for a mask
        that is missing or has another shape, or differs from those of the checkpoint; TypeError for one that
        is neither bool nor uint8; NotImplementedError for strategies that shard parameters, and beside
        callbacks that average weights. A parameter that is unfrozen on the way must have a mask then.

    Raises:
        ImportError: If neither lightning nor pytorch_lightning is installed.
    """
    prefix = f"{module}." if module else ""
    return _callback_class()({f"{prefix}{name}": mask for name, mask in masks.items()})


@functools.cache
def _callback_class() -> Any:  # noqa: ANN401 - a class of an optional package
    try:
        from lightning.pytorch import Callback
    except ImportError:
        from pytorch_lightning import Callback

    class MaskCallback(Callback):  # type: ignore[misc]
        """See ``mask_callback``."""

        def __init__(self, masks: Mapping[str, Tensor]) -> None:
            self._masks = dict(masks)
            self._guard = MaskGuard(self._masks, "mask_callback")
            self._handles: list[Any] = []

        def on_fit_start(self, trainer: Any, pl_module: nn.Module) -> None:  # noqa: ANN401
            _refuse_sharding(trainer)
            _refuse_averaging(trainer)
            self._guard.enter(pl_module)

        def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:  # noqa: ANN401
            # The step is where it is, whatever calls it: a loop, a loss scaler, a user's training_step.
            for optimizer in trainer.optimizers:
                before = optimizer.register_step_pre_hook(lambda own, *_: self._guard.keep(own))
                after = optimizer.register_step_post_hook(lambda own, *_: self._guard.put_back(own))
                self._handles += [before, after]

        def on_before_optimizer_step(self, *_: object) -> None:
            self._guard.zero()  # those that came over other processes

        def on_train_end(self, *_: object) -> None:
            self._leave()

        def on_exception(self, *_: object) -> None:
            self._leave()

        def _leave(self) -> None:
            self._guard.leave()
            for handle in self._handles:
                handle.remove()
            self._handles.clear()

        def state_dict(self) -> dict[str, Any]:
            return {"masks": _digest(self._masks)}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            found = _digest(self._masks)
            if state_dict["masks"] != found:
                raise ValueError(
                    f"mask_callback: masks must be those of the run that is resumed, with the digest "
                    f"{state_dict['masks'][:12]}..., got {found[:12]}...: pass the same masks, or load the "
                    "weights alone and begin a run of its own"
                )

    return MaskCallback


def _digest(masks: Mapping[str, Tensor]) -> str:
    # The same for bool and for packed masks.
    digest = hashlib.sha256()
    for name, mask in sorted(with_plain_names(masks).items()):
        digest.update(f"{name}\0".encode())
        update_digest(digest, ops.pack_mask(mask) if mask.dtype == torch.bool else mask)
    return digest.hexdigest()


def _refuse_sharding(trainer: Any) -> None:  # noqa: ANN401 - of an optional package
    kinds = [kind.__name__ for kind in type(trainer.strategy).__mro__]
    if found := [kind for kind in _SHARDING if kind in kinds]:
        raise NotImplementedError(
            f"mask_callback: the strategy must leave parameters whole, got {found[0]}; return "
            "ux.optim.MaskedAdamW or MaskedSGD from configure_optimizers, which take sharded parameters "
            "(ModelParallelStrategy), or train with ddp"
        )


def _refuse_averaging(trainer: Any) -> None:  # noqa: ANN401 - of an optional package
    for callback in trainer.callbacks:
        if "WeightAveraging" in {kind.__name__ for kind in type(callback).__mro__}:
            raise NotImplementedError(
                "mask_callback: weights must not be averaged by a callback, since a mean of equal numbers is "
                f"rounded, got {type(callback).__name__}; leave it out, or take StochasticWeightAveraging"
            )


def training_step_task(task: Task | None = None) -> Task:
    """Make a task whose loss is that of the module's own ``training_step``.

    ``training_step`` returns one number for a batch, and methods need one per sample: it is called with every
    sample by itself, so that a batch costs as many forward passes as it has samples. Where it is a usual loss
    of ``self(inputs)``, the usual task says the same and is several times faster. What it logs meanwhile is
    dropped; metrics that it updates are updated.

    Args:
        task: What the module is for, for all that is not the loss: accuracies, log-odds, other labels, and
            how samples are taken from batches. None: ``training_step`` alone; then methods and metrics that
            need more refuse, as do goals (``until=``).

    Returns:
        The task. Its loss raises TypeError for a model without ``training_step``, and ValueError for one that
        optimizes manually, returns no loss, or has batch statistics in train mode, since those of a single
        sample are not those of its batch.
    """
    if task is None:
        return _TrainingStep()
    return task.with_loss(_StepLoss(task))


class _TrainingStep(Task):
    """What ``training_step`` says, and nothing else."""

    def forward(self, model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401 - the user's own
        """Call ``training_step``.

        Args:
            model: The module.
            batch: The batch.

        Returns:
            ``[N]``, the losses.
        """
        return _losses(self, model, batch)

    def losses(self, outputs: Tensor, batch: Any) -> Tensor:  # noqa: ANN401 - the user's own
        """Return them.

        Args:
            outputs: The losses.
            batch: The batch.

        Returns:
            ``[N]``.
        """
        return outputs


class _StepLoss:
    """The loss of ``training_step`` for a task that has everything else."""

    def __init__(self, task: Task) -> None:
        self._task = task

    def __repr__(self) -> str:
        return "training_step"

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401 - the user's own
        return _losses(self._task, model, batch)


def _losses(task: Task, model: nn.Module, batch: Any) -> Tensor:  # noqa: ANN401 - the user's own
    step = _step_of(model)
    with _silent(model):
        singles = [task.select(batch, [sample]) for sample in range(task.count(batch))]
        return torch.stack([_as_loss(step(single)) for single in singles])


def _step_of(model: nn.Module) -> Callable[[Any], Any]:
    step = getattr(model, "training_step", None)
    if not callable(step):
        raise TypeError(
            "training_step_task: model must be a LightningModule with training_step, got "
            f"{type(model).__name__}"
        )
    if not getattr(model, "automatic_optimization", True):
        raise ValueError(
            "training_step_task: model must optimize automatically, got automatic_optimization=False: its "
            "training_step would make steps of its own; pass loss_fn(model, batch) -> Tensor[N] instead"
        )
    if any(isinstance(part, _BatchNorm) and part.training for part in model.modules()):
        raise ValueError(
            "training_step_task: batch normalisation must be in eval mode, where samples do not depend on "
            "their batch, got train mode; take a method that keeps it so (ssd, newton, gradient_masking), or "
            "pass loss_fn(model, batch) -> Tensor[N]"
        )
    further = {"batch_idx": 0, "dataloader_idx": 0}
    taken = inspect.signature(step).parameters
    return functools.partial(step, **{name: value for name, value in further.items() if name in taken})


def _as_loss(found: Any) -> Tensor:  # noqa: ANN401 - what the user returns
    loss = found.get("loss") if isinstance(found, Mapping) else found
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        got = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(found).__name__
        raise ValueError(f"training_step_task: training_step must return one loss, got {got}")
    return loss.reshape(())


@contextmanager
def _silent(model: nn.Module) -> Iterator[None]:
    # Outside of the Trainer's loop there is nothing that a log could be added to.
    names = ("log", "log_dict")
    before = {name: vars(model).get(name) for name in names}

    def put_back() -> None:
        for name, own in before.items():
            if own is not None:
                object.__setattr__(model, name, own)
            elif name in vars(model):
                object.__delattr__(model, name)

    with Undone(put_back):
        for name in names:
            object.__setattr__(model, name, lambda *_, **__: None)
        yield
