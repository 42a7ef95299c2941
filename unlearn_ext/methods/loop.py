"""One loop over batches for every method that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unlearn_ext.methods.common import check_count, single_values_normalised
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
    parameters: Iterable[Tensor] | None = None,
    epochs: int = 1,
    steps_min: int = 0,
    schedule: Callable[[int], float] | None = None,
    after_epoch: Callable[[int], bool] | None = None,
    progress: bool = False,
) -> int:
    """Minimise an objective, epoch by epoch. The model's training flags are the caller's business.

    Where a batch normalisation in train mode gets a single value per channel, as from a batch of one sample,
    it uses its running statistics for that call and leaves them as they are.

    Args:
        run: The run to record in; one entry per epoch with the mean loss, the steps and the learning rate.
        phase: Name of the phase.
        data: Re-iterable batches.
        objective: What to minimise; its mean over a batch is the step's loss.
        optimizer: Its ``param_groups`` decide what is trained.
        parameters: What gets gradients; None: whatever requires them.
        epochs: Passes over the data, >= 0.
        steps_min: Go on past ``epochs``, in whole steps, until so many have been made.
        schedule: Learning rate of an epoch, counted from 0; the optimizer's own without one.
        after_epoch: Called with the number of the epoch; True ends the training. So does the run's goal, once
            it is reached; then no other training of the run begins either.
        progress: Show a progress bar, where tqdm is installed.

    Returns:
        The number of steps.

    Raises:
        FloatingPointError: If a loss is NaN or infinite; the message names the phase, epoch and batch.
        ValueError: If ``data`` holds no batch, or ``epochs`` or ``steps_min`` is negative.
    """
    check_count(run.method, "epochs", epochs)
    check_count(run.method, "steps_min", steps_min)
    device = device_of(run.model)
    gradients = _Gradients(parameters)
    steps = epoch = 0
    with run.phase(phase), single_values_normalised(run.model):
        while (epoch < epochs or steps < steps_min) and not (run.goal is not None and run.goal.stops):
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
                gradients.compute(loss)
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
            ends = after_epoch is not None and after_epoch(epoch - 1)
            if run.goal is not None:
                ends = run.goal.after_epoch() or ends
            if ends:
                break
    return steps


class _Gradients:
    """Fills ``.grad`` of some parameters alone, so that those to be left alone need not be marked as frozen.

    Args:
        parameters: The parameters; None: all that a loss depends on.
    """

    def __init__(self, parameters: Iterable[Tensor] | None) -> None:
        self._parameters = None if parameters is None else list(parameters)
        self._is_checked = False

    def compute(self, loss: Tensor) -> None:
        if self._parameters is not None and not self._is_checked:
            self._is_checked = True
            if _has_reentrant_checkpoint(loss):  # which autograd.grad does not support
                self._parameters = None
        if self._parameters is None:
            loss.backward()  # type: ignore[no-untyped-call]
            return
        grads = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        for parameter, grad in zip(self._parameters, grads, strict=True):
            if grad is not None and grad.layout == torch.strided and grad.stride() != parameter.stride():
                # Laid out like the parameter, as backward() leaves it.
                grad = torch.empty_like(parameter, dtype=grad.dtype).copy_(grad)
            parameter.grad = grad


def _has_reentrant_checkpoint(loss: Tensor) -> bool:
    seen: set[object] = set()
    stack = [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node.name() == "CheckpointFunctionBackward":
            return True
        seen.add(node)
        stack.extend(source for source, _ in node.next_functions)
    return False
