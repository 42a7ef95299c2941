"""Kronecker factors of models that FSDP2 has sharded: whole on every rank, of all ranks' data.

The factors are made of activations and of the gradients of outputs, which no sharding touches: each rank
takes them off its own passes, and the totals are added up at the end. What differs from one process: plain
backward passes, whose collectives all ranks share, in place of gradients of single edges; and the proof of
what a layer shows is made where its weight's gradient arises, before it is freed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.names import plain_name
from unlearn_ext._internal.undo import handles
from unlearn_ext.distributed import MeshRanks
from unlearn_ext.distributed.fsdp import reshard
from unlearn_ext.distributed.fsdp_steps import steps
from unlearn_ext.fisher.kfac import KroneckerFactors
from unlearn_ext.fisher.kfac_layers import Factored
from unlearn_ext.fisher.kfac_pass import (
    FLAT,
    PROBE,
    TEMPERATURE,
    Watch,
    WatchedLayer,
    close_to,
    drawn_from,
)
from unlearn_ext.fisher.sharded import ShardedLockstep
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches
from unlearn_ext.tasks.losses import LossFn

LARGEST = 16 << 30
"""Bytes of factors that a rank may be asked to hold."""


def sharded_factors(
    model: nn.Module,
    data: Batches,
    task: Task,
    ranks: MeshRanks,
    loss_fn: LossFn | None,
    generator: torch.Generator | None,
    gradients: str,
    *,
    progress: bool,
) -> KroneckerFactors:
    """Sum the factors of a sharded model over all ranks' data; see ``kfac_factors``.

    Args:
        model: The model.
        data: This rank's batches, perhaps none.
        task: The task, with its loss.
        ranks: Those of the model's mesh.
        loss_fn: Whose gradients are taken, at the labels there are; None: the task's, at drawn labels.
        generator: For the draws, this rank's own.
        gradients: What they are called.
        progress: Show a progress bar.

    Returns:
        The factors, with the same bits on every rank.

    Raises:
        NotImplementedError: If they would take more than ``LARGEST`` bytes.
        ValueError: If no rank has a sample, or no layer can be covered.
        FloatingPointError: If a loss or a total is not finite, on every rank.
    """
    n_samples = 0
    watch: ShardedWatch | None = None
    sharded = ranks.begin("factors")
    with sharded.resharded(), borrowed(model):
        for step in steps(
            sharded,
            data,
            task,
            sharded.device,
            call=task.forward if loss_fn is None else task.loss,
            description="Kronecker factors",
            progress=progress,
        ):
            if watch is None:
                watch = ShardedWatch(model, task, step.batch, ranks, is_drawn=loss_fn is None)
            with watch.recording():
                with ranks.in_pass(task):
                    found = (
                        task.forward(model, step.batch)
                        if loss_fn is None
                        else task.sample_losses(model, step.batch)
                    )
                if loss_fn is None:
                    drawn = drawn_from(found, task, step.batch, generator, TEMPERATURE)
                    loss = task.losses(found, drawn).sum()
                else:
                    loss = cast("Tensor", found).sum()
                if not bool(torch.isfinite(loss)):
                    raise FloatingPointError(
                        f"kfac_factors: the loss must be finite, got {loss.item()} in batch {step.index}"
                    )
                ranks.exchange("loss", None)
                watch.take_pass(loss, step.n if step.is_live else 0)
            n_samples += step.n if step.is_live else 0
        (n_samples,) = ranks.total("samples", n_samples)
        if n_samples == 0 or watch is None:
            raise ValueError("kfac_factors: data must hold at least one sample on some rank, got none")
        watch.join(ranks)
        return watch.result(n_samples, gradients)


@dataclass
class _Use:
    # One call of a layer.
    inputs: Tensor
    grad: Tensor | None = None

    def take(self, grad: Tensor | None) -> None:
        # None: of a backward function that answers nothing.
        self.grad = None if grad is None else grad.detach()


class ShardedWatch(Watch):
    """The layers of a sharded model; see ``Watch``. What one rank leaves out, all leave out.

    Args:
        model: The model, borrowed, with its shards in place.
        task: What it is for.
        batch: Some samples, of every rank its own.
        ranks: Those of the model's mesh.
        is_drawn: Labels are drawn.
    """

    def __init__(
        self, model: nn.Module, task: Task, batch: Batch, ranks: MeshRanks, *, is_drawn: bool
    ) -> None:
        self._ranks = ranks
        self._leaves = ranks.sharded.leaves()
        self._seen: dict[nn.Module, list[_Use]] = {}
        super().__init__(model, task, batch, is_drawn=is_drawn)

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Note inputs and output gradients of the layers that run inside, backward passes included."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
            inputs = args[0] if args else kwargs.get("input", kwargs.get("x"))
            if isinstance(output, Tensor) and output.requires_grad and isinstance(inputs, Tensor):
                use = _Use(inputs.detach())
                self._seen[module].append(use)
                output.register_hook(use.take)  # type: ignore[no-untyped-call]

        self._seen = {module: [] for module in self._layers}
        with handles() as hooks:
            hooks.extend(module.register_forward_hook(hook, with_kwargs=True) for module in self._layers)
            yield

    def take_pass(self, loss: Tensor, n: int) -> None:
        """Run a recorded pass backward, on all ranks at once, and add what the layers have shown.

        Args:
            loss: A sum over samples.
            n: Their number; 0 where the pass counts for nothing.
        """
        self._backward(loss, {})
        for module, layer in list(self._layers.items()) if n else []:
            sums = None
            for use in self._used(module):
                if len(use.grad) != n or len(use.inputs) != n:
                    self._drop(layer, f"its output must have {n} samples along the leading dimension")
                    break
                layer.factored.add_inputs(layer.totals, use.inputs)
                found = layer.factored.position_sums(use.inputs, use.grad)
                sums = found if sums is None else sums + found
            else:
                if sums is not None:
                    layer.totals.add_outputs(sums)
        self._seen.clear()

    def _make(self, found: list[tuple[str, Factored]]) -> None:
        sizes = {
            name: 8 * sum(torch.Size(shape).numel() for shape in factored.sizes.values())
            for name, factored in found
        }
        if sum(sizes.values()) > LARGEST:
            largest = sorted(sizes, key=lambda name: -sizes[name])[:3]
            told = ", ".join(f"{name} ({sizes[name] / 2**30:.1f} GiB)" for name in largest)
            raise NotImplementedError(
                f"kfac_factors: factors must take at most {LARGEST / 2**30:g} GiB, since every rank holds "
                f"them whole, got {sum(sizes.values()) / 2**30:.1f} GiB; leave the largest out, by "
                f"requires_grad_(False) on their weights or exclude= of newton: {told}"
            )
        device = self._ranks.sharded.device
        for name, factored in found:
            totals = factored.new_totals(device)
            self._layers[factored.module] = WatchedLayer(name, factored, totals)

    def _backward(self, loss: Tensor, chosen: Mapping[str, tuple[WatchedLayer, str]]) -> None:
        sharded = self._ranks.sharded
        with self._ranks.in_collectives():
            lockstep = ShardedLockstep(sharded, self._leaves, list(chosen))
            lockstep.gradients(loss, lambda name, grad: self._check(*chosen[name], grad), (), None)
            reshard(sharded.model)

    def _used(self, module: nn.Module) -> list[Any]:
        return [use for use in self._seen.get(module, []) if use.grad is not None]

    def _probe(self, batch: Batch, is_drawn: bool) -> None:
        model, task, ranks = self._model, self._task, self._ranks
        n = min(PROBE, task.count(batch))
        few = task.select(batch, range(n))
        if is_drawn:
            with torch.no_grad(), ranks.in_pass(task):
                outputs = task.forward(model, few)
            few = drawn_from(outputs, task, few, torch.Generator().manual_seed(0), FLAT)
            ranks.exchange("draws", None)
            reshard(model)
        ends = [(sample, task.select(few, [sample])) for sample in (0, n - 1)]
        self._reasons: dict[str, str] = {}
        self._arrived: set[str] = set()
        chosen = {
            plain_name(f"{layer.name}.{part}" if layer.name else part): (layer, part)
            for layer in self._layers.values()
            for part in layer.factored.parameters
        }
        seen = []
        for part, count in ((few, n), *((part, 1) for _, part in ends)):
            with self.recording():
                with ranks.in_pass(task):
                    values = (
                        task.losses(task.forward(model, part), part) if is_drawn else task.loss(model, part)
                    )
                if not values.requires_grad:
                    raise ValueError("kfac_factors: the model's output must depend on a trainable parameter")
                ranks.exchange("probe", None)
                self._backward(values.sum(), chosen if part is few else {})
            seen.append({module: self._used(module) for module in self._layers})
            for module, uses in seen[-1].items():
                if any(len(use.inputs) != count or len(use.grad) != count for use in uses):
                    self._object(self._layers[module], "samples do not lie along the leading dimension")
        for module, layer in self._layers.items():
            for (sample, _), alone in zip(ends, seen[1:], strict=True):
                self._compare(layer, sample, seen[0][module], alone[module])
        self._seen.clear()
        told: dict[str, str] = {}
        for each in ranks.exchange("reasons", self._reasons):
            told = {**each, **told}
        for layer in list(self._layers.values()):
            if layer.name in told:
                self._drop(layer, told[layer.name])

    def _compare(self, layer: WatchedLayer, sample: int, together: list[_Use], alone: list[_Use]) -> None:
        # What one sample shows alone must be what it shows among others.
        if not together or not alone:
            if sample == 0 and layer.name in self._arrived:
                self._object(layer, "its weight is used outside of its own call")
            return  # it may run in another batch
        own = slice(sample, sample + 1)
        if len(together) != len(alone) or not all(
            close_to(a.inputs[own], b.inputs)
            and close_to(cast("Tensor", a.grad)[own], cast("Tensor", b.grad))
            for a, b in zip(together, alone, strict=True)
        ):
            self._object(layer, "its samples depend on each other")

    def _check(self, layer: WatchedLayer, part: str, true: Tensor) -> None:
        # Called where the gradient arises: inputs and output gradients must make it up.
        self._arrived.add(layer.name)
        total: Tensor | None = None
        with torch.enable_grad():
            for use in self._used(layer.factored.module):
                values = layer.factored.stand_ins(true)
                inputs = use.inputs.to(true.dtype) if use.inputs.is_floating_point() else use.inputs
                with layer.factored.standing_in(values):
                    output = layer.factored.plain_call(inputs)
                if output.shape != use.grad.shape:
                    total = None
                    break
                (found,) = torch.autograd.grad(output, values[part], use.grad.to(output.dtype))
                total = found if total is None else total + found
        if total is None or not close_to(total, true.to_dense()):
            self._object(layer, "its weight is used outside of its own call, or not as its kind does")

    def _object(self, layer: WatchedLayer, why: str) -> None:
        self._reasons.setdefault(layer.name, why)
