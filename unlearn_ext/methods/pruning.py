"""Drop the neurons that matter least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from unlearn_ext import ops
from unlearn_ext._internal.names import matcher, parameters_by_name, with_plain_names
from unlearn_ext.masks.neurons import NeuronGroup, Part, module_groups
from unlearn_ext.masks.saliency import Reduction, Scores
from unlearn_ext.masks.selection import Scope
from unlearn_ext.methods.run import unlearning
from unlearn_ext.results import UnlearnResult


def prune_neurons(
    model: nn.Module,
    scores: Mapping[str, Tensor],
    fraction: float,
    *,
    scope: Scope = "global",
    exclude: str | Iterable[str] | None = None,
    reduction: Reduction | None = None,
) -> UnlearnResult:
    """Set the neurons with the lowest scores to zero: the other use of knowing what answers for given data.

    Zeroed are a neuron's row of the weight, its bias, its scale and shift in the normalisation that follows,
    and the columns of the next layers that multiply its output, as far as ``saliency`` could verify which
    these are. The shapes stay; a neuron whose activation maps 0 to 0 is then as good as removed.

    Neurons are the outputs of linear and convolutional layers. The layer that makes the model's outputs is
    left alone, and every other layer keeps at least one. Scores on the retain set make sense here, such as
    ``saliency(model, retain, score="obd")``: the lowest are what the data to be kept does not use. That costs
    far less accuracy than dropping by magnitude or at random.

    Args:
        model: The model, changed in place.
        scores: What ``saliency`` returned. With a plain dictionary of scores by parameter name, the neurons
            are those of the model's modules, the last of which is taken for the output, and normalisations
            and next layers are left alone.
        fraction: Share of the neurons to drop, in [0, 1).
        scope: Compare all neurons, or drop the same share of every layer.
        exclude: Layers or parameters to leave alone: names, the last parts of names, regular expressions that
            match a whole name, or patterns as for file names.
        reduction: From the scores of a neuron's scalars to the neuron's; see ``Scores.of_neurons``.

    Returns:
        The record; its history tells how many neurons every layer lost.

    Raises:
        ValueError: If ``fraction`` is out of range, a score is NaN or of another shape than its parameter, a
            parameter is unknown, or there is no neuron to drop.

    Source:
        From the abstract of Sharjeel Masood's seminar (Centre for Image Analysis, Uppsala University,
        15 December 2025): that the least influential neurons can be found and pruned. What is dropped and
        how: our design, after Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR
        2019.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> result = prune_neurons(model, {name: p.abs() for name, p in model.named_parameters()}, 0.25)
        >>> int((model[0].weight == 0).all(dim=1).sum())
        2
    """
    if not 0 <= fraction < 1:
        raise ValueError(f"prune_neurons: fraction must lie in [0, 1), got {fraction}")
    if scope not in ("global", "layer"):
        raise ValueError(f"prune_neurons: scope must be 'global' or 'layer', got {scope!r}")
    parameters = parameters_by_name(model)
    scores = scores if isinstance(scores, Scores) else with_plain_names(scores)
    for name, tensor in scores.items():
        if name not in parameters or tensor.shape != parameters[name].shape:
            shape = list(parameters[name].shape) if name in parameters else "no such parameter"
            raise ValueError(
                f"prune_neurons: scores[{name!r}] must fit the model, got {list(tensor.shape)} for {shape}"
            )
        if bool(tensor.isnan().any()):
            raise ValueError(f"prune_neurons: scores[{name!r}] must not be NaN, got one")
    patterns = [exclude] if isinstance(exclude, str) else list(exclude or ())
    known = scores if isinstance(scores, Scores) else Scores(scores, _groups(model, scores))
    groups = list(_prunable(known.groups, matcher(patterns or None, "prune_neurons")))
    if not groups:
        raise ValueError("prune_neurons: the scores must be of a hidden layer with neurons, got none")
    settings = {
        "score": known.score,
        "fraction": fraction,
        "scope": scope,
        "exclude": patterns,
        "reduction": reduction,
    }
    with unlearning(model, "prune_neurons", settings) as run, torch.no_grad():
        with run.phase("pruning"):
            values = [known.of_neurons(group, reduction).to("cpu", torch.float64) for group in groups]
            for group, lost in zip(groups, _lowest(values, fraction, scope), strict=True):
                for part in (*group.parts, *group.consumers):
                    _zero(parameters[part.name], part, lost)
                run.record("pruning", layer=group.name, neurons=group.size, dropped=int(lost.sum()))
        return run.result()


def _groups(model: nn.Module, scores: Mapping[str, Tensor]) -> list[NeuronGroup]:
    groups = list(module_groups(model, {name: tuple(tensor.shape) for name, tensor in scores.items()}))
    layers = [group.name for group in module_groups(model) if group.is_layer]
    return [replace(group, is_output=group.name == layers[-1]) for group in groups] if layers else groups


def _prunable(groups: Iterable[NeuronGroup], is_excluded: Callable[[str], bool]) -> Iterable[NeuronGroup]:
    for group in groups:
        # A layer's name is asked about like that of a parameter in it.
        names = (f"{group.name}.", *(part.name for part in group.parts))
        excluded = any(is_excluded(name) for name in names)
        if group.is_layer and not group.is_output and not excluded:
            yield group


def _lowest(values: list[Tensor], fraction: float, scope: Scope) -> list[Tensor]:
    # Marks the neurons to drop; all but the highest of every layer are candidates.
    if scope == "layer":
        return [_lowest([value], fraction, "global")[0] for value in values]
    total = sum(value.numel() for value in values)
    k = min(round(fraction * total), total - len(values))
    candidates = []
    for value in values:
        candidate = value.clone()
        candidate[value.argmax()] = math.inf
        candidates.append(candidate)
    masks = ops.topk_mask(candidates, k, largest=False)
    return ops.unpack_mask(masks, [[value.numel()] for value in values])


def _zero(parameter: Tensor, part: Part, lost: Tensor) -> None:
    parameter.masked_fill_(part.spread(lost.to(parameter.device)).reshape(parameter.shape), 0.0)
