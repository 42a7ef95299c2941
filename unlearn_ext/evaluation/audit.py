"""Unlearned networks judged against many retrained ones, sample by sample."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from torch import nn

from unlearn_ext._internal.modules import check_model
from unlearn_ext._internal.plain import plain
from unlearn_ext.distributed import ALONE, Group, Ranks, ranks_of
from unlearn_ext.distributed.agree import check_alike
from unlearn_ext.evaluation.audit_rows import ORIGINAL, Jobs, Trained, made_rows
from unlearn_ext.evaluation.audit_scores import (
    Margins,
    area_and_recall,
    epsilons,
    forgetting_score,
    klom,
    likelihood_ratios,
)
from unlearn_ext.evaluation.cache import Cache
from unlearn_ext.evaluation.margins import Rows, order_of
from unlearn_ext.evaluation.references import References
from unlearn_ext.evaluation.sets import Sets
from unlearn_ext.methods import METHODS
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches, device_of
from unlearn_ext.tasks.losses import resolve

SETS = ("forget", "retain", "validation")
FLOOR = "retrained (half against half)"
RESERVED = ("oracles", ORIGINAL, FLOOR)
LEAST_MODELS = 4


@dataclass(frozen=True, slots=True)
class Figure:
    """A score with its 95 % interval from resampling networks.

    Attributes:
        value: The score.
        low: 2.5 % quantile; NaN without resampling.
        high: 97.5 % quantile.
    """

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        interval = "" if math.isnan(self.low) else f" ({self.low:.3g} to {self.high:.3g})"
        return f"{self.value:.3g}{interval}"


@dataclass(frozen=True)
class Audit:
    """What an audit found; see ``audit``.

    Attributes:
        figures: Label to score to figure.
        limits: What the number of networks cannot show, in words.
        margins: Label to set to ``[models, samples]``; ``"oracles"`` are the retrained networks.
        refused: Label to how many networks the method left as they were, saying so.
        failed: Label to why there are no figures.
        facts: How it was made.
    """

    figures: Mapping[str, Mapping[str, Figure]]
    limits: tuple[str, ...]
    margins: Mapping[str, Mapping[str, Margins]]
    refused: Mapping[str, int] = field(default_factory=dict)
    failed: Mapping[str, str] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)

    def to_markdown(self) -> str:
        """Return the scores as a table, and what they cannot show below it.

        Returns:
            Markdown.
        """
        columns = list(dict.fromkeys(name for scores in self.figures.values() for name in scores))
        lines = [f"| method | {' | '.join(columns)} | refused |", "| --- " * (len(columns) + 2) + "|"]
        for label, scores in self.figures.items():
            cells = []
            for name in columns:
                figure = scores.get(name)
                interval = (
                    ""
                    if figure is None or math.isnan(figure.low)
                    else f" ({figure.low:.3g} to {figure.high:.3g})"
                )
                cells.append("" if figure is None else f"{figure.value:.3g}{interval}")
            told = str(self.refused[label]) if label in self.refused else ""
            lines.append(f"| {label} | {' | '.join(cells)} | {told} |")
        lines += ["", *(f"- {label}: {why}" for label, why in self.failed.items())]
        return "\n".join([*lines, *(f"- {limit}" for limit in self.limits), ""])

    def to_dict(self) -> dict[str, Any]:
        """Return figures, limits and facts as plain values, without the margins.

        Returns:
            ``figures`` (label to score to ``value``, ``low``, ``high``), ``limits``, ``refused``, ``failed``
            and ``facts``.
        """
        record = {name: getattr(self, name) for name in ("figures", "limits", "refused", "failed", "facts")}
        return cast("dict[str, Any]", plain(record))

    def to_json(self) -> str:
        """Return figures, limits and facts, without the margins.

        Returns:
            A JSON object.
        """
        return json.dumps(self.to_dict(), indent=1)


def audit(
    methods: Mapping[str, object] | list[str] | tuple[str, ...],
    *,
    forget: Batches,
    retain: Batches,
    validation: Batches,
    make_model: Callable[[], nn.Module],
    train: Callable[[nn.Module, Batches], object],
    full: Batches | None = None,
    model: nn.Module | None = None,
    n_models: int = 16,
    task: Task | None = None,
    cache: str | Path | None = None,
    code: str | None = None,
    bootstrap: int = 100,
    progress: bool = False,
    process_group: Group = None,
) -> Audit:
    """Compare the log-odds that unlearned networks give every sample with those of retrained ones.

    ``n_models`` networks are retrained without the forget set (oracles), and as many unlearn. Of the two
    distributions of a sample's margin ``log p - log(1 - p)``:

        klom        KL divergence of the histograms: median and 95th percentile over samples, per set
        epsilon     how well the best threshold tells a network of one kind from the other, per forget sample
        score       forgetting score: mean of 2^-floor(2 epsilon), times the oracles' share of retain and
                    validation accuracy that is left (at most 1); 1 is ideal
        ulira auc   attack by Gaussians fitted to both, AUC over forget samples and networks; 0.5 is ideal
        ulira tpr   its true positives at 1 % false ones; 0.01 is ideal

    A row "retrained (half against half)" shows what the scores are for networks that do not differ, measured
    with half as many. Every row of margins is kept in ``cache`` as soon as it is there, so that a run which
    was killed goes on where it was.

    Args:
        methods: Names of ``METHODS``, or a mapping of labels to names, functions ``(model, forget, retain,
            **settings)``, or pairs of one and its settings. ``validation``, ``generator`` and ``task`` are
            passed where a method takes them.
        forget: The forget set.
        retain: The retain set.
        validation: Samples that no network was trained on.
        make_model: Makes an untrained network.
        train: ``train(network, data)``: trains in place, or returns the trained network.
        full: Forget and retain set together, as the original networks are trained on: then every unlearned
            network comes from an original of its own. Otherwise give ``model``.
        model: The one original network that all unlearned ones come from. What differs between these is then
            a method's own randomness only; a method without any is told apart too easily.
        n_models: Networks of each kind, >= 4.
        task: What the networks are for; inferred, or refused, where it is not given.
        cache: Folder for networks and margins.
        code: Stands for the code of the functions in the cache's keys; None looks at the code.
        bootstrap: Resamples of the networks behind the intervals; 0 for none.
        progress: Say on stderr what is being done.
        process_group: Every rank passes the same, with the whole sets, and makes its part of the networks;
            the figures on all of them are those of one process, to the bit. Each goes on where it was;
            ``cache`` may be one folder for all.

    Returns:
        The figures.

    Raises:
        ValueError: If not exactly one of ``full`` and ``model`` is given, there are too few networks, a set
            is empty, or a method is unknown; if ranks are given different things, or shares of the sets.
        NotImplementedError: If ``model`` is sharded, lazy, on the meta device or wrapped for parallel
            training.

    Source:
        Georgiev et al., "Attribute-to-Delete", 2024; Triantafillou et al., "Are we making progress in
        unlearning?", 2024; Hayes et al., "Inexact Unlearning Needs More Careful Evaluations", 2024.
    """
    ranks = ranks_of(process_group, "audit")
    with ranks.failing_together():
        if (full is None) == (model is None):
            raise ValueError("audit: exactly one of full and model must be given")
        if n_models < LEAST_MODELS:
            raise ValueError(f"audit: n_models must be at least {LEAST_MODELS}, got {n_models}")
        if model is not None:
            check_model(model, "audit")
        jobs = _jobs(methods)
        judge = resolve(task, who="audit")
        folder = Cache(None if cache is None else Path(cache), code)
        first = make_model() if model is None else model
        data = {"forget": forget, "retain": retain, "validation": validation}
        device = device_of(first)

        def trained_on(part: Batches) -> Trained:
            hashed = folder.is_on or ranks.are_many
            sets = Sets(first, forget, part, validation, task=task, hashed=hashed)
            networks = References(None, make_model, train, sets, folder, device)
            return Trained(networks, sets.fingerprints["retain"])

        oracles = trained_on(retain)
        originals = first if full is None else trained_on(full)
        if ranks.are_many:
            samples = [order_of(data, judge), str(oracles.data), str(getattr(originals, "data", ""))]
            same = {
                "model": model,
                "methods": {label: {"method": method, **given} for label, (method, given) in jobs.items()},
                "n_models": n_models,
                "task": judge,
                "bootstrap": bootstrap,
                "code": code,
                "forget, retain, validation and full, each of them whole,": samples,
            }
            check_alike(ranks, same)
        return judged(
            jobs,
            oracles,
            originals,
            Rows(first, data, judge, folder, held_out=validation),
            n_models,
            bootstrap=bootstrap,
            say=functools.partial(print, file=sys.stderr) if progress else None,
            task=repr(judge),
            ranks=ranks,
        )


def judged(
    jobs: Jobs,
    oracles: Trained,
    originals: Trained | nn.Module,
    rows: Rows,
    n_models: int,
    *,
    bootstrap: int = 100,
    say: Callable[[str], object] | None = None,
    task: str = "",
    ranks: Ranks = ALONE,
) -> Audit:
    """Make, or take from the cache, the rows of margins of all networks, and hold them against each other.

    Args:
        jobs: Label to method and settings.
        oracles: Networks retrained without the forget set.
        originals: What unlearns: networks of the same seeds as the unlearned ones, or the one there is.
        rows: Measures networks.
        n_models: Networks of each kind.
        bootstrap: Resamples of the networks.
        say: What to do with a line per network.
        task: The task in words, for the record.
        ranks: Those that share the networks out among themselves.

    Returns:
        The figures. A method that fails costs its own row only.
    """
    known_rows, failed = made_rows(jobs, oracles, originals, rows, n_models, say or (lambda _: None), ranks)
    margins = {
        label: {name: np.stack([row.margins[name] for row in found]) for name in SETS}
        for label, found in known_rows.items()
    }
    accuracy = {
        label: {name: np.array([row.accuracy[name] for row in found]) for name in SETS}
        for label, found in known_rows.items()
    }
    sides = {label: (margins[label], accuracy[label]) for label in margins}
    against = sides.pop("oracles")
    figures = {label: _compared(side, against, bootstrap) for label, side in sides.items()}
    figures[FLOOR] = _floor(against, bootstrap)
    return Audit(
        figures,
        _limits(n_models, isinstance(originals, nn.Module)),
        margins,
        {
            label: sum(row.reached is False for row in found)
            for label, found in known_rows.items()
            if any(row.reached is not None for row in found)
        },
        failed,
        {"n_models": n_models, "task": task, "bootstrap": bootstrap},
    )


def _jobs(methods: object) -> Jobs:
    labelled = methods.items() if isinstance(methods, Mapping) else [(name, name) for name in methods]  # type: ignore[attr-defined]
    jobs: dict[str, tuple[Callable[..., Any], Mapping[str, Any]]] = {}
    for label, entry in labelled:
        chosen, settings = entry if isinstance(entry, tuple) else (entry, {})
        if isinstance(chosen, str) and chosen not in METHODS:
            raise ValueError(f"audit: methods must be among {', '.join(METHODS)}, got {chosen!r}")
        if label in RESERVED:
            raise ValueError(f"audit: a label must not be {label!r}")
        jobs[str(label)] = (METHODS[chosen] if isinstance(chosen, str) else chosen, dict(settings))
    return jobs


def _scores(
    ours: Mapping[str, Margins],
    theirs: Mapping[str, Margins],
    our_accuracy: Mapping[str, Margins],
    their_accuracy: Mapping[str, Margins],
) -> dict[str, float]:
    found: dict[str, float] = {}
    for name in SETS:
        values = klom(ours[name], theirs[name])
        found[f"klom {name}, median"] = float(np.median(values))
        found[f"klom {name}, 95 %"] = float(np.quantile(values, 0.95))
    epsilon = epsilons(ours["forget"], theirs["forget"])
    found["epsilon, median"] = float(np.median(epsilon))
    utility = 1.0
    for name in ("retain", "validation"):
        utility *= min(1.0, float(our_accuracy[name].mean()) / max(float(their_accuracy[name].mean()), 1e-12))
    found["score"] = utility * forgetting_score(epsilon, min(len(ours["forget"]), len(theirs["forget"])))
    found["ulira auc"], found["ulira tpr"] = area_and_recall(
        *likelihood_ratios(ours["forget"], theirs["forget"])
    )
    return found


_Side = tuple[Mapping[str, Margins], Mapping[str, Margins]]  # margins and accuracies by set


def _drawn(side: _Side, chosen: slice | npt.NDArray[np.int64]) -> _Side:
    margins, accuracy = ({name: values[chosen] for name, values in part.items()} for part in side)
    return margins, accuracy


def _floor(oracles: _Side, bootstrap: int) -> dict[str, Figure]:
    half = len(oracles[0]["forget"]) // 2
    first, second = (_drawn(oracles, part) for part in (slice(half), slice(half, 2 * half)))
    return _compared(first, second, bootstrap)


def _compared(ours: _Side, theirs: _Side, bootstrap: int) -> dict[str, Figure]:
    def scored(a: _Side, b: _Side) -> dict[str, float]:
        return _scores(a[0], b[0], a[1], b[1])

    values = scored(ours, theirs)
    draws = np.random.default_rng(0)
    n, m = len(ours[0]["forget"]), len(theirs[0]["forget"])
    resampled: dict[str, list[float]] = {name: [] for name in values}
    for _ in range(bootstrap):
        drawn = scored(_drawn(ours, draws.integers(n, size=n)), _drawn(theirs, draws.integers(m, size=m)))
        for name, value in drawn.items():
            resampled[name].append(value)
    found = {}
    for name, value in values.items():
        low, high = np.quantile(resampled[name], [0.025, 0.975]) if bootstrap else (math.nan, math.nan)
        found[name] = Figure(value, float(low), float(high))
    return found


def _limits(n: int, one_original: bool) -> tuple[str, ...]:
    found = [
        f"With {n} networks of each kind no finite epsilon is above {math.log(n - 1):.2f}: a leak that one "
        f"network in {n} does not show is not seen, and a sample whose networks a threshold tells apart "
        "without an error counts as told apart for certain.",
        f"Histograms of {n} values in 20 bins differ by chance: compare KLoM with the row of the retrained "
        "networks, which has half as many and so overstates it.",
        "Intervals come from resampling networks; a resample repeats some, so KLoM's lie high.",
        "True positives at 1 % false ones are pooled over samples; per sample they would take hundreds of "
        "networks.",
    ]
    if one_original:
        found.append("All unlearned networks come from one original: what retraining varies, they do not.")
    return tuple(found)
