"""One loop over batches for every method that trains."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unlearn_ext.methods.run import Run
from unlearn_ext.tasks.batches import Batch, Batches, device_of, read_batches

Objective = Callable[[nn.Module, Batch], Tensor]
"""``objective(model, batch)``: one value per sample, or their mean; minimised."""


def train(
    run: Run,
    phase: str,
    data: Batches,
    objective: Objective,
    optimizer: Optimizer,
    *,
    epochs: int = 1,
    steps_min: int = 0,
    schedule: Callable[[int], float] | None = None,
    after_epoch: Callable[[int], bool] | None = None,
    progress: bool = False,
) -> int:
    """Minimise an objective, epoch by epoch. The model's training flags are the caller's business.

    Args:
        run: The run to record in; one entry per epoch with the mean loss, the steps and the learning rate.
        phase: Name of the phase.
        data: Re-iterable batches.
        objective: What to minimise; its mean over a batch is the step's loss.
        optimizer: Its ``param_groups`` decide what is trained.
        epochs: Passes over the data, >= 0.
        steps_min: Go on past ``epochs``, in whole steps, until so many have been made.
        schedule: Learning rate of an epoch, counted from 0; the optimizer's own without one.
        after_epoch: Called with the number of the epoch; True ends the training.
        progress: Show a progress bar on a terminal, where tqdm is installed.

    Returns:
        The number of steps.

    Raises:
        FloatingPointError: If a loss is NaN or infinite; the message names the phase, epoch and batch.
        ValueError: If ``data`` holds no batch.
    """
    device = device_of(run.model)
    steps = epoch = 0
    with run.phase(phase):
        while epoch < epochs or steps < steps_min:
            if schedule is not None:
                for group in optimizer.param_groups:
                    group["lr"] = schedule(epoch)
            total, batches = torch.zeros((), device=device), 0
            for index, batch in enumerate(
                read_batches(data, device, description=f"{run.method}: {phase}", progress=progress)
            ):
                loss = objective(run.model, batch).mean()
                if not bool(torch.isfinite(loss.detach())):
                    raise FloatingPointError(
                        f"{run.method}: the loss must be finite, got {loss.item()} in phase {phase!r}, "
                        f"epoch {epoch}, batch {index}"
                    )
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                total += loss.detach()
                batches += 1
                steps += 1
                if epoch >= epochs and steps >= steps_min:
                    break
            if batches == 0:
                raise ValueError(f"{run.method}: the data of phase {phase!r} must hold a batch, got none")
            run.record(
                phase,
                epoch=epoch,
                loss=float(total) / batches,
                steps=batches,
                lr=float(optimizer.param_groups[0]["lr"]),
            )
            epoch += 1
            if after_epoch is not None and after_epoch(epoch - 1):
                break
    return steps
