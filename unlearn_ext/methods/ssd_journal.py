"""Which scalars of a model were changed, from which bits: enough to undo it, or to do it again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from unlearn_ext import ops
from unlearn_ext._internal.checksum import checksum

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Entry:
    """Some scalars of one parameter, and what they are to be.

    Attributes:
        selected: Packed mask over the parameter.
        values: Of the scalars in it, row-major.
        checksum: Of the whole parameter as it must be when the values are written.
    """

    selected: Tensor
    values: Tensor
    checksum: int


def entry(selected: Tensor, values: Tensor, tensor: Tensor) -> Entry:
    """Note scalars of a parameter.

    Args:
        selected: bool, of the parameter's shape.
        values: What is to be written there.
        tensor: The parameter as it must be then.

    Returns:
        The entry.
    """
    return Entry(ops.pack_mask(selected), values, checksum(tensor))


def differing(a: Tensor, b: Tensor) -> Tensor:
    """Mark the scalars whose bits differ; -0 and 0 do, a NaN and itself do not.

    Args:
        a: A tensor.
        b: One of the same shape and dtype.

    Returns:
        bool, of that shape.

    Example:
        >>> differing(torch.tensor([0.0, torch.nan]), torch.tensor([-0.0, torch.nan])).tolist()
        [True, False]
    """
    words = _WORDS[a.element_size()]
    return a.view(words) != b.view(words)


def is_as_noted(journal: Mapping[str, Entry], parameters: Mapping[str, Tensor]) -> bool:
    """Say whether all parameters are as a journal wants them.

    Args:
        journal: Parameter name to entry.
        parameters: The model's parameters by name, or this rank's shards of them.

    Returns:
        False if one has changed.
    """
    return all(checksum(parameters[name].detach()) == found.checksum for name, found in journal.items())


def write(
    journal: Mapping[str, Entry], parameters: Mapping[str, Tensor], who: str, since: str
) -> dict[str, Entry]:
    """Write the values of a journal into a model, all or none.

    Args:
        journal: Parameter name to entry.
        parameters: The model's parameters by name.
        who: For the message.
        since: What a parameter must not have changed since, for the message.

    Returns:
        The journal that undoes it.

    Raises:
        RuntimeError: If a parameter is not as its entry wants it; nothing is written then.
    """
    for name, found in journal.items():
        if checksum(parameters[name].detach()) != found.checksum:
            raise RuntimeError(f"{who}: {name} has changed since {since}")
    done: dict[str, tuple[Tensor, Tensor]] = {}
    try:
        for name, found in journal.items():
            tensor = parameters[name].detach()
            selected = ops.unpack_mask(found.selected, list(tensor.shape)).to(tensor.device)
            done[name] = (selected, tensor[selected])
            tensor[selected] = found.values.to(tensor.device)
        return {
            name: entry(selected, values, parameters[name].detach())
            for name, (selected, values) in done.items()
        }
    except BaseException:
        for name, (selected, values) in done.items():
            parameters[name].detach()[selected] = values
        raise
