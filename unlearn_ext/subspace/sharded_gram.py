"""Gram matrices of models that FSDP2 has sharded."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.dtensors import sum_over_mesh
from unlearn_ext._internal.modules import eager
from unlearn_ext.distributed import MeshRanks
from unlearn_ext.distributed.fsdp_steps import steps
from unlearn_ext.subspace.layers import Layer
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches


def sharded_totals(
    model: nn.Module,
    data: Batches,
    task: Task,
    chosen: Mapping[nn.Module, tuple[str, Layer]],
    watched: Callable[..., object],
    progress: bool,
) -> tuple[dict[str, Tensor], int]:
    """Sum X^T X over the inputs of layers, and over all ranks.

    Args:
        model: The model.
        data: This rank's batches, perhaps none.
        task: Calls the model, and counts samples.
        chosen: Module to its name and what kind of layer it is.
        watched: A context in which ``record(module, *inputs)`` is called whenever one of the modules runs.
        progress: Show a progress bar.

    Returns:
        Totals by module name, the same on every rank, and the number of samples.
    """
    ranks = MeshRanks(model, "activation_gram")
    sharded = ranks.sharded
    device = sharded.device
    own: dict[str, Tensor] = {}
    counts = False

    def record(module: nn.Module, *inputs: Tensor) -> None:
        name, layer = chosen[module]
        if counts:
            if name not in own:
                own[name] = torch.zeros(layer.gram, dtype=torch.float64, device=device)
            layer.add(own[name], *inputs)

    n_samples = 0
    with (
        ranks.failing_together(),
        sharded.resharded(),
        borrowed(model),
        torch.no_grad(),
        eager(),
        watched(model, chosen, record),  # type: ignore[attr-defined]
    ):
        for step in steps(
            sharded,
            data,
            task,
            device,
            call=task.forward,
            description="activation Gram matrices",
            progress=progress,
        ):
            counts = step.is_live
            with ranks.in_collectives():
                task.forward(model, step.batch)
            n_samples += step.n if step.is_live else 0
    read = sharded.exchanged((n_samples, list(own)))
    ran = {name for _, names in read for name in names}  # layers may run for some samples only
    totals = {}
    for name, layer in chosen.values():
        if name in ran:
            total = own.pop(name, None)
            if total is None:
                total = torch.zeros(layer.gram, dtype=torch.float64, device=device)
            totals[name] = sum_over_mesh(total, sharded.mesh)
    return totals, sum(n for n, _ in read)
