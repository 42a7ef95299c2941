"""The importances behind a dampening: where they come from, and what must not be mixed."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor, nn

from unlearn_ext._internal.dtensors import agreed_by_all, is_dtensor, local_of, sharded_like
from unlearn_ext._internal.names import parameters_by_name
from unlearn_ext._internal.plain import callable_name
from unlearn_ext.distributed import ALONE, Ranks
from unlearn_ext.fisher.diagonal import fisher_diagonal
from unlearn_ext.fisher.importance import Estimator, Importance, check_covers, check_same_kind, pool
from unlearn_ext.methods.ssd_plan import parameters_of
from unlearn_ext.tasks import losses
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches, check_batches
from unlearn_ext.tasks.losses import LossFn, resolve

Sources: TypeAlias = Mapping[str, Batches | Importance]
"""``forget``, and either ``retain`` or ``importance``."""

_LOSSES: dict[str, LossFn] = {
    callable_name(loss): loss for loss in (losses.cross_entropy, losses.log_odds, losses.logit_norm)
}


@dataclass(frozen=True, slots=True)
class Measure:
    """Measures importances of one model with the settings of one plan.

    Attributes:
        model: The model.
        task: What the model is for; None infers it.
        loss_fn: One loss per sample.
        estimator: See ``fisher_diagonal``.
        power: 1 or 2.
        params: Names of the parameters; None for all trainable ones.
        generator: For ``"mc"``.
        progress: Show progress bars.
        ranks: Those that measure together, each on its own share of the data.
    """

    model: nn.Module
    task: Task | None
    loss_fn: LossFn
    estimator: Estimator
    power: int
    params: list[str] | None
    generator: torch.Generator | None
    progress: bool
    ranks: Ranks = ALONE

    @property
    def judge(self) -> Task:
        """The task, with the loss of the importances."""
        return resolve(self.task, self.loss_fn, who="plan_ssd")

    def one(self, data: Batches) -> Importance:
        """Measure a set.

        Args:
            data: Re-iterable batches.

        Returns:
            Its importances.
        """
        return fisher_diagonal(
            self.model,
            data,
            task=self.task,
            loss_fn=self.loss_fn,
            estimator=self.estimator,
            power=self.power,
            params=self.params,
            generator=self.generator,
            progress=self.progress,
            process_group=self.ranks,
        )

    def both(self, sources: Sources) -> tuple[Importance, Importance]:
        """Measure, or take, the importances on the forget set and on the full set.

        Args:
            sources: Data or importances.

        Returns:
            Both, in one order of names, on the parameters' devices.

        Raises:
            ValueError: If they do not go together.
            FloatingPointError: If one is NaN or infinite.
        """
        part, other = (
            source if isinstance(source, Importance) else self.one(source) for source in sources.values()
        )
        check_same_kind("plan_ssd", part, other)
        part, other = _laid_out(part, self.model), _laid_out(other, self.model)
        _check_weights(part, other)
        _check_batch_sizes(part, other)
        # What was measured here is nobody's: it need not stay beside the full set's.
        is_ours = not isinstance(list(sources.values())[1], Importance)
        full = other if "importance" in sources else pool(part, other, into=is_ours)
        if "importance" in sources and part.weights_digest == full.weights_digest is not None:
            check_covers("plan_ssd", full, part)
        if full.n_samples < part.n_samples:
            raise ValueError(
                f"plan_ssd: importance must cover the full set, forget set included, got {full.n_samples} "
                f"samples for {part.n_samples} to forget"
            )
        parameters = parameters_of(self.model, full, "plan_ssd")
        part, full = _placed(part, parameters, full), _placed(full, parameters, full)
        _check_finite("forget", part)
        _check_finite("full", full)
        return part, full


def sources_of(
    forget: Batches | Importance,
    retain: Batches | Importance | None,
    importance: Importance | None,
    *,
    closed_loop: bool,
) -> Sources:
    """Say where the importances come from.

    Args:
        forget: What the user passed.
        retain: What the user passed.
        importance: What the user passed.
        closed_loop: Whether the forget set, and the retain set where there are data, are to be watched.

    Returns:
        ``forget``, and ``retain`` or ``importance``.

    Raises:
        ValueError: If a set is missing, or one too many is given.
    """
    if closed_loop and isinstance(forget, Importance):
        raise ValueError(
            "plan_ssd: forget must be data for alpha='auto', which watches it, got an Importance; "
            "alpha='adaptive' needs none"
        )
    watches = closed_loop and retain is not None and not isinstance(retain, Importance)
    if (retain is None) == (importance is None) and not (importance is not None and watches):
        raise ValueError("plan_ssd: exactly one of retain and importance must be given")
    if importance is not None:
        return {"forget": forget, "importance": importance}
    return {"forget": forget, "retain": retain}  # type: ignore[dict-item]


def of_names(sources: Sources, names: list[str] | None) -> Sources:
    """Cut stored importances down to the parameters that were asked for.

    Args:
        sources: Data or importances.
        names: Plain names of the parameters; None for whatever is stored.

    Returns:
        The sources.

    Raises:
        ValueError: If importances of a parameter are not stored.
    """
    if names is None:
        return sources
    cut: dict[str, Batches | Importance] = {}
    for which, source in sources.items():
        if isinstance(source, Importance):
            missing = [name for name in names if name not in source]
            if missing:
                raise ValueError(
                    f"plan_ssd: {which} must hold importances of the parameters that params, include and "
                    f"exclude leave, got none of {', '.join(missing[:3])}{', ...' if missing[3:] else ''}"
                )
            source = _like(source, {name: source[name] for name in names})
        cut[which] = source
    return cut


def loss_of(loss_fn: LossFn | None, sources: Sources, *, default: LossFn) -> LossFn:
    """Choose the loss of the importances that are to be measured: that of those which are stored.

    Args:
        loss_fn: What the user passed.
        sources: Data or importances.
        default: For data, where the user passed none.

    Returns:
        The loss.

    Raises:
        ValueError: If stored importances are of another loss than the user's, or of one that only the user
            can name.
    """
    stored = {name: source for name, source in sources.items() if isinstance(source, Importance)}
    names = {name: source.loss for name, source in stored.items()}
    for name, known in names.items():
        if known is None:
            continue
        if loss_fn is not None and callable_name(loss_fn) != known:
            raise ValueError(
                f"plan_ssd: loss_fn must be that of {name}, which holds importances of {known}, got "
                f"{callable_name(loss_fn)}"
            )
        if loss_fn is None and known not in _LOSSES and len(stored) < len(sources):
            raise ValueError(f"plan_ssd: loss_fn must be given: {name} holds importances of {known}")
    if len({known for known in names.values() if known is not None}) > 1:
        raise ValueError(f"plan_ssd: importances must be of one loss, got {names}")
    if loss_fn is not None:
        return loss_fn
    if not stored:
        return default
    # What does not say is taken for what fisher_diagonal measures unless told otherwise.
    known = next((known for known in names.values() if known is not None), None)
    return _LOSSES.get(known or "", losses.cross_entropy)


def check_sources(model: nn.Module, sources: Sources, estimator: Estimator, power: int) -> list[str] | None:
    """Refuse what can be refused without a pass over the data.

    Args:
        model: The model.
        sources: Data or importances.
        estimator: The user's setting.
        power: The user's setting.

    Returns:
        Names of the parameters to look at, those of stored importances where there are any; None for all.

    Raises:
        TypeError: If ``importance`` is not an ``Importance``, or a set no iterable of batches.
        ValueError: If a set is a one-shot iterator, or stored importances do not fit.
    """
    stored = {name: source for name, source in sources.items() if isinstance(source, Importance)}
    for name, source in sources.items():
        if name not in stored:
            if name == "importance":
                raise TypeError(f"plan_ssd: importance must be an Importance, got {type(source).__name__}")
            check_batches(source, name)
    for name, given in stored.items():
        parameters_of(model, given, "plan_ssd", trainable=True)
        if len(stored) == 1 and (given.estimator, given.power) != (estimator, power):
            raise ValueError(
                f"plan_ssd: {name} holds {given.estimator!r} importances of power {given.power}, got "
                f"estimator={estimator!r} and power={power} for the other set"
            )
    return next((list(given) for given in stored.values()), None)


def _check_finite(which: str, importance: Importance) -> None:
    for name, tensor in importance.items():
        if not agreed_by_all(bool(torch.isfinite(local_of(tensor)).all()), [tensor]):
            raise FloatingPointError(
                f"plan_ssd: the importance of {name} on the {which} set must be finite, got NaN or infinity"
            )


def _check_weights(forget: Importance, other: Importance) -> None:
    # Requests that follow one another start from importances of the weights before the first, so this is no
    # error; of another model altogether they would be.
    digests = (forget.weights_digest, other.weights_digest)
    if None not in digests and digests[0] != digests[1]:
        warnings.warn(
            "plan_ssd: the importances of the two sets were measured with different weights; that is meant "
            "where an earlier request has changed the model since, and wrong for any other model",
            stacklevel=5,
        )


def _check_batch_sizes(forget: Importance, other: Importance) -> None:
    if forget.estimator != "batch" or forget.batch_size == other.batch_size:
        return
    small = min(forget, other, key=lambda importance: importance.batch_size)
    sizes = f"{forget.batch_size} (forget) and {other.batch_size}"
    if small.n_batches > 1:
        raise ValueError(f"plan_ssd: batch sizes must agree for the 'batch' estimator, got {sizes}")
    warnings.warn(
        f"plan_ssd: a set smaller than one batch has inflated 'batch' importances, got batch sizes {sizes}",
        stacklevel=4,
    )


def _laid_out(importance: Importance, model: nn.Module) -> Importance:
    # Whole importances, read from a file, say, beside the shards of a sharded model.
    parameters = parameters_by_name(model)
    if not any(is_dtensor(parameter) for parameter in parameters.values()):
        return importance
    found = {
        name: sharded_like(tensor, parameters[name]) if name in parameters else tensor
        for name, tensor in importance.items()
    }
    return importance.with_tensors(found)


def _placed(importance: Importance, parameters: Mapping[str, Tensor], like: Importance) -> Importance:
    # One order of names, and each tensor beside its parameter, whatever the importances were loaded from.
    return _like(
        importance,
        {name: importance[name].to(parameters[name].device, like[name].dtype) for name in like},
    )


def _like(importance: Importance, tensors: Mapping[str, Tensor]) -> Importance:
    return Importance(
        tensors,
        n_samples=importance.n_samples,
        estimator=importance.estimator,
        power=importance.power,
        batch_size=importance.batch_size,
        n_batches=importance.n_batches,
        coverage={name: how for name, how in importance.coverage.items() if name in tensors},
        loss=importance.loss,
        weights_digest=importance.weights_digest,
    )
