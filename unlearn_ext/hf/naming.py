"""Masks by name, for models that may have been wrapped or given adapters since the masks were made."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from unlearn_ext._internal.names import parameters_by_name, plain_name, with_plain_names

# What PEFT puts before the names of a model, and into those of the layers that it puts adapters on.
_PREFIX, _PART = "base_model.model.", "base_layer"


def bare_name(name: str) -> str:
    """Return a parameter's name without what wrappers and adapters have put into it.

    Args:
        name: A name.

    Returns:
        As the model that was wrapped has it.

    Example:
        >>> bare_name("module.base_model.model.layers.0.q_proj.base_layer.weight")
        'layers.0.q_proj.weight'
    """
    plain = plain_name(name).removeprefix(_PREFIX)
    return ".".join(part for part in plain.split(".") if part != _PART)


def masks_by_parameter(model: nn.Module, masks: Mapping[str, Tensor], who: str) -> dict[str, Tensor]:
    """Find the mask of every trainable parameter.

    Args:
        model: The model.
        masks: By the names of this model, or of what it was before it was wrapped or given adapters.
        who: Whose message it is.

    Returns:
        Plain name of the parameter in the model to mask.

    Raises:
        ValueError: If a trainable parameter has no mask, or it cannot be told which of several is its own.
    """
    parameters = {name: p for name, p in parameters_by_name(model).items() if p.requires_grad}
    given = with_plain_names(masks)
    by_bare: dict[str, list[str]] = {}
    for name in given:
        by_bare.setdefault(bare_name(name), []).append(name)
    bare_in_model: dict[str, list[str]] = {}
    for name in parameters:
        bare_in_model.setdefault(bare_name(name), []).append(name)
    found = {}
    for name in parameters:
        if name in given:
            found[name] = given[name]
            continue
        bare = bare_name(name)
        candidates = by_bare.get(bare, [])
        if not candidates:
            raise ValueError(
                f"{who}: masks[{name!r}] must be given, as for every trainable parameter, got none"
            )
        if len(candidates) > 1 or len(bare_in_model[bare]) > 1:
            raise ValueError(
                f"{who}: masks must name {name} as the model does, got {', '.join(map(repr, candidates))} "
                f"for {', '.join(bare_in_model[bare])}: it cannot be told which is meant"
            )
        found[name] = given[candidates[0]]
    return found
