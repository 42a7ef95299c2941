"""A figure, or the reason why there is none."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Measure:
    """One figure, or the reason why there is none.

    Attributes:
        value: The figure; None if it could not be computed.
        why: Why not; None if it could.
        low: Lower end of its 95 % interval, if it has one.
        high: Upper end.
        spread: Standard deviation over the seeds, where it is a mean of several.
        note: What to read into it, such as the verdict of the attack.
    """

    value: float | None
    why: str | None = None
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    note: str | None = None


def attempt(measure: Callable[..., float | Measure], *arguments: object) -> Measure:
    """Take a figure, or note why there is none.

    Args:
        measure: Returns the figure.
        *arguments: Its arguments.

    Returns:
        The figure or the reason.
    """
    try:
        found = measure(*arguments)
        found = found if isinstance(found, Measure) else Measure(float(found))
    except Exception as error:
        _log.debug("a figure is missing", exc_info=True)
        return Measure(None, reason_of(error))
    if found.value is not None and not math.isfinite(found.value):
        return Measure(None, f"it came to {found.value}")
    return found


def reason_of(error: BaseException) -> str:
    """Put an error into one line.

    Args:
        error: The error.

    Returns:
        Its message, with its class where the message alone would not do.
    """
    text = " ".join(str(error).split())
    named = isinstance(error, (ValueError, LookupError, ImportError, NotImplementedError)) and text
    if isinstance(error, KeyError):
        named = False
    text = text if len(text) <= 300 else f"{text[:297]}..."
    return text if named else f"{type(error).__name__}: {text}".rstrip(": ")
