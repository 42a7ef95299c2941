"""Which scalars, neurons or layers answer for given data: saliency scores, and masks of what scores highest.

``saliency`` scores every trainable scalar; ``select_mask`` turns scores into packed masks, one per parameter,
of scalars, of the neurons that ``unlearn_ext.neurons`` has found, or of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from unlearn_ext import losses, ops
from unlearn_ext.data import Batches, check_batches, count_samples, device_of, read_batches
from unlearn_ext.importance import Importance, LossFn, fisher_diagonal
from unlearn_ext.neurons import NeuronGroup, Part, groups_by_prefix, neuron_groups
from unlearn_ext.state import borrowed

Score: TypeAlias = Literal["ratio", "grad", "grad_abs", "fisher", "taylor", "obd", "random"]
Granularity: TypeAlias = Literal["element", "neuron", "layer"]
Scope: TypeAlias = Literal["global", "layer"]
Rule: TypeAlias = Literal["density", "threshold", "quantile", "mass"]
Reduction: TypeAlias = Literal["mean", "sum", "max", "l2", "first"]

SCORES: tuple[Score, ...] = ("ratio", "grad", "grad_abs", "fisher", "taylor", "obd", "random")

# In units of the mean importance on the retain set. What matters far less than that to either set must not
# stand out for a quotient of two tiny numbers.
_RATIO_FLOOR = 0.1


class Scores(Mapping[str, Tensor]):
    """Saliency scores by parameter name, and which scalars make up a neuron.

    Attributes:
        groups: The layers with their neurons; every scored parameter is part of exactly one.
        score: What the scores are; see ``saliency``.

    Args:
        tensors: Parameter name to scores of the parameter's shape.
        groups: By default the parameters with a common module prefix and leading dimension make up a layer.
        score: A name for the record.
        fraction: Numerator and denominator, where the scores are a quotient: a neuron's is then the quotient
            of its means.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        groups: Sequence[NeuronGroup] | None = None,
        *,
        score: str = "given",
        fraction: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
    ) -> None:
        self._tensors = dict(tensors)
        shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.groups = tuple(groups) if groups is not None else tuple(groups_by_prefix(shapes))
        self.score = score
        self._fraction = fraction

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __repr__(self) -> str:
        neurons = sum(group.size for group in self.groups)
        return (
            f"Scores({self.score!r}, {len(self)} parameters, {neurons} neurons in {len(self.groups)} layers)"
        )

    def of_neurons(self, group: NeuronGroup, reduction: Reduction | None = None) -> Tensor:
        """Reduce the scores of every neuron's scalars to one.

        Args:
            group: A layer.
            reduction: ``"mean"``, which does not favour large neurons, ``"sum"``, ``"max"``, ``"l2"`` or
                ``"first"``, the score of one scalar. None: the mean; for ``"ratio"`` the quotient of the mean
                importances, for ``"random"`` the first, which is as random for a large neuron as for a small.

        Returns:
            ``[neurons]``.

        Raises:
            ValueError: If there is no such reduction.
        """
        if reduction is None and self._fraction is not None:
            top, bottom = (_reduced(group.parts, terms, "mean") for terms in self._fraction)
            return top / bottom
        return _reduced(group.parts, self, reduction or ("first" if self.score == "random" else "mean"))


def _reduced(parts: Sequence[Part], tensors: Mapping[str, Tensor], reduction: str) -> Tensor:
    device = tensors[parts[0].name].device
    rows = [part.rows(tensors[part.name]).to(device) for part in parts]
    if reduction == "first":
        return rows[0][:, 0]
    if reduction == "max":
        return torch.stack([row.amax(1) for row in rows]).amax(0)
    if reduction == "l2":
        return torch.stack([row.square().sum(1) for row in rows]).sum(0).sqrt()
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction must be one of mean, sum, max, l2, first, got {reduction!r}")
    total = torch.stack([row.sum(1) for row in rows]).sum(0)
    return total / sum(row.shape[1] for row in rows) if reduction == "mean" else total


def saliency(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    score: Score = "ratio",
    generator: torch.Generator | None = None,
    progress: bool = False,
    loss_fn: LossFn = losses.cross_entropy,
) -> Scores:
    """Score every trainable scalar by how much it answers for the forget set.

    With g_n the gradient of sample n's loss, F the mean of its square over a set, and theta the parameter:

        ratio      (F_forget + e) / (F_retain + e)     in which the forget set stands out; needs ``retain``
        grad       |mean g_n|                          opposite gradients cancel
        grad_abs   mean |g_n|
        fisher     F
        taylor     |theta * mean g_n|                  change of the loss without the scalar, first order
        obd        theta^2 F / 2                       the same, second order
        random     uniform in [0, 1)                   the control that every score has to beat

    e is a tenth of the mean of all F_retain (our choice: without it, scalars that matter to neither set may
    come first). The model runs in eval mode and is left as it was.

    Args:
        model: Any model. Frozen parameters are not scored.
        forget: The forget set: re-iterable batches.
        retain: The retain set, for ``"ratio"``; not read otherwise.
        score: See above.
        generator: For ``"random"``. Without one the global random state is used, and put back.
        progress: Show a progress bar on a terminal, where tqdm is installed.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``, one loss per sample.

    Returns:
        Scores by parameter name, float32 (float64 for double parameters), with the neurons of every layer.
        What belongs to a neuron is found out by running the model on a few samples: its row of the weight,
        its bias, and its scale and shift in the normalisation that takes the layer's output and nothing
        else.

    Raises:
        ValueError: If there is no such score, ``"ratio"`` gets no ``retain``, or a set is empty or a one-shot
            iterator.
        FloatingPointError: If a loss is NaN or infinite.

    Source:
        ``grad``: Fan et al., "SalUn", ICLR 2024, whose code sums the gradients of batch means; the mean over
        samples used here does not depend on the batch size. ``ratio``: Huang et al., "Unified Gradient-Based
        Machine Unlearning with Remain Geometry Enhancement", NeurIPS 2024. ``taylor``: Molchanov et al.,
        "Importance Estimation for Neural Network Pruning", CVPR 2019. ``obd``: LeCun, Denker & Solla,
        "Optimal Brain Damage", NIPS 1989. Neurons as units: our design.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 2))
        >>> scores = saliency(model, [(torch.randn(8, 4), torch.arange(8) % 2)], score="fisher")
        >>> [(group.name, [part.name for part in group.parts]) for group in scores.groups]
        [('0', ['0.weight', '0.bias', '1.weight', '1.bias']), ('3', ['3.weight', '3.bias'])]
    """
    if score not in SCORES:
        raise ValueError(f"saliency: score must be one of {', '.join(SCORES)}, got {score!r}")
    check_batches(forget, "forget")
    if score == "ratio":
        if retain is None:
            raise ValueError("saliency: retain must be given for the score 'ratio', got None")
        check_batches(retain, "retain")
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("saliency: the model must have a trainable parameter, got none")
    groups = neuron_groups(model, forget, loss_fn=loss_fn)

    def fisher(data: Batches, power: int = 2) -> Importance:
        return fisher_diagonal(model, data, loss_fn=loss_fn, power=power, progress=progress)

    fraction: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None
    tensors: Mapping[str, Tensor]
    if score == "ratio":
        assert retain is not None
        above, below = fisher(forget), fisher(retain)
        total = sum(float(values.sum(dtype=torch.float64)) for values in below.values())
        floor = _RATIO_FLOOR * total / sum(values.numel() for values in below.values())
        floor = max(floor, torch.finfo(torch.float32).tiny)
        for importance in (above, below):
            for values in importance.values():
                values.add_(floor)
        fraction = above, below
        tensors = {name: values / below[name] for name, values in above.items()}
    elif score in ("grad_abs", "fisher"):
        tensors = dict(fisher(forget, 1 if score == "grad_abs" else 2))
    elif score == "obd":
        tensors = {name: f * parameters[name].detach().square() / 2 for name, f in fisher(forget).items()}
    elif score == "random":
        tensors = _random(parameters, generator)
    else:
        tensors = _mean_gradients(model, forget, parameters, loss_fn, progress)
        if score == "taylor":
            for name, gradient in tensors.items():
                gradient.mul_(parameters[name].detach())
        for gradient in tensors.values():
            gradient.abs_()
    return Scores(tensors, groups, score=score, fraction=fraction)


def _accumulator(parameter: Tensor) -> Tensor:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros_like(parameter.detach(), dtype=dtype)


def _random(parameters: Mapping[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
    # Drawn on the generator's device, so that a seed means the same on every device the model may be on.
    device = torch.device("cpu") if generator is None else generator.device
    with torch.random.fork_rng([]):
        return {
            name: torch.rand(p.shape, generator=generator, device=device).to(_accumulator(p))
            for name, p in parameters.items()
        }


def _mean_gradients(
    model: nn.Module, data: Batches, parameters: Mapping[str, Tensor], loss_fn: LossFn, progress: bool
) -> dict[str, Tensor]:
    totals = {name: _accumulator(p) for name, p in parameters.items()}
    n = 0
    with borrowed(model):
        reader = read_batches(data, device_of(model), description="saliency", progress=progress)
        for index, batch in enumerate(reader):
            values = loss_fn(model, batch)
            if not bool(torch.isfinite(values.detach()).all()):
                raise FloatingPointError(f"saliency: the loss must be finite, got {values} in batch {index}")
            n += count_samples(batch)
            if values.requires_grad:
                grads = torch.autograd.grad(values.sum(), list(parameters.values()), allow_unused=True)
                for total, grad in zip(totals.values(), grads, strict=True):
                    if grad is not None:
                        total.add_(grad)
    if n == 0:
        raise ValueError("saliency: forget must hold at least one sample, got none")
    for total in totals.values():
        total.div_(n)
    return totals


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
        include: Patterns (as for file names) of the parameters to consider; None: all.
        exclude: Patterns of the parameters to leave out, whatever ``include`` says.
        min_depth: Leave out this share of the layers, rounded down, counted from the first in the order of
            the model's modules; in [0, 1).
        reduction: From the scores of a unit's scalars to the unit's; see ``Scores.of_neurons``.

    Returns:
        Parameter name to packed mask, uint8 ``[ceil(numel / 8)]``, for every scored parameter: the form that
        the masked optimizers take. What is left out has no bit set.

    Raises:
        ValueError: If a choice is unknown, ``density`` is out of range, a score is NaN, or no parameter is
            left.

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
    deep = known.groups[int(min_depth * len(known.groups)) :]
    groups = list(_kept(deep, _pattern(include, True), _pattern(exclude, False)))
    if not groups:
        raise ValueError(f"select_mask: include and exclude must leave a parameter, got {include}, {exclude}")

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
        runs = [range(len(groups))] if scope == "global" else [range(i, i + 1) for i in range(len(groups))]
        for run in runs:
            marked = choose([values[i] for i in run])
            for i, mask in zip(run, marked, strict=True):
                flags = ops.unpack_mask(mask, [values[i].numel()])
                for part in groups[i].parts:
                    whole = part.spread(flags.expand(groups[i].size) if granularity == "layer" else flags)
                    masks[part.name] = ops.pack_mask(whole.reshape(known[part.name].shape))
    for name, tensor in known.items():
        nothing = torch.zeros((tensor.numel() + 7) // 8, dtype=torch.uint8, device=tensor.device)
        masks[name] = masks[name].to(tensor.device) if name in masks else nothing
    return {name: masks[name] for name in known}


def _check_choices(granularity: str, scope: str, rule: str) -> None:
    for name, value, choices in (
        ("granularity", granularity, ("element", "neuron", "layer")),
        ("scope", scope, ("global", "layer")),
        ("rule", rule, ("density", "threshold", "quantile", "mass")),
    ):
        if value not in choices:
            raise ValueError(f"select_mask: {name} must be one of {', '.join(choices)}, got {value!r}")


def _pattern(patterns: str | Iterable[str] | None, default: bool) -> Callable[[str], bool]:
    if patterns is None:
        return lambda _: default
    known = [patterns] if isinstance(patterns, str) else list(patterns)
    return lambda name: any(fnmatchcase(name, pattern) for pattern in known)


def _kept(
    groups: Iterable[NeuronGroup], included: Callable[[str], bool], excluded: Callable[[str], bool]
) -> Iterator[NeuronGroup]:
    for group in groups:
        parts = tuple(
            part
            for part in group.parts
            if math.prod(part.view) and included(part.name) and not excluded(part.name)
        )
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
