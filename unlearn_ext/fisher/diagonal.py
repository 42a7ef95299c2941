"""How much each scalar parameter matters to a data set: the diagonal of the Fisher information, and its kin.

Every estimator here is a mean of powers of gradients; they differ in which gradients. See
``fisher_diagonal``.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.chosen import Params, Patterns, check_floating, chosen_parameters
from unlearn_ext._internal.fingerprint import weights_fingerprint
from unlearn_ext._internal.modules import check_made, check_not_flattened
from unlearn_ext.distributed import Group, MeshRanks, Ranks, lockstep_or_sharded, ranks_of
from unlearn_ext.distributed.agree import refuse_group_of_shards
from unlearn_ext.distributed.fsdp import fsdp_modules
from unlearn_ext.fisher.engine import (
    PerSample,
    PerSampleLoss,
    add_gradient,
    check_parameters,
    forget,
    prepared,
    unwritten,
)
from unlearn_ext.fisher.engine import register_layer as register_layer
from unlearn_ext.fisher.importance import Estimator, Importance, check_estimator, joined_coverage, loss_name
from unlearn_ext.resume import Progress
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches, check_batches, device_of
from unlearn_ext.tasks.losses import LossFn, resolve


@lockstep_or_sharded
def fisher_diagonal(
    model: nn.Module,
    data: Batches,
    *,
    task: Task | None = None,
    loss_fn: LossFn | None = None,
    estimator: Estimator = "per_sample",
    power: int = 2,
    params: Params = None,
    include: Patterns = None,
    exclude: Patterns = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    process_group: Group = None,
    checkpoint: str | os.PathLike[str] | None = None,
    checkpoint_every: int = 200,
) -> Importance:
    """Estimate the diagonal of the Fisher information of every trainable parameter.

    With g_n the gradient of sample n's own loss:

        per_sample   F = (1/N) sum_n |g_n|^power               the empirical Fisher
        mc           the same, with targets drawn from softmax(model(inputs))      the true Fisher
        batch        F = (1/B) sum_b |gradient of the mean loss of batch b|^power

    ``per_sample`` does not depend on the batch size, on the order or on a ragged last batch, and is exact for
    any architecture. ``batch`` depends on all of them; it is what the published code of selective synaptic
    dampening computes, and is here for comparison with it only.

    Parameters that PyTorch's own functions use (linear, convolution, lookup, norm functions, sums, products)
    cost one forward and backward pass per batch, in which every sample's gradient is squared as it arises and
    none is stored; ``coverage`` calls them ``"fused"``. The first call on a model makes sure, on a few
    samples, that plain autograd agrees. What it does not agree with, and what autograd cannot look into, is
    computed sample by sample, and ``coverage`` says why. ``register_layer`` adds rules for layers with
    functions of their own.

    With a model that FSDP2 (``fully_shard``) has sharded, all ranks of its mesh call it together, each with
    its own share of the data: any number of batches, or none. The result is that of all data, in DTensors
    that are sharded like the parameters. No rank holds more gradients at a time than in a training step.

    The model runs in eval mode. Training flags, ``requires_grad``, ``.grad``, hooks, buffers and the global
    random state are as before afterwards, also after an exception or an interrupt.

    Args:
        model: Any model; parameters float32, float64, float16 or bfloat16. Frozen ones are left out, a tied
            one counts under its first name, one that gets no gradient gets zeros.
        data: Re-iterable batches; tensors are moved to the model's device.
        task: What the model is for; None infers it from the model and the batch. See ``ux.tasks``.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``, one loss per sample, in place of the task's.
        estimator: See above.
        power: 2 for squares, 1 for absolute values.
        params: Names of the parameters to look at; ``"adapters"``, those of PEFT's active adapters and of the
            modules that are trained and saved beside them; or ``"base"``, the weights underneath, frozen or
            not, with the adapters in effect. None: all trainable ones.
        include: Parameters to take of these: names of them or of their modules, the last parts of such names,
            or regular expressions that match a whole name, as in PEFT's ``target_modules``. None: all.
        exclude: Parameters to leave out, likewise.
        generator: For the draws of ``"mc"``. Without one the global random state is used, and put back: two
            calls draw the same targets.
        progress: Show a progress bar, where tqdm is installed.
        process_group: Ranks that call this together, each with its own share of the data (perhaps none; see
            ``ux.data.shard_batches``). Sums and counts are added up over them, once, at the end: the result
            is that of all data, the same on every rank to the bit. ``"mc"`` draws from a stream of each
            rank's own. A model in ``DistributedDataParallel`` is taken out of it.
        checkpoint: A file for the progress of the pass, so that the same call goes on where it was
            interrupted, even by a power cut, and comes to the same bits. Of many ranks each keeps its own,
            with its number in the name. SIGTERM is held back until the next batch is done and written. The
            file stays when the pass is over, and the same call then only reads the data to see that they are
            the same; it derives from the data, so delete it with them. Needs safetensors.
        checkpoint_every: Batches from one writing to the next. Each costs as much as the proof of a first
            call.

    Returns:
        The importances, on the parameters' devices; float32, float64 for double parameters.

    Raises:
        ValueError: If ``data`` is empty or a one-shot iterator, no parameter is trainable or left, ``params``
            names an unknown or frozen one, or adapters that are merged, disabled or not there, the loss is
            not one value per sample or does not depend on the parameters, or ``"mc"`` finds no targets it
            could replace; if ``checkpoint`` is damaged, or of other data, weights or settings.
        TypeError: If a parameter is of another dtype (quantised, say).
        FloatingPointError: If a loss is NaN or infinite, the message names the batch; or an importance is.
        NotImplementedError: If a parameter is sharded in another way than by FSDP2 (tensor parallelism, say),
            or on the meta device; of a sharded model also for ``"batch"``.
        RuntimeError: If the forward pass writes to a parameter.

    Source:
        Foster, Schoepf & Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic
        Dampening", AAAI 2024; Kunstner, Balles & Hennig, "Limitations of the Empirical Fisher Approximation
        for Natural Gradient Descent", NeurIPS 2019, on the difference between the first two.

    Example:
        >>> model = nn.Linear(2, 3)
        >>> importance = fisher_diagonal(model, [(torch.randn(4, 2), torch.tensor([0, 1, 2, 0]))])
        >>> importance.n_samples, importance["weight"].shape
        (4, torch.Size([3, 2]))
    """
    check_estimator("fisher_diagonal", estimator, power)
    batches = check_batches(data)
    judge = resolve(task, loss_fn, who="fisher_diagonal")
    check_not_flattened(model, "fisher_diagonal")
    check_made(model, "fisher_diagonal")
    if fsdp_modules(model):
        from unlearn_ext.fisher.sharded_diagonal import sharded_diagonal

        if ranks_of(process_group, "fisher_diagonal").are_many and not isinstance(process_group, MeshRanks):
            refuse_group_of_shards("fisher_diagonal")
        mesh = process_group if isinstance(process_group, MeshRanks) else MeshRanks(model, "fisher_diagonal")
        with mesh.failing_together():
            return sharded_diagonal(
                model,
                batches,
                judge,
                mesh,
                estimator=estimator,
                power=power,
                params=params,
                include=include,
                exclude=exclude,
                generator=generator,
                progress=progress,
                checkpoint=checkpoint,
                checkpoint_every=checkpoint_every,
            )
    ranks = ranks_of(process_group, "fisher_diagonal")
    chosen = checked_parameters(model, params, include, exclude)
    check_parameters(chosen)
    tally = _Tally()
    kept = Progress(
        "fisher_diagonal",
        checkpoint,
        checkpoint_every,
        model=model,
        settings={
            "estimator": estimator,
            "power": power,
            "params": list(chosen),
            "loss": loss_name(judge),
            "task": repr(judge),
        },
        ranks=ranks,
    )
    with borrowed(model), unwritten(model) as guard:
        for parameter in chosen.values():  # borrowed puts the flags back
            if not parameter.requires_grad:
                parameter.requires_grad_(True)
        if estimator == "mc":
            generator = ranks.own_generator(generator)
        fisher = {
            name: torch.zeros_like(
                parameter.detach(), dtype=torch.float64 if parameter.dtype == torch.float64 else torch.float32
            )
            for name, parameter in chosen.items()
        }
        if kept.found is not None:
            tally = _Tally(**kept.found[1])
            for name, total in fisher.items():
                total.copy_(kept.found[0][name])

        def new_engine() -> _BatchGradients | PerSample:
            if estimator == "batch":
                return _BatchGradients(model, judge.loss, chosen, fisher, power, guard)
            if kept.is_kept:
                forget(model)
            own = judge.select if judge.has_own_select else None
            return PerSample(model, judge.loss, chosen, fisher, power, select=own, guard=guard)

        gradients = new_engine()

        def so_far() -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
            nonlocal gradients
            gradients.finish()
            tally.coverage = with_all_of(tally.coverage, gradients.coverage)
            gradients = new_engine()
            return fisher, asdict(tally)

        reader = kept.read(
            batches,
            device_of(model),
            save=so_far,
            generator=generator if estimator == "mc" else None,
            description="importance",
            progress=progress,
        )
        with closing(reader):  # type: ignore[type-var]
            for index, batch in reader:
                n = judge.count(batch)
                if n == 0:
                    continue
                if estimator == "mc":
                    with guard if not tally.n_batches else nullcontext():
                        batch = with_drawn_targets(model, judge, batch, index, generator)
                check_finite("loss", gradients.accumulate(batch, n), index)
                tally.add(n)
        gradients.finish()
    tally.coverage = with_all_of(tally.coverage, gradients.coverage)
    if ranks.are_many:
        tally = _joined(ranks, tally)
        ranks.sum_("importances", fisher.values())
    n_samples, n_batches = tally.n_samples, tally.n_batches
    if n_samples == 0:
        raise ValueError("fisher_diagonal: data must hold at least one sample, got none")
    torch._foreach_div_(list(fisher.values()), n_batches if estimator == "batch" else n_samples)
    _check_importances(fisher)
    return Importance(
        fisher,
        n_samples=n_samples,
        estimator=estimator,
        power=power,
        batch_size=tally.batch_size,
        n_batches=n_batches,
        coverage=tally.coverage,
        loss=loss_name(judge),
        weights_digest=weights_fingerprint(model),
    )


def _check_importances(fisher: Mapping[str, Tensor]) -> None:
    # Nothing is negative: the largest is finite if all are. One answer for all tensors of a kind.
    largest: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in fisher.values():
        if tensor.numel():
            largest.setdefault((tensor.device, tensor.dtype), []).append(tensor.max())
    if all(bool(torch.isfinite(torch.stack(values)).all()) for values in largest.values()):
        return
    for name, tensor in fisher.items():
        if not bool(torch.isfinite(tensor).all()):
            value = tensor[~torch.isfinite(tensor)][0].item()
            raise FloatingPointError(
                f"fisher_diagonal: importances must be finite, got {value} for {name}: a "
                "gradient is not finite, or too large to be raised to the power"
            )


@dataclass
class _Tally:
    # What a pass has read, and how it has computed what it has.
    n_samples: int = 0
    n_batches: int = 0
    batch_size: int = 0
    coverage: dict[str, str] = field(default_factory=dict)

    def add(self, n: int) -> None:
        self.n_samples += n
        self.n_batches += 1
        self.batch_size = max(self.batch_size, n)


def _joined(ranks: Ranks, mine: _Tally) -> _Tally:
    found = ranks.exchange("counts", mine)
    return _Tally(
        sum(each.n_samples for each in found),
        sum(each.n_batches for each in found),
        max(each.batch_size for each in found),
        functools.reduce(with_all_of, [each.coverage for each in found]),
    )


def with_all_of(a: dict[str, str], b: dict[str, str]) -> dict[str, str]:
    """Join how two parts of the data have been computed.

    Args:
        a: Coverage of one.
        b: Coverage of the other.

    Returns:
        The coverage of both.
    """
    # A part without data has covered nothing, and says nothing of how another has.
    names = dict.fromkeys([*a, *b])
    both = [{name: each.get(name, other.get(name, "")) for name in names} for each, other in ((a, b), (b, a))]
    return joined_coverage(*both)


class _BatchGradients:
    """Adds powers of the gradient of each batch's mean loss, inside ``borrowed(model)``."""

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFn,
        chosen: Mapping[str, Tensor],
        fisher: Mapping[str, Tensor],
        power: int,
        guard: AbstractContextManager[object],
    ) -> None:
        self._loss = PerSampleLoss(model, loss_fn)
        self._loss.surroundings = guard
        self._chosen, self._fisher, self._power = chosen, fisher, power
        why = "fallback: one plain gradient per batch is the estimator's definition"
        self.coverage = dict.fromkeys(fisher, why)

    def accumulate(self, batch: Batch, n: int) -> Tensor:
        with prepared(self._loss.model):
            values = self._loss.losses(batch, n, is_whole=True)
            self._loss.surroundings = None
            add_gradient(values.mean(), self._chosen, self._fisher, self._power)
        return values.detach()

    def finish(self) -> None:
        pass


def with_drawn_targets(
    model: nn.Module, task: Task, batch: Batch, index: int, generator: torch.Generator | None
) -> Batch:
    """Replace a batch's targets by some that are drawn from the model's own distribution.

    Args:
        model: The model, borrowed.
        task: What it is for.
        batch: A batch on its device.
        index: Its number, for messages.
        generator: Draws them.

    Returns:
        A batch of the same form.
    """
    with torch.no_grad():
        outputs = task.forward(model, batch)
        scores = task.log_scores(outputs, batch)
        check_finite("output of the model", scores.exp(), index)
        return task.sampled(outputs, batch, generator)


def checked_parameters(
    model: nn.Module, params: Params, include: Patterns, exclude: Patterns
) -> dict[str, nn.Parameter]:
    """Look up the parameters that importances are computed of.

    Args:
        model: The model.
        params: What the user passed.
        include: What the user passed.
        exclude: What the user passed.

    Returns:
        Plain name to parameter, in the model's order.

    Raises:
        TypeError: If one has another dtype.
    """
    chosen = chosen_parameters(model, "fisher_diagonal", params, include, exclude)
    check_floating(chosen, "fisher_diagonal")
    for name, parameter in chosen.items():
        if parameter.dtype not in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            raise TypeError(
                f"fisher_diagonal: {name} must be float32, float64, float16 or bfloat16, "
                f"got {parameter.dtype}"
            )
    return chosen


def check_finite(what: str, values: Tensor, index: int) -> None:
    """Refuse values that are not finite.

    Args:
        what: What they are.
        values: Any shape.
        index: Number of the batch.

    Raises:
        FloatingPointError: If one is NaN or infinite.
    """
    finite = torch.isfinite(values)
    if not bool(finite.all()):
        raise FloatingPointError(
            f"fisher_diagonal: the {what} must be finite, got {values[~finite][0].item()} in batch {index}"
        )
