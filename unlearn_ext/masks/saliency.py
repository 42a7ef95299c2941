"""Which scalars and neurons answer for given data: saliency scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.chosen import Params, Patterns, check_floating, chosen_parameters, restricted
from unlearn_ext._internal.dtensors import local_of, sharded_like, totals, whole_of
from unlearn_ext._internal.modules import check_model
from unlearn_ext._internal.names import parameters_by_name, plain_name, with_plain_names
from unlearn_ext.distributed import ALONE, Group, MeshRanks, Ranks, lockstep_on_mesh, ranks_of
from unlearn_ext.distributed.fsdp import fsdp_modules, reshard
from unlearn_ext.fisher.diagonal import fisher_diagonal
from unlearn_ext.fisher.importance import Importance, joined_coverage
from unlearn_ext.fisher.sharded_gradients import sharded_mean_gradients
from unlearn_ext.masks.neurons import NeuronGroup, Part, groups_by_prefix, module_groups, neuron_groups
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches, check_batches, device_of, read_batches
from unlearn_ext.tasks.losses import LossFn, resolve

Score: TypeAlias = Literal["ratio", "grad", "grad_abs", "fisher", "taylor", "obd", "random"]

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
        coverage: Parameter name to how its importances were computed, where the scores are made from any.

    Args:
        tensors: Parameter name to scores of the parameter's shape.
        groups: By default the parameters with a common module prefix and leading dimension make up a layer.
        score: A name for the record.
        fraction: Numerator and denominator, where the scores are a quotient: a neuron's is then the quotient
            of its means.
        coverage: How importances were computed, by parameter name.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        groups: Sequence[NeuronGroup] | None = None,
        *,
        score: str = "given",
        fraction: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None,
        coverage: Mapping[str, str] | None = None,
    ) -> None:
        self._tensors = with_plain_names(tensors)
        self.coverage = dict(coverage or {})
        shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}
        self.groups = tuple(groups) if groups is not None else tuple(groups_by_prefix(shapes))
        self.score = score
        self._fraction = fraction

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name if name in self._tensors else plain_name(name)]

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
    rows = [part.rows(whole_of(tensors[part.name])).to(device) for part in parts]
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


@lockstep_on_mesh
def saliency(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    score: Score = "ratio",
    generator: torch.Generator | None = None,
    progress: bool = False,
    task: Task | None = None,
    loss_fn: LossFn | None = None,
    params: Params = None,
    include: Patterns = None,
    exclude: Patterns = None,
    process_group: Group = None,
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

    Of a model that FSDP2 (``fully_shard``) has sharded, all ranks call it together, each with its own share
    of the sets; the scores are DTensors, sharded like the parameters. A neuron is then a row of its layer's
    weight and its bias: the normalisation that follows is a layer of its own.

    Args:
        model: Any model. Frozen parameters are not scored.
        forget: The forget set: re-iterable batches.
        retain: The retain set, for ``"ratio"``; not read otherwise.
        score: See above.
        generator: For ``"random"``. Without one the global random state is used, and put back.
        progress: Show a progress bar, where tqdm is installed.
        task: What the model is for; None tells it from the model and the batches, or refuses.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``, instead of the task's.
        params: Names of trainable parameters; ``"adapters"``, those of PEFT's active adapters and of the
            modules that are trained and saved beside them; or ``"base"``, the weights underneath, frozen or
            not, with the adapters in effect. None: all that are trainable.
        include: Parameters to score: names of them or of their modules, the last parts of such names, or
            regular expressions that match a whole name. None: all of these.
        exclude: Parameters to leave out, likewise.
        process_group: Ranks that call this together, each with its own share of both sets, perhaps none: the
            scores are those of all data, with the same bits on every rank, and so are masks made of them.
            ``"random"`` takes rank 0's draw. See ``fisher_diagonal``.

    Returns:
        Scores by parameter name, float32 (float64 for double parameters), with the neurons of every layer.
        What belongs to a neuron is found out by running the model on a few samples: its row of the weight,
        its bias, and its scale and shift in the normalisation that takes the layer's output and nothing
        else.

    Raises:
        ValueError: If there is no such score, ``"ratio"`` gets no ``retain``, a set is empty or a one-shot
            iterator, or no parameter is left.
        TypeError: If a parameter is not floating point (quantised, say).
        NotImplementedError: If the model is wrapped for parallel training, sharded in another way than by
            FSDP2, or not in memory.
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
    is_sharded = bool(fsdp_modules(model))
    if is_sharded:
        reshard(model)
    check_model(model, "saliency", may_be_sharded=is_sharded)
    chosen = resolve(task, loss_fn, who="saliency")
    ranks = ranks_of(process_group, "saliency")
    with restricted(model, "saliency", is_sharded, params, include, exclude) as names:
        if names is None:
            names = list(chosen_parameters(model, "saliency"))
        return scored("saliency", model, forget, retain, chosen, score, names, progress, generator, ranks)


def scored(
    who: str,
    model: nn.Module,
    forget: Batches,
    retain: Batches | None,
    task: Task,
    score: Score,
    names: Sequence[str],
    progress: bool = False,
    generator: torch.Generator | None = None,
    ranks: Ranks = ALONE,
) -> Scores:
    """Do what ``saliency`` does, for parameters that have been chosen and a task that has been resolved.

    Args:
        who: Whose message it is.
        model: The model.
        forget: The forget set.
        retain: The retain set.
        task: The task.
        score: As for ``saliency``.
        names: Plain names of the parameters.
        progress: As for ``saliency``.
        generator: As for ``saliency``.
        ranks: Those that call this together.

    Returns:
        The scores.

    Raises:
        ValueError: As ``saliency``.
    """
    if score not in SCORES:
        raise ValueError(f"{who}: score must be one of {', '.join(SCORES)}, got {score!r}")
    check_batches(forget, "forget")
    if score == "ratio":
        if retain is None:
            raise ValueError(f"{who}: retain must be given for the score 'ratio', got None")
        check_batches(retain, "retain")
    known = parameters_by_name(model)
    parameters = {name: known[name] for name in names}
    check_floating(parameters, who)
    groups: Sequence[NeuronGroup]
    if isinstance(ranks, MeshRanks):
        # How channels flow is read off gradients inside a layer, where shards are not gathered.
        groups = tuple(module_groups(model, {name: tuple(p.shape) for name, p in parameters.items()}))
    else:
        groups = neuron_groups(model, forget, task=task, names=names, ranks=ranks)

    coverage: dict[str, str] = {}

    def fisher(data: Batches, power: int = 2) -> Importance:
        importance = fisher_diagonal(
            model, data, task=task, power=power, params=names, progress=progress, process_group=ranks
        )
        coverage.update(joined_coverage(coverage or importance.coverage, importance.coverage))
        return importance

    fraction: tuple[Mapping[str, Tensor], Mapping[str, Tensor]] | None = None
    tensors: Mapping[str, Tensor]
    if score == "ratio":
        assert retain is not None
        above, below = fisher(forget), fisher(retain)
        sums = [float(local_of(values).sum(dtype=torch.float64)) for values in below.values()]
        total = sum(totals(sums, list(below.values())))
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
        with torch.random.fork_rng([]):
            tensors = _random(parameters, ranks.shared_generator(generator))
    else:
        if isinstance(ranks, MeshRanks):
            tensors = sharded_mean_gradients(
                who, "forget", forget, task, list(parameters), ranks, progress=progress
            )
        else:
            tensors = _mean_gradients(who, model, forget, parameters, task, progress, ranks)
        if score == "taylor":
            for name, gradient in tensors.items():
                gradient.mul_(parameters[name].detach())
        for gradient in tensors.values():
            gradient.abs_()
    return Scores(tensors, groups, score=score, fraction=fraction, coverage=coverage)


def _accumulator(parameter: Tensor) -> Tensor:
    dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
    return torch.zeros_like(parameter.detach(), dtype=dtype)


def _random(parameters: Mapping[str, Tensor], generator: torch.Generator | None) -> dict[str, Tensor]:
    # Drawn on the generator's device, so that a seed means the same on every device the model may be on.
    device = torch.device("cpu") if generator is None else generator.device
    with torch.random.fork_rng([]):
        return {
            name: sharded_like(torch.rand(p.shape, generator=generator, device=device), p.detach()).to(
                _accumulator(p)
            )
            for name, p in parameters.items()
        }


def _mean_gradients(
    who: str,
    model: nn.Module,
    data: Batches,
    parameters: Mapping[str, Tensor],
    task: Task,
    progress: bool,
    ranks: Ranks,
) -> dict[str, Tensor]:
    gradients = {name: _accumulator(p) for name, p in parameters.items()}
    n = 0
    with borrowed(model):
        reader = read_batches(data, device_of(model), description="saliency", progress=progress)
        for index, batch in enumerate(reader):
            values = task.sample_losses(model, batch)
            if not bool(torch.isfinite(values.detach()).all()):
                wrong = values[~torch.isfinite(values)][0].item()
                raise FloatingPointError(f"{who}: the loss must be finite, got {wrong} in batch {index}")
            n += len(values)
            if values.requires_grad:
                grads = torch.autograd.grad(values.sum(), list(parameters.values()), allow_unused=True)
                for total, grad in zip(gradients.values(), grads, strict=True):
                    if grad is not None:
                        total.add_(grad)
    (n,) = ranks.total("samples", n)
    if n == 0:
        raise ValueError(f"{who}: forget must hold at least one sample, got none")
    ranks.sum_("gradients", gradients.values())
    for total in gradients.values():
        total.div_(n)
    return gradients
