"""Unlearning methods side by side, on copies of one model, against one retrained without the forget set."""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias, cast

from torch import nn

from unlearn_ext._internal.plain import plain
from unlearn_ext._internal.files import write_text
from unlearn_ext.evaluation import page
from unlearn_ext.evaluation.references import References
from unlearn_ext.evaluation.rows import FORMAT, LOSS_EDGES, Job, Measure, Method, Row, described
from unlearn_ext.evaluation.sets import Task
from unlearn_ext.evaluation.study import Study
from unlearn_ext.methods import METHODS
from unlearn_ext.results import NOTICE
from unlearn_ext.tasks.batches import Batches, device_of

Named: TypeAlias = str | Method | tuple[str | Method, Mapping[str, Any]]

Methods: TypeAlias = Sequence[Named] | Mapping[str, Named]

Metric: TypeAlias = str | tuple[str, Callable[[nn.Module], float]]

METRICS: tuple[str, ...] = ("retain", "forget", "test", "mia", "js", "activation_distance", "gap")

ORIGINAL, RETRAINED, RANDOM_MASK = "original", "retrained", "random mask"

_Column: TypeAlias = tuple[str, str, str]  # title, unit, meaning

_COLUMNS: dict[str, _Column] = {
    "retain": ("retain, %", "percent", "Accuracy on the training samples that were kept."),
    "forget": ("forget, %", "percent", "Accuracy on the training samples that were to be forgotten."),
    "test": ("test, %", "percent", "Accuracy on samples that no model was trained on."),
    "test_retained": ("test, kept classes, %", "percent", "Accuracy on unseen samples of the classes kept."),
    "test_forgotten": (
        "test, forgotten classes, %",
        "percent",
        "Accuracy on unseen samples of the forgotten classes.",
    ),
    "mia_auc": (
        "MIA AUC",
        "number",
        "Membership inference by the loss, forget against test samples: area under the ROC curve, 95 % "
        "bootstrap interval, and on which side of the retrained model it lies. 0.5 is chance; the aim is the "
        "retrained model's, not the lowest.",
    ),
    "mia_tpr": (
        "TPR at 1 % FPR",
        "number",
        "Share of the forget samples that the same attack recognises at a threshold which 1 % of the test "
        "samples pass.",
    ),
    "js": (
        "JS to retrained",
        "number",
        "Jensen-Shannon divergence, in bits, from the predictions of the retrained model on the forget set.",
    ),
    "activation_distance": (
        "activation distance",
        "number",
        "Mean Euclidean distance of the predicted probabilities on the forget set from the retrained "
        "model's.",
    ),
    "gap": (
        "gap to retrained, points",
        "points",
        "Mean absolute difference to the retrained model of the same seed, over the accuracies and the AUC "
        "in this table, in points of 0.01.",
    ),
    "changed": ("changed, %", "percent", "Share of the scalar parameters whose value changed."),
    "seconds": ("seconds", "seconds", "Wall-clock time of unlearning, or of retraining."),
}


@dataclass(frozen=True, slots=True)
class Comparison:
    """Methods side by side. Made by ``compare``.

    Attributes:
        rows: One per model measured: the original, the retrained, then methods and controls, seed by seed.
        columns: Names of the figures in their order.
        facts: What was compared: sizes, classes, model, reference, seeds, environment.
    """

    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    facts: Mapping[str, Any]

    def measures(self, label: str) -> dict[str, Measure]:
        """Return the figures of one label: means over its seeds.

        Args:
            label: As in ``rows``.

        Returns:
            Column to figure. With several seeds ``spread`` is their standard deviation, and a seed without
            the figure is told of in ``note``.

        Raises:
            KeyError: If there is no such label.
        """
        rows = [row for row in self.rows if row.label == label]
        if not rows:
            raise KeyError(f"there is no {label!r} in the comparison, only {', '.join(self.labels)}")
        return {name: _pooled([_figure(row, name) for row in rows]) for name in self.columns}

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels in the order of the rows, each once."""
        return tuple(dict.fromkeys(row.label for row in self.rows))

    def to_markdown(self) -> str:
        """Lay the comparison out as a table.

        Returns:
            Markdown: one line per label, the reasons for what is missing, and what the figures do not say.
        """
        notes: dict[str, int] = {}
        heads = ["", *(_column(name)[0] for name in self.columns)]
        lines = [[label, *self._cells(label, notes)] for label in self.labels]
        widths = [max(len(cell) for cell in column) for column in zip(heads, *lines, strict=True)]
        table = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in (heads, ["-" * width for width in widths], *lines)
        ]
        reasons = [f"[{number}] {reason}  " for reason, number in notes.items()]
        return "\n".join([*table, *([""] if reasons else []), *reasons, "", NOTICE, ""])

    def to_dict(self) -> dict[str, Any]:
        """Return all there is to know as plain numbers, strings, lists and dictionaries.

        Returns:
            ``format``, ``facts``, ``columns`` (title, unit, meaning), ``table`` (means over the seeds, by
            label), ``rows`` (seed by seed), ``loss_edges`` and ``notice``.
        """
        kinds = {row.label: row.kind for row in self.rows}
        document = {
            "format": FORMAT,
            "facts": self.facts,
            "columns": [
                dict(zip(("name", "title", "unit", "meaning"), (name, *_column(name)), strict=True))
                for name in self.columns
            ],
            "table": [
                {"label": label, "kind": kinds[label], "measures": _records(self.measures(label))}
                for label in self.labels
            ],
            "rows": [asdict(row) for row in self.rows],
            "loss_edges": LOSS_EDGES,
            "notice": NOTICE,
        }
        return cast("dict[str, Any]", plain(document))

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the comparison as JSON, and write it to a file if asked to.

        Args:
            path: File to write, all or nothing.

        Returns:
            Strict JSON of ``to_dict()``.
        """
        text = json.dumps(self.to_dict(), indent=2)
        if path is not None:
            write_text(path, text + "\n")
        return text

    def to_html(self, path: str | Path | None = None, *, title: str = "Unlearning compared") -> str:
        """Return the comparison as one self-contained page, and write it to a file if asked to.

        Args:
            path: File to write, all or nothing.
            title: Title of the page.

        Returns:
            HTML with everything in it: no script, no font, no image is loaded.
        """
        text = page.render(self.to_dict(), title=title)
        if path is not None:
            write_text(path, text)
        return text

    def _cells(self, label: str, notes: dict[str, int]) -> list[str]:
        cells = []
        for name, measure in self.measures(label).items():
            text = page.figure(asdict(measure), _column(name)[1])
            if measure.value is None:
                # The reason stands below the table, where there is room for it.
                text = f"n/a [{notes.setdefault(measure.why or 'not measured', len(notes) + 1)}]"
            elif measure.note:
                text += f", {measure.note}"
            cells.append(text)
        return cells


def compare(
    model: nn.Module,
    forget: Batches,
    retain: Batches,
    test: Batches,
    *,
    methods: Methods,
    reference: nn.Module | None = None,
    seeds: Sequence[int] = (0,),
    make_model: Callable[[], nn.Module] | None = None,
    train: Callable[[nn.Module, Batches], object] | None = None,
    metrics: Sequence[Metric] = METRICS,
    cache: str | Path | None = None,
    controls: bool = True,
    progress: bool = False,
) -> Comparison:
    """Run unlearning methods on copies of a model, measure them alike, and set them beside retraining.

    Every (method, seed) starts from the same weights, the same state of the global random generators and of
    the loaders' own; the user's model, loaders and random states are as before afterwards. A method that
    fails gets a row that says why; the others are not affected.

    Where whole classes are forgotten (``forget`` has classes of which ``retain`` has no sample) the test set
    is split by them, and the attack compares forget samples with test samples of the same classes.

    With ``cache`` every row is written down as soon as it is there. A comparison that was interrupted and is
    called again takes from there what it has: rows of the same method, settings, seed, weights, data,
    reference, metrics and versions. What has failed is tried again.

    Args:
        model: The trained model; only copies of it are unlearned.
        forget: The forget set.
        retain: The retain set.
        test: Samples the model was not trained on.
        methods: What to run: names of ``METHODS`` or functions ``f(model, forget, retain, **settings)`` that
            change the model in place; pairs of one and its settings; or a mapping from labels to these.
        reference: A model retrained without the forget set. Instead, ``make_model`` and ``train`` make one
            for every seed. With neither, what needs it says so in its place.
        seeds: Each method runs once per seed.
        make_model: Returns a fresh model with the architecture of ``model``, on its device.
        train: ``train(model, data)`` trains a fresh model in place, as ``model`` was.
        metrics: Names out of ``METRICS``, or pairs of a name and a function of the unlearned model.
        cache: Folder to keep rows and retrained models in.
        controls: Add the original, and for gradient masking a random mask of the same size.
        progress: Print a line to stderr as each row is done.

    Returns:
        The comparison.

    Raises:
        TypeError: If a set is no iterable of batches.
        ValueError: If a name, a label or the combination of references is wrong, or a set is a one-shot
            iterator or empty. Nothing has been run then.

    Example:
        >>> import torch
        >>> model = nn.Linear(2, 3)
        >>> x, y = torch.randn(60, 2), torch.arange(60) % 3
        >>> forget, retain = [(x[y == 2], y[y == 2])], [(x[y < 2], y[y < 2])]
        >>> table = compare(model, forget, retain, [(x, y)], methods=["ssd"], metrics=["retain", "forget"])
        >>> table.labels
        ('original', 'retrained', 'ssd', 'random mask')
        >>> table.measures("original")["changed"].value
        0.0
    """
    jobs = _jobs(methods, controls)
    seeds = tuple(int(seed) for seed in seeds)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"compare: seeds must be distinct and at least one, got {list(seeds)}")
    names = _checked_metrics(metrics)
    if (make_model is None) != (train is None):
        raise ValueError("compare: make_model and train must be given together")
    if reference is not None and make_model is not None:
        raise ValueError("compare: reference must not be given together with make_model and train")
    task = Task(forget, retain, test, hashed=cache is not None)
    folder = None if cache is None else Path(cache)
    references = References(reference, make_model, train, task, folder, device_of(model))
    # Not even measuring touches the user's model.
    study = Study(deepcopy(model), task, names, references, folder)
    n_rows = (len(seeds) if controls else 0) + len(seeds) * (len(jobs) + 1)
    rows: list[Row] = []
    original = [Job(ORIGINAL, "original", "", None, {})] if controls else []
    # The reference first: the others are compared with it.
    for job in [Job(RETRAINED, "reference", "", None, {}), *original, *jobs]:
        for seed in seeds:
            started = time.perf_counter()
            row, from_cache = study.row(job, seed)
            rows.append(row)
            if progress:
                outcome = "from the cache" if from_cache else f"{time.perf_counter() - started:.1f} s"
                outcome = f"failed: {row.why}" if row.why else outcome
                print(f"{len(rows)}/{n_rows} {row.label}, seed {seed}: {outcome}", file=sys.stderr)
    rows.sort(key=lambda row: row.kind != "original")
    return Comparison(tuple(rows), study.columns, {**study.facts(), "seeds": list(seeds)})


def _jobs(methods: Methods, controls: bool) -> list[Job]:
    if isinstance(methods, str) or not isinstance(methods, (Mapping, Sequence)):
        raise ValueError(f"compare: methods must be a sequence or a mapping, got {methods!r}")
    labelled = methods.items() if isinstance(methods, Mapping) else ((None, entry) for entry in methods)
    jobs = []
    for label, entry in labelled:
        chosen, settings = entry if isinstance(entry, tuple) else (entry, {})
        if not isinstance(settings, Mapping) or not (isinstance(chosen, str) or callable(chosen)):
            raise ValueError(
                "compare: a method must be a name, a function, or a pair of one and its settings, "
                f"got {entry!r}"
            )
        if isinstance(chosen, str) and chosen not in METHODS:
            raise ValueError(f"compare: methods must be among {', '.join(METHODS)}, got {chosen!r}")
        function = METHODS[chosen] if isinstance(chosen, str) else chosen
        name = chosen if isinstance(chosen, str) else getattr(chosen, "__name__", type(chosen).__name__)
        jobs.append(Job(label or _label(name, settings), "method", name, function, dict(settings)))
    if controls:
        jobs += _random_masks(jobs)
    labels = [ORIGINAL, RETRAINED, *(job.label for job in jobs)]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"compare: labels must be distinct, got {label!r} {labels.count(label)} times")
    return jobs


def _label(name: str, settings: Mapping[str, Any]) -> str:
    told = [f"{key}={value}" for key, value in described(settings).items()]
    return f"{name}({', '.join(told)})" if told and len(", ".join(told)) < 40 else name


def _random_masks(jobs: Sequence[Job]) -> list[Job]:
    # The same number of neurons, drawn by lot: what the choice of the neurons is worth.
    masked = [job for job in jobs if job.name == "gradient_masking"]
    controls = []
    for job in masked or [Job("", "control", "gradient_masking", None, {})]:
        settings = {key: value for key, value in job.settings.items() if key != "masks"}
        label = RANDOM_MASK if len(masked) < 2 else f"{RANDOM_MASK} for {job.label}"
        function = METHODS.get("gradient_masking", _missing("gradient_masking"))
        controls.append(Job(label, "control", job.name, function, {**settings, "score": "random"}))
    return controls


def _missing(name: str) -> Method:
    def missing(*_: object, **__: object) -> None:
        raise NotImplementedError(f"this build has no method {name}")

    return missing


def _checked_metrics(metrics: Sequence[Metric]) -> dict[str, Callable[[nn.Module], float] | None]:
    chosen: dict[str, Callable[[nn.Module], float] | None] = {}
    for entry in [metrics] if isinstance(metrics, str) else metrics:
        name, function = entry if isinstance(entry, tuple) else (entry, None)
        if (function is None and name not in METRICS) or (function is not None and not callable(function)):
            raise ValueError(
                f"compare: metrics must be among {', '.join(METRICS)}, or pairs of a name and a function, "
                f"got {entry!r}"
            )
        if name in chosen or (function is not None and name in _COLUMNS):
            raise ValueError(f"compare: the names of metrics must be distinct, got {name!r} twice")
        chosen[name] = function
    return chosen


def _figure(row: Row, name: str) -> Measure:
    if row.why is not None:
        return Measure(None, row.why)
    return row.measures.get(name, Measure(None, "not measured"))


def _pooled(figures: Sequence[Measure]) -> Measure:
    if len(set(figures)) == 1:
        return figures[0]
    values = [figure.value for figure in figures if figure.value is not None]
    reasons = list(dict.fromkeys(figure.why for figure in figures if figure.why is not None))
    if not values:
        return Measure(None, "; ".join(reasons))
    mean = statistics.fmean(values)
    spread = statistics.stdev(values) if len(values) > 1 else None
    notes = [figure.note for figure in figures if figure.note]
    told = [f"{note} {notes.count(note)}/{len(notes)}" for note in dict.fromkeys(notes)]
    if len(values) < len(figures):
        told.append(f"{len(values)} of {len(figures)} seeds ({'; '.join(reasons)})")
    return Measure(mean, spread=spread, note=", ".join(told) or None)


def _column(name: str) -> _Column:
    return _COLUMNS.get(name, (name.replace("|", "/"), "number", "A measure of the caller's."))


def _records(measures: Mapping[str, Measure]) -> dict[str, object]:
    return {name: asdict(measure) for name, measure in measures.items()}
