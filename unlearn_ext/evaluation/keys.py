"""Keys for what has been computed: equal for equal content, in this process and in any other."""

from __future__ import annotations

import enum
import functools
import hashlib
import inspect
import json
import logging
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from unlearn_ext._internal.digests import update_digest, weights_digest
from unlearn_ext._internal.plain import callable_name
from unlearn_ext._internal.seeding import seeded
from unlearn_ext.tasks import Task
from unlearn_ext.tasks.batches import Batch, count_samples, is_per_sample, tensors_in

# What the tensors of a mapping with a record, such as ``Importance``, do not tell.
_ATTRIBUTES = ("n_samples", "n_batches", "estimator", "power", "batch_size", "loss", "weights_digest")

_INSTALLED = tuple(
    os.path.realpath(sysconfig.get_paths()[name]) for name in ("stdlib", "platstdlib", "purelib", "platlib")
)


class NoKeyError(Exception):
    """There is no telling what a value holds: what depends on it must not be cached."""


def key(*, code: str | None = None, **facts: object) -> str:
    """Return a key of facts.

    Functions count by name, code, defaults, what they close over, the globals they use, and the source of
    the module that defines them; so do the functions that they use in turn. Libraries count by name alone,
    and so do files and other things that a function reads.

    Args:
        code: Stands for the code of all functions instead, where there is no telling what they hold.
        **facts: Numbers, strings, tensors, modules, functions, loaders, objects with plain attributes, and
            mappings and sequences of them.

    Returns:
        64 hexadecimal digits.

    Raises:
        NoKeyError: If there is no telling what a fact holds. The message says what stands in the way.

    Example:
        >>> key(seed=0, settings={"a": 1, "b": 2}) == key(settings={"b": 2, "a": 1}, seed=0)
        True
    """
    try:
        content = _Keys(code).of(facts)
    except RecursionError as error:
        raise NoKeyError("something that contains itself") from error
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Untold:
    """Stands for something that has no key.

    Args:
        why: What stands in the way.
    """

    def __init__(self, why: str) -> None:
        self.why = why


def sample_hashes(batch: Batch, task: Task | None = None) -> Iterator[int]:
    """Yield a hash of each sample of a batch; their sum stands for a data set in any order.

    Args:
        batch: A batch in any form.
        task: Counts the samples, and takes them where they do not lie along leading dimensions.

    Yields:
        Integers below 2^256.

    Raises:
        NoKeyError: If the batch holds no tensor: what it holds cannot be told.
    """
    if not any(True for _ in tensors_in(batch)):
        raise NoKeyError(f"a batch of {type(batch).__name__}, which holds no tensor")
    n = count_samples(batch) if task is None else task.count(batch)
    if task is not None and task.has_own_select:
        for index in range(n):
            digest = hashlib.sha256()
            for tensor in tensors_in(task.select(batch, [index])):
                update_digest(digest, tensor)
            yield int.from_bytes(digest.digest(), "big")
        return
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


class _Keys:
    """Turns values into JSON that stands for their content."""

    def __init__(self, code: str | None) -> None:
        self._code = code
        self._functions: set[CodeType] = set()  # those that are done, or being done

    def of(self, value: object) -> object:
        if value is None or isinstance(value, (bool, int, float, str)):
            return value.value if isinstance(value, enum.Enum) else value
        if isinstance(value, (bytes, complex, range, slice, torch.device, torch.dtype, Path)):
            return [type(value).__name__, str(value)]
        if isinstance(value, Tensor):
            return _digest(value)
        if isinstance(value, (np.ndarray, np.generic)) and value.dtype != object:
            return ["array", str(value.dtype), list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
        if isinstance(value, Mapping):
            entries = {str(name): self.of(entry) for name, entry in value.items()}
            if isinstance(value, dict):
                return entries
            return [entries, *(self.of(getattr(value, name, None)) for name in _ATTRIBUTES)]
        if isinstance(value, (list, tuple)):
            return [self.of(entry) for entry in value]
        if isinstance(value, (set, frozenset)):
            # The order of a set of strings differs from process to process.
            return ["set", *sorted(json.dumps(self.of(entry), sort_keys=True) for entry in value)]
        if isinstance(value, nn.Module):
            classes = sorted({json.dumps(self.of(type(module))) for module in value.modules()})
            return [*classes, repr(value), weights_digest(value)]
        if isinstance(value, DataLoader):
            with seeded(0, value):
                return f"{sum(sum(sample_hashes(batch)) for batch in value) % 2**256:064x}"
        if isinstance(value, ModuleType):
            return [value.__name__, _source(value.__name__)]
        if isinstance(value, logging.Logger):
            return [type(value).__name__, value.name]
        if isinstance(value, type):
            return (
                callable_name(value) if self._code is not None else [callable_name(value), _source_of(value)]
            )
        if isinstance(value, functools.partial):
            return [self.of(value.func), self.of(value.args), self.of(value.keywords)]
        if isinstance(value, MethodType):
            return [self._part(value, "of", value.__self__), self.of(value.__func__)]
        if isinstance(value, FunctionType):
            return self._function(value)
        if isinstance(value, BuiltinFunctionType) and isinstance(
            value.__self__, (ModuleType, type, type(None))
        ):
            return callable_name(value)
        return self._object(value)

    def _object(self, value: object) -> object:
        if isinstance(value, Untold):
            raise NoKeyError(value.why)
        # An object of a class written in Python is what its attributes are, unless its class has others.
        kind = type(value)
        plain = kind.__reduce_ex__ is object.__reduce_ex__ and not hasattr(kind, "__getstate__")
        if hasattr(object, "__getstate__"):  # Python 3.11 gives every class one
            plain = plain or getattr(kind, "__getstate__", None) is getattr(object, "__getstate__", None)
        if not plain or kind.__module__ == "builtins" or not hasattr(value, "__dict__") or _slots(kind):
            raise NoKeyError(f"{_article(value)}, whose content cannot be told")
        return [self.of(kind), {name: self._part(value, name, entry) for name, entry in vars(value).items()}]

    def _function(self, function: FunctionType) -> object:
        name = callable_name(function)
        if self._code is not None:
            return [name, self._code]
        if _is_library(function):
            return [name, _source(function.__module__)]
        code = function.__code__
        if code in self._functions:
            return name
        self._functions.add(code)
        closure = {}
        for variable, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                content = cell.cell_contents
            except ValueError as error:  # a name that is not bound yet
                raise NoKeyError(f"{name} closes over {variable!r}, which has no value yet") from error
            closure[variable] = self._part(function, variable, content, "closes over")
        return [
            name,
            _code_key(code),
            self._part(function, "its defaults", [function.__defaults__, function.__kwdefaults__]),
            closure,
            _source(function.__module__),
            {} if _is_installed(function.__module__) else self._globals(function),
        ]

    def _globals(self, function: FunctionType) -> dict[str, object]:
        used: dict[str, object] = {}
        names = _names_in(function.__code__)
        for name in sorted(names & set(function.__globals__)):
            value = function.__globals__[name]
            if isinstance(value, ModuleType):
                if not _is_installed(value.__name__):
                    used[name] = self.of(value)
                    for attribute in sorted(names & set(vars(value))):
                        used[f"{name}.{attribute}"] = self._part(function, name, vars(value)[attribute])
            elif isinstance(value, (type, FunctionType)) and _is_installed(value.__module__):
                used[name] = callable_name(value)
            else:
                used[name] = self._part(function, name, value)
        return used

    def _part(self, owner: object, name: str, value: object, verb: str = "uses") -> object:
        try:
            return self.of(value)
        except NoKeyError as error:
            # The first reason is the nearest to the cause.
            text = str(error)
            told = text if " uses " in text or " closes over " in text else f"{name!r}: {text}"
            owned = callable_name(owner) if callable(owner) else type(owner).__name__
            raise NoKeyError(told if told is text else f"{owned} {verb} {told}") from error


def _article(value: object) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def _slots(kind: type) -> bool:
    return any(bool(vars(base).get("__slots__")) for base in kind.__mro__)


def _digest(tensor: Tensor) -> str:
    digest = hashlib.sha256()
    update_digest(digest, tensor)
    return digest.hexdigest()


def _source(module: str) -> str | None:
    # None where there is no file: what is typed at a prompt is known by its code and its globals.
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None or not str(path).endswith(".py"):
        return None
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except OSError:
        return None


def _source_of(kind: type) -> str | None:
    source = _source(kind.__module__)
    if source is not None or _is_installed(kind.__module__):
        return source
    members = [member for member in vars(kind).values() if inspect.isfunction(member)]
    return hashlib.sha256("".join(_code_key(member.__code__) for member in members).encode()).hexdigest()


def _is_installed(module: str) -> bool:
    root = module.partition(".")[0]
    if root in sys.builtin_module_names or root in ("torch", "numpy", "unlearn_ext"):
        return True
    path = getattr(sys.modules.get(module), "__file__", None)
    # A frozen module of the standard library may have no file; what is typed at a prompt has none either.
    if path is None:
        return root in sys.stdlib_module_names and root != "__main__"
    return os.path.realpath(str(path)).startswith(tuple(f"{folder}{os.sep}" for folder in _INSTALLED))


def _is_library(function: FunctionType) -> bool:
    # What a library gives out under a name is what its version makes it, whatever it closes over.
    if not _is_installed(function.__module__):
        return False
    found: object = sys.modules.get(function.__module__)
    for part in function.__qualname__.split("."):
        found = getattr(found, part, None)
    return found is function


def _names_in(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names_in, inner))


def _code_key(code: CodeType) -> str:
    constants = [_constant_key(constant) for constant in code.co_consts]
    content = [code.co_code.hex(), *code.co_names, *code.co_varnames, *constants]
    return hashlib.sha256("\0".join(content).encode()).hexdigest()


def _constant_key(constant: object) -> str:
    if isinstance(constant, CodeType):
        return _code_key(constant)
    # The order of a set of strings differs from process to process.
    return repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)
