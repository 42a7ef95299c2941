"""The pictures of the page: what to draw where.

Every picture is drawn from numbers that also stand in a table beside it, for screen readers, for copying and
for whoever would rather read them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# Of a histogram, in units of its view box.
_WIDTH, _HEIGHT, _LEFT, _FLOOR, _TALLEST = 300, 120, 8, 100, 84


def percent(value: float) -> str:
    """Return a length as CSS has it.

    Args:
        value: Share of the whole; what lies outside [0, 1] is cut off.

    Returns:
        Text.

    Example:
        >>> percent(0.5), percent(7.0)
        ('50.00%', '100.00%')
    """
    return f"{100 * min(1.0, max(0.0, value)):.2f}%"


def shade(value: float, top: float) -> str:
    """Return how dark a cell of the heat map is.

    Args:
        value: Its number.
        top: The largest number.

    Returns:
        Opacity, as CSS has it. Of the square root, so that small changes show.
    """
    return f"{0.6 * (value / top) ** 0.5 if top else 0.0:.2f}"


def shares(counts: Sequence[int]) -> list[float]:
    """Divide counts by their sum.

    Args:
        counts: Of a histogram.

    Returns:
        Shares; nothing where there is nothing.
    """
    total = sum(counts)
    return [count / total for count in counts] if total else []


def median_bar(counts: Sequence[int], edges: Sequence[float]) -> str:
    """Say between which edges of a histogram the median lies.

    Args:
        counts: Of the bars.
        edges: One more than there are bars.

    Returns:
        Text.

    Example:
        >>> median_bar([1, 3, 1], [0.0, 0.1, 1.0, 10.0])
        '0.1 to 1'
    """
    seen = 0
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        seen += count
        if 2 * seen >= sum(counts) > 0:
            return f"{low:.2g} to {high:.2g}"
    return "none"


def histogram(sets: Mapping[str, Sequence[float]], before: Sequence[float]) -> dict[str, Any]:
    """Draw the losses of a model on the forget set and on unseen samples.

    Args:
        sets: ``"forget"`` and ``"test"`` to the shares of their bars.
        before: The shares of the forget set before unlearning.

    Returns:
        Size, floor, the paths with their classes, and the ticks of the axis.
    """
    step = (_WIDTH - 2 * _LEFT) / len(sets["forget"])
    top = max([*sets["forget"], *sets["test"], *before])

    def outline(heights: Sequence[float], *, closed: bool) -> str:
        points = [f"M{_LEFT} {_FLOOR}"]
        for index, share in enumerate(heights):
            height = _FLOOR - _TALLEST * share / top
            points.append(f"V{height:.1f}H{_LEFT + (index + 1) * step:.1f}")
        return "".join(points) + f"V{_FLOOR}" + ("Z" if closed else "")

    paths = [("forget", outline(sets["forget"], closed=True))]
    if sets["test"]:
        paths.append(("test", outline(sets["test"], closed=False)))
    if before and list(before) != list(sets["forget"]):
        paths.append(("before", outline(before, closed=False)))
    ticks = [(0.0, "loss"), (2 / 7, "0.001"), (4 / 7, "0.1"), (6 / 7, "10")]
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _LEFT,
        "floor": _FLOOR,
        "paths": paths,
        "ticks": [
            {
                "x": f"{_LEFT + (_WIDTH - 2 * _LEFT) * at:.0f}",
                "anchor": "middle" if at else "start",
                "text": text,
            }
            for at, text in ticks
        ],
    }
