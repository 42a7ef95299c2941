"""Weights out of the files in which training scripts leave them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unlearn_ext._internal.names import with_plain_names

# Where training scripts keep the state_dict among other things.
_PLACES = ("state_dict", "model_state_dict", "model")


def load_weights(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Load a checkpoint into a model.

    The file is one of ``torch.save`` or of safetensors (by its ending). It holds a state_dict, itself or
    under ``"state_dict"``, ``"model_state_dict"`` or ``"model"``; names that ``torch.compile``,
    ``DistributedDataParallel`` or FSDP have put a part into are matched without it.

    Args:
        model: Gets the weights, all of them or none.
        path: The file. It cannot run code: pickled objects other than tensors and plain values are refused.

    Raises:
        ImportError: If safetensors is needed and not installed.
        ValueError: If the file holds no state_dict, or more than one, or not this model's.
    """
    weights = _state_dict(_read(Path(path)), path)
    wanted = model.state_dict()
    if set(weights) != set(wanted):
        ours = with_plain_names({name: name for name in wanted})
        weights = {ours.get(name, name): value for name, value in with_plain_names(weights).items()}
    _check(weights, wanted, path)
    model.load_state_dict(weights)


def _read(path: Path) -> Any:  # noqa: ANN401 - whatever was saved
    if path.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError as error:
            raise ImportError(
                f"{path} is read with safetensors: pip install 'unlearn_ext[safetensors]'"
            ) from error
        return load_file(path)
    # Weights only: a checkpoint must not be able to run code.
    return torch.load(path, map_location="cpu", weights_only=True)


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
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor) and ours.shape != theirs.shape:
            told.append(f"has {name} of shape {list(theirs.shape)} instead of {list(ours.shape)}")
    if told:
        raise ValueError(f"{path} must hold the weights of this model: it {'; '.join(told)}")
