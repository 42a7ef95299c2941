"""States of all random generators that a pass may draw from, in a form that can be written."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


def states(generators: Sequence[torch.Generator]) -> dict[str, Tensor]:
    """Take the states of the generators of torch, Python and NumPy, and of some others.

    Args:
        generators: Others.

    Returns:
        uint8 tensors by name.
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    plain = [random.getstate(), [str(name), np.asarray(keys).tolist(), *rest]]
    found = {"plain": torch.frombuffer(bytearray(json.dumps(plain).encode()), dtype=torch.uint8)}
    found["torch"] = torch.get_rng_state()
    if torch.cuda.is_available():
        found |= {f"cuda/{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return found | {f"own/{i}": generator.get_state() for i, generator in enumerate(generators)}


def set_states(found: Mapping[str, Tensor], generators: Sequence[torch.Generator]) -> None:
    """Put them back.

    Args:
        found: Of ``states``.
        generators: The same others, in the same order.
    """
    python, numpy = json.loads(found["plain"].numpy().tobytes())
    random.setstate(_tuples(python))
    np.random.set_state((numpy[0], np.asarray(numpy[1], dtype=np.uint32), *numpy[2:]))
    torch.set_rng_state(found["torch"])
    for name, state in found.items():
        if name.startswith("cuda/") and torch.cuda.is_available():
            torch.cuda.set_rng_state(state, int(name.partition("/")[2]))
    for index, generator in enumerate(generators):
        if f"own/{index}" in found:
            generator.set_state(found[f"own/{index}"])


def _tuples(value: Any) -> Any:  # noqa: ANN401 - JSON has lists only
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
