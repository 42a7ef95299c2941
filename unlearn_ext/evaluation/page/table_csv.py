"""The figures of the page as a table for spreadsheets, in the page itself."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

# What comes beside a figure, where any row has it.
_BESIDE = ("spread", "low", "high", "note", "why")


def csv_text(document: Mapping[str, Any]) -> str:
    """Write the figures of a comparison as comma-separated values.

    Args:
        document: What ``Comparison.to_dict()`` returns.

    Returns:
        CSV as RFC 4180 has it. A line per label: ``label``, ``kind``, ``seeds_reached`` (of those with a
        goal), then every figure with all its digits under its name, shares as shares; behind it
        ``<name>_spread``, ``_low``, ``_high``, ``_note`` and ``_why``, where any line has them.
    """
    columns = _columns(document)
    heads = [name if part == "value" else f"{name}_{part}" for name, part in columns]
    out = io.StringIO()
    writer = csv.writer(out)  # quotes what has to be; lines end with CR LF
    writer.writerow(["label", "kind", "seeds_reached", *heads])
    for entry in document["table"]:
        measured = [_cell(entry["measures"][name].get(part)) for name, part in columns]
        writer.writerow([_cell(entry["label"]), entry["kind"], _reached(document, entry["label"]), *measured])
    return out.getvalue()


def csv_url(document: Mapping[str, Any]) -> str:
    """Return ``csv_text`` as a link that needs no network.

    Args:
        document: What ``Comparison.to_dict()`` returns.

    Returns:
        A ``data:`` URL. The mark at its beginning tells spreadsheets that it is UTF-8.
    """
    return "data:text/csv;charset=utf-8," + quote(
        "\N{ZERO WIDTH NO-BREAK SPACE}" + csv_text(document), safe=""
    )


def _columns(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    for column in document["columns"]:
        name = column["name"]
        measures = [entry["measures"][name] for entry in document["table"]]
        there = [part for part in _BESIDE if any(entry.get(part) is not None for entry in measures)]
        found += [(name, part) for part in ("value", *there)]
    return found


def _reached(document: Mapping[str, Any], label: str) -> str:
    asked = [
        row["reached"] for row in document["rows"] if row["label"] == label and row["reached"] is not None
    ]
    return f"{sum(asked)} of {len(asked)}" if asked else ""


def _cell(value: float | str | None) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        # A spreadsheet would compute what begins like this; names and messages are the user's.
        return f"'{value}" if value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
    return repr(value)
