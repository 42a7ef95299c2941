"""Values as plain JSON, and names of functions."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import fields, is_dataclass

_PUBLIC = {"unlearn_ext.tasks.losses": "unlearn_ext.losses"}


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
        fixed = [repr(plain(value)) for value in function.args]
        fixed += [f"{name}={plain(value)!r}" for name, value in function.keywords.items()]
        return f"{callable_name(function.func)}({', '.join(fixed)})"
    named = function if hasattr(function, "__qualname__") else type(function)
    # What users import is the name of a loss; where its file lies may change, and stored records stay.
    module = _PUBLIC.get(named.__module__, named.__module__)
    return f"{module}.{named.__qualname__}"


def plain(value: object) -> object:
    """Turn a value into what strict JSON knows.

    Args:
        value: Anything: mappings, sequences, sets, records, tensors and arrays are taken apart.

    Returns:
        Dictionaries, lists, strings, numbers, booleans and None. NaN and infinities become strings, a
        function its full name, anything else ``str(value)``.

    Example:
        >>> import torch
        >>> plain({"shape": torch.Size([2]), "loss": math.inf, "function": math.sqrt})
        {'shape': [2], 'loss': 'inf', 'function': 'math.sqrt'}
    """
    if is_dataclass(value) and not isinstance(value, type):
        return plain({f.name: getattr(value, f.name) for f in fields(value)})
    if isinstance(value, Mapping):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple, set, frozenset, range)):
        return [plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if callable(value) and not hasattr(value, "tolist"):
        return callable_name(value)
    return plain(value.tolist()) if hasattr(value, "tolist") else str(value)
