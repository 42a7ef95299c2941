"""One comparison at work: one row after the other, each run and measured."""

from __future__ import annotations

import inspect
import json
import math
import time
from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.digests import weights_digest
from unlearn_ext._internal.names import layer_name
from unlearn_ext._internal.plain import callable_name, plain
from unlearn_ext._internal.seeding import seeded
from unlearn_ext._internal.files import write_text
from unlearn_ext.evaluation.cache import NoKeyError, key
from unlearn_ext.evaluation.evidence import environment
from unlearn_ext.evaluation.metrics.accuracy import accuracy
from unlearn_ext.evaluation.metrics.attacks import mia
from unlearn_ext.evaluation.metrics.distances import layer_distance
from unlearn_ext.evaluation.metrics.divergences import activation_distance, js_divergence
from unlearn_ext.evaluation.references import References
from unlearn_ext.evaluation.rows import (
    FORMAT,
    LOSS_EDGES,
    Job,
    Measure,
    Row,
    attempt,
    described,
    read_row,
    reason_of,
)
from unlearn_ext.evaluation.sets import Task
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks import losses
from unlearn_ext.tasks.batches import Batches, device_of, read_batches

_DISTANCES = {"js": js_divergence, "activation_distance": activation_distance}


class Study:
    """Runs and measures, one row at a time."""

    def __init__(
        self,
        original: nn.Module,
        task: Task,
        metrics: Mapping[str, Callable[[nn.Module], float] | None],
        references: References,
        cache: Path | None,
    ) -> None:
        self._original = original
        self._task = task
        self._metrics = metrics
        self._references = references
        self._cache = cache
        self._weights = weights_digest(original)
        self._norms = {name: float(p.detach().double().norm()) for name, p in original.named_parameters()}
        self._reference_rows: dict[int, Row] = {}
        columns: list[str] = []
        for name in metrics:
            parts = {"test": [*task.tests], "mia": ["mia_auc", "mia_tpr"]}
            columns += parts.get(name, [name])
        self.columns = (*columns, "changed", "seconds")

    def facts(self) -> dict[str, Any]:
        """Return what is compared.

        Returns:
            Plain values by name.
        """
        return {
            "samples": self._task.sizes,
            "forget_classes": self._task.classes,
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
                write_text(path, json.dumps(plain(asdict(row))))
        if job.kind == "reference":
            self._reference_rows[seed] = row
        return row, found

    def _run(self, job: Job, seed: int) -> Row:
        row = Row(job.label, job.kind, job.name, described(job.settings), seed)
        try:
            subject, seconds, result = self._subject(job, seed)
        except Exception as error:
            return replace(row, why=reason_of(error))
        measures = {**self._figures(subject, seed, job.kind)}
        measures["changed"] = (
            Measure(None, "it was trained afresh")
            if job.kind == "reference"
            else attempt(self._changed, subject)
        )
        measures["seconds"] = (
            Measure(None, "it was given, not trained here") if seconds is None else Measure(seconds)
        )
        return replace(
            row,
            measures=measures,
            phases=dict(result.seconds) if result is not None else {},
            layers={} if job.kind == "reference" else self._layers(subject),
            loss_counts=self._loss_counts(subject),
        )

    def _subject(self, job: Job, seed: int) -> tuple[nn.Module, float | None, UnlearnResult | None]:
        if job.kind == "reference":
            return *self._references.get(seed), None
        if job.function is None:
            return self._original, 0.0, None
        subject = deepcopy(self._original)
        settings = dict(job.settings)
        accepted = inspect.signature(job.function).parameters
        if "generator" in accepted and "generator" not in settings:
            settings["generator"] = torch.Generator().manual_seed(seed)
        for name, value in self._references.recipe().items():
            if name in accepted or job.name == "retrain":
                settings.setdefault(name, value)
        forget, retain = self._task.sets["forget"], self._task.sets["retain"]
        with seeded(seed, *self._task.sets.values()):
            started = time.perf_counter()
            result = job.function(subject, forget, retain, **settings)
            if device_of(subject).type == "cuda":
                torch.cuda.synchronize(device_of(subject))
            seconds = time.perf_counter() - started
        return subject, seconds, result if isinstance(result, UnlearnResult) else None

    def _figures(self, subject: nn.Module, seed: int, kind: str) -> dict[str, Measure]:
        sets = self._task.sets
        figures: dict[str, Measure] = {}
        for name, function in self._metrics.items():
            with seeded(seed, *sets.values()):
                if function is not None:
                    figures[name] = attempt(function, subject)
                elif name in ("retain", "forget"):
                    figures[name] = attempt(accuracy, subject, sets[name])
                elif name == "test":
                    for part, data in self._task.tests.items():
                        figures[part] = attempt(accuracy, subject, data)
                elif name == "mia":
                    figures |= self._attack(subject, seed, kind)
                elif name in _DISTANCES:
                    figures[name] = attempt(self._distance, _DISTANCES[name], subject, seed)
        if "gap" in self._metrics:
            figures["gap"] = attempt(self._gap, figures, seed, kind)
        return {name: figures[name] for name in self.columns if name in figures}

    def _distance(
        self, function: Callable[[nn.Module, nn.Module, Batches], float], subject: nn.Module, seed: int
    ) -> float:
        return function(subject, self._references.get(seed)[0], self._task.sets["forget"])

    def _attack(self, subject: nn.Module, seed: int, kind: str) -> dict[str, Measure]:
        names = ("mia_auc", "mia_tpr")
        try:
            attack = mia(subject, self._task.sets["retain"], self._task.sets["forget"], self._task.unseen)
        except Exception as error:
            return dict.fromkeys(names, Measure(None, reason_of(error)))
        theirs = self._reference_figure("mia_auc", seed) if kind != "reference" else None
        attack = replace(attack, reference_auc=theirs)
        note = None if attack.reference_auc is None else attack.verdict
        return {
            "mia_auc": Measure(attack.auc, None, *attack.auc_interval, note=note),
            "mia_tpr": Measure(attack.tpr, None, *attack.tpr_interval),
        }

    def _gap(self, figures: Mapping[str, Measure], seed: int, kind: str) -> float:
        if kind == "reference":
            return 0.0
        if self._reference_rows[seed].why is not None:
            raise LookupError(self._reference_rows[seed].why)
        pairs = [
            (figure.value, self._reference_figure(name, seed))
            for name, figure in figures.items()
            if name in ("retain", "forget", "mia_auc", *self._task.tests)
        ]
        gaps = [abs(ours - theirs) for ours, theirs in pairs if ours is not None and theirs is not None]
        if not gaps:
            raise LookupError("there is no accuracy and no AUC to compare")
        return sum(gaps) / len(gaps)

    def _reference_figure(self, name: str, seed: int) -> float | None:
        return self._reference_rows[seed].measures.get(name, Measure(None)).value

    def _changed(self, subject: nn.Module) -> float:
        before = dict(self._original.named_parameters())
        changed = sum(
            int((p.detach() != before[name].detach()).sum()) for name, p in subject.named_parameters()
        )
        return changed / max(1, sum(p.numel() for p in before.values()))

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
        for name, data in (("forget", self._task.sets["forget"]), ("test", self._task.unseen)):
            try:
                with seeded(0, *self._task.sets.values()):
                    counts[name] = _histogram(_losses(subject, data))
            except Exception:  # without labels there is no loss; the figures above say so
                continue
        return counts

    def _path(self, job: Job, seed: int) -> Path | None:
        if self._cache is None:
            return None
        try:
            name = key(
                format=FORMAT,
                kind=job.kind,
                method=job.name,
                function=job.function,
                settings=job.settings,
                seed=seed,
                weights=self._weights,
                model=callable_name(type(self._original)),
                data=self._task.fingerprints,
                reference=self._references.key(seed),
                metrics=self._metrics,
                environment=environment(self._original),
            )
        except NoKeyError:
            return None
        return self._cache / f"row-{name[:32]}.json"


def _losses(model: nn.Module, data: Batches) -> Tensor:
    with borrowed(model), torch.no_grad():
        parts = [losses.cross_entropy(model, batch).cpu() for batch in read_batches(data, device_of(model))]
    return torch.cat(parts).double()


def _histogram(values: Tensor) -> list[int]:
    inside = values[torch.isfinite(values)].clamp(LOSS_EDGES[0], LOSS_EDGES[-1] * (1 - 1e-9))
    counts, _ = np.histogram(inside.numpy(), np.array(LOSS_EDGES))
    counts[-1] += int((~torch.isfinite(values)).sum())
    return cast("list[int]", counts.tolist())
