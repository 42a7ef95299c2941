"""A sentence per method: whether it reached what it was to reach."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from unlearn_ext.evaluation.page.numbers import number

# What is told of a method besides, by column; nothing where it was not measured.
_TOLD = (
    ("forget", "percent", "{} % of the forget set right"),
    ("retain", "percent", "{} % of the retain set"),
    ("gap", "points", "{} points from retraining"),
)


def verdicts(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """Say of every method whether it reached its goal.

    Args:
        document: What ``Comparison.to_dict()`` returns.

    Returns:
        ``label``; ``kind``: ``"reached"``, ``"missed"``, ``"partly"`` (with some seeds), ``"open"``
        (without a goal) or ``"failed"``; and ``text``, the sentence that goes on from the label.
    """
    said = []
    for entry in document["table"]:
        if entry["kind"] != "method":
            continue
        rows = [row for row in document["rows"] if row["label"] == entry["label"]]
        kind, text = _outcome(rows)
        figures = [] if kind == "failed" else _figures(entry)
        said.append(
            {
                "label": entry["label"],
                "kind": kind,
                "text": f"{text}{': ' * bool(figures)}{', '.join(figures)}.",
            }
        )
    return said


def _outcome(rows: Sequence[Mapping[str, Any]]) -> tuple[str, str]:
    ran = [row for row in rows if row["why"] is None]
    if not ran:
        why = rows[0]["why"].removeprefix(f"{rows[0]['label']}: ").rstrip(".")
        return "failed", f"did not run: {why}"
    asked = [row["reached"] for row in ran if row["reached"] is not None]
    missing = f" ({len(rows) - len(ran)} of {len(rows)} seeds did not run)" if len(ran) < len(rows) else ""
    if not asked:
        return "open", f"ran without a goal, so nothing says whether it was reached{missing}"
    if all(asked):
        return "reached", f"reached its goal within its budget{missing}"
    if any(asked):
        told = f"reached its goal with {sum(asked)} of {len(asked)} seeds"
        return "partly", f"{told}; with the others the model is as it was{missing}"
    return "missed", f"did not reach its goal within its budget, and left the model as it was{missing}"


def _figures(entry: Mapping[str, Any]) -> list[str]:
    values = ((entry["measures"].get(name, {}).get("value"), unit, text) for name, unit, text in _TOLD)
    return [text.format(number(value, unit)) for value, unit, text in values if value is not None]
