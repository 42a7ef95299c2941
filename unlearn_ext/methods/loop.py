"""One loop over batches for every method that trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.optim import Optimizer

from unlearn_ext.distributed import MeshRanks
from unlearn_ext.methods.common import check_count, single_values_normalised
from unlearn_ext.methods.run import Run
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches, device_of, read_batches

if TYPE_CHECKING:
    from unlearn_ext.methods.sharded_steps import ShardedSteps

Terms: TypeAlias = Sequence[tuple[float, Tensor]]
"""Weights, and what they are the weights of: one value per sample of some set, of which the mean counts."""

Objective: TypeAlias = Callable[[nn.Module, Batch], Tensor | Terms]
"""``objective(model, batch)``: one value per sample, or terms; the sum of their means is minimised."""

SEGMENT: Batch = ()
"""Stands between batches where those before it belong to other steps than those behind, on all ranks."""


def mean_of(found: Tensor | Terms) -> Tensor:
    """Return what is minimised.

    Args:
        found: What an objective has returned.

    Returns:
        A scalar; of a set without a sample in this batch there is no mean, and nothing is added.
    """
    total: Tensor | None = None
    for weight, values in terms_of(found):
        if not values.numel():
            continue
        term = values.mean() if weight == 1 else weight * values.mean()
        total = term if total is None else total + term
    return torch.zeros(()) if total is None else total


def terms_of(found: Tensor | Terms) -> Terms:
    """Return what an objective has returned as terms.

    Args:
        found: Values, or terms.

    Returns:
        Terms; values are one of weight 1.
    """
    return [(1.0, found)] if isinstance(found, Tensor) else found


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
    before_step: Callable[[], None] | None = None,
    after_epoch: Callable[[int], bool] | None = None,
    progress: bool = False,
    task: Task | None = None,
) -> int:
    """Minimise an objective, epoch by epoch. The model's training flags are the caller's business.

    Where a batch normalisation in train mode gets a single value per channel, as from a batch of one sample,
    it uses its running statistics for that call and leaves them as they are.

    On many ranks a step is that of all their batches together: gradients are added up, every term weighted by
    its samples. A rank that has no batch left takes the steps of the others.

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
        before_step: Called before every step of the optimizer, on every rank.
        after_epoch: Called with the number of the epoch; True ends the training. So does the run's goal, once
            it is reached; then no other training of the run begins either.
        progress: Show a progress bar, where tqdm is installed.
        task: Counts samples, of a sharded model alone, whose batches say what they are for.

    Returns:
        The number of steps.

    Raises:
        FloatingPointError: If a loss is NaN or infinite; the message names the phase, epoch and batch.
        ValueError: If ``data`` holds no batch, or ``epochs`` or ``steps_min`` is negative.
        NotImplementedError: If there are many ranks, and samples would be normalised among a rank's own.
    """
    check_count(run.method, "epochs", epochs)
    check_count(run.method, "steps_min", steps_min)
    device = device_of(run.model)
    if run.ranks.are_many:
        _check_norms(run)
        parameters = _of_optimizer(optimizer) if parameters is None else parameters
    step: _Step | ShardedSteps
    if isinstance(run.ranks, MeshRanks):
        from unlearn_ext.methods.sharded_steps import ShardedSteps

        assert parameters is not None
        assert task is not None
        step = ShardedSteps(run, objective, parameters, task)
    else:
        step = _Step(run, objective, _Gradients(run.model, parameters))
    steps = epoch = 0
    with run.phase(phase), single_values_normalised(run.model):
        while (epoch < epochs or steps < steps_min) and not (run.goal is not None and run.goal.stops):
            if schedule is not None:
                for group in optimizer.param_groups:
                    group["lr"] = schedule(epoch)
            total, batches = torch.zeros((), device=device), 0
            reader = read_batches(data, device, description=f"{run.method}: {phase}", progress=progress)
            step.begin(reader, f"phase {phase!r}, epoch {epoch}")
            while (loss := step.loss(optimizer)) is not None:
                if before_step is not None:
                    before_step()
                optimizer.step()
                total += loss
                batches += 1
                steps += 1
                if epoch >= epochs and steps >= steps_min:
                    break
            step.end()
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


class _Step:
    """The steps of one epoch: on every rank the next batch, in the end the gradients of all of them."""

    def __init__(self, run: Run, objective: Objective, gradients: _Gradients) -> None:
        self._run, self._ranks = run, run.ranks
        self._objective, self._gradients = objective, gradients

    def begin(self, reader: Iterable[Batch], where: str) -> None:
        self._reader, self._where = iter(reader), where
        self._index, self._held = -1, False
        self._seen: list[int] = []

    def loss(self, optimizer: Optimizer) -> Tensor | None:
        # Fills the gradients; None where no rank has a batch left.
        while True:
            batch = None if self._held else next(self._reader, None)
            self._held = self._held or (isinstance(batch, tuple) and not batch)
            terms: Terms | None = None
            if batch is not None and not self._held:
                self._index += 1
                terms = terms_of(self._objective(self._run.model, batch))
            counts = None if terms is None else [len(values) if values.ndim else 1 for _, values in terms]
            told = self._ranks.exchange("batch", (counts, self._held))
            sizes = [sum(column) for column in zip(*(each for each, _ in told if each), strict=True)]
            if any(sizes):
                return self._backward(terms, sizes, optimizer)
            if sizes:  # batches without a sample, as filters leave them
                continue
            if not any(held for _, held in told):
                return None
            self._held = False

    def end(self) -> None:
        if 0 in self._seen:
            raise ValueError(
                f"{self._run.method}: every set must hold a sample on some rank, got none in {self._where}"
            )

    def _backward(self, terms: Terms | None, sizes: list[int], optimizer: Optimizer) -> Tensor:
        loss = None if terms is None else self._weighted(terms, sizes)
        if loss is not None and not bool(torch.isfinite(loss.detach())):
            raise FloatingPointError(
                f"{self._run.method}: the loss must be finite, got {loss.item()} in {self._where}, batch "
                f"{self._index}"
            )
        if loss is not None and not loss.requires_grad and not self._ranks.are_many:
            raise ValueError(
                f"{self._run.method}: the loss must depend on the parameters to be trained, got a constant "
                f"in {self._where}, batch {self._index}"
            )
        optimizer.zero_grad()
        if not self._ranks.are_many:
            assert loss is not None
            self._gradients.compute(loss)
            return loss.detach()
        self._seen = [a + b for a, b in zip(self._seen or [0] * len(sizes), sizes, strict=True)]
        own = self._gradients.of(loss)
        value = 0.0 if loss is None else float(loss.detach())
        told = self._ranks.exchange("gradients", (value, [grad is not None for grad in own]))
        used = [any(column) for column in zip(*(flags for _, flags in told), strict=True)]
        parameters = self._gradients.parameters
        dense = [
            torch.zeros_like(parameter) if grad is None else grad
            for parameter, grad, is_used in zip(parameters, own, used, strict=True)
            if is_used
        ]
        self._ranks.sum_("gradients", dense)
        summed = iter(dense)
        for parameter, is_used in zip(parameters, used, strict=True):
            parameter.grad = next(summed) if is_used else None
        return torch.tensor(sum(value for value, _ in told), device=parameters[0].device)

    def _weighted(self, terms: Terms, sizes: list[int]) -> Tensor:
        if not self._ranks.are_many:
            return mean_of(terms)
        parts = [
            weight * values.sum() / size for (weight, values), size in zip(terms, sizes, strict=True) if size
        ]
        return sum(parts[1:], parts[0]) if parts else torch.zeros(())


def _check_norms(run: Run) -> None:
    for name, module in run.model.named_modules():
        mixes = isinstance(module, _BatchNorm)
        moves = isinstance(module, _NormBase) and module.track_running_stats
        if module.training and (mixes or moves) and isinstance(run.ranks, MeshRanks):
            raise NotImplementedError(
                f"{run.method}: model must not be sharded while its {name} normalises the samples of a batch "
                "together: every rank would take those of its own batch alone; gradient_masking leaves such "
                "statistics as they are (freeze_norm_stats=True)"
            )
        if module.training and (mixes or moves):
            raise NotImplementedError(
                f"{run.method}: process_group must be None for a model whose {name} normalises the samples "
                "of a batch together: every rank would take those of its own batch alone. Methods that leave "
                "such statistics as they are run on many ranks (gradient_masking, pgu, gradient_ascent, "
                "neg_grad_plus, random_label, bad_teacher, scrub)"
            )


def _of_optimizer(optimizer: Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


class _Gradients:
    """Fills ``.grad`` of some parameters alone, so that those to be left alone need not be marked as frozen.

    Args:
        model: The model.
        parameters: The parameters; None: all that a loss depends on.
    """

    def __init__(self, model: nn.Module, parameters: Iterable[Tensor] | None) -> None:
        self._named = self._parameters = None if parameters is None else list(parameters)
        self._of_model = list(model.parameters())
        self._is_checked = False

    def compute(self, loss: Tensor) -> None:
        if self._parameters is not None and not self._is_checked:
            self._is_checked = True
            if has_reentrant_checkpoint(loss):  # which autograd.grad does not support
                self._parameters = None
        if self._parameters is None:
            loss.backward()  # type: ignore[no-untyped-call]
            for own in self._of_model:
                if own.grad is not None and own.grad.layout != torch.strided:
                    own.grad = own.grad.to_dense()
            return
        grads = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        for parameter, grad in zip(self._parameters, grads, strict=True):
            if grad is not None and grad.layout != torch.strided:
                grad = grad.to_dense()  # Adam and weight decay take no sparse ones
            if grad is not None and grad.stride() != parameter.stride():
                # Laid out like the parameter, as backward() leaves it.
                grad = torch.empty_like(parameter, dtype=grad.dtype).copy_(grad)
            parameter.grad = grad

    @property
    def parameters(self) -> list[Tensor]:
        """The parameters, where they have been named."""
        assert self._named is not None
        return self._named

    def of(self, loss: Tensor | None) -> list[Tensor | None]:
        """Return the gradients of a rank, for which nothing is marked and no hook of a wrapper runs.

        Args:
            loss: What this rank has; None if nothing.

        Returns:
            One per parameter; None where it is not used.
        """
        if loss is None or not loss.requires_grad:
            return [None] * len(self.parameters)
        if has_reentrant_checkpoint(loss):
            raise NotImplementedError(
                "process_group must be None for a model with reentrant checkpoints; make them with "
                "use_reentrant=False"
            )
        found: list[Tensor | None] = []
        for parameter, grad in zip(
            self.parameters, torch.autograd.grad(loss, self.parameters, allow_unused=True), strict=True
        ):
            dense: Any = grad if grad is None or grad.layout == torch.strided else grad.to_dense()
            if dense is not None:
                dense = torch.empty_like(parameter, dtype=dense.dtype).copy_(dense)
            found.append(dense)
        return found


def has_reentrant_checkpoint(loss: Tensor) -> bool:
    """Say whether a reentrant activation checkpoint stands in a loss's graph.

    Args:
        loss: Any tensor that is differentiated.

    Returns:
        True if so.
    """
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
