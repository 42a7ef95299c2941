"""Settings of methods, checked against their signatures before anything runs."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping

import unlearn_ext.methods as methods

# The three things that every method is called with.
_SETS = ("model", "forget", "retain")


def check_settings(
    who: str,
    name: str,
    function: Callable[..., object],
    settings: Mapping[str, object],
    given: Iterable[str] = (),
) -> None:
    """Refuse settings that a method does not have, and calls that lack what it requires.

    Args:
        who: For the message: ``"compare"``.
        name: Name of the method.
        function: The method.
        settings: The keyword arguments it is to be called with.
        given: Names that are passed if the method has them.

    Raises:
        ValueError: If a setting is unknown, or a required one is missing. The message names the nearest ones.

    Example:
        >>> check_settings("compare", "ssd", methods.ssd, {"alpa": 3})
        Traceback (most recent call last):
        ValueError: compare: ssd has no setting 'alpa'; did you mean 'alpha'? It has ...
    """
    accepted = _accepted(name, function)
    if accepted is None:
        return
    known, required = accepted
    for setting in settings:
        if setting in _SETS or setting not in known:
            nearest = difflib.get_close_matches(setting, known, n=2)
            hint = f"; did you mean {' or '.join(map(repr, nearest))}?" if nearest else "."
            has = f"It has {', '.join(known)}" if known else "It has none"
            raise ValueError(f"{who}: {name} has no setting {setting!r}{hint} {has}")
    missing = [setting for setting in required if setting not in settings and setting not in given]
    if missing:
        raise ValueError(f"{who}: {name} needs the setting {', '.join(map(repr, missing))}, which is missing")


def accepts(name: str, function: Callable[..., object], setting: str) -> bool:
    """Say whether a method has a setting, itself or through the function that it hands its settings on to.

    Args:
        name: Name of the method.
        function: The method.
        setting: Name of the setting.

    Returns:
        False where there is no telling.

    Example:
        >>> accepts("ssd", methods.ssd, "alpha"), accepts("ssd", methods.ssd, "beta")
        (True, False)
    """
    accepted = _accepted(name, function)
    return accepted is not None and setting in accepted[0]


def _accepted(name: str, function: Callable[..., object]) -> tuple[list[str], list[str]] | None:
    # None where any keyword is taken, or where there is no telling.
    parameters = _parameters(function)
    if parameters is None:
        return None
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        # What METHODS holds may hand its settings on to the function that users know under the same name.
        inner = getattr(methods, name, None) if function is methods.METHODS.get(name) else None
        handed_on = _parameters(inner) if callable(inner) else None
        if handed_on is None or any(parameter.kind is parameter.VAR_KEYWORD for parameter in handed_on):
            return None
        keywords = (parameter for parameter in handed_on if parameter.kind is parameter.KEYWORD_ONLY)
        parameters = list({parameter.name: parameter for parameter in (*keywords, *parameters)}.values())
    named = [
        parameter
        for parameter in parameters
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    ]
    settings = [parameter for parameter in named if parameter.name not in _SETS]
    keyword_only = [parameter for parameter in settings if parameter.kind is parameter.KEYWORD_ONLY]
    required = [parameter.name for parameter in keyword_only if parameter.default is parameter.empty]
    return [parameter.name for parameter in settings], required


def _parameters(function: Callable[..., object]) -> list[inspect.Parameter] | None:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a function written in C
        return None
