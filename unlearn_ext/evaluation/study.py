"""One comparison at work: one row after the other, each run and measured."""

from __future__ import annotations

import inspect
import logging
import math
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.copies import copied
from unlearn_ext._internal.digests import weights_digest
from unlearn_ext._internal.names import layer_name
from unlearn_ext._internal.plain import callable_name
from unlearn_ext._internal.seeding import seeded
from unlearn_ext.evaluation.audit import Audit, judged
from unlearn_ext.evaluation.audit_rows import Trained
from unlearn_ext.evaluation.cache import Cache, keeping
from unlearn_ext.evaluation.evidence import environment
from unlearn_ext.evaluation.keys import NoKeyError
from unlearn_ext.evaluation.margins import Rows
from unlearn_ext.evaluation.metrics.distances import layer_distance
from unlearn_ext.evaluation.metrics.measures import Measure, attempt, reason_of
from unlearn_ext.evaluation.metrics.registry import Metric, Subject
from unlearn_ext.evaluation.references import References
from unlearn_ext.evaluation.rows import FORMAT, LOSS_EDGES, Job, Row, described, read_row, row_text
from unlearn_ext.evaluation.sets import Sets
from unlearn_ext.evaluation.settings import accepts
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks import Task, resolve
from unlearn_ext.tasks.batches import Batches, device_of, read_batches

_log = logging.getLogger(__name__)


class Study:
    """Runs and measures, one row at a time."""

    def __init__(
        self,
        original: nn.Module,
        sets: Sets,
        task: Task | None,
        metrics: Sequence[Metric],
        references: References,
        cache: Cache,
    ) -> None:
        self._original = original
        self._sets = sets
        self._task = task
        self._metrics = [entry for entry in metrics if entry.needs is None or entry.needs in sets.tests]
        self._references = references
        self._cache = cache
        self._weights = weights_digest(original)
        self._norms = {name: float(p.detach().double().norm()) for name, p in original.named_parameters()}
        self._classes = sorted({type(module) for module in original.modules()}, key=callable_name)
        self._reference_rows: dict[int, Row] = {}
        self.columns = tuple(entry.name for entry in self._metrics)

    def facts(self) -> dict[str, Any]:
        """Return what is compared.

        Returns:
            Plain values by name.
        """
        return {
            "samples": self._sets.sizes,
            "forget_classes": self._sets.classes,
            "task": self._sets.task if self._task is not None else f"{self._sets.task}, inferred",
            "model": callable_name(type(self._original)),
            "parameters": sum(p.numel() for p in self._original.parameters()),
            "layers": {
                layer: type(self._original.get_submodule(layer)).__name__
                for layer in dict.fromkeys(map(layer_name, self._norms))
                if not isinstance(getattr(self._original, layer, None), nn.Parameter)
            },
            "weights": self._weights,
            "reference": self._references.story,
            "environment": environment(self._original),
        }

    def row(self, job: Job, seed: int) -> tuple[Row, bool]:
        """Make a row, or take it from the cache. The reference of a seed must come first.

        Args:
            job: What to make it of.
            seed: Decides every random choice.

        Returns:
            The row, and whether it comes from the cache.
        """
        path = self._path(job, seed)
        row = read_row(path, job.label)
        found = row is not None
        if row is None:
            row = self._run(job, seed)
            if path is not None and row.why is None:
                with keeping(path) as draft:
                    draft.write_text(row_text(row), encoding="utf-8")
        if job.kind == "reference":
            self._reference_rows[seed] = row
        return row, found

    def why_not_kept(self, job: Job, seed: int) -> str | None:
        """Say why a row cannot be kept in the cache.

        Args:
            job: What the row is made of.
            seed: Its seed.

        Returns:
            What stands in the way; None if nothing does, or if there is no cache.
        """
        try:
            self._named_path(job, seed)
        except NoKeyError as error:
            return str(error)
        return None

    def audited(self, jobs: Sequence[Job], n_models: int) -> Audit:
        """Hold every method's margins against those of many retrained networks.

        Args:
            jobs: Rows; those that run a method take part.
            n_models: Networks of each kind.

        Returns:
            The figures.
        """
        data = {name: self._sets.all[name] for name in ("forget", "retain")}
        rows = Rows(
            self._original,
            {**data, "validation": self._sets.all["test"]},
            resolve(self._task, who="compare"),
            self._cache,
        )
        return judged(
            {
                job.label: (job.function, self._with_recipe(job, job.settings))
                for job in jobs
                if job.function is not None
            },
            Trained(self._references, self._sets.fingerprints["retain"]),
            self._original,
            rows,
            n_models,
            say=_log.info,
            task=self._sets.task,
        )

    def _with_recipe(self, job: Job, settings: Mapping[str, Any]) -> dict[str, Any]:
        # Where a method retrains, it is given what the references are trained by.
        accepted = () if job.function is None else inspect.signature(job.function).parameters
        recipe = self._references.recipe()
        given = {name: value for name, value in recipe.items() if name in accepted or job.name == "retrain"}
        return {**given, **settings}

    def _path(self, job: Job, seed: int) -> Path | None:
        try:
            return self._named_path(job, seed)
        except NoKeyError:
            return None

    def _named_path(self, job: Job, seed: int) -> Path | None:
        if not self._cache.is_on:
            return None
        return self._cache.path("row", ".json", **self._key_facts(job, seed))

    def _run(self, job: Job, seed: int) -> Row:
        row = Row(job.label, job.kind, job.name, described(job.settings), seed)
        try:
            subject, seconds, result = self._subject(job, seed)
        except Exception as error:
            _log.debug("%s, seed %d failed", job.label, seed, exc_info=True)
            return replace(row, why=reason_of(error))
        reached = getattr(result, "reached", None)
        return replace(
            row,
            reached=reached,
            measures=self._figures(subject, seed, job.kind, seconds, reached),
            phases=dict(result.seconds) if result is not None else {},
            layers={} if job.kind == "reference" else self._layers(subject),
            loss_counts=self._loss_counts(subject),
        )

    def _subject(self, job: Job, seed: int) -> tuple[nn.Module, float | None, UnlearnResult | None]:
        if job.kind == "reference":
            return *self._references.get(seed), None
        if job.function is None:
            return self._original, 0.0, None
        subject = copied(self._original)
        settings = dict(job.settings)
        accepted = inspect.signature(job.function).parameters
        if "generator" in accepted and "generator" not in settings:
            settings["generator"] = torch.Generator().manual_seed(seed)
        if self._task is not None and accepts(job.name, job.function, "task"):
            settings.setdefault("task", self._task)
        settings = self._with_recipe(job, settings)
        sets = self._sets.all
        with seeded(seed, *sets.values()), _warnings_of(job):
            started = time.perf_counter()
            result = job.function(subject, sets["forget"], sets["retain"], **settings)
            if device_of(subject).type == "cuda":
                torch.cuda.synchronize(device_of(subject))
            seconds = time.perf_counter() - started
        return subject, seconds, result if isinstance(result, UnlearnResult) else None

    def _figures(
        self, model: nn.Module, seed: int, kind: str, seconds: float | None, reached: bool | None
    ) -> dict[str, Measure]:
        figures: dict[str, Measure] = {}
        theirs = self._reference_rows.get(seed)
        subject = Subject(
            model=model,
            original=self._original,
            task=self._task,
            sets=self._sets.all,
            tests=self._sets.tests,
            is_reference=kind == "reference",
            seconds=seconds,
            reached=reached,
            reference=lambda: self._references.get(seed)[0],
            reference_figures={} if theirs is None else theirs.measures,
            reference_why=None if theirs is None else theirs.why,
            figures=figures,
        )
        for entry in sorted(self._metrics, key=lambda entry: entry.kind == "summary"):
            with seeded(seed, *self._sets.all.values()):
                figures[entry.name] = attempt(entry.function, subject)
        return {name: figures[name] for name in self.columns}

    def _layers(self, subject: nn.Module) -> dict[str, float | None]:
        try:
            moved = layer_distance(subject, self._original, relative=False)
        except ValueError:  # a method that replaces parameters has no counterpart for them
            return {}
        squares: dict[str, list[float]] = {}
        for name, distance in moved.items():
            entry = squares.setdefault(layer_name(name), [0.0, 0.0])
            entry[0] += distance**2
            entry[1] += self._norms[name] ** 2
        return {
            layer: math.sqrt(distance / norm) if norm else (None if distance else 0.0)
            for layer, (distance, norm) in squares.items()
        }

    def _loss_counts(self, subject: nn.Module) -> dict[str, list[int]]:
        counts = {}
        for name, data in (("forget", self._sets.all["forget"]), ("test", self._sets.unseen)):
            try:
                with seeded(0, *self._sets.all.values()):
                    counts[name] = _histogram(self._losses(subject, data))
            except (TypeError, ValueError, NotImplementedError):  # no labels; the figures above say so
                _log.debug("there are no losses on the %s set", name, exc_info=True)
            except Exception as error:
                warnings.warn(f"compare: there are no losses on the {name} set: {error}", stacklevel=2)
        return counts

    def _losses(self, model: nn.Module, data: Batches) -> Tensor:
        loss = resolve(self._task, who="compare").loss
        with borrowed(model), torch.no_grad():
            parts = [loss(model, batch).cpu() for batch in read_batches(data, device_of(model))]
        return torch.cat(parts).double()

    def _key_facts(self, job: Job, seed: int) -> dict[str, object]:
        return {
            "format": FORMAT,
            "kind": job.kind,
            "method": job.name,
            "function": job.function,
            "settings": job.settings,
            "seed": seed,
            "weights": self._weights,
            # The same weights in other code are another model.
            "model": [repr(self._original), *self._classes],
            "data": self._sets.fingerprints,
            "task": self._task,
            "reference": self._references.key(seed),
            # What is in the registry goes with the version; functions of the caller count by their code.
            "metrics": {entry.name: entry.given for entry in self._metrics},
            "environment": environment(self._original),
        }


@contextmanager
def _warnings_of(job: Job) -> Iterator[None]:
    # A control that forgets nothing or does harm is no news: its row says so, under its own label. A warning
    # would name the method it controls for, which did neither.
    if job.kind != "control":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        yield


def _histogram(values: Tensor) -> list[int]:
    inside = values[torch.isfinite(values)].clamp(LOSS_EDGES[0], LOSS_EDGES[-1] * (1 - 1e-9))
    counts, _ = np.histogram(inside.numpy(), np.array(LOSS_EDGES))
    counts[-1] += int((~torch.isfinite(values)).sum())
    return cast("list[int]", counts.tolist())
