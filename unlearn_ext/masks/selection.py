"""From scores to packed masks: of scalars, of neurons, of layers."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from unlearn_ext import ops
from unlearn_ext._internal.dtensors import is_dtensor, like, local_of, part_of
from unlearn_ext._internal.names import chosen_names
from unlearn_ext.masks.neurons import NeuronGroup, Part
from unlearn_ext.masks.saliency import Reduction, Scores

Granularity: TypeAlias = Literal["element", "neuron", "layer"]

Scope: TypeAlias = Literal["global", "layer"]

Rule: TypeAlias = Literal["density", "threshold", "quantile", "mass"]


def select_mask(
    scores: Mapping[str, Tensor],
    density: float,
    *,
    granularity: Granularity = "element",
    scope: Scope = "global",
    largest: bool = True,
    rule: Rule = "density",
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    min_depth: float = 0.0,
    reduction: Reduction | None = None,
) -> dict[str, Tensor]:
    """Mark what scores highest, as packed masks.

    A *unit* is a scalar, a neuron with all its scalars, or a layer. At least one is marked, in every layer if
    the scope is one. Ties go to the lowest flat index, counted through the parameters (or layers) in order.

    Args:
        scores: What ``saliency`` returned, or any scores by parameter name, without NaN.
        density: For the rule ``"density"`` the share of units to mark, in [0, 1]. For the others see there.
        granularity: The unit. Plain dictionaries do not say what a neuron is: then parameters of one module
            with one leading dimension make up a layer, and its index counts the neurons.
        scope: Compare all units, or those of each layer among themselves.
        largest: Mark the highest scores; False marks the lowest, such as to train on something new what
            matters least.
        rule: ``"density"``; ``"threshold"``: scores >= ``density`` (<= for the lowest); ``"quantile"``: those
            at or beyond the ``density`` quantile of the scores, counted from below, ties included;
            ``"mass"``: as few units as hold the share ``density`` of the total score, which takes
            non-negative scores.
        include: The parameters to consider: names of them or of their modules, the last parts of such names,
            regular expressions that match a whole name, or patterns as for file names. None: all.
        exclude: The parameters to leave out, likewise, whatever ``include`` says.
        min_depth: Leave out this share of the layers, rounded down, counted from the first in the order of
            the model's modules; in [0, 1).
        reduction: From the scores of a unit's scalars to the unit's; see ``Scores.of_neurons``.

    Returns:
        Parameter name to packed mask, uint8 ``[ceil(numel / 8)]``, for every scored parameter: the form that
        the masked optimizers take. What is left out has no bit set. For scores that are DTensors, bool
        DTensors laid out like them; all ranks call it together, and the selection is that of the whole.

    Raises:
        ValueError: If a choice is unknown, ``density`` is out of range, a score is NaN, or no parameter is
            left.
        NotImplementedError: If scores are DTensors, the units scalars and the rule not ``"density"``.

    Source:
        Exactly k of all scalars without a sort, as in Fan et al., "SalUn", ICLR 2024, by radix selection
        (``ops.topk_mask``); the other rules and granularities: our design.

    Example:
        >>> scores = {"a.weight": torch.tensor([[1.0, 2.0], [9.0, 0.0]]), "a.bias": torch.tensor([4.0, 0.0])}
        >>> masks = select_mask(scores, 0.5, granularity="neuron")     # means 7/3 and 3
        >>> ops.unpack_mask(masks["a.weight"], [2, 2])
        tensor([[False, False],
                [ True,  True]])
    """
    _check_choices(granularity, scope, rule)
    if math.isnan(density) or (rule != "threshold" and not 0 <= density <= 1):
        raise ValueError(f"select_mask: density must lie in [0, 1], got {density}")
    if granularity == "layer" and scope == "layer":
        raise ValueError("select_mask: scope must be 'global' where layers are the units, got 'layer'")
    if not 0 <= min_depth < 1:
        raise ValueError(f"select_mask: min_depth must lie in [0, 1), got {min_depth}")
    known = scores if isinstance(scores, Scores) else Scores(scores)
    is_sharded = any(is_dtensor(tensor) for tensor in known.values())
    if is_sharded and granularity == "element" and rule != "density":
        raise NotImplementedError(
            "select_mask: rule must be 'density' for scalars whose scores are sharded (DTensors), got "
            f"{rule!r}; gather the scores with full_tensor()"
        )
    deep = known.groups[int(min_depth * len(known.groups)) :]
    known_names = [part.name for group in deep for part in group.parts]
    groups = list(_kept(deep, set(chosen_names(known_names, include, exclude, "select_mask"))))
    if not groups:
        raise ValueError("select_mask: scores must hold a scalar, got none")

    def choose(units: Sequence[Tensor]) -> list[Tensor]:
        return _choose(units, density, rule, largest)

    masks: dict[str, Tensor] = {}
    if granularity == "element":
        names = [[part.name for part in group.parts] for group in groups]
        order = {name: index for index, name in enumerate(known)}
        families = (
            names
            if scope == "layer"
            else [sorted((name for family in names for name in family), key=order.__getitem__)]
        )
        for family in families:
            packed = choose([known[name] for name in family])
            masks.update(zip(family, packed, strict=True))
    else:
        values = [known.of_neurons(group, reduction) for group in groups]
        if granularity == "layer":
            values = [_of_layer(known, group, reduction) for group in groups]
        runs = [values] if scope == "global" else [[value] for value in values]
        marked = [mask for run in runs for mask in choose(run)]
        spread: dict[str, Tensor] = {}
        neurons = ops.unpack_mask(marked, [list(value.shape) for value in values])
        for group, flags in zip(groups, neurons, strict=True):
            for part in group.parts:
                whole = part.spread(flags.expand(group.size) if granularity == "layer" else flags)
                whole = whole.reshape(known[part.name].shape)
                spread[part.name] = whole[part_of(known[part.name])]  # of shards only this rank's
        masks.update(zip(spread, ops.pack_mask(list(spread.values())), strict=True))
    if is_sharded:
        return {name: _sharded_mask(masks.get(name), tensor) for name, tensor in known.items()}
    for name, tensor in known.items():
        nothing = torch.zeros((tensor.numel() + 7) // 8, dtype=torch.uint8, device=tensor.device)
        masks[name] = masks[name].to(tensor.device) if name in masks else nothing
    return {name: masks[name] for name in known}


def _sharded_mask(packed: Tensor | None, scores: Tensor) -> Tensor:
    # Not packed: what the bits of a shard mean would depend on how the scores are cut.
    own = local_of(scores)
    if packed is None:
        return like(torch.zeros(own.shape, dtype=torch.bool, device=own.device), scores)
    return like(ops.unpack_mask(packed, list(own.shape)), scores)


def _check_choices(granularity: str, scope: str, rule: str) -> None:
    for name, value, choices in (
        ("granularity", granularity, ("element", "neuron", "layer")),
        ("scope", scope, ("global", "layer")),
        ("rule", rule, ("density", "threshold", "quantile", "mass")),
    ):
        if value not in choices:
            raise ValueError(f"select_mask: {name} must be one of {', '.join(choices)}, got {value!r}")


def _kept(groups: Iterable[NeuronGroup], names: Collection[str]) -> Iterator[NeuronGroup]:
    for group in groups:
        parts = tuple(part for part in group.parts if math.prod(part.view) and part.name in names)
        if parts:
            yield replace(group, parts=parts)


def _of_layer(scores: Scores, group: NeuronGroup, reduction: Reduction | None) -> Tensor:
    whole = replace(group, parts=tuple(Part(part.name, (1, *part.view)) for part in group.parts))
    return scores.of_neurons(whole, reduction)


def _choose(units: Sequence[Tensor], density: float, rule: Rule, largest: bool) -> list[Tensor]:
    # topk_mask takes one dtype and one device.
    device = units[0].device
    wide = torch.float64 if any(unit.dtype == torch.float64 for unit in units) else units[0].dtype
    together = [unit.to(device, wide) for unit in units]
    total = sum(unit.numel() for unit in together)

    def top(k: int) -> list[Tensor]:
        return ops.topk_mask(together, k, largest=largest)

    def beyond(threshold: Tensor | float) -> list[Tensor]:
        return [ops.pack_mask(unit >= threshold if largest else unit <= threshold) for unit in together]

    if rule == "density":
        return top(max(1, round(density * total)))
    if rule == "quantile":
        one = top(max(1, round((1 - density if largest else density) * total)))
        last = [
            (unit[marked].min() if largest else unit[marked].max())
            for unit, mask in zip(together, one, strict=True)
            if bool((marked := ops.unpack_mask(mask, list(unit.shape))).any())
        ]
        return beyond(torch.stack(last).min() if largest else torch.stack(last).max())
    if rule == "threshold":
        if any(bool(unit.isnan().any()) for unit in together):
            raise ValueError("select_mask: scores must not be NaN, got one")
        masks = beyond(density)
        return masks if any(bool(mask.any()) for mask in masks) else top(1)
    if any(bool((unit < 0).any()) for unit in together):
        raise ValueError("select_mask: scores must be non-negative for the rule 'mass', got a negative one")

    def mass(masks: Sequence[Tensor]) -> float:
        marked = (ops.unpack_mask(mask, list(unit.shape)) for mask, unit in zip(masks, together, strict=True))
        return sum(float(unit[m].sum(dtype=torch.float64)) for m, unit in zip(marked, together, strict=True))

    # By bisection: the mass of the k highest grows with k.
    wanted, low, high = density * mass(top(total)), 1, total
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if mass(top(middle)) >= wanted else (middle + 1, high)
    return top(low)
