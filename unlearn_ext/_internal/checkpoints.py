"""Weights out of the files in which training scripts leave them."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_ext._internal.names import with_plain_names

# Where training scripts keep the state_dict among other things.
_PLACES = ("state_dict", "model_state_dict", "model")
_WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint into a model.

    The file is one of ``torch.save`` or of safetensors (by its ending). It holds a state_dict, itself or
    under ``"state_dict"``, ``"model_state_dict"`` or ``"model"``; names that ``torch.compile``,
    ``DistributedDataParallel`` or FSDP have put a part into are matched without it.

    Args:
        model: Gets the weights, all of them or none.
        path: The file. It cannot run code: pickled objects other than tensors and plain values are refused.
            Files of ``torch.save`` have checksums, which are verified; those of safetensors, and of torch's
            format before 1.6, have none: a bit that has flipped in a weight is not noticed there.

    Raises:
        ImportError: If safetensors is needed and not installed.
        OSError: If the file is not there, or cannot be opened.
        ValueError: If it cannot be read as what its ending says; if it holds no state_dict, or more than
            one, or not this model's.
    """
    weights = _state_dict(_read(Path(path)), path)
    wanted = model.state_dict()
    if set(weights) != set(wanted):
        ours = with_plain_names({name: name for name in wanted})
        weights = {ours.get(name, name): value for name, value in with_plain_names(weights).items()}
    _check(weights, wanted, path)
    model.load_state_dict(weights)


def _read(path: Path) -> Any:  # noqa: ANN401 - whatever was saved
    is_safe = path.suffix == ".safetensors"
    try:
        return stored_in(path)
    except (ImportError, OSError, MemoryError):
        raise
    except Exception as error:  # of many kinds, by where the file is damaged
        kind = "a safetensors file" if is_safe else "a file of torch.save with nothing but tensors"
        told = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
        raise ValueError(
            f"{path} must be {kind}{'' if is_safe else ' and plain values'}, got {type(error).__name__}: "
            f"{told}; it is cut short or damaged, or of another kind: save model.state_dict() again, by "
            f"{'safetensors.torch.save_file' if is_safe else 'torch.save'}"
        ) from error


def stored_in(path: Path) -> Any:  # noqa: ANN401 - whatever was saved
    """Read a file of ``torch.save`` or of safetensors, which cannot run code, and verify its checksums.

    Args:
        path: The file; safetensors by its ending.

    Returns:
        What it holds, on the CPU.

    Raises:
        ImportError: If safetensors is needed and not installed.
        ValueError: If a checksum of ``torch.save`` is another than that of what is there. What else may be
            wrong with a file is told by errors of its library.
    """
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(
                f"{path} is read with safetensors: pip install 'unlearn_ext[safetensors]'"
            ) from error
        return load_file(path)
    # Weights only: a checkpoint must not be able to run code.
    found = torch.load(path, map_location="cpu", weights_only=True)
    if zipfile.is_zipfile(path):  # torch does not look at the checksums that it writes
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                raise ValueError(f"{part} has another checksum (or was saved under set_crc32_options(False))")
    return found


def _state_dict(stored: Any, path: str | os.PathLike[str]) -> dict[str, Any]:  # noqa: ANN401 - see _read
    if not isinstance(stored, Mapping):
        raise ValueError(f"{path} must hold a state_dict, got {type(stored).__name__}")
    places = [place for place in _PLACES if isinstance(stored.get(place), Mapping)]
    if len(places) > 1:
        raise ValueError(f"{path} must hold one state_dict, got several: {', '.join(places)}")
    if places:
        return _state_dict(stored[places[0]], path)
    if not any(isinstance(value, Tensor) for value in stored.values()):
        raise ValueError(
            f"{path} must hold a state_dict, itself or under one of {', '.join(_PLACES)}, got the keys "
            f"{', '.join(map(str, list(stored)[:8])) or 'of an empty mapping'}"
        )
    return {str(name): value for name, value in stored.items()}


def _check(weights: Mapping[str, Any], wanted: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    # Before anything is copied: load_state_dict copies what fits first, and complains then.
    told = []
    for what, names in (("misses", set(wanted) - set(weights)), ("has besides", set(weights) - set(wanted))):
        if names:
            told.append(f"{what} {', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}")
    for name in sorted(set(weights) & set(wanted)):
        ours, theirs = wanted[name], weights[name]
        if not isinstance(ours, Tensor):
            continue
        if not isinstance(theirs, Tensor):
            told.append(f"has {type(theirs).__name__} for {name}")
        elif ours.shape != theirs.shape:
            told.append(f"has {name} of shape {list(theirs.shape)} instead of {list(ours.shape)}")
        elif _form(ours) != _form(theirs) or theirs.is_meta:
            told.append(f"has {name} as {'meta' if theirs.is_meta else _form(theirs)} for {_form(ours)}")
    if told:
        raise ValueError(f"{path} must hold the weights of this model: it {'; '.join(told)}")


def _form(tensor: Tensor) -> str:
    # Only within one of these are values the same after they have been copied, up to rounding.
    kind = "whole" if tensor.dtype in _WHOLE else str(tensor.dtype).removeprefix("torch.")
    kind = "floating-point" if tensor.is_floating_point() else kind
    kind = "complex" if tensor.is_complex() else kind
    kind = "quantised" if tensor.is_quantized else kind
    return f"{kind} numbers, {str(tensor.layout).removeprefix('torch.')}"
