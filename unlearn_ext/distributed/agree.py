"""The face of a function that takes ``process_group``: one model, one call and one outcome on all ranks."""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable, Mapping
from typing import NoReturn, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from unlearn_ext._internal.checksum import checksum
from unlearn_ext._internal.dtensors import is_dtensor
from unlearn_ext._internal.fingerprint import weights_fingerprint
from unlearn_ext._internal.modules import check_model
from unlearn_ext._internal.names import with_plain_names
from unlearn_ext._internal.plain import callable_name
from unlearn_ext.distributed.fsdp import fsdp_modules, reshard
from unlearn_ext.distributed.group import Group, Ranks, ranks_of
from unlearn_ext.distributed.mesh import MeshRanks
from unlearn_ext.distributed.shards import Shards, warn_if_alone, warn_if_padded

_Settings = ParamSpec("_Settings")
_Result = TypeVar("_Result")

# Arguments that change no result, or that are one rank's own by their nature.
_MAY_DIFFER = ("progress", "process_group", "checkpoint")


def lockstep(function: Callable[_Settings, _Result]) -> Callable[_Settings, _Result]:
    """Let a function with the arguments ``model`` and ``process_group`` be called on all ranks together.

    Where a group is given, the model is taken out of ``DistributedDataParallel``; models and settings that
    differ between the ranks are refused on all of them; and where the function fails on one rank, it raises
    on all. The function gets the ``Ranks`` as its ``process_group``. A call from inside another one, which
    passes these on, goes straight through.

    Args:
        function: Takes ``process_group`` by keyword.

    Returns:
        The same function for its callers.
    """
    return _together(function)


def lockstep_or_sharded(function: Callable[_Settings, _Result]) -> Callable[_Settings, _Result]:
    """Do what ``lockstep`` does for a function that also takes models which ``fully_shard`` has sharded.

    Args:
        function: Takes ``process_group`` by keyword, and such models without it: their mesh says which ranks
            there are.

    Returns:
        The same function for its callers.
    """
    return _together(function, may_be_sharded=True)


def lockstep_on_mesh(function: Callable[_Settings, _Result]) -> Callable[_Settings, _Result]:
    """Do what ``lockstep`` does, and the same for the ranks of a sharded model's mesh.

    Of a model that ``fully_shard`` has sharded the function gets the ``MeshRanks`` as its ``process_group``.

    Args:
        function: Takes ``process_group`` by keyword.

    Returns:
        The same function for its callers.
    """
    return _together(function, on_mesh=True)


def _together(
    function: Callable[_Settings, _Result], *, may_be_sharded: bool = False, on_mesh: bool = False
) -> Callable[_Settings, _Result]:
    signature = inspect.signature(function)
    who = function.__name__

    @functools.wraps(function)
    def together(*args: _Settings.args, **settings: _Settings.kwargs) -> _Result:
        group = cast("Group", settings.get("process_group"))
        if isinstance(group, Ranks):
            return function(*args, **settings)
        try:
            given = dict(signature.bind_partial(*args, **settings).arguments)
        except TypeError:  # which the function itself says better
            with ranks_of(group, who).failing_together():
                return function(*args, **settings)
        model = given.get("model")
        is_sharded = isinstance(model, nn.Module) and bool(fsdp_modules(model))
        if group is None and not (is_sharded and on_mesh):
            if isinstance(model, nn.Module) and not may_be_sharded:
                check_whole(model, who)
            for data in [] if is_sharded else _data_in(given):  # a sharded model's mesh is the group
                warn_if_alone(who, data, stacklevel=2)
            return function(*args, **settings)
        if is_sharded and group is not None and (may_be_sharded or on_mesh):
            refuse_group_of_shards(who)
        is_mesh = is_sharded and on_mesh
        ranks = MeshRanks(cast("nn.Module", model), who) if is_mesh else ranks_of(group, who)
        with ranks.failing_together():
            for data in _data_in(given):
                warn_if_padded(who, data, stacklevel=4)
            if "model" in given:
                given["model"] = unwrapped(given["model"])
            check_alike(ranks, given)
            given["process_group"] = ranks
            bound = signature.bind_partial()
            bound.arguments.update((name, given[name]) for name in signature.parameters if name in given)
            return function(*bound.args, **bound.kwargs)

    return together


def refuse_group_of_shards(who: str) -> NoReturn:
    """Refuse a process group beside a sharded model.

    Args:
        who: Whose message it is.

    Raises:
        ValueError: Always.
    """
    raise ValueError(
        f"{who}: process_group must be None for a model that fully_shard has sharded, whose mesh says which "
        "ranks there are"
    )


def check_whole(model: nn.Module, who: str) -> None:
    """Refuse models that ``fully_shard`` has sharded, where a figure would be of one rank's data alone.

    Args:
        model: The model.
        who: Whose message it is.

    Raises:
        NotImplementedError: If it is one.
    """
    if fsdp_modules(model):
        reshard(model)
        check_model(model, who)


def unwrapped(model: object) -> object:
    """Take a model out of ``DistributedDataParallel``, compiled or not.

    Args:
        model: A model.

    Returns:
        What is inside; any other model as it is.
    """
    inner = getattr(model, "_orig_mod", model)
    if isinstance(inner, nn.parallel.DistributedDataParallel):
        return inner.module
    return model


def check_replicated(model: nn.Module, who: str) -> None:
    """Refuse models of which the ranks do not each hold the whole, as plain tensors.

    Args:
        model: The model, outside of any wrapper.
        who: Whose message it is.

    Raises:
        NotImplementedError: If it is wrapped or sharded, or has parameters elsewhere, or quantised ones.
    """
    check_model(model, who)
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "ds_id") or hasattr(parameter, "ds_tensor"):
            raise NotImplementedError(
                f"{who}: model must hold its parameters, got {name} partitioned by DeepSpeed; gather them "
                "(deepspeed.zero.GatheredParameters), or pass the model before deepspeed.initialize"
            )
        kind = type(parameter).__name__
        if not parameter.dtype.is_floating_point or parameter.element_size() < 2 or "4bit" in kind:
            raise NotImplementedError(
                f"{who}: model must have floating-point parameters, got {name}, {kind} of {parameter.dtype}; "
                "quantised ones must be dequantised first"
            )


def check_alike(ranks: Ranks, given: Mapping[str, object]) -> None:
    """Refuse a call that is another one on some rank.

    Args:
        ranks: The ranks.
        given: The arguments by name.

    Raises:
        ValueError: On every rank, with what differs and where.
    """
    model = given.get("model")
    if isinstance(model, nn.Module) and not isinstance(ranks, MeshRanks):
        check_replicated(model, ranks.who)
    found = {name: _digest_of(value) for name, value in given.items() if name not in _MAY_DIFFER}
    all_of_them = ranks.exchange(f"start of {ranks.who}", found)
    for name in sorted({name for each in all_of_them for name in each}):
        seen = [each.get(name, "") for each in all_of_them]
        other = next((rank for rank, text in enumerate(seen) if text != seen[0]), None)
        if other is None:
            continue
        if name == "model" and isinstance(model, nn.Module):
            check_same_weights(ranks, model)
        raise ValueError(
            f"{ranks.who}: {name} must be the same on all ranks, got {seen[0]} on rank 0 and "
            f"{seen[other]} on rank {other}"
        )
    if isinstance(ranks, MeshRanks):
        ranks.check_copies("at the start")


def check_same_weights(ranks: Ranks, model: nn.Module, when: str = "") -> None:
    """Compare a model's parameters and buffers over the ranks.

    Args:
        ranks: The ranks.
        model: The model.
        when: For the message: "" for a call's start, or what has happened since.

    Raises:
        ValueError: At a call's start, on every rank; the message names a tensor that differs.
        RuntimeError: Later, likewise.
    """
    if not ranks.are_many:
        return
    if isinstance(ranks, MeshRanks):
        ranks.check_copies(when or "at the start")
        return
    digests = ranks.exchange(f"weights {when}", weights_fingerprint(model))
    if len(set(digests)) == 1:
        return
    named = with_plain_names({**dict(model.named_parameters()), **dict(model.named_buffers())})
    sums = ranks.exchange("checksums", {name: _digest_of(tensor) for name, tensor in named.items()})
    names = dict.fromkeys(name for each in sums for name in each)
    differing = [name for name in names if len({each.get(name) for each in sums}) > 1]
    what = f"{', '.join(differing[:3])}{', ...' if len(differing) > 3 else ''}"
    if when:
        raise RuntimeError(
            f"{ranks.who}: model must be the same on all ranks {when}, got other values of {what}; the ranks "
            "compute differently"
        )
    buffers = set(with_plain_names(dict(model.named_buffers())))
    hint = ""
    if set(differing) <= buffers:
        hint = ", buffers (running statistics, say) that no rank has sent to the others"
    raise ValueError(
        f"{ranks.who}: model must be the same on all ranks, got other values of {what}{hint}; send one "
        "rank's to all with torch.distributed.broadcast"
    )


def _data_in(given: Mapping[str, object]) -> list[object]:
    # What may be batches; nothing of it is read here.
    kinds = (nn.Module, Tensor, Mapping, str)
    values = given.values()
    return [value for value in values if hasattr(type(value), "__iter__") and not isinstance(value, kinds)]


def _digest_of(value: object) -> str:
    """Say in a few words what must be the same of an argument on all ranks; data may differ, and do.

    Args:
        value: Any argument.

    Returns:
        A text that can be compared.
    """
    if isinstance(value, nn.Module) and fsdp_modules(value):
        return f"parameters {[(name, tuple(p.shape), str(p.dtype)) for name, p in value.named_parameters()]}"
    if isinstance(value, nn.Module):
        return f"weights {weights_fingerprint(value)}"
    if is_dtensor(value):
        return f"{value.dtype}{list(value.shape)} {value.placements}"  # type: ignore[attr-defined]
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)} {_checksum(value)}"
    if isinstance(value, Mapping):
        parts = [f"{name}: {_digest_of(part)}" for name, part in value.items()]
        return f"{type(value).__name__} of {len(parts)}, {_hash_of(' '.join(parts))}"
    if isinstance(value, Shards):
        return f"shards (world, seed, pass) = {value.state}"
    if isinstance(value, torch.Generator):
        return "a generator"
    if isinstance(value, tuple) and any(isinstance(part, Tensor) for part in value):
        return f"({', '.join(_digest_of(part) for part in value)})"
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    if isinstance(value, (list, tuple)) and all(isinstance(part, (int, float, str)) for part in value):
        return repr(value) if value else "data"
    if type(value).__module__.startswith("unlearn_ext.tasks"):
        return repr(value)
    if callable(value) and not hasattr(value, "__iter__"):
        return callable_name(value)
    return "data" if hasattr(value, "__iter__") else type(value).__name__


def _checksum(tensor: Tensor) -> int:
    if tensor.dtype == torch.bool or tensor.element_size() == 1:
        tensor = tensor.detach().to(torch.int16) if tensor.dtype != torch.float8_e4m3fn else tensor.float()
    return checksum(tensor.detach()) if tensor.numel() else 0


def _hash_of(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
