"""What a closed loop measures of a model that FSDP2 has sharded: all ranks together, each its own share."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.dtensors import is_dtensor, local_of, sharded_like
from unlearn_ext.distributed import ALONE, MeshRanks, Ranks
from unlearn_ext.distributed.fsdp import ShardedModel
from unlearn_ext.distributed.fsdp_steps import Step, steps
from unlearn_ext.methods.readings import Reading, Tally
from unlearn_ext.methods.use_order import order_of_use
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches


def figures_of(
    model: nn.Module, data: Batches, judge: Task, classes_seen: set[int] | None, ranks: Ranks = ALONE
) -> tuple[float, float, Reading]:
    """Measure accuracy and mean loss in one forward pass over all ranks' data.

    Args:
        model: The model; run in eval mode, left as it was, with its shards in place.
        data: This rank's batches, perhaps none.
        judge: The task.
        classes_seen: Takes up the classes of all ranks' samples that count, where they have one each.
        ranks: Those of the model's mesh, where they are known already.

    Returns:
        Accuracy (NaN where nothing is counted), mean loss, and what tells these samples from others, with
        their number; the same on every rank.
    """
    mesh = ranks if isinstance(ranks, MeshRanks) else MeshRanks(model, "measure")
    sums = torch.zeros(4, dtype=torch.float64)  # right, counted, samples, loss
    own: set[int] = set()
    tally = Tally(model, judge, data)
    sharded = mesh.begin("measure")
    with mesh.failing_together(), sharded.resharded(), borrowed(model), torch.no_grad():
        failure: Exception | None = None
        for step in steps(sharded, data, judge, sharded.device, call=judge.forward):
            with mesh.in_collectives():  # what fails before it is found by ``steps``
                outputs = judge.forward(model, step.batch)
            if not step.is_live or failure is not None:
                continue
            try:
                sums += _judged(judge, outputs, step, own if classes_seen is not None else None)
                tally.add(step.batch, step.n)
            except Exception as error:  # the others go on with the pass
                failure = error
        if failure is not None:
            raise failure
        sums = torch.cat([sums, torch.tensor(tally.sums(), dtype=torch.float64)])
    right, counted, samples, loss, *read = sharded.reduced(sums, dist.ReduceOp.SUM).tolist()
    if classes_seen is not None:
        for each in sharded.exchanged(own):
            classes_seen |= each
    accuracy = right / counted if counted else math.nan
    return accuracy, loss / samples if samples else math.nan, Reading.of(int(samples), read)


def _judged(judge: Task, outputs: Any, step: Step, classes_seen: set[int] | None) -> Tensor:  # noqa: ANN401
    # Right and counted answers, samples, and the sum of their losses.
    loss = float(judge.losses(outputs, step.batch).double().sum())
    found = torch.tensor([0, 0, step.n, loss], dtype=torch.float64)
    try:
        hits, valid = judge.correct(outputs, step.batch)
    except NotImplementedError:  # there is no right and wrong, as for numbers without a tolerance
        return found
    classes = None if classes_seen is None else judge.classes_of(step.batch)
    if classes is not None and classes_seen is not None:
        classes_seen.update(torch.unique(classes[valid > 0]).tolist())
    return found + torch.tensor([int(hits.sum()), int(valid.sum()), 0, 0], dtype=torch.float64)


def on_all_shards(model: nn.Module, flag: bool) -> bool:
    """Take something for true only where all ranks of a model say so.

    Args:
        model: The model.
        flag: What this rank says.

    Returns:
        The same on every rank.
    """
    every = ShardedModel(model, "until").reduced(torch.tensor(int(flag)), dist.ReduceOp.MIN)
    return bool(every)


def first_uses(
    model: nn.Module, parameters: Mapping[str, Tensor], data: Batches, judge: Task
) -> tuple[list[str], int]:
    """Sort parameters by their first use, on the first batch of every rank; see ``order_of_use``.

    Args:
        model: The model.
        parameters: Some of its parameters by name.
        data: This rank's batches, perhaps none.
        judge: The task, with its loss.

    Returns:
        The names, as the first rank sees them, and the number of samples that all ranks have read.
    """
    sharded = ShardedModel(model, "plan_ssd")
    with sharded.resharded():
        leaves = sharded.leaves()
        named = {name: leaves[name] for name in parameters}
        step = next(steps(sharded, data, judge, sharded.device))
        order = order_of_use(model, named, step.batch, judge.loss)
    read = sharded.reduced(torch.tensor(step.n if step.is_live else 0), dist.ReduceOp.SUM)
    return sharded.exchanged(order)[0], int(read)


def still_known(model: nn.Module, data: Batches, task: Task) -> tuple[list[Batch], bool]:
    """Collect the samples that the model still answers rightly.

    Args:
        model: The model.
        data: This rank's batches, perhaps none.
        task: The task.

    Returns:
        This rank's, and whether any rank has some.
    """
    sharded = ShardedModel(model, "plan_ssd")
    left: list[Batch] = []
    with sharded.resharded(), borrowed(model), torch.no_grad():
        for step in steps(sharded, data, task, sharded.device, call=task.forward):
            right, _ = task.correct(task.forward(model, step.batch), step.batch)
            known = right.nonzero().flatten().tolist() if step.is_live else []
            if known:
                left.append(task.select(step.batch, known))
    return left, bool(sharded.reduced(torch.tensor(len(left)), dist.ReduceOp.MAX))


def sharded_mask(who: str, name: str, mask: Tensor, parameter: Tensor) -> Tensor:
    """Cut a mask as a parameter is cut.

    Args:
        who: The method.
        name: The parameter's.
        mask: bool: whole on every rank, or sharded like the parameter.
        parameter: The parameter.

    Returns:
        This rank's part, as a ``DTensor`` where the parameter is one.

    Raises:
        ValueError: If it is packed, or of another shape or placement.
    """
    condition = f"{who}: masks[{name!r}] must be bool {list(parameter.shape)} for a sharded model, whole on"
    condition += " every rank or a DTensor placed like the parameter"
    if mask.dtype != torch.bool or mask.shape != parameter.shape:
        raise ValueError(f"{condition}, got {mask.dtype} {list(mask.shape)}")
    try:
        found = sharded_like(mask.detach(), parameter.detach())
    except ValueError as error:
        raise ValueError(f"{condition}, got a DTensor with other placements") from error
    return found.to(local_of(parameter).device) if not is_dtensor(found) else found
