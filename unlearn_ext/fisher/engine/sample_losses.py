"""The losses of a batch and of some of its samples, and plain autograd on them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TypeAlias

import torch
from torch import Tensor, nn

from unlearn_ext import ops
from unlearn_ext.fisher.engine.layout import MismatchError
from unlearn_ext.fisher.engine.lockstep import Lockstep
from unlearn_ext.tasks.batches import Batch, device_of, is_per_sample, map_tensors, tensors_in
from unlearn_ext.tasks.fields import described
from unlearn_ext.tasks.losses import LossFn

Select: TypeAlias = Callable[[Batch, Sequence[int]], Batch]


class NotPerSampleError(ValueError):
    """A loss is not one value per sample."""


class PerSampleLoss:
    """A model and its loss, which is one value per sample.

    Args:
        model: The model, borrowed for a pass.
        loss_fn: ``loss_fn(model, batch) -> Tensor[n]``.
        lockstep: Decides together with other ranks, if there are any.

    Attributes:
        surroundings: What forward passes run inside; None for nothing.
    """

    def __init__(self, model: nn.Module, loss_fn: LossFn, lockstep: Lockstep | None = None) -> None:
        self.model, self.loss_fn = model, loss_fn
        self.lockstep = Lockstep() if lockstep is None else lockstep
        self._is_first = True
        self.surroundings: AbstractContextManager[object] | None = None
        self.device = device_of(model)
        if self.device.type == "meta":
            raise NotImplementedError(
                "fisher_diagonal: the model must hold its parameters, got some on the meta device (offloaded "
                "or not loaded yet); load the whole model onto one device"
            )
        halves = (torch.float16, torch.bfloat16)
        self.is_half = torch.is_autocast_enabled(self.device.type) or any(
            parameter.dtype in halves for parameter in model.parameters()
        )

    def losses(self, batch: Batch, n: int, *, is_whole: bool = False) -> Tensor:
        """Compute the losses.

        Args:
            batch: A batch on the model's device.
            n: Its number of samples.
            is_whole: It is a batch as the user gave it, and not some samples of one.

        Returns:
            ``[n]``, with their graph.

        Raises:
            NotPerSampleError: If the loss is not one value per sample.
            ValueError: If that of the first whole batch does not depend on the parameters.
            RuntimeError: If losses depend on the parameters on some ranks only, or cannot be computed on
                another one.
        """
        # Weights that autocast has cast for an earlier pass belong to a graph that is used up.
        torch.clear_autocast_cache()

        def computed() -> Tensor:
            with self.surroundings or nullcontext(), one_alone_explained():
                values = self.loss_fn(self.model, batch)
            if not isinstance(values, Tensor) or values.shape != (n,):
                got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise NotPerSampleError(f"loss_fn must return one loss per sample, a tensor [{n}], got {got}")
            return values

        values = self.lockstep.losses(self.model, computed)
        if is_whole:
            if self._is_first and not values.requires_grad:
                raise ValueError("loss_fn must return losses that depend on the parameters, got a constant")
            self._is_first = False
        return values


@contextmanager
def taken_apart(batch: Batch, n: int) -> Iterator[None]:
    """Say what was taken apart, where the model does not take a sample on its own that it took in its batch.

    Args:
        batch: The batch.
        n: Its number of samples.

    Yields:
        Nothing.

    Raises:
        ValueError: In the place of torch's error, which is its cause.
        RuntimeError: If memory has run out.
    """
    try:
        yield
    except IndexError as error:
        raise ValueError(_not_alone(batch, n, error)) from error
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise ValueError(_not_alone(batch, n, error)) from error


def _not_alone(batch: Batch, n: int, error: Exception) -> str:
    parts = [described(part) for part in tensors_in(batch) if is_per_sample(part, n)]
    return (
        f"a sample must be one entry of every tensor as long as its batch, {n}: {', '.join(parts)}; got one "
        f"on its own that the model does not take ({describe(error)}). Where samples share one of these, or "
        "are linked by it (edges, offsets), pass a task with select and count of its own"
    )


@contextmanager
def one_alone_explained() -> Iterator[None]:
    """Say why a sample cannot be taken alone, where torch only says what it expects.

    Yields:
        Nothing.

    Raises:
        ValueError: If a batch normalisation has no statistics but those of the samples beside it.
    """
    try:
        yield
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError(
            "a sample must have a loss of its own, got a batch normalisation without running statistics, "
            "which normalises it by the samples beside it and cannot take it alone; train the model with "
            "track_running_stats=True or with layers that normalise each sample (GroupNorm, LayerNorm)"
        ) from error


class Samples:
    """A batch, and its samples one by one.

    Args:
        batch: A batch on the model's device.
        n: Its number of samples.
        select: ``select(batch, samples) -> batch``; by default, samples lie along the leading dimension.
    """

    def __init__(self, batch: Batch, n: int, select: Select | None = None) -> None:
        self.batch, self.n = batch, n
        self._select = select

    @property
    def is_leading(self) -> bool:
        """The samples lie along a leading dimension."""
        return self._select is None

    def take(self, samples: Sequence[int]) -> Batch:
        """Return the batch of some samples.

        Args:
            samples: Which ones; one may come several times.

        Returns:
            A batch of the same form; tensors that the samples share stay whole.
        """
        chosen = list(samples)
        if self._select is not None:
            return self._select(self.batch, chosen)
        if len(chosen) == 1:  # a view
            first = chosen[0]
            return map_tensors(
                lambda tensor: tensor[first : first + 1] if is_per_sample(tensor, self.n) else tensor,
                self.batch,
            )
        return map_tensors(
            lambda tensor: tensor[chosen] if is_per_sample(tensor, self.n) else tensor, self.batch
        )


def add_gradient(
    loss: Tensor, chosen: Mapping[str, Tensor], totals: Mapping[str, Tensor], power: int, weight: float = 1.0
) -> None:
    """Add a power of the plain gradient of one loss.

    Args:
        loss: A scalar.
        chosen: Parameter name to parameter.
        totals: Parameter name to accumulator, written in place.
        power: 1 or 2.
        weight: Factor of what is added.
    """
    if not loss.requires_grad:  # a sample that the loss function leaves out
        return
    grads = torch.autograd.grad(loss, list(chosen.values()), allow_unused=True)
    pairs = [
        (totals[name], grad.to_dense() if grad.is_sparse else grad)
        for name, grad in zip(chosen, grads, strict=True)
        if grad is not None
    ]
    ops.fisher_accumulate_(
        [total for total, _ in pairs], [grad for _, grad in pairs], power=power, weight=weight
    )


def in_channels_last(batch: Batch, n: int) -> Batch:
    """Return the batch with its images in channels-last order; the values are the same.

    Args:
        batch: A batch in either form.
        n: Its number of samples.

    Returns:
        A batch of the same form.
    """

    def convert(tensor: Tensor) -> Tensor:
        is_image = tensor.ndim == 4 and tensor.is_floating_point() and is_per_sample(tensor, n)
        return tensor.contiguous(memory_format=torch.channels_last) if is_image else tensor

    return map_tensors(convert, batch)


def describe(error: BaseException) -> str:
    """Say in one line why a way of computing something failed.

    Args:
        error: What was raised.

    Returns:
        The message, with the error's class unless it is about the layout of the samples.
    """
    text = str(error).strip().split("\n")[0][:100]
    return text if isinstance(error, MismatchError) else f"{type(error).__name__}: {text}"
