"""Names of parameters and layers."""

from __future__ import annotations


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
