"""Methods side by side: what a comparison has found, as a table, JSON and a page."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from unlearn_ext._internal.files import write_text
from unlearn_ext._internal.plain import plain
from unlearn_ext.evaluation import page
from unlearn_ext.evaluation.audit import Audit
from unlearn_ext.evaluation.metrics.measures import Measure
from unlearn_ext.evaluation.metrics.registry import metric
from unlearn_ext.evaluation.rows import FORMAT, LOSS_EDGES, Row
from unlearn_ext.results import NOTICE

if TYPE_CHECKING:
    import pandas


@dataclass(frozen=True, slots=True, repr=False)
class Comparison:
    """Methods side by side. Made by ``compare``.

    Attributes:
        rows: One per model measured: the original, the retrained, then methods and controls, seed by seed.
        columns: Names of the figures in their order.
        facts: What was compared: sizes, classes, model, reference, seeds, environment.
        audit: Every method against many retrained networks, where that was asked for.
    """

    rows: tuple[Row, ...]
    columns: tuple[str, ...]
    facts: Mapping[str, Any]
    audit: Audit | None = None

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
        heads = ["", *(metric(name).title for name in self.columns)]
        lines = [[label, *self._cells(label, notes)] for label in self.labels]
        widths = [max(len(cell) for cell in column) for column in zip(heads, *lines, strict=True)]
        table = [
            "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |"
            for line in (heads, ["-" * width for width in widths], *lines)
        ]
        reasons = [f"[{number}] {reason}  " for reason, number in notes.items()]
        text = [*table, *([""] if reasons else []), *reasons, ""]
        if self.audit is not None:
            head = f"Against {self.audit.facts['n_models']} retrained networks, sample by sample:"
            text += [head, "", self.audit.to_markdown()]
        return "\n".join([*text, NOTICE, ""])

    def to_dict(self) -> dict[str, Any]:
        """Return all there is to know as plain numbers, strings, lists and dictionaries.

        Returns:
            ``format``, ``facts``, ``columns`` (name, title, unit, meaning, kind), ``table`` (means over the
            seeds, by label), ``rows`` (seed by seed), ``loss_edges``, ``audit`` (None, or what
            ``Audit.to_dict`` returns) and ``notice``.
        """
        kinds = {row.label: row.kind for row in self.rows}
        document = {
            "format": FORMAT,
            "facts": self.facts,
            "columns": [
                {
                    "name": name,
                    "title": metric(name).title,
                    "unit": metric(name).unit,
                    "meaning": metric(name).meaning,
                    "kind": metric(name).kind,
                }
                for name in self.columns
            ],
            "table": [
                {"label": label, "kind": kinds[label], "measures": _records(self.measures(label))}
                for label in self.labels
            ],
            "rows": [asdict(row) for row in self.rows],
            "loss_edges": LOSS_EDGES,
            "audit": None if self.audit is None else self.audit.to_dict(),
            "notice": NOTICE,
        }
        return cast("dict[str, Any]", plain(document))

    def to_pandas(self) -> pandas.DataFrame:
        """Return the figures as a data frame: one line per label, means over its seeds.

        Returns:
            Columns of numbers by name, NaN where there is none; where there are several seeds, a column
            ``<name>_spread`` with their standard deviation behind each that has one. The index is called
            ``"label"``; ``attrs["why"]`` maps (label, column) to the reason for what is missing.

        Raises:
            ImportError: If pandas is not installed; the message says how to.
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError(
                "Comparison.to_pandas: a data frame needs pandas: pip install 'unlearn_ext[pandas]'"
            ) from error
        measures = {label: self.measures(label) for label in self.labels}
        columns: dict[str, list[float]] = {}
        for name in self.columns:
            found = [measures[label][name] for label in self.labels]
            columns[name] = [math.nan if entry.value is None else entry.value for entry in found]
            if any(entry.spread is not None for entry in found):
                spreads = [math.nan if entry.spread is None else entry.spread for entry in found]
                columns[f"{name}_spread"] = spreads
        frame = pandas.DataFrame(columns, index=pandas.Index(self.labels, name="label"), dtype=float)
        frame.attrs["why"] = {
            (label, name): entry.why
            for label, figures in measures.items()
            for name, entry in figures.items()
            if entry.why is not None
        }
        return frame

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

    def __repr__(self) -> str:
        seeds = len(self.facts.get("seeds", ())) or 1
        return (
            f"Comparison({len(self.labels)} models, {len(self.columns)} figures, {seeds} "
            f"seed{'s' if seeds > 1 else ''}: {', '.join(self.labels)})"
        )

    def _repr_html_(self) -> str:
        return page.fragment(self.to_dict())

    def _cells(self, label: str, notes: dict[str, int]) -> list[str]:
        cells = []
        for name, measure in self.measures(label).items():
            text = page.figure(asdict(measure), metric(name).unit)
            if measure.value is None:
                # The reason stands below the table, where there is room for it.
                text = f"n/a [{notes.setdefault(measure.why or 'not measured', len(notes) + 1)}]"
            elif measure.note:
                text += f", {measure.note}"
            cells.append(text)
        return cells


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


def _records(measures: Mapping[str, Measure]) -> dict[str, object]:
    return {name: asdict(measure) for name, measure in measures.items()}
