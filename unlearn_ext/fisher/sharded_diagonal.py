"""``fisher_diagonal`` of a model that FSDP2 has sharded."""

from __future__ import annotations

import functools
import os

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.chosen import Params, Patterns
from unlearn_ext._internal.dtensors import local_of
from unlearn_ext._internal.fingerprint import weights_fingerprint
from unlearn_ext.distributed import MeshRanks
from unlearn_ext.distributed.fsdp import ShardedModel
from unlearn_ext.distributed.fsdp_steps import steps
from unlearn_ext.fisher.diagonal import check_finite, checked_parameters, with_all_of, with_drawn_targets
from unlearn_ext.fisher.engine import PerSample, forget
from unlearn_ext.fisher.importance import Estimator, Importance, loss_name
from unlearn_ext.fisher.sharded import ShardedLockstep, unwritten_shards
from unlearn_ext.resume import SharedProgress, State
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches


def sharded_diagonal(
    model: nn.Module,
    data: Batches,
    judge: Task,
    ranks: MeshRanks,
    *,
    estimator: Estimator,
    power: int,
    params: Params,
    include: Patterns,
    exclude: Patterns,
    generator: torch.Generator | None,
    progress: bool,
    checkpoint: str | os.PathLike[str] | None,
    checkpoint_every: int,
) -> Importance:
    """Estimate the diagonal of a sharded model, on all ranks of its mesh at once; see ``fisher_diagonal``.

    Args:
        model: A model with ``fully_shard`` applied to it.
        data: This rank's share of the data; ranks may have different numbers of batches, or none.
        judge: The task, with its loss.
        ranks: Those of the model's mesh.
        estimator: ``"per_sample"`` or ``"mc"``.
        power: 1 or 2.
        params: See ``fisher_diagonal``.
        include: See ``fisher_diagonal``.
        exclude: See ``fisher_diagonal``.
        generator: For the draws of ``"mc"``, this rank's own.
        progress: Show a progress bar.
        checkpoint: The file, to whose name every rank adds its number.
        checkpoint_every: Steps from one writing to the next.

    Returns:
        Importances of the ranks' data together; tensors sharded like the parameters.

    Raises:
        NotImplementedError: If the estimator is ``"batch"``, or the model is not sharded by FSDP2 alone.
        ValueError: If no rank has a sample.
        FloatingPointError: If a loss or an importance is not finite, on every rank.
        RuntimeError: If the forward pass writes to a shard.
    """
    who = "fisher_diagonal"
    if estimator == "batch":
        raise NotImplementedError(
            f"{who}: estimator 'batch' must be computed on an unsharded model, whose batches it is a mean "
            "over; 'per_sample' does not depend on batches"
        )
    names = list(checked_parameters(model, params, include, exclude))
    sharded = ranks.begin("importances")
    counts = torch.zeros(3, dtype=torch.int64)  # samples, batches, the largest batch
    coverage: dict[str, str] = {}
    kept = SharedProgress(
        who,
        checkpoint,
        checkpoint_every,
        model=model,
        settings={
            "estimator": estimator,
            "power": power,
            "params": names,
            "loss": loss_name(judge),
            "task": repr(judge),
        },
        ranks=ranks,
    )
    ranks.exchange("progress", None)
    with (
        kept.holding_signals() as interrupt,
        sharded.resharded(),
        borrowed(model),
        unwritten_shards(sharded),
    ):
        for name in names:  # borrowed puts the flags back
            if not sharded.shards[name].requires_grad:
                sharded.shards[name].requires_grad_(True)
        leaves = sharded.leaves()
        device = leaves[names[0]].device
        fisher = {name: sharded.zeros_like(name) for name in names}
        if kept.found is not None:
            totals, facts = kept.found
            counts, coverage = torch.tensor(facts["counts"]), dict(facts["coverage"])
            for name, total in fisher.items():
                local_of(total).copy_(totals[name])

        def new_engine() -> tuple[ShardedLockstep, PerSample]:
            if kept.is_kept:
                forget(model)
            lockstep = ShardedLockstep(sharded, leaves, names, judge)
            own = judge.select if judge.has_own_select else None
            chosen = {name: leaves[name] for name in names}
            return lockstep, PerSample(
                model, judge.loss, chosen, fisher, power, select=own, lockstep=lockstep
            )

        def so_far() -> State:
            facts = {"counts": counts.tolist(), "coverage": coverage}
            return {name: local_of(total) for name, total in fisher.items()}, facts

        lockstep, gradients = new_engine()
        left = kept.begin(data, generator if estimator == "mc" else None)
        ranks.exchange("data", None)
        for step in steps(sharded, left, judge, device, description="importance", progress=progress):
            batch = step.batch
            with ranks.in_collectives():
                if estimator == "mc":
                    draw = functools.partial(with_drawn_targets, model, judge, batch, step.index, generator)
                    batch = lockstep.together(model, draw)
                lockstep.count(step.is_live)
                values = gradients.accumulate(batch, step.n)
            is_asked = _checked_everywhere(sharded, values, step.index, is_asked=interrupt.is_due)
            if step.is_live:
                counts += torch.tensor([step.n, 1, 0])
                counts[2] = max(int(counts[2]), step.n)
            if kept.is_due(is_asked=is_asked):
                gradients.finish()
                coverage = with_all_of(coverage, gradients.coverage)
                kept.write(so_far())
                if interrupt.is_due:
                    interrupt.deliver()
                lockstep, gradients = new_engine()
        gradients.finish()
        coverage = with_all_of(coverage, gradients.coverage)
        kept.write(so_far(), is_finished=True)
        n_samples, n_batches = sharded.reduced(counts[:2], dist.ReduceOp.SUM).tolist()
        if not n_samples:
            raise ValueError(f"{who}: data must hold at least one sample on some rank, got none")
        largest = lockstep.most(int(counts[2]))
        coverage = _joined_coverage(sharded, coverage)
    for name, total in fisher.items():
        own = local_of(total)
        own.div_(n_samples)
        if not lockstep.all(bool(torch.isfinite(own).all())):
            raise FloatingPointError(
                f"{who}: importances must be finite, got some that are not for {name}: a gradient is not "
                "finite, or too large to be raised to the power"
            )
    return Importance(
        fisher,
        n_samples=n_samples,
        estimator=estimator,
        power=power,
        batch_size=largest,
        n_batches=n_batches,
        coverage=coverage,
        loss=loss_name(judge),
        weights_digest=weights_fingerprint(model),
    )


def _checked_everywhere(sharded: ShardedModel, values: Tensor, index: int, *, is_asked: bool) -> bool:
    # Whether some rank has been told to end; raises on all ranks where a loss of one is not finite.
    is_finite = bool(torch.isfinite(values).all())
    told = torch.tensor([not is_finite, is_asked], dtype=torch.int32)
    has_failed, asked = sharded.reduced(told, dist.ReduceOp.MAX).tolist()
    if has_failed and is_finite:
        raise FloatingPointError(
            "fisher_diagonal: the loss must be finite, got another value on another rank"
        )
    if has_failed:
        check_finite("loss", values, index)
    return bool(asked)


def _joined_coverage(sharded: ShardedModel, own: dict[str, str]) -> dict[str, str]:
    joined: dict[str, str] = {}
    for each in sharded.exchanged(own):
        for name, how in each.items():
            if joined.setdefault(name, how) == "fused":
                joined[name] = how
    return {name: joined[name] for name in own}
