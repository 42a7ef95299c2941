"""The checks of csrc/torch in Python: what an op refuses, before anything is written, and in which words.

Only for the kernels in plain PyTorch. The compiled ones check for themselves; tests/test_fallback.py holds the
two against each other, message by message.
"""

# ruff: noqa: DOC501 (every function raises ValueError, or TypeError for a dtype)

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from unlearn_ext.ops.fallback.memory import Extent, extent_of, first_shared, overlaps_itself

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# What becomes infinite in float32.
_TOO_LARGE = (2 - 2**-24) * 2.0**127

# As C++ calls them, so that messages are the same.
_DTYPES = {
    torch.float32: "Float",
    torch.float64: "Double",
    torch.float16: "Half",
    torch.bfloat16: "BFloat16",
    torch.uint8: "Byte",
    torch.int8: "Char",
    torch.int16: "Short",
    torch.int32: "Int",
    torch.int64: "Long",
    torch.bool: "Bool",
    torch.complex64: "ComplexFloat",
    torch.complex128: "ComplexDouble",
}


def require(holds: bool, message: str) -> None:
    """Raise ValueError unless a condition holds.

    Args:
        holds: The condition.
        message: What was wrong.
    """
    if not holds:
        raise ValueError(message)


def require_dtype(holds: bool, message: str) -> None:
    """Raise TypeError unless a condition holds.

    Args:
        holds: The condition.
        message: What was wrong.
    """
    if not holds:
        raise TypeError(message)


def dtype_name(dtype: torch.dtype) -> str:
    """Name a dtype as messages do.

    Args:
        dtype: The dtype.

    Returns:
        Its name.
    """
    return _DTYPES.get(dtype, str(dtype))


def number(value: float) -> str:
    """Write a number as messages do.

    Args:
        value: The number.

    Returns:
        Its six leading digits.
    """
    return f"{value:g}"


def sizes(of: Tensor | Sequence[int]) -> str:
    """Write a shape as messages do.

    Args:
        of: A tensor, or numbers.

    Returns:
        The numbers in brackets.
    """
    return str(list(of.shape if isinstance(of, Tensor) else of))


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """Give the dtype that sums of a dtype are kept in.

    Args:
        dtype: Of the values.

    Returns:
        float64 for float64, else float32.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


def is_float(value: float) -> bool:
    """Say whether a number is finite in float32.

    Args:
        value: The number.

    Returns:
        Whether it is.
    """
    return math.isfinite(value) and abs(value) < _TOO_LARGE


def require_finite(op: str, name: str, value: float) -> None:
    """Check a constant.

    Args:
        op: Whose it is.
        name: Its name.
        value: Its value.
    """
    require(is_float(value), f"{op}: {name} must be finite in float32, got {number(value)}")


def require_non_negative(op: str, **values: float) -> None:
    """Check constants.

    Args:
        op: Whose they are.
        **values: By name.
    """
    for name, value in values.items():
        require(
            is_float(value) and value >= 0,
            f"{op}: {name} must be finite in float32 and non-negative, got {number(value)}",
        )


def require_power(op: str, power: int) -> None:
    """Check the power of a gradient.

    Args:
        op: Whose it is.
        power: 1 or 2.
    """
    require(power in (1, 2), f"{op}: power must be 1 or 2, got {power}")


def require_strided(op: str, name: str, tensor: Tensor) -> None:
    """Check a layout.

    Args:
        op: Whose argument it is.
        name: Its name.
        tensor: The tensor.
    """
    require(
        tensor.layout == torch.strided, f"{op}: {name} must be dense (strided), got layout {tensor.layout}"
    )


def require_float(op: str, name: str, tensor: Tensor) -> None:
    """Check a dtype.

    Args:
        op: Whose argument it is.
        name: Its name.
        tensor: The tensor.
    """
    require_dtype(
        tensor.dtype in FLOATS,
        f"{op}: {name} must be float32, float64, float16 or bfloat16, got {dtype_name(tensor.dtype)}",
    )


def require_writable(op: str, name: str, tensor: Tensor) -> None:
    """Check that a tensor's elements can be written one by one.

    Args:
        op: Whose argument it is.
        name: Its name.
        tensor: The tensor.
    """
    require(not tensor.is_neg(), f"{op}: {name} must hold its values, got a lazily negated view")
    require(
        not overlaps_itself(tensor),
        f"{op}: {name} must not overlap itself, got strides {sizes(tensor.stride())}",
    )


def require_no_aliases(op: str, tensors: Iterable[tuple[str, int, Tensor, bool]]) -> None:
    """Check that written memory is reached through one argument only.

    Args:
        op: Whose arguments they are.
        tensors: Name, index, tensor, whether it is written.
    """
    extents: list[Extent] = [
        extent_of(name, index, tensor, written=written)
        for name, index, tensor, written in tensors
        if tensor.numel()
    ]
    shared = first_shared(extents)
    if shared is not None:
        written, other = shared
        raise ValueError(
            f"{op}: {written.name}[{written.index}] must not share memory with another argument, got memory "
            f"of {other.name}[{other.index}]"
        )


@dataclass(frozen=True)
class TensorList:
    """A list of tensors that an op takes.

    Attributes:
        name: Of the argument.
        tensors: The tensors.
        holds: ``parameters`` (any float), ``like`` (the parameters' dtype), ``accumulators`` (float32, float64
            with float64 parameters), ``importances`` (float32 or float64, the same in all such lists) or
            ``bits`` (packed masks).
        written: Whether the op writes them.
    """

    name: str
    tensors: Sequence[Tensor]
    holds: Literal["parameters", "like", "accumulators", "importances", "bits"]
    written: bool = False


def require_lists(op: str, *lists: TensorList) -> None:
    """Check lists whose i-th tensors belong together.

    Args:
        op: Whose they are.
        *lists: The lists; the first leads.
    """
    first = lists[0]
    for one in lists:
        require(
            len(one.tensors) == len(first.tensors),
            f"{op}: {one.name} must have {len(first.tensors)} tensors like {first.name}, got "
            f"{len(one.tensors)}",
        )
    for index in range(len(first.tensors)):
        _require_row(op, lists, index)
    require_no_aliases(
        op,
        (
            (one.name, index, one.tensors[index], one.written)
            for index in range(len(first.tensors))
            for one in lists
        ),
    )


def _require_row(op: str, lists: Sequence[TensorList], index: int) -> None:
    for one in lists:
        require_strided(op, f"{one.name}[{index}]", one.tensors[index])
    lead = f"{lists[0].name}[{index}]"
    leading = lists[0].tensors[index]
    dtype = next(one.tensors[index].dtype for one in lists if one.holds in ("parameters", "importances"))
    for one in lists:
        tensor, name = one.tensors[index], f"{one.name}[{index}]"
        if one.holds == "bits":
            _require_bits(op, name, tensor, leading, lead)
        else:
            _require_values(op, name, one.holds, tensor, dtype)
            require(
                tensor.shape == leading.shape,
                f"{op}: {name} must have the shape {sizes(leading)} of {lead}, got {sizes(tensor)}",
            )
        require(
            tensor.device == leading.device,
            f"{op}: {name} must be on {leading.device} like {lead}, got {tensor.device}",
        )
        if one.written:
            require_writable(op, name, tensor)


def _require_values(op: str, name: str, holds: str, tensor: Tensor, dtype: torch.dtype) -> None:
    got = dtype_name(tensor.dtype)
    if holds == "parameters":
        require_float(op, name, tensor)
    elif holds == "accumulators":
        wanted = accumulator_dtype(dtype)
        require_dtype(
            tensor.dtype == wanted,
            f"{op}: {name} must be {dtype_name(wanted)} for {dtype_name(dtype)} values, got {got}",
        )
    else:
        if holds == "importances":
            require_dtype(
                tensor.dtype in (torch.float32, torch.float64),
                f"{op}: {name} must be float32 or float64, got {got}",
            )
        require_dtype(tensor.dtype == dtype, f"{op}: {name} must be {dtype_name(dtype)}, got {got}")


def _require_bits(op: str, name: str, tensor: Tensor, leading: Tensor, lead: str) -> None:
    require_dtype(
        tensor.dtype == torch.uint8,
        f"{op}: {name} must be a packed mask (uint8, see pack_mask), got {dtype_name(tensor.dtype)}",
    )
    n_bytes = (leading.numel() + 7) // 8
    require(
        tensor.dim() == 1 and tensor.numel() == n_bytes,
        f"{op}: {name} must have shape [{n_bytes}], one bit per scalar of {lead}, got {sizes(tensor)}",
    )
