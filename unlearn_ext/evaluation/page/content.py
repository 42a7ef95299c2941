"""What stands on the page, as plain data for the templates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from unlearn_ext.evaluation.page import charts
from unlearn_ext.evaluation.page.numbers import figure, number
from unlearn_ext.evaluation.page.table_csv import csv_url
from unlearn_ext.evaluation.page.verdicts import verdicts

_NO_BREAK = "\N{NO-BREAK SPACE}"

_KINDS = {"original": "before", "reference": "the aim", "control": "control"}

# Class of a bar, by the kind of its column.
_BARS = {"kept": "retain", "forgotten": "forget", "summary": "gap"}


def sections(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the sections of the page that have something to show.

    Args:
        document: What ``Comparison.to_dict()`` returns.

    Returns:
        ``anchor`` (also the template's name), ``title`` and ``content``, in their order.
    """
    made = [
        ("results", "Results", {**results(document), **_beside(document)}),
        ("accuracy", "Accuracy, and the gap to retraining", _accuracy(document)),
        ("audit", "Against many retrained networks", _audit(document)),
        ("losses", "Losses of forget and unseen samples", _losses(document)),
        ("layers", "Where the weights changed", _layers(document)),
        ("time", "Time", _time(document)),
        ("method", "How to read this", _method(document)),
    ]
    return [
        {"anchor": anchor, "title": title, "content": content} for anchor, title, content in made if content
    ]


def _beside(document: Mapping[str, Any]) -> dict[str, Any]:
    return {"verdicts": verdicts(document), "csv": csv_url(document)}


def lead(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is said at the top: what is forgotten, and what came closest to retraining.

    Args:
        document: What ``Comparison.to_dict()`` returns.

    Returns:
        ``facts``, and ``best`` with ``controls`` where there is a reference.
    """
    facts = document["facts"]
    # A method that left the model as it was is as close as doing nothing, and nothing to recommend.
    missed = {verdict["label"] for verdict in verdicts(document) if verdict["kind"] == "missed"}
    methods = [
        entry for entry in document["table"] if entry["kind"] == "method" and entry["label"] not in missed
    ]
    gaps = [(gap, entry) for entry in methods if (gap := _value(entry, "gap")) is not None]
    reference = _entry(document, "reference")
    said: dict[str, Any] = {
        "samples": facts["samples"],
        "classes": facts["forget_classes"],
        "model": facts["model"].rpartition(".")[2],
        "parameters": facts["parameters"],
        "best": None,
    }
    if not gaps or reference is None:
        return said
    gap, best = min(gaps, key=lambda pair: pair[0])
    said["best"] = {"label": best["label"], "gap": number(gap, "points"), "speed": None}
    ours, theirs = _value(best, "seconds"), _value(reference, "seconds")
    if ours and theirs:
        ratio = theirs / ours
        said["best"]["speed"] = f"{ratio:.1f} times faster" if ratio >= 1 else f"{1 / ratio:.1f} times slower"
        said["best"]["ours"], said["best"]["theirs"] = number(ours, "seconds"), number(theirs, "seconds")
    # What the best method is worth shows beside doing nothing, and beside a choice by lot.
    said["controls"] = [
        {"label": entry["label"], "gap": number(gap, "points")}
        for entry in document["table"]
        if entry["kind"] in ("original", "control") and (gap := _value(entry, "gap")) is not None
    ]
    return said


def results(document: Mapping[str, Any]) -> dict[str, Any]:
    """Return the table of all figures.

    Args:
        document: What ``Comparison.to_dict()`` returns.

    Returns:
        ``heads``, ``lines`` with their cells, and how many ``seeds`` it is a mean of.
    """
    columns = document["columns"]
    lines = []
    for entry in document["table"]:
        measures = [entry["measures"][column["name"]] for column in columns]
        reasons = {measure["why"] for measure in measures}
        (why, *others) = reasons
        line = {"label": entry["label"], "kind": entry["kind"], "note": _KINDS.get(entry["kind"])}
        if why is not None and not others:
            line["why"] = why
        else:
            line["cells"] = [
                _cell(measure, column["unit"]) for measure, column in zip(measures, columns, strict=True)
            ]
        lines.append(line)
    return {
        "heads": [column["title"] for column in columns],
        "lines": lines,
        "seeds": document["facts"]["seeds"],
    }


def _cell(measure: Mapping[str, Any], unit: str) -> dict[str, str | None]:
    if measure["value"] is None:
        return {"why": measure["why"] or "not measured"}
    text, _, rest = figure(measure, unit).partition(" ")
    return {"text": text, "rest": rest.replace(" ", _NO_BREAK), "verdict": measure["note"]}


def _value(entry: Mapping[str, Any], name: str) -> float | None:
    value = entry["measures"].get(name, {}).get("value")
    return None if value is None else float(value)


def _entry(document: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    return next((entry for entry in document["table"] if entry["kind"] == kind), None)


def _accuracy(document: Mapping[str, Any]) -> dict[str, Any] | None:
    columns = [column for column in document["columns"] if column["kind"] in ("kept", "forgotten")]
    if not columns:
        return None
    summaries = [column for column in document["columns"] if column["kind"] == "summary"]
    reference = _entry(document, "reference")
    blocks = []
    for entry in document["table"]:
        bars = []
        for column in [*columns, *summaries]:
            value = _value(entry, column["name"])
            summary = column["kind"] == "summary"
            if value is None or (summary and entry is reference):
                continue
            aim = None if reference is None or summary else _value(reference, column["name"])
            bars.append(
                {
                    "title": column["name"] if summary else column["title"].removesuffix(", %"),
                    "unit": "" if summary else " %",
                    "kind": _BARS[column["kind"]],
                    "width": charts.percent(value),
                    "aim": None if aim is None else charts.percent(aim),
                    "text": number(value, "percent"),
                }
            )
        if bars:
            blocks.append({"label": entry["label"], "kind": entry["kind"], "bars": bars})
    return {"blocks": blocks, "has_reference": reference is not None}


def _audit(document: Mapping[str, Any]) -> dict[str, Any] | None:
    found = document.get("audit")
    if found is None:
        return None
    columns = list(dict.fromkeys(name for scores in found["figures"].values() for name in scores))
    failed = found["failed"]
    # Last what networks score that do not differ: no method can be expected to do better.
    floor = list(found["figures"])[-1]
    lines = [
        {
            "label": label,
            "kind": "reference" if label == floor else "method",
            "note": "the ceiling" if label == floor else _refusals(found, label),
            "cells": [_score(scores.get(name)) for name in columns],
        }
        for label, scores in found["figures"].items()
    ]
    lines += [{"label": label, "kind": "method", "note": None, "why": why} for label, why in failed.items()]
    return {"heads": columns, "lines": lines, "n": found["facts"]["n_models"], "limits": found["limits"]}


def _refusals(found: Mapping[str, Any], label: str) -> str | None:
    refused = found["refused"].get(label, 0)
    return f"refused {refused} of {found['facts']['n_models']}" if refused else None


def _score(score: Mapping[str, Any] | None) -> dict[str, str | None]:
    if score is None:
        return {"why": "not measured"}
    low, high = score["low"], score["high"]
    known = not isinstance(low, str)  # NaN, where networks were not resampled
    rest = f"[{low:.3g},{_NO_BREAK}{high:.3g}]" if known else ""
    return {"text": f"{score['value']:.3g}", "rest": rest, "verdict": None}


def _losses(document: Mapping[str, Any]) -> dict[str, Any] | None:
    edges = document["loss_edges"]
    counts = {
        entry["label"]: {name: _summed(document, entry["label"], name) for name in ("forget", "test")}
        for entry in document["table"]
    }
    counts = {label: sets for label, sets in counts.items() if sets["forget"]}
    if not counts:
        return None
    shares = {label: {name: charts.shares(c) for name, c in sets.items()} for label, sets in counts.items()}
    original = _entry(document, "original")
    before = shares.get(original["label"], {}).get("forget", []) if original is not None else []
    panels = [
        {
            "label": label,
            "medians": {name: charts.median_bar(counts[label][name], edges) for name in sets},
            "chart": charts.histogram(sets, before),
        }
        for label, sets in shares.items()
    ]
    of_classes = document["facts"]["forget_classes"] is not None
    unseen = "unseen samples of the forgotten classes" if of_classes else "unseen samples"
    return {"panels": panels, "unseen": unseen}


def _summed(document: Mapping[str, Any], label: str, name: str) -> list[int]:
    counts = [row["loss_counts"].get(name) for row in document["rows"] if row["label"] == label]
    return [sum(bars) for bars in zip(*filter(None, counts), strict=True)]


def _layers(document: Mapping[str, Any]) -> dict[str, Any] | None:
    labels = [entry["label"] for entry in document["table"] if entry["kind"] in ("method", "control")]
    moved: dict[str, dict[str, float | None]] = {}
    for label in labels:
        rows = [row["layers"] for row in document["rows"] if row["label"] == label and row["layers"]]
        for layer in rows[0] if rows else ():
            values = [row[layer] for row in rows if row.get(layer) is not None]
            moved.setdefault(layer, {})[label] = sum(values) / len(values) if values else None
    labels = [label for label in labels if any(label in values for values in moved.values())]
    if not moved:
        return None
    top = max((value or 0.0 for values in moved.values() for value in values.values()), default=0.0)
    kinds = document["facts"]["layers"]
    lines = [
        {
            "layer": layer,
            "kind": kinds.get(layer),
            "cells": [_heat(values.get(label), top) for label in labels],
        }
        for layer, values in moved.items()
    ]
    return {"labels": labels, "lines": lines}


def _heat(value: float | None, top: float) -> dict[str, str] | None:
    if value is None:
        return None
    return {"shade": charts.shade(value, top), "text": "0" if value == 0 else number(value, "percent")}


def _time(document: Mapping[str, Any]) -> dict[str, Any] | None:
    entries = [entry for entry in document["table"] if entry["kind"] in ("method", "control")]
    totals = {entry["label"]: total for entry in entries if (total := _value(entry, "seconds")) is not None}
    longest = max(totals.values(), default=0.0)
    if not longest:
        return None
    blocks = [
        {
            "label": label,
            "total": number(total, "seconds"),
            "phases": [
                {
                    "name": name,
                    "colour": index % 4,
                    "width": charts.percent(seconds / longest),
                    "text": number(seconds, "seconds"),
                }
                for index, (name, seconds) in enumerate(_phases(document, label, total))
            ],
        }
        for label, total in totals.items()
    ]
    reference = _entry(document, "reference")
    retrained = None if reference is None else _value(reference, "seconds")
    return {"blocks": blocks, "retrained": number(retrained, "seconds") if retrained else None}


def _phases(document: Mapping[str, Any], label: str, total: float) -> list[tuple[str, float]]:
    rows = [row["phases"] for row in document["rows"] if row["label"] == label and row["why"] is None]
    names = dict.fromkeys(name for phases in rows for name in phases)
    means = [(name, sum(phases.get(name, 0.0) for phases in rows) / len(rows)) for name in names]
    rest = total - sum(seconds for _, seconds in means)
    return [*means, ("other", rest)] if rest > 0.02 * total or not means else means


def _method(document: Mapping[str, Any]) -> dict[str, Any]:
    facts = document["facts"]
    circumstances = {
        "Reference": facts["reference"],
        "Task": facts.get("task"),
        "Seeds": ", ".join(map(str, facts["seeds"])),
        "SHA-256 of the original weights": facts["weights"],
        **facts["environment"],
    }
    by_label = {row["label"]: row for row in document["rows"] if row["method"]}
    return {
        "columns": document["columns"],
        "settings": {
            label: ", ".join(f"{key} = {value}" for key, value in row["settings"].items()) or "defaults"
            for label, row in by_label.items()
        },
        "circumstances": {name: value for name, value in circumstances.items() if value is not None},
    }
