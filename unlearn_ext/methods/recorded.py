"""What every method says of its run: how the forget and the retain set are answered before and after.

It warns where the forget set is answered as well as before, and where the retain set lost much.
"""

from __future__ import annotations

import functools
import inspect
import logging
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import ParamSpec, cast

from torch import nn

from unlearn_ext._internal.modules import check_model
from unlearn_ext._internal.seeding import random_states_kept
from unlearn_ext.distributed import ALONE, Group, MeshRanks, Ranks, ranks_of
from unlearn_ext.fisher.importance import Importance
from unlearn_ext.methods.readings import Reading, difference
from unlearn_ext.methods.run import Run, at_the_end
from unlearn_ext.methods.until import Measured, figures, measure
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches

_LOG = logging.getLogger("unlearn_ext")

_Settings = ParamSpec("_Settings")

# Of retain accuracy: what the package's defaults may cost on the networks they were chosen with.
MUCH = 0.05


def recorded(method: Callable[_Settings, UnlearnResult]) -> Callable[_Settings, UnlearnResult]:
    """Let a method's record tell what was measured before and after, and warn of what went wrong.

    That is: nothing was forgotten, or more than 5 points of retain accuracy were lost.

    That costs two forward passes over the sets. What cannot be measured (importances in place of data, data
    without labels) is left out.

    Args:
        method: Takes ``model``, ``forget`` and perhaps ``retain`` and ``task``.

    Returns:
        The method.
    """
    signature = inspect.signature(method)

    @functools.wraps(method)
    def measured(*args: _Settings.args, **settings: _Settings.kwargs) -> UnlearnResult:
        try:
            given = signature.bind_partial(*args, **settings).arguments
        except TypeError:  # which the method itself says better
            return method(*args, **settings)
        # Where the classes are named, a method promises not to read the forget set.
        forget = None if given.get("forget_classes") is not None else given.get("forget")
        if given.get("until") is not None:  # measured as it goes
            return method(*args, **settings)
        ranks = ranks_of(cast("Group", given.get("process_group")), method.__name__)
        # Where right labels are to be learnt instead of wrong ones, to answer them well is the goal.
        is_relabelled = given.get("objective") == "relabel"
        record = Record(
            given.get("model"),
            forget,
            given.get("retain"),
            given.get("task"),
            ranks,
            warn_if_known=not is_relabelled,
        )
        try:
            with at_the_end(record.measure_again):
                result = method(*args, **settings)
            with ranks.failing_together():  # while every rank can still be put back
                return record.added_to(result)
        except BaseException:
            record.take_back()
            raise

    return measured


class Record:
    """What was measured of a model before it is changed.

    Args:
        model: The model.
        forget: The forget set; only what is data is measured.
        retain: The retain set, likewise.
        task: What the model is for; None infers it.
        ranks: Those that call the method together.
        warn_if_known: Warn where the forget set is answered as well as before.
    """

    def __init__(
        self,
        model: object,
        forget: object,
        retain: object,
        task: object,
        ranks: Ranks = ALONE,
        *,
        warn_if_known: bool = True,
    ) -> None:
        self._warn_if_known = warn_if_known
        self._model, self._ranks = model, ranks
        self._on_mesh = isinstance(ranks, MeshRanks)
        self._task = task if isinstance(task, Task) else None
        self._sets: dict[str, Batches] = {
            name: data  # type: ignore[misc]
            for name, data in (("forget", forget), ("retain", retain))
            if data is not None and not isinstance(data, Importance)
        }
        try:
            check_model(cast("nn.Module", model), "Record", may_be_sharded=self._on_mesh)
        except (TypeError, NotImplementedError):  # which the method refuses; running it could change it
            self._sets = {}
        self._missing: list[str] = []
        self._run: Run | None = None
        self._before = self._measured("before")
        self._after: Mapping[str, Measured] | None = None

    def measure_again(self, run: Run | None = None) -> None:
        """Measure what the method has made of the model: while it can still be put back, if this is stopped.

        Args:
            run: What changed it.
        """
        self._run = run
        if self._before:
            self._after = self._measured("after")

    def take_back(self) -> None:
        """Put the model back after all, where a run has changed it."""
        if self._run is not None:
            self._run.put_back()

    def added_to(self, result: UnlearnResult) -> UnlearnResult:
        """Add what was measured before and after to a method's record; measure again where that was not done.

        Args:
            result: The record.

        Returns:
            The record with both; as it is where it has them already.
        """
        if result.before or not (self._before or self._missing):
            return result
        after = self._after if self._after is not None else self._measured("after")
        for text in self._missing:
            warnings.warn(f"{result.method}: {text}", stacklevel=4)
        if not after:
            return result
        both = {name: self._before[name] for name in after}
        notes = []
        for name, part in after.items():
            first, later = (found.reading or Reading(found.samples) for found in (both[name], part))
            text, are_others = difference(name, first, later)
            if are_others:
                warnings.warn(f"{result.method}: {text}", stacklevel=4)
            elif text:
                notes.append({"phase": "measure", "note": text})
        if "forget" in after and self._warn_if_known:
            _warn_if_known(result.method, both["forget"], after["forget"])
        if "retain" in after:
            _warn_if_hurt(result.method, both["retain"], after["retain"])
        return replace(
            result,
            before=figures(both),
            after=figures(after),
            history=(*result.history, *notes),
            passes=result.passes + 2.0,
        )

    def _measured(self, when: str) -> Mapping[str, Measured]:
        found = {}
        for name, data in self._sets.items():
            if when == "after" and name not in self._before:
                continue
            try:
                with self._ranks.failing_together(), random_states_kept(*self._sets.values()):
                    if isinstance(self._model, nn.Module):
                        # What the method refuses is not to be run.
                        check_model(self._model, "measure", may_be_sharded=self._on_mesh)
                        found[name] = measure(self._model, data, self._task, ranks=self._ranks)
            except (TypeError, ValueError, NotImplementedError) as error:  # no labels, or no right and wrong
                if self._ranks.is_broken:
                    raise
                _LOG.debug("the %s set is not measured: %s", name, error)
            except Exception as error:  # what is wrong with the data, the method says in another reading
                if self._ranks.is_broken:
                    raise
                self._missing.append(f"the {name} set was not measured {when}: {error}")
        return found


def _warn_if_known(method: str, before: Measured, after: Measured) -> None:
    if math.isnan(before.accuracy):
        known, text = after.loss <= before.loss, f"loss {before.loss:.4g} before, {after.loss:.4g} after"
    else:
        known = 0 < before.accuracy <= after.accuracy
        text = f"accuracy {before.accuracy:.2%} before, {after.accuracy:.2%} after"
    if known:
        warnings.warn(f"{method}: the forget set is answered as well as before: {text}", stacklevel=5)


def _warn_if_hurt(method: str, before: Measured, after: Measured) -> None:
    lost = before.accuracy - after.accuracy
    if lost > MUCH:  # not for NaN, where a task has no accuracy
        shares = f"{before.accuracy:.2%} before, {after.accuracy:.2%} after"
        warnings.warn(
            f"{method}: the retain set lost {100 * lost:.1f} points of accuracy, {shares}: smaller or fewer "
            "steps cost less, and `until=` with `budget=`, where a method has them, allows no more than that",
            stacklevel=5,
        )
