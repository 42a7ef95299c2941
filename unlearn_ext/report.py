"""What an unlearning run leaves behind for the record."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

NOTICE = (
    "Approximate unlearning: these figures tell what was changed and measured. They do not prove that the "
    "data has no influence left."
)


@dataclass(frozen=True, slots=True)
class UnlearnResult:
    """The record of one unlearning run.

    Attributes:
        method: Name of the method.
        hyperparameters: What it was called with; ``alpha="adaptive"`` is joined by the value it came to.
        seconds: Wall-clock seconds per phase.
        changed: Share of the model's scalar parameters whose value changed, in [0, 1].
        changed_per_parameter: The same for each parameter, by name.
        history: What happened, phase by phase or step by step.

    Example:
        >>> result = UnlearnResult("ssd", {"alpha": 2.0}, {"importance": 0.5}, 0.1, {"weight": 0.1}, ())
        >>> print(result)
        ssd: 10.0% of the parameters changed in 0.50 s
    """

    method: str
    hyperparameters: Mapping[str, object]
    seconds: Mapping[str, float]
    changed: float
    changed_per_parameter: Mapping[str, float]
    history: Sequence[Mapping[str, object]]

    def __str__(self) -> str:
        seconds = sum(self.seconds.values())
        return f"{self.method}: {self.changed:.1%} of the parameters changed in {seconds:.2f} s"

    def to_json(self) -> str:
        """Return the record as a JSON object.

        NaN and infinities, which JSON does not know, are written as strings; a function by its full name.

        Returns:
            JSON with the attributes as keys, and ``notice``: what the record does not say.
        """
        return json.dumps(_plain({**asdict(self), "notice": NOTICE}), indent=2)


def callable_name(function: object) -> str:
    """Name a function for the record, without keeping it alive.

    Args:
        function: A function, a ``functools.partial`` of one, or any other callable.

    Returns:
        Its module and name, with the arguments that a partial fixes.

    Example:
        >>> callable_name(math.sqrt), callable_name(functools.partial(math.pow, 2.0))
        ('math.sqrt', 'math.pow(2.0)')
    """
    if isinstance(function, functools.partial):
        fixed = [repr(_plain(value)) for value in function.args]
        fixed += [f"{name}={_plain(value)!r}" for name, value in function.keywords.items()]
        return f"{callable_name(function.func)}({', '.join(fixed)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def _plain(value: object) -> object:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if callable(value) and not hasattr(value, "tolist"):
        return callable_name(value)
    return _plain(value.tolist()) if hasattr(value, "tolist") else str(value)
