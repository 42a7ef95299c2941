"""What unlearning methods that train have in common: all or nothing, a record, and one loop over batches."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unlearn_ext.data import Batch, Batches, device_of, read_batches
from unlearn_ext.report import UnlearnResult
from unlearn_ext.state import Buffers, restored

Objective = Callable[[nn.Module, Batch], Tensor]
"""``objective(model, batch)``: one value per sample, or their mean; minimised."""


class Run:
    """One unlearning run in progress: the model as it was, and the record so far. Made by ``unlearning``."""

    def __init__(self, model: nn.Module, method: str, hyperparameters: Mapping[str, object]) -> None:
        self.model = model
        self.method = method
        self.hyperparameters = dict(hyperparameters)
        self.history: list[dict[str, object]] = []
        self.seconds: dict[str, float] = {}
        self._before = {name: p.detach().clone() for name, p in model.named_parameters()}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside; phases of one name add up.

        Args:
            name: The phase, as it appears in ``seconds``.

        Yields:
            Nothing.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            if device_of(self.model).type == "cuda":
                torch.cuda.synchronize(device_of(self.model))
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def record(self, phase: str, **facts: object) -> None:
        """Add an entry to the history.

        Args:
            phase: The phase it belongs to.
            **facts: What happened: plain numbers and strings.
        """
        self.history.append({"phase": phase, **facts})

    def original(self, name: str) -> Tensor:
        """Return a parameter's value from before the run.

        Args:
            name: Its name in ``model.named_parameters()``.

        Returns:
            The value; not to be written.
        """
        return self._before[name]

    def result(self) -> UnlearnResult:
        """Compare the model with what it was.

        Returns:
            The record; a scalar counts as changed if its value differs.
        """
        counts = {
            name: (int((p.detach() != self._before[name]).sum()), p.numel())
            for name, p in self.model.named_parameters()
        }
        total = sum(size for _, size in counts.values())
        return UnlearnResult(
            method=self.method,
            hyperparameters=self.hyperparameters,
            seconds=dict(self.seconds),
            changed=sum(changed for changed, _ in counts.values()) / max(1, total),
            changed_per_parameter={name: changed / max(1, size) for name, (changed, size) in counts.items()},
            history=tuple(self.history),
        )


@contextmanager
def unlearning(
    model: nn.Module,
    method: str,
    hyperparameters: Mapping[str, object],
    *,
    generator: torch.Generator | None = None,
) -> Iterator[Run]:
    """Change a model all or nothing.

    If the body raises, or is interrupted, every parameter and buffer gets back its value. In any case
    training flags, ``requires_grad``, ``.grad`` and the global random states are as before afterwards;
    parameters keep their storage throughout.

    Args:
        model: The user's model.
        method: Name for the record.
        hyperparameters: What the method was called with, for the record.
        generator: Decides every random choice inside, those of data loaders and dropout too. Without one the
            global random state does, and is put back.

    Yields:
        The run; call ``result()`` on it inside the body, or after it.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with unlearning(model, "zero", {}) as run, torch.no_grad():
        ...     _ = model.weight.zero_()
        >>> run.result().changed_per_parameter
        {'weight': 1.0, 'bias': 0.0}
    """
    run = Run(model, method, hyperparameters)
    parameters = list(model.named_parameters())
    buffers = Buffers(model)
    try:
        with restored(model):
            if generator is not None:
                torch.manual_seed(int(torch.randint(2**62, (), generator=generator, device=generator.device)))
            yield run
    except BaseException:
        with torch.no_grad():
            for name, p in parameters:
                p.copy_(run.original(name))
        buffers.put_back()
        raise


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
