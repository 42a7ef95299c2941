"""Keys for what has been computed: equal for equal content, in this process and in any other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unlearn_ext._internal.digests import update_digest, weights_digest
from unlearn_ext._internal.plain import callable_name
from unlearn_ext._internal.seeding import seeded
from unlearn_ext.tasks.batches import Batch, count_samples, is_per_sample, tensors_in

# What the tensors of a mapping with a record, such as ``Importance``, do not tell.
_ATTRIBUTES = ("n_samples", "n_batches", "estimator", "power", "batch_size")


class NoKeyError(Exception):
    """There is no telling what a value holds: what depends on it must not be cached."""


def key(**facts: object) -> str:
    """Return a key of facts.

    Args:
        **facts: What ``value_key`` takes.

    Returns:
        64 hexadecimal digits.

    Raises:
        NoKeyError: If there is no telling what a fact holds.

    Example:
        >>> key(seed=0, settings={"a": 1, "b": 2}) == key(settings={"b": 2, "a": 1}, seed=0)
        True
    """
    return hashlib.sha256(json.dumps(value_key(facts), sort_keys=True).encode()).hexdigest()


def value_key(value: object) -> object:
    """Turn a value into JSON that stands for its content.

    Functions count by name, code, defaults and what they close over; what they call, and globals, do not.

    Args:
        value: Numbers, strings, tensors, modules, functions, loaders, and mappings and sequences of them.

    Returns:
        Plain JSON.

    Raises:
        NoKeyError: If it is something else.
    """
    try:
        return _value_key(value)
    except RecursionError as error:
        raise NoKeyError(type(value).__name__) from error


def sample_hashes(batch: Batch) -> Iterator[int]:
    """Yield a hash of each sample of a batch; their sum stands for a data set in any order.

    Args:
        batch: A batch in either form.

    Yields:
        Integers below 2^256.
    """
    n = count_samples(batch)
    shared = hashlib.sha256()
    columns = []
    for tensor in tensors_in(batch):
        if is_per_sample(tensor, n):
            shared.update(f"{tensor.dtype}{list(tensor.shape[1:])}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(n, -1) if tensor.numel() else None
            columns.append(np.empty((n, 0), np.uint8) if flat is None else flat.view(torch.uint8).numpy())
        else:
            update_digest(shared, tensor)
    for row in range(n):
        digest = shared.copy()
        for column in columns:
            digest.update(column[row].data)
        yield int.from_bytes(digest.digest(), "big")


def _value_key(value: object) -> object:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor):
        digest = hashlib.sha256()
        update_digest(digest, value)
        return digest.hexdigest()
    if isinstance(value, Mapping):
        entries = {str(name): _value_key(entry) for name, entry in value.items()}
        return entries if isinstance(value, dict) else [entries, *_attributes(value)]
    if isinstance(value, (list, tuple)):
        return [_value_key(entry) for entry in value]
    if isinstance(value, nn.Module):
        return [callable_name(type(value)), weights_digest(value)]
    if isinstance(value, DataLoader):
        with seeded(0, value):
            return f"{sum(sum(sample_hashes(batch)) for batch in value) % 2**256:064x}"
    if isinstance(value, (torch.device, torch.dtype)):
        return str(value)
    if callable(value):
        return _function_key(value)
    raise NoKeyError(type(value).__name__)


def _attributes(value: object) -> list[object]:
    return [_value_key(getattr(value, name, None)) for name in _ATTRIBUTES]


def _function_key(function: Callable[..., object]) -> object:
    if hasattr(function, "func") and hasattr(function, "keywords"):
        partial = cast("Any", function)
        return [_value_key(partial.func), _value_key(partial.args), _value_key(partial.keywords)]
    owner = getattr(function, "__self__", None)
    if owner is not None and not isinstance(owner, type):  # a method: what its object holds is unknown
        raise NoKeyError(callable_name(function))
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        if isinstance(function, type) or hasattr(function, "__qualname__"):
            return callable_name(function)
        raise NoKeyError(callable_name(function))
    try:
        cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    except ValueError as error:  # a name that is not bound yet
        raise NoKeyError(callable_name(function)) from error
    defaults = [getattr(function, "__defaults__", None), getattr(function, "__kwdefaults__", None)]
    return [callable_name(function), _code_key(code), _value_key(cells), _value_key(defaults)]


def _code_key(code: CodeType) -> str:
    constants = [_constant_key(constant) for constant in code.co_consts]
    content = [code.co_code.hex(), *code.co_names, *code.co_varnames, *constants]
    return hashlib.sha256("\0".join(content).encode()).hexdigest()


def _constant_key(constant: object) -> str:
    if isinstance(constant, CodeType):
        return _code_key(constant)
    # The order of a set of strings differs from process to process.
    return repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)
