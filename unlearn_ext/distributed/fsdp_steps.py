"""Batches that all ranks of a sharded model read in step, however many each of them has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from unlearn_ext.distributed.forward import try_up_to_model
from unlearn_ext.distributed.fsdp import ShardedModel
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches, map_tensors, moved, read_batches


@dataclass(frozen=True)
class Step:
    """One batch on every rank.

    Attributes:
        batch: This rank's, or one that counts for nothing.
        n: Its number of samples.
        index: Its number among this rank's batches.
        is_live: It counts.
    """

    batch: Batch
    n: int
    index: int
    is_live: bool


def steps(
    sharded: ShardedModel,
    data: Batches,
    task: Task,
    device: torch.device,
    *,
    call: Callable[[nn.Module, Batch], object] | None = None,
    **how: object,
) -> Iterator[Step]:
    """Read every rank's batches until none has any left.

    Args:
        sharded: The model.
        data: This rank's batches, perhaps none.
        task: Counts samples.
        device: Where tensors go.
        call: ``call(model, batch)`` is what will be done with a batch; by default, what the task or its loss
            does.
        **how: For ``read_batches``.

    Yields:
        As many steps on every rank. A rank that has run out goes on with its last batch, one that has never
        had any with samples of another rank's.

    Raises:
        RuntimeError: If reading failed on another rank, or what comes before the model is called.
        Exception: What that raised on this one.
    """
    reader = enumerate(read_batches(data, device, **how))  # type: ignore[arg-type]
    last: tuple[Batch, int] | None = None
    has_company = False
    while True:
        step: Step | None = None
        error: Exception | None = None
        try:
            for index, batch in reader:
                n = task.count(batch)
                if n:
                    try_up_to_model(sharded.model, task, batch, call)
                    step, last = Step(batch, n, index, True), (batch, n)
                    break
        except Exception as raised:  # told to the others first
            error = raised
        failed, ready, lacks = sharded.reduced(
            torch.tensor([error is not None, step is not None, last is None], dtype=torch.int32),
            dist.ReduceOp.MAX,
        ).tolist()
        if error is not None:
            raise error
        if failed:
            raise RuntimeError("reading the data failed on another rank, whose message says why")
        if not ready:
            return
        if lacks and not has_company:
            has_company = True
            found = sharded.exchanged(None if step is None else _few(task, step))
            company = next(each for each in found if each is not None)
            if last is None:
                last = moved(company[0], device), company[1]
        if step is None:
            assert last is not None
            step = Step(*last, -1, False)
        yield step


def _few(task: Task, step: Step) -> tuple[Batch, int]:
    n = min(2, step.n)
    return map_tensors(lambda tensor: tensor.cpu(), task.select(step.batch, list(range(n)))), n
