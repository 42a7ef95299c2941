"""Arguments brought into the form of an op's schema."""

from collections.abc import Sequence


def per_dimension(value: int | Sequence[int], n_dims: int) -> Sequence[int]:
    """Give every dimension a value.

    Args:
        value: One for all, or one per dimension.
        n_dims: Number of dimensions.

    Returns:
        One per dimension.
    """
    return [value] * n_dims if isinstance(value, int) else value


def flat_padding(padding: int | Sequence[int | tuple[int, int]], n_dims: int) -> list[int]:
    """Write padding as the schema has it.

    Args:
        padding: One number for all dimensions, or one number or (before, after) pair per dimension.
        n_dims: Number of dimensions.

    Returns:
        One number per dimension, or two if any is a pair.
    """
    entries = [padding] * n_dims if isinstance(padding, int) else padding
    if all(isinstance(entry, int) for entry in entries):
        return [entry for entry in entries if isinstance(entry, int)]
    pairs = [(entry, entry) if isinstance(entry, int) else entry for entry in entries]
    return [amount for pair in pairs for amount in pair]
