"""Names of parameters and layers."""

from __future__ import annotations

# What torch.compile, DataParallel and DistributedDataParallel, and FullyShardedDataParallel put into the
# names of the module that they wrap.
_WRAPPERS = frozenset({"_orig_mod", "module", "_fsdp_wrapped_module"})


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
    """Return a parameter's or module's name without what wrappers have put in.

    Args:
        name: A name of ``named_parameters()``, ``named_modules()`` or ``state_dict()``, perhaps of a model
            that ``torch.compile``, ``DistributedDataParallel`` or FSDP has wrapped.

    Returns:
        The name with ``_orig_mod.``, ``module.`` and ``_fsdp_wrapped_module.`` left out wherever they stand.
        A module of the model's own that is called so is left out too: compare plain names with plain names.

    Example:
        >>> plain_name("module._orig_mod.block._fsdp_wrapped_module.weight"), plain_name("weight")
        ('block.weight', 'weight')
    """
    *parents, last = name.split(".")
    return ".".join([*(part for part in parents if part not in _WRAPPERS), last])
