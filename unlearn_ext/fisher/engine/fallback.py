"""Importances sample by sample, for any architecture: vmap over chunks of samples, else a plain loop."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, vmap

from unlearn_ext._internal.undo import Undone
from unlearn_ext.fisher.engine.sample_losses import PerSampleLoss, Samples, add_gradient, describe
from unlearn_ext.fisher.engine.settled import SettledTotals
from unlearn_ext.tasks.batches import Batch, device_of, is_per_sample, map_tensors, tensors_in

# Scalars in the gradients of one chunk, and the fewest samples that are worth a chunk. Measured on two CPU
# cores: vmap wins, up to sevenfold, while a chunk's gradients stay in the cache, and loses where only a few
# samples fit into that. A GPU needs the chunk to be busy at all.
VMAP_SCALARS = {"cpu": (2**22, 16), "cuda": (2**28, 2)}


class Fallback:
    """Adds the samples' powers of gradients one sample, or one vmapped chunk of samples, after the other.

    vmap is trusted once its gradients of two samples agree with plain autograd's.

    Args:
        loss: The model and its loss.
        chosen: Parameter name to parameter.
        power: 1 or 2.
    """

    def __init__(self, loss: PerSampleLoss, chosen: Mapping[str, Tensor], power: int) -> None:
        self._loss, self._chosen, self._power = loss, chosen, power
        scalars = sum(parameter.numel() for parameter in chosen.values())
        device = device_of(loss.model).type
        budget, fewest = VMAP_SCALARS.get(device, VMAP_SCALARS["cpu"])
        self._chunk = budget // max(1, scalars)
        self._loop_because = (
            "" if self._chunk >= fewest else f"faster than vmap for {scalars:,} scalars on {device}"
        )
        self._used_vmap = False
        if not loss.lockstep.is_alone:
            self._loop_because = "parameters are sharded"

    @property
    def how(self) -> str:
        """Which of the two it was, and why."""
        if self._used_vmap and not self._loop_because:
            return "vmap"
        return f"single-sample loop: {self._loop_because or 'batches of one sample'}"

    def accumulate(self, samples: Samples, fisher: Mapping[str, Tensor]) -> Tensor:
        """Add one batch.

        Args:
            samples: A batch on the model's device.
            fisher: Parameter name to accumulator, written in place.

        Returns:
            The samples' losses on their own, ``[n]``.
        """
        values: list[Tensor] = []
        start, n = 0, samples.n
        if not samples.is_leading and not self._loop_because:
            self._loop_because = "the samples do not lie along a leading dimension"
        while start < n:
            stop = min(n, start + max(1, self._chunk))
            if stop - start > 1 and not self._loop_because:
                chunk_values = self._add_chunk(samples, start, stop, fisher)
                if chunk_values is None:
                    continue
                values.append(chunk_values)
            else:
                stop = start + 1
                value = self._loss.losses(samples.take([start]), 1, is_whole=n == 1)
                add_gradient(value.sum(), self._chosen, fisher, self._power)
                values.append(value.detach())
            start = stop
        return torch.cat(values)

    def accumulate_in_lockstep(self, samples: Samples, totals: SettledTotals) -> Tensor:
        """Add one batch, sample by sample, on all ranks at once.

        Args:
            samples: A batch on the model's device.
            totals: What the gradients' powers are added to.

        Returns:
            The samples' losses on their own, ``[n]``.
        """
        lockstep = self._loss.lockstep
        values: list[Tensor] = []
        for sample in range(lockstep.most(samples.n)):
            with lockstep.marking(self._loss.model) as marks:
                one = samples.take([min(sample, samples.n - 1)])
                value = self._loss.losses(one, 1, is_whole=samples.n == 1)
            if sample < samples.n:
                values.append(value.detach())
            if not value.requires_grad:
                continue
            totals.begin(self._chosen)

            def take(name: str, grad: Tensor, is_real: bool = sample < samples.n) -> None:
                if is_real and name in self._chosen:
                    totals.add_power(name, grad)

            lockstep.gradients(value.sum(), take, marks, totals.settle)
        return torch.cat(values)

    def _add_chunk(
        self, samples: Samples, start: int, stop: int, fisher: Mapping[str, Tensor]
    ) -> Tensor | None:
        """Add the samples ``start`` to ``stop - 1``, or note why vmap cannot and add nothing.

        Args:
            samples: The whole batch.
            start: First sample of the chunk.
            stop: One past its last sample.
            fisher: Parameter name to accumulator.

        Returns:
            The samples' losses, or None if nothing was added.
        """
        try:
            grads, values = vmap_gradients(
                self._loss, self._chosen, samples.batch, samples.n, slice(start, stop)
            )
        except Exception as error:  # whatever the reason, the loop needs no vmap
            self._loop_because = f"vmap raised {describe(error)}"
            return None
        if not self._used_vmap and not self._is_trustworthy(grads, samples, start):
            self._loop_because = "vmap disagrees with plain autograd"
            return None
        self._used_vmap = True
        for name, grad in grads.items():
            total = fisher[name]
            powers = grad.to(total.dtype)
            total.add_((powers.square() if self._power == 2 else powers.abs()).sum(0))
        return values

    def _is_trustworthy(self, grads: Mapping[str, Tensor], samples: Samples, start: int) -> bool:
        largest = max((float(grad[:2].abs().max()) for grad in grads.values() if grad.numel()), default=0.0)
        for offset in range(2):
            loss = self._loss.losses(samples.take([start + offset]), 1).sum()
            expected = torch.autograd.grad(loss, list(self._chosen.values()), materialize_grads=True)
            for grad, plain in zip(grads.values(), expected, strict=True):
                # Gradients that vanish in exact arithmetic are rounding; they are held against the largest.
                if not _agree(grad[offset], plain, 0.01 * largest):
                    return False
        return True


def vmap_gradients(
    loss: PerSampleLoss, chosen: Mapping[str, Tensor], batch: Batch, n: int, samples: slice
) -> tuple[dict[str, Tensor], Tensor]:
    """Compute the gradients of some samples side by side.

    Args:
        loss: The model and its loss.
        chosen: Parameter name to parameter.
        batch: A batch on the model's device.
        n: Its number of samples.
        samples: Which of them.

    Returns:
        Parameter name to gradients ``[samples, *shape]``, and the losses.
    """
    module = _Module(loss)

    def loss_of_one(parameters: Mapping[str, Tensor], *entries: Tensor) -> Tensor:
        rest = iter(entries)
        sample = map_tensors(
            lambda tensor: next(rest).unsqueeze(0) if is_per_sample(tensor, n) else tensor, batch
        )
        named = {f"model.{name}": tensor for name, tensor in parameters.items()}
        value: Tensor = functional_call(module, named, (sample,))
        return value.squeeze(0)

    entries = [tensor[samples] for tensor in tensors_in(batch) if is_per_sample(tensor, n)]
    parameters = {name: parameter.detach() for name, parameter in chosen.items()}
    with torch.no_grad(), warnings.catch_warnings(), _kept_in_place(loss.model):
        # Operators without a batching rule of their own are looped over inside vmap: slower, not wrong.
        warnings.filterwarnings("ignore", message="There is a performance drop")
        grads, values = vmap(grad_and_value(loss_of_one), in_dims=(None,) + (0,) * len(entries))(
            parameters, *entries
        )
    return grads, values


@contextmanager
def _kept_in_place(model: nn.Module) -> Iterator[None]:
    # Under vmap, ``module.to(...)`` writes into tensors that belong to vmap, and the process dies of it.
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("the forward pass converts or moves a module's parameters")

    modules = [module for module in model.modules() if "_apply" not in vars(module)]

    def put_back() -> None:
        for module in modules:
            vars(module).pop("_apply", None)

    with Undone(put_back):
        for module in modules:
            object.__setattr__(module, "_apply", refuse)
        yield


class _Module(nn.Module):
    """Model and loss as one module, so that ``functional_call`` swaps parameters under the user's loss."""

    def __init__(self, loss: PerSampleLoss) -> None:
        super().__init__()
        self.model = loss.model
        self.loss = loss

    def forward(self, batch: Batch) -> Tensor:
        return self.loss.loss_fn(self.model, batch)


def _agree(a: Tensor, b: Tensor, scale: float) -> bool:
    # Loose: it is to find what is wrong altogether, not rounding in the model's precision.
    if not b.numel():
        return True
    tolerance = 0.1 if a.dtype in (torch.float16, torch.bfloat16) else 1e-2
    allowed = tolerance * b.abs().amax().clamp(min=scale)
    return bool(((a - b).abs() <= allowed).all() | ~torch.isfinite(b).all())
