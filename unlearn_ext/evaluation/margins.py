"""The margins of many networks on the samples of an audit: computed once, kept row by row."""

from __future__ import annotations

import hashlib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.copies import copied
from unlearn_ext._internal.digests import weights_digest
from unlearn_ext._internal.seeding import seeded
from unlearn_ext.evaluation.audit_scores import Margins
from unlearn_ext.evaluation.cache import Cache, keeping
from unlearn_ext.evaluation.keys import NoKeyError, sample_hashes
from unlearn_ext.evaluation.metrics.attacks import counted_in
from unlearn_ext.evaluation.references import References
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches, device_of, read_batches

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """One network on all samples.

    Attributes:
        margins: Set to log-odds of its samples that count, in reading order.
        accuracy: Set to the share of right answers.
        reached: What the method said, where it said something.
    """

    margins: Mapping[str, Margins]
    accuracy: Mapping[str, float]
    reached: bool | None = None


class Rows:
    """Makes rows, or takes those of an earlier run, killed or not, from the cache.

    Args:
        model: A network of the form that is audited.
        sets: Forget, retain and validation set.
        task: What the networks are for.
        cache: Where rows are kept.
        held_out: What methods that take ``validation`` are given; None: nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        sets: Mapping[str, Batches],
        task: Task,
        cache: Cache,
        *,
        held_out: Batches | None = None,
    ) -> None:
        self._sets = sets
        self._held_out = held_out
        self._task = task
        self._cache = cache
        self._order = order_of(sets, task) if cache.is_on else ""
        self._device = device_of(model)

    def of_trained(self, kind: str, trained: References, seed: int, data: object) -> Row:
        """Return the row of a trained network.

        Args:
            kind: What it is.
            trained: Trains it, where its row is not known.
            seed: Its seed.
            data: Fingerprint of what it is trained on.

        Returns:
            The row.
        """
        facts = {"kind": kind, "network": trained.key(seed), "data": data}
        return self._kept(facts, lambda: self.measured(trained.get(seed)[0]))

    def of_unlearned(
        self,
        method: Any,  # noqa: ANN401 - any callable
        settings: Mapping[str, Any],
        original: References | nn.Module,
        seed: int,
        data: object,
    ) -> Row:
        """Return the row of a network that has unlearned.

        Args:
            method: ``method(model, forget, retain, **settings)``.
            settings: The method's own.
            original: The network, or what trains it.
            seed: Of the method, and of the network where it is trained.
            data: Fingerprint of what the network is trained on.

        Returns:
            The row.
        """
        network = weights_digest(original) if isinstance(original, nn.Module) else original.key(seed)
        facts: dict[str, object] = {"kind": "unlearned", "network": network, "data": data, "seed": seed}
        facts |= {"method": method, "settings": settings, "validation": self._held_out is not None}

        def make() -> Row:
            start = original if isinstance(original, nn.Module) else original.get(seed)[0]
            model = copied(start)
            own: dict[str, object] = {"generator": torch.Generator().manual_seed(seed)}
            if self._held_out is not None:
                own["validation"] = self._held_out
            accepted = inspect.signature(method).parameters
            given: dict[str, Any] = {name: value for name, value in own.items() if name in accepted}
            if "task" in accepted:
                given["task"] = self._task
            with seeded(seed, *self._sets.values()):
                result = method(model, self._sets["forget"], self._sets["retain"], **{**given, **settings})
            reached = result.reached if isinstance(result, UnlearnResult) else None
            return self.measured(model, reached)

        return self._kept(facts, make)

    def measured(self, model: nn.Module, reached: bool | None = None) -> Row:
        """Measure a network now.

        Args:
            model: The network; left as it was.
            reached: What a method said of it.

        Returns:
            The row.

        Raises:
            FloatingPointError: If a margin is NaN.
            ValueError: If no sample of a set counts.
        """
        margins, accuracy = {}, {}
        with borrowed(model), torch.no_grad():
            for name, data in self._sets.items():
                found, right, counted = [], 0.0, 0.0
                # The same order every time, whatever a loader shuffles.
                with seeded(0, data):
                    for batch in read_batches(data, device_of(model)):
                        if self._task.count(batch) == 0:
                            continue
                        outputs = self._task.forward(model, batch)
                        # Samples without a label have log-odds of 0 in every network: as if forgotten.
                        kept = counted_in(self._task, outputs, batch).any(-1)
                        found.append(self._task.log_odds(outputs, batch)[kept].double().cpu())
                        hits, labels = self._task.correct(outputs, batch)
                        right, counted = right + float(hits.sum()), counted + float(labels.sum())
                values = torch.cat(found).numpy()
                if not values.size:
                    raise ValueError(f"audit: {name} must hold at least one sample with a label, got none")
                if np.isnan(values).any():
                    raise FloatingPointError(f"audit: margins on the {name} set must be numbers, got NaN")
                margins[name], accuracy[name] = values, right / max(counted, 1.0)
        return Row(margins, accuracy, reached)

    def _kept(self, facts: Mapping[str, object], make: Any) -> Row:  # noqa: ANN401 - a function
        try:
            key = {**facts, "order": self._order, "task": repr(self._task), "samples": "that count"}
            path = self._cache.path("margins", ".npz", **key)
        except NoKeyError as error:
            _log.warning("a row of margins is not kept: %s", error)
            path = None
        if path is not None and path.exists():
            try:
                return _read(path, self._sets)
            except Exception:  # cut short by hand, or by another version: make it again
                _log.info("%s cannot be used", path, exc_info=True)
        row: Row = make()
        if path is not None:
            arrays = {f"margins/{name}": values for name, values in row.margins.items()}
            arrays |= {f"accuracy/{name}": np.array(value) for name, value in row.accuracy.items()}
            arrays["reached"] = np.array(-1 if row.reached is None else int(row.reached))
            with keeping(path) as draft, open(draft, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        return row


def _read(path: Any, names: Mapping[str, object]) -> Row:  # noqa: ANN401 - a path
    with np.load(path) as stored:
        said = int(stored["reached"])
        return Row(
            {name: stored[f"margins/{name}"] for name in names},
            {name: float(stored[f"accuracy/{name}"]) for name in names},
            None if said < 0 else bool(said),
        )


def order_of(sets: Mapping[str, Batches], task: Task) -> str:
    """Tell sets, and the order of their samples, from others: columns of margins are samples.

    Args:
        sets: Sets by name.
        task: Reads the batches.

    Returns:
        A digest.
    """
    digest = hashlib.sha256()
    for name, data in sets.items():
        digest.update(name.encode())
        with seeded(0, data):
            for batch in read_batches(data, torch.device("cpu")):
                for value in sample_hashes(batch, task):
                    digest.update(value.to_bytes(32, "big"))
    return digest.hexdigest()
