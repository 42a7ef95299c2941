"""Figures as text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def figure(measure: Mapping[str, Any], unit: str) -> str:
    """Write a measure with its spread over the seeds, or its interval.

    Args:
        measure: The fields of a ``Measure``.
        unit: ``"percent"``, ``"points"``, ``"seconds"`` or ``"number"``.

    Returns:
        Text.

    Example:
        >>> figure({"value": 0.9753, "spread": 0.01}, "percent")
        '97.5 ± 1.0'
    """
    if measure["value"] is None:
        return "n/a"
    text = number(measure["value"], unit)
    if measure.get("spread") is not None:
        return f"{text} ± {number(measure['spread'], unit)}"
    if measure.get("low") is not None and measure.get("high") is not None:
        return f"{text} [{number(measure['low'], unit)}, {number(measure['high'], unit)}]"
    return text


def number(value: float, unit: str) -> str:
    """Write a number with the digits that its unit deserves.

    Args:
        value: The number.
        unit: As for ``figure``.

    Returns:
        Text.

    Example:
        >>> number(0.0123, "percent"), number(123.4, "seconds"), number(0.5, "number")
        ('1.2', '123', '0.500')
    """
    if unit in ("percent", "points"):
        hundredfold = 100 * value
        return f"{hundredfold:.1f}" if abs(hundredfold) >= 0.1 or hundredfold == 0 else f"{hundredfold:.1g}"
    if unit == "seconds":
        return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.1f}"
    return f"{value + 0.0:.3f}".replace("-0.000", "0.000")
