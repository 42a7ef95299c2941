"""Names of parameters and layers."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

from torch import nn

# What torch.compile, DataParallel and FullyShardedDataParallel put into the names of what they wrap.
_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module"}

_Value = TypeVar("_Value")


def layer_name(parameter: str) -> str:
    """Return the name of the module that a parameter belongs to.

    Args:
        parameter: A name of ``model.named_parameters()``.

    Returns:
        The name without its last part; the whole name for a parameter of the model itself.

    Example:
        >>> layer_name("block.0.weight"), layer_name("scale")
        ('block.0', 'scale')
    """
    return parameter.rpartition(".")[0] or parameter


def plain_name(name: str) -> str:
    """Return a parameter's name as the module itself has it.

    Args:
        name: A name, perhaps of a compiled, parallel or sharded module.

    Returns:
        The name without what a wrapper has put in, wherever in it.

    Example:
        >>> plain_name("module._orig_mod.block._orig_mod.weight"), plain_name("submodule.weight")
        ('block.weight', 'submodule.weight')
    """
    if "module" not in name and "_orig_mod" not in name:  # as nearly always
        return name
    *path, last = name.split(".")
    return ".".join([*(part for part in path if part not in _WRAPPERS), last])


def plain_module_name(name: str) -> str:
    """Return a module's name as the model itself has it.

    Args:
        name: A name of ``model.named_modules()``.

    Returns:
        The name without what a wrapper has put in; ``""`` for the model inside a wrapper.

    Example:
        >>> plain_module_name("_orig_mod.block"), plain_module_name("_orig_mod")
        ('block', '')
    """
    return plain_name(f"{name}.").removesuffix(".")


def with_plain_names(
    named: Mapping[str, _Value], plain: Callable[[str], str] = plain_name
) -> dict[str, _Value]:
    """Rename what is kept by a parameter's name, so that it can be found whatever wraps the model.

    Args:
        named: Name to anything.
        plain: ``plain_name``, or ``plain_module_name``.

    Returns:
        Plain name to the same. A name that several would share (of a model that has a module called
        ``module`` beside others) is left to the first of them, and the others keep theirs.

    Example:
        >>> with_plain_names({"_orig_mod.weight": 1})
        {'weight': 1}
        >>> with_plain_names({"weight": 1, "module.weight": 2})
        {'weight': 1, 'module.weight': 2}
    """
    shorts = {name: plain(name) for name in named}
    exact = {name for name, short in shorts.items() if short == name}
    renamed: dict[str, _Value] = {}
    for name, value in named.items():
        short = shorts[name]
        is_taken = short in renamed or (short in exact and name not in exact)
        renamed[name if is_taken else short] = value
    return renamed


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return a model's parameters by their plain names, in the order of ``model.named_parameters()``.

    Args:
        model: The model.

    Returns:
        Name to parameter; the names do not depend on what wraps the model or its parts.
    """
    return with_plain_names(dict(model.named_parameters()))


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's modules by their plain names, in the order of ``model.named_modules()``.

    Args:
        model: The model.

    Returns:
        Name to module. Of a wrapper and what it wraps the latter has the plain name, and the wrapper is left
        out.
    """
    modules = dict(model.named_modules())
    wrappers = {
        name
        for name, module in modules.items()
        if any(child in _WRAPPERS for child, _ in module.named_children()) and len(module._modules) == 1
        if not module._parameters
    }
    return with_plain_names(
        {name: module for name, module in modules.items() if name not in wrappers}, plain_module_name
    )


def matcher(patterns: str | Iterable[str] | None, who: str) -> Callable[[str], bool]:
    r"""Say which parameters some patterns mean, as ``target_modules`` of PEFT does.

    Args:
        patterns: One or several. Each is a regular expression that matches the whole name of a parameter or
            of its module, or what one of these names equals or ends with after a dot, or a pattern as for
            file names (``*.bias``). None means no parameter.
        who: Whose message it is.

    Returns:
        A function of a parameter's plain name.

    Raises:
        ValueError: If there is no pattern.
        TypeError: If one is not a string.

    Example:
        >>> is_meant = matcher(["head", r"blocks\.[01]\..*", "*.bias"], "example")
        >>> [is_meant(name) for name in ("model.head.weight", "blocks.1.w", "blocks.2.w", "blocks.2.bias")]
        [True, True, False, True]
    """
    if patterns is None:
        return lambda _: False
    known: list[object] = [patterns] if isinstance(patterns, str) else list(patterns)
    if not known:
        raise ValueError(f"{who}: patterns of parameter names must be at least one, got none")
    expressions: list[tuple[str, re.Pattern[str]]] = []
    for pattern in known:
        if not isinstance(pattern, str):
            kind = type(pattern).__name__
            raise TypeError(f"{who}: patterns of parameter names must be strings, got {kind}")
        try:
            expressions.append((pattern, re.compile(pattern)))
        except re.error:
            expressions.append((pattern, re.compile(fnmatch.translate(pattern))))

    def matches(name: str) -> bool:
        names = {name, layer_name(name)}
        return any(
            expression.fullmatch(one) or one == pattern or one.endswith(f".{pattern}")
            for pattern, expression in expressions
            for one in names
        )

    return matches


def chosen_names(
    names: Iterable[str],
    include: str | Iterable[str] | None,
    exclude: str | Iterable[str] | None,
    who: str,
) -> list[str]:
    """Return the parameters that patterns leave.

    Args:
        names: Plain names of parameters.
        include: Patterns of those to take (see ``matcher``); None takes all.
        exclude: Patterns of those to leave out, whatever ``include`` says.
        who: Whose message it is.

    Returns:
        Names, in their order.

    Raises:
        ValueError: If none is left.

    Example:
        >>> chosen_names(["a.weight", "a.bias", "b.weight"], None, ["bias", "b"], "example")
        ['a.weight']
    """
    is_included = matcher(include, who) if include is not None else lambda _: True
    is_excluded = matcher(exclude, who)
    known = list(names)
    chosen = [name for name in known if is_included(name) and not is_excluded(name)]
    if known and not chosen:
        raise ValueError(
            f"{who}: include and exclude must leave a parameter, got include={include!r}, "
            f"exclude={exclude!r} for {', '.join(known[:3])}{', ...' if len(known) > 3 else ''}"
        )
    return chosen
