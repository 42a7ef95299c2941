"""Training steps of a model that FSDP2 has sharded: all ranks' batches together, whoever has some."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unlearn_ext._internal.names import parameters_by_name
from unlearn_ext.distributed import MeshRanks
from unlearn_ext.distributed.forward import try_up_to_model
from unlearn_ext.fisher.sharded_gradients import ShardedGradients, weighted
from unlearn_ext.methods.common import is_nothing
from unlearn_ext.methods.loop import Objective, Terms, has_reentrant_checkpoint, terms_of
from unlearn_ext.methods.run import Run
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, map_tensors, moved

# Samples of another rank's that a rank goes along with where it has never had any of a set.
_FEW = 2

_SETS = {"both": ("forget", "retain"), "forget": ("forget",), "retain": ("retain",)}
"""What a batch is for, and the sets that its parts are of."""

_Parts = tuple[Batch | None, ...]


class ShardedSteps:
    """Steps over batches that say what they are for: ``("both", forget, retain)``, ``("forget", forget)``...

    Every forward and backward pass is a collective. So a rank that lacks a batch of a set goes along with the
    last it had, or with a few samples of another rank's, and that counts for nothing. Gradients are sums over
    ranks, every term weighted by its samples on all of them: the step of one process on all batches.

    Args:
        run: The run.
        objective: One term per part of a batch.
        parameters: What is trained.
        task: Counts and selects samples.
    """

    def __init__(self, run: Run, objective: Objective, parameters: Iterable[Tensor], task: Task) -> None:
        assert isinstance(run.ranks, MeshRanks)
        self._run, self._ranks, self._objective, self._task = run, run.ranks, objective, task
        sharded = self._ranks.begin("training")
        wanted = {id(parameter) for parameter in parameters}
        self._parameters: Mapping[str, Tensor] = {
            name: p for name, p in parameters_by_name(run.model).items() if id(p) in wanted
        }
        self._gradients = ShardedGradients(sharded, self._parameters)
        self._last: dict[str, Batch] = {}  # of every set, to go along with

    def begin(self, reader: Iterable[Batch], where: str) -> None:
        """Begin an epoch.

        Args:
            reader: This rank's batches.
            where: For messages.
        """
        self._reader: Iterator[Batch] = iter(reader)
        self._where, self._index, self._held = where, -1, False
        self._seen: dict[str, int] = {}

    def loss(self, optimizer: Optimizer) -> Tensor | None:
        """Fill the gradients for the next step.

        Args:
            optimizer: Its gradients are set.

        Returns:
            The loss of all ranks' batches together; None where no rank has one left.

        Raises:
            FloatingPointError: If it is not finite on some rank.
        """
        while True:
            batch = None if self._held else next(self._reader, None)
            self._held = self._held or (isinstance(batch, tuple) and not batch)
            tagged = None if batch is None or self._held else cast("tuple[Any, ...]", batch)
            kinds = self._ranks.exchange("batch", (None if tagged is None else tagged[0], self._held))
            kind = next((each for each, _ in kinds if each is not None), None)
            if kind is not None:
                return self._step(kind, tagged, optimizer)
            if not any(held for _, held in kinds):
                return None
            self._held = False

    def end(self) -> None:
        """End an epoch.

        Raises:
            ValueError: If a set has had no sample on any rank.
        """
        missing = sorted(name for name, count in self._seen.items() if not count)
        if missing:
            raise ValueError(
                f"{self._run.method}: {missing[0]} must hold a sample on some rank, got none in {self._where}"
            )

    def _step(self, kind: str, tagged: tuple[Any, ...] | None, optimizer: Optimizer) -> Tensor:
        optimizer.zero_grad()
        sets = _SETS[kind]
        parts: _Parts = (None,) * len(sets) if tagged is None else tuple(map(self._counted, tagged[1:]))
        self._index += tagged is not None
        self._try(kind, sets, parts)
        company = self._company(sets, parts)
        with self._ranks.sharded.resharded(), self._gradients.watching() as marks:
            terms = self._terms((kind, *company))
            loss, total = self._weighted(sets, parts, terms)
            with self._ranks.in_collectives():
                self._gradients.clear()
                self._gradients.add(loss, marks)
        for name, parameter in self._parameters.items():
            is_used = name in self._gradients.used
            # A copy: the sums are added up anew in the next step.
            grad = self._gradients.sums[name].to(parameter.dtype, copy=True) if is_used else None
            parameter.grad = grad
        return torch.tensor(total, device=self._ranks.sharded.device)

    def _terms(self, tagged: tuple[Any, ...]) -> Terms:
        # Every part is one forward pass, in their order.
        with self._ranks.in_pass(self._task, tagged[1:]):
            return terms_of(self._objective(self._run.model, tagged))

    def _counted(self, part: Batch) -> Batch | None:
        return None if is_nothing(part) or not self._task.count(part) else part

    def _try(self, kind: str, sets: tuple[str, ...], parts: _Parts) -> None:
        # What fails before the model is called on any of the parts.
        own = zip(sets, parts, strict=True)
        known = [self._last.get(name) if part is None else part for name, part in own]
        is_whole = all(part is not None for part in known)
        for place, part in enumerate(parts):
            call = None
            if is_whole and place == 0:  # the objective calls the model on the first before anything else

                def call(model: nn.Module, _: Batch) -> object:
                    return self._objective(model, (kind, *known))

            if part is not None:
                try_up_to_model(self._run.model, self._task, part, call)

    def _company(self, sets: tuple[str, ...], parts: _Parts) -> list[Batch]:
        # Something to go along with for every part.
        self._last.update((name, part) for name, part in zip(sets, parts, strict=True) if part is not None)
        told = self._ranks.exchange("company", [name in self._last for name in sets])
        for place, name in enumerate(sets):
            has = [flags[place] for flags in told]
            if not any(has):
                raise ValueError(
                    f"{self._run.method}: {name} must hold a sample on some rank, got none in {self._where}"
                )
            if not all(has):
                few = self._few(self._last[name]) if self._ranks.rank == has.index(True) else None
                found = cast("Batch", self._ranks.first(f"samples of {name}", few))
                self._last.setdefault(name, moved(found, self._ranks.sharded.device))
        return [self._last[name] for name in sets]

    def _few(self, batch: Batch) -> Batch:
        n = min(_FEW, self._task.count(batch))
        return map_tensors(lambda tensor: tensor.cpu(), self._task.select(batch, list(range(n))))

    def _weighted(self, sets: tuple[str, ...], parts: _Parts, terms: Terms) -> tuple[Tensor, float]:
        # What this rank minimises, and the loss of all of them.
        own: list[tuple[int, float]] = []
        for (weight, values), part in zip(terms, parts, strict=True):
            total = float((weight * values.detach().double()).sum())
            if not torch.isfinite(torch.tensor(total)):
                raise FloatingPointError(
                    f"{self._run.method}: the loss must be finite, got {total} in {self._where}, batch "
                    f"{self._index}"
                )
            own.append((len(values) if values.ndim else 1, total) if part is not None else (0, 0.0))
        if terms and has_reentrant_checkpoint(terms[0][1]):
            raise NotImplementedError(
                f"{self._run.method}: a sharded model must not have reentrant checkpoints; make them with "
                "use_reentrant=False"
            )
        told = self._ranks.exchange("terms", own)
        sizes = [sum(each[place][0] for each in told) for place in range(len(terms))]
        for name, size in zip(sets, sizes, strict=True):
            self._seen[name] = self._seen.get(name, 0) + size
        factors = [1 / size if part is not None else 0.0 for size, part in zip(sizes, parts, strict=True)]
        loss = weighted(
            (factor * weight, values) for factor, (weight, values) in zip(factors, terms, strict=True)
        )
        sums = [sum(each[place][1] for each in told) for place in range(len(terms))]
        return loss, sum(total / size for total, size in zip(sums, sizes, strict=True) if size)
