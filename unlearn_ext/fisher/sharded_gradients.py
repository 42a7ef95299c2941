"""Gradients of a sharded model's loss over all ranks' batches: sums, sharded like the parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.dtensors import local_of
from unlearn_ext.distributed import MeshRanks
from unlearn_ext.distributed.fsdp import ShardedModel, reshard
from unlearn_ext.distributed.fsdp_steps import steps
from unlearn_ext.fisher.engine.lockstep import Marks
from unlearn_ext.fisher.engine.settled import SettledSums
from unlearn_ext.fisher.sharded import ShardedLockstep
from unlearn_ext.tasks.base import Task, one_per_sample
from unlearn_ext.tasks.batches import Batches
from unlearn_ext.tasks.losses import LossFn


class ShardedGradients:
    """Adds up gradients of some parameters, over passes and over ranks.

    Gradients are taken where they arise, before FSDP would average them: what is computed is a sum, whatever
    divisor FSDP was given, and nothing is sent of parameters that are not asked for. As in a training step no
    rank holds more than one group's gradients in full; ranks add up in float32 (float64 for double
    parameters).

    Args:
        sharded: The model, with its shards in place.
        names: Plain names of the parameters.

    Attributes:
        sums: Name to the sum so far, sharded like the parameter.
        used: The parameters that a loss of some rank has depended on.
    """

    def __init__(self, sharded: ShardedModel, names: Iterable[str]) -> None:
        self._sharded = sharded
        self._leaves = sharded.leaves()
        self.sums = {name: sharded.zeros_like(name) for name in names}
        self.used: set[str] = set()
        self._lockstep = ShardedLockstep(sharded, self._leaves, self.sums)
        self._totals = SettledSums(
            self.sums,
            1,
            shapes={name: self._leaves[name] for name in self.sums},
            reduce=self._reduce,
            least=sharded.reduced,
        )

    def clear(self) -> None:
        """Begin anew."""
        self.used.clear()
        for total in self.sums.values():
            local_of(total).zero_()

    @contextmanager
    def watching(self) -> Iterator[Marks]:
        """Note the borders between groups of parameters in the forward passes inside.

        Yields:
            What ``add`` takes.
        """
        with self._lockstep.marking(self._sharded.model) as marks:
            yield marks

    def add(self, loss: Tensor, marks: Marks) -> None:
        """Add a loss's gradients, in a backward pass that all ranks make together.

        Args:
            loss: A scalar; of a rank with nothing to add zero times what it has computed.
            marks: What ``watching`` gave.

        Raises:
            NotImplementedError: If a gradient comes in several parts, as from reentrant checkpoints.
        """
        self._totals.begin(self.sums)
        self._lockstep.gradients(loss, self._totals.add_power, marks, self._totals.settle)
        reshard(self._sharded.model)

    def _reduce(self, name: str, full: Tensor) -> None:
        self.used.add(name)
        self._sharded.add_reduced(self.sums[name], full)


def weighted(terms: Iterable[tuple[float, Tensor]]) -> Tensor:
    """Add up what is minimised on this rank.

    Args:
        terms: Weights, and values per sample; a weight of 0 keeps a pass in step without counting it.

    Returns:
        A scalar.
    """
    parts = [weight * values.sum() for weight, values in terms]
    return torch.stack(parts).sum()


def sharded_mean_gradients(
    who: str,
    what: str,
    data: Batches,
    task: Task,
    names: Sequence[str],
    ranks: MeshRanks,
    *,
    loss_fn: LossFn | None = None,
    weigh: Callable[[Tensor], Tensor] = torch.ones_like,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Compute the mean over all ranks' samples of the gradient of their loss.

    Args:
        who: Whose message an error is.
        what: Name of the set.
        data: This rank's batches, perhaps none.
        task: Counts and selects samples.
        names: Plain names of the parameters.
        ranks: Those of the model's mesh.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``; None: the task's loss.
        weigh: The samples' weights in the mean, from their losses.
        progress: Show a progress bar.

    Returns:
        Name to mean, sharded like the parameter.

    Raises:
        ValueError: If no rank has a sample.
        FloatingPointError: If a loss is not finite, on every rank.
    """
    total, loss = 0.0, task.loss if loss_fn is None else loss_fn
    sharded = ranks.begin(f"gradients of {what}")
    with sharded.resharded(), borrowed(sharded.model):
        gradients = ShardedGradients(sharded, names)
        for step in steps(sharded, data, task, sharded.device, call=loss, description=who, progress=progress):
            with gradients.watching() as marks:
                with ranks.in_pass(task) if loss_fn is None else ranks.in_collectives():
                    values = one_per_sample(loss(sharded.model, step.batch))
                if not bool(torch.isfinite(values.detach()).all()):
                    raise FloatingPointError(
                        f"{who}: the loss of {what} must be finite, got {values} in batch {step.index}"
                    )
                ranks.exchange("losses", None)
                weights = weigh(values.detach()) * float(step.is_live)
                with ranks.in_collectives():
                    gradients.add((weights * values).sum(), marks)
            total += float(weights.double().sum())
    (total,) = ranks.total("weights", total)
    if not total > 0:
        raise ValueError(f"{who}: {what} must hold at least one sample on some rank, got none")
    for each in gradients.sums.values():
        local_of(each).div_(total)
    return gradients.sums
