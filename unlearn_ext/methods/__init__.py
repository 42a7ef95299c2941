"""Unlearning methods: functions that change a model in place and return an ``UnlearnResult``.

``METHODS[name](model, forget, retain, **settings)`` works for every one of them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from unlearn_ext.data import Batches
from unlearn_ext.importance import Importance
from unlearn_ext.methods.ssd import SsdPlan, Sweep, SweepRow, plan_ssd, ssd
from unlearn_ext.report import UnlearnResult

METHODS: dict[str, Callable[..., UnlearnResult]] = {"ssd": ssd}

__all__ = ["METHODS", "SsdPlan", "Sweep", "SweepRow", "plan_ssd", "ssd", "unlearn"]


def unlearn(
    name: str,
    model: nn.Module,
    forget: Batches | Importance,
    retain: Batches | Importance | None = None,
    **settings: object,
) -> UnlearnResult:
    """Run a method by name.

    Args:
        name: A key of ``METHODS``.
        model: The model, changed in place.
        forget: The forget set.
        retain: The retain set, where the method needs one.
        **settings: The method's own keyword arguments.

    Returns:
        The record of the run.

    Raises:
        ValueError: If there is no such method.

    Example:
        >>> unlearn("magic", nn.Linear(1, 1), [])
        Traceback (most recent call last):
        ValueError: unlearn: name must be one of ssd, got 'magic'
    """
    if name not in METHODS:
        raise ValueError(f"unlearn: name must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name](model, forget, retain, **settings)
