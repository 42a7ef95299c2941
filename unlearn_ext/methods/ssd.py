"""Selective synaptic dampening: shrink what matters far more to the forget set than to all data.

With the importances F (forget set) and D (full set), for every scalar parameter:

    theta <- clamp((lambda * D / F)^exponent, beta_min, beta_max) * theta     where F > alpha * D

Source:
    Foster, Schoepf & Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic
    Dampening", AAAI 2024. The percentile rule for alpha is that of the adaptive variant (ASSD) in Schoepf,
    Foster & Brintrup, "Parameter-tuning-free data entry error unlearning with adaptive selective synaptic
    dampening", 2024. Its release compares with the retain set; here, as in SSD, it is the full set. The lower
    bound that the rule gets here, the default lambda and the closed loop (``ssd_search``) are ours.
"""

from __future__ import annotations

import math
import time
import warnings
from typing import Literal, TypeAlias

import torch
from torch import nn

from unlearn_ext._internal.chosen import Params, Patterns, choice, restricted
from unlearn_ext._internal.modules import check_model
from unlearn_ext._internal.plain import callable_name
from unlearn_ext.distributed import Group, Ranks, lockstep_or_sharded, ranks_of
from unlearn_ext.distributed.agree import check_same_weights
from unlearn_ext.distributed.fsdp import fsdp_modules, reshard
from unlearn_ext.fisher.importance import Estimator, Importance, check_estimator
from unlearn_ext.methods.recorded import Record
from unlearn_ext.methods.ssd_importances import Measure, check_sources, loss_of, of_names, sources_of
from unlearn_ext.methods.ssd_loop import closed_loop, settled
from unlearn_ext.methods.ssd_plan import Found, SsdPlan, checked, found_by, threshold_of
from unlearn_ext.methods.until import Until, Watch, check_goal
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks import losses
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches, check_batches
from unlearn_ext.tasks.losses import LossFn, resolve

Alpha: TypeAlias = float | Literal["auto", "adaptive"]


@lockstep_or_sharded
def plan_ssd(
    model: nn.Module,
    forget: Batches | Importance,
    retain: Batches | Importance | None = None,
    *,
    task: Task | None = None,
    importance: Importance | None = None,
    alpha: Alpha = "auto",
    until: Until | Literal["auto"] = "auto",
    budget: float = 0.02,
    validation: Batches | None = None,
    strict: bool = False,
    lambda_: float = 0.1,
    exponent: float = 1.0,
    beta_min: float = 0.0,
    beta_max: float = 1.0,
    estimator: Estimator = "per_sample",
    power: int = 2,
    loss_fn: LossFn | None = None,
    params: Params = None,
    include: Patterns = None,
    exclude: Patterns = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    process_group: Group = None,
) -> SsdPlan:
    """Work out a selective synaptic dampening and leave the model as it is.

    ``alpha="auto"`` works in a closed loop: candidates are applied, measured on the forget and the retain
    data, and taken back, until one reaches the goal ``until`` at a cost in retain accuracy that the budget
    allows. What was tried, and why one was chosen, stands in ``summary()``. Where none will do, the plan
    changes nothing and says why. A number or ``"adaptive"`` dampens once, whatever comes of it.

    Of ``retain`` and ``importance`` give one. With ``retain`` the full set is forget and retain set together,
    pooled by their sample counts; ``importance`` is what has been stored for the full set, so that nothing
    but the forget set is read. The closed loop then watches the forget set alone and takes the least
    dampening that reaches the goal. It also takes both, stored importances and retain data to watch.

    ``power=1`` with ``loss_fn=losses.logit_norm`` is the loss-free, label-free variant (LFSSD); without
    labels, ``alpha`` must be given.

    A model that FSDP2 (``fully_shard``) has sharded is planned for, dampened and put back shard by shard, by
    all ranks together, each with its own share of the sets.

    Args:
        model: The model. Parameters that do not require grad are considered for ``params="base"`` only.
        forget: The forget set: re-iterable batches, or importances computed on them, for which ``alpha`` must
            be given.
        retain: The retain set, in the same forms.
        task: What the model is for; None infers it from the model and the batch. See ``ux.tasks``.
        importance: Importances on the full set, forget set included. Those of ``losses.log_odds`` serve the
            closed loop best.
        alpha: ``"auto"`` for the closed loop, else: select where forget > alpha * full; >= 0. Lower forgets
            more. Per-sample importances never exceed n / n_forget times those of the full set, so a higher
            alpha selects nothing. ``"adaptive"`` takes the quantile of forget / full that selects about ln(1
            + 100 n_forget / n) % of the scalars, and of these (but for ``"batch"``) only what is at least
            twice as important to the forget set as to the retain set.
        until: The closed loop's goal: ``"forgotten"`` (accuracy on the forget set at most 1 %: classes),
            ``"unseen"`` (no higher than on ``validation``), a number (the highest accuracy on the forget
            set), or a callable that is given the model and says whether it will do. ``"auto"`` is
            ``"forgotten"`` with ``alpha="auto"``, else None: one shot. For texts (tasks of language models)
            ``"unseen"`` is a loss no lower than on ``validation``, and what ``"auto"`` means where that is
            given: most tokens of any text are told.
        budget: Retain accuracy that the closed loop may lose, as a share; for texts the share by which the
            perplexity on the retain set may rise.
        validation: Data that the model never saw, for ``until="unseen"``.
        strict: Let ``apply`` raise ``UnlearningFailed`` where the goal was not reached, not warn.
        lambda_: Dampening constant, >= 0. Lower dampens more; the papers have 1 or 0.1.
        exponent: Sharpens (> 1) or softens (< 1) the factor; > 0.
        beta_min: Lower bound of the factor, in [0, beta_max].
        beta_max: Upper bound of the factor.
        estimator: See ``fisher_diagonal``. ``"batch"`` makes the ratio depend on batch sizes; it is here for
            comparison with the published code.
        power: 2 for squared gradients, 1 for absolute values.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``, whose gradients are the importances. None: that of
            stored importances where there are any; else ``losses.log_odds`` for the closed loop and
            ``losses.cross_entropy`` for one shot, as the task has them.
        params: Names of trainable parameters; ``"adapters"``, those of PEFT's active adapters and of the
            modules that are trained and saved beside them; or ``"base"``, the weights underneath, frozen or
            not, with the adapters in effect. None: all that are trainable.
        include: Parameters that may be dampened: names of them or of their modules, the last parts of such
            names, or regular expressions that match a whole name. None: all of these.
        exclude: Parameters to leave out, likewise.
        generator: For the draws of ``estimator="mc"``.
        progress: Show a progress bar, where tqdm is installed.
        process_group: Ranks that call this together, each with its own share of every set, perhaps none; see
            ``fisher_diagonal``. All of them come to the same plan, that of all data; what is done with it
            afterwards (``apply``, ``revert``) each does for itself.

    Returns:
        The plan: ``summary()``, ``sweep()``, ``apply()``, ``revert()``, ``purge()``.

    Raises:
        TypeError: If ``importance`` is not an ``Importance``, or a set no iterable of batches.
        ValueError: If ``retain`` and ``importance`` are both missing, or both given where nothing watches, a
            set is empty or a one-shot iterator, a setting is out of range or does not go with another, the
            full set is smaller than the forget set, or importances of different losses, estimators, powers,
            batch sizes (for ``"batch"``) or parameters meet.
        NotImplementedError: If the closed loop has no accuracy to watch, or the task has no log-odds.
        FloatingPointError: If a loss or an importance is NaN or infinite; the message names the batch or the
            parameter.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(12, 2), torch.ones(12, dtype=torch.long))]
        >>> plan = plan_ssd(model, forget, retain, alpha=1.5)
        >>> before = model.weight.detach().clone()
        >>> result = plan.apply()
        >>> plan.revert()
        >>> torch.equal(model.weight, before)
        True
    """
    is_sharded = bool(fsdp_modules(model))
    if is_sharded:
        reshard(model)
    check_model(model, "plan_ssd", may_be_sharded=is_sharded)
    judge = resolve(task, loss_fn, who="plan_ssd")  # refuses what is neither, before anything runs
    factors = _checked_factors(lambda_, exponent, beta_min, beta_max)
    if alpha not in ("auto", "adaptive"):
        checked("alpha", alpha)
    check_estimator("plan_ssd", estimator, power)
    is_text = alpha == "auto" and judge.yardstick(model) == "loss"
    goal = _checked_goal(alpha, until, budget, validation, is_text=is_text)
    ranks = ranks_of(process_group, "plan_ssd")
    choices = choice(params, include, exclude)
    with restricted(model, "plan_ssd", is_sharded, **choices) as names:
        sources = of_names(sources_of(forget, retain, importance, closed_loop=alpha == "auto"), names)
        measured = check_sources(model, sources, estimator, power)
        watched = (
            None if retain is None or isinstance(retain, Importance) else check_batches(retain, "retain")
        )
        loss = loss_of(loss_fn, sources, default=losses.log_odds if alpha == "auto" else losses.cross_entropy)
        hyperparameters: dict[str, object] = {
            "alpha": alpha,
            **factors,
            "estimator": estimator,
            "power": power,
            "loss_fn": callable_name(loss),
            **choices,
        }
        seconds: dict[str, float] = {}
        measure = Measure(model, task, loss, estimator, power, measured or names, generator, progress, ranks)

        started = time.perf_counter()
        watch = None
        if alpha == "auto" and not isinstance(forget, Importance):
            hyperparameters |= {"until": goal, "budget": budget}
            watch = Watch(
                "plan_ssd",
                model,
                forget,
                watched,
                until=goal,
                budget=budget,
                validation=validation,
                task=task,
                ranks=ranks,
            )
            outcome = settled(watch, goal)
            seconds["search"] = time.perf_counter() - started
            if outcome is not None:
                return SsdPlan(
                    model,
                    None,
                    None,
                    alpha=math.nan,
                    factors=factors,
                    hyperparameters=hyperparameters,
                    seconds=seconds,
                    found=found_by(model, outcome, watch, strict=strict),
                )
        started = time.perf_counter()
        part, full = measure.both(sources)
        hyperparameters |= {"estimator": full.estimator, "power": full.power}
        seconds = {"importance": time.perf_counter() - started, **seconds}

        loop: Found | None = None
        if watch is not None and not isinstance(forget, Importance):
            started = time.perf_counter()
            outcome = closed_loop(measure, forget, watched, (part, full), watch, factors)
            loop = found_by(model, outcome, watch, strict=strict)
            threshold = outcome.chosen[-1].alpha if outcome.chosen else math.nan
            seconds["search"] += time.perf_counter() - started
        else:
            threshold = threshold_of("adaptive" if isinstance(alpha, str) else alpha, full, part)
            bound = full.n_samples / part.n_samples
            if full.estimator == "per_sample" and threshold >= bound:
                warnings.warn(
                    f"plan_ssd: alpha = {threshold:.6g} selects nothing: no importance on the forget set "
                    f"exceeds n / n_forget = {bound:.6g} times that on the full set",
                    stacklevel=3,
                )
        return SsdPlan(
            model,
            part,
            full,
            alpha=threshold,
            factors=factors,
            hyperparameters={**hyperparameters, "alpha_value": threshold},
            seconds=seconds,
            found=loop,
        )


@lockstep_or_sharded
def ssd(
    model: nn.Module,
    forget: Batches | Importance,
    retain: Batches | Importance | None = None,
    *,
    task: Task | None = None,
    importance: Importance | None = None,
    alpha: Alpha = "auto",
    until: Until | Literal["auto"] = "auto",
    budget: float = 0.02,
    validation: Batches | None = None,
    strict: bool = False,
    lambda_: float = 0.1,
    exponent: float = 1.0,
    beta_min: float = 0.0,
    beta_max: float = 1.0,
    estimator: Estimator = "per_sample",
    power: int = 2,
    loss_fn: LossFn | None = None,
    params: Params = None,
    include: Patterns = None,
    exclude: Patterns = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    process_group: Group = None,
) -> UnlearnResult:
    """Dampen what matters far more to the forget set than to the full set: ``plan_ssd(...).apply()``.

    By default in a closed loop: how much is dampened, and where, is chosen by what it does to the accuracy on
    the forget and the retain data. The result tells what was measured before and after. Where the goal cannot
    be reached within the budget the model is left as it was, ``result.reached`` is False and a warning says
    what was tried. Test data are never read.

    Buffers (BatchNorm statistics) do not change. A failure leaves the model as it was. This is approximate
    unlearning; see ``plan_ssd`` for what the settings mean and for undoing it.

    The closed loop is for classes: where samples to retain carry a label of the forget set it refuses, since
    dampening would break single samples, which is not forgetting. ``python -m bench.ssd_networks`` compares
    it with one shot over many networks. Measure before relying on it.

    Args:
        model: The model, changed in place.
        forget: The forget set: re-iterable batches, or importances computed on them.
        retain: The retain set, in the same forms.
        task: What the model is for; None infers it from the model and the batch. See ``ux.tasks``.
        importance: Importances on the full set, instead of ``retain`` or beside it.
        alpha: ``"auto"`` for the closed loop, a threshold, or ``"adaptive"``.
        until: The closed loop's goal.
        budget: Retain accuracy that the closed loop may lose, as a share.
        validation: Data that the model never saw, for ``until="unseen"``.
        strict: Raise ``UnlearningFailed`` where the goal is not reached.
        lambda_: Dampening constant.
        exponent: Exponent of the factor.
        beta_min: Lower bound of the factor.
        beta_max: Upper bound of the factor.
        estimator: See ``fisher_diagonal``.
        power: 2 for squared gradients, 1 for absolute values.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``; None as in ``plan_ssd``.
        params: Names of trainable parameters, ``"adapters"`` or ``"base"``; see ``plan_ssd``.
        include: Patterns of parameters that may be dampened; see ``plan_ssd``.
        exclude: Patterns of parameters to leave out.
        generator: For the draws of ``estimator="mc"``.
        progress: Show a progress bar, where tqdm is installed.
        process_group: Ranks that call this together, each with its own share of every set; see ``plan_ssd``.
            Every rank ends with the same model, which is verified.

    Returns:
        The record of the run.

    Source:
        Foster, Schoepf & Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic
        Dampening", AAAI 2024. The published code squares gradients of batch means and uses alpha = 10; the
        exact per-sample importances used here have another scale, which the adaptive rule finds. Parity:
        ``alpha`` a number and ``estimator="batch"``. The closed loop is ours.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(12, 2), torch.ones(12, dtype=torch.long))]
        >>> ssd(model, forget, retain, alpha="adaptive").method
        'ssd'
    """
    ranks = ranks_of(process_group, "ssd")
    # The closed loop measures as it goes; one shot is measured around it.
    record = None if alpha == "auto" else Record(model, forget, retain, task, ranks)
    plan = plan_ssd(
        model,
        forget,
        retain,
        task=task,
        importance=importance,
        alpha=alpha,
        until=until,
        budget=budget,
        validation=validation,
        strict=strict,
        lambda_=lambda_,
        exponent=exponent,
        beta_min=beta_min,
        beta_max=beta_max,
        estimator=estimator,
        power=power,
        loss_fn=loss_fn,
        params=params,
        include=include,
        exclude=exclude,
        generator=generator,
        progress=progress,
        process_group=ranks,
    )
    return _applied(plan, model, ranks, record)


def _applied(plan: SsdPlan, model: nn.Module, ranks: Ranks, record: Record | None) -> UnlearnResult:
    # On all ranks or on none, and measured before it is too late to undo it.
    try:
        with ranks.failing_together():
            result = plan.apply()
            check_same_weights(ranks, model, "after the dampening")
        if record is not None:
            record.measure_again()
        return result if record is None else record.added_to(result)
    except BaseException:
        if plan.is_applied:
            plan.revert()
        raise


def _checked_goal(
    alpha: Alpha,
    until: Until | Literal["auto"],
    budget: float,
    validation: Batches | None,
    *,
    is_text: bool,
) -> Until:
    default: Until = "forgotten" if alpha == "auto" else None
    if is_text and validation is not None:
        default = "unseen"
    goal = default if isinstance(until, str) and until == "auto" else until
    check_goal("plan_ssd", goal, budget, validation)
    if alpha == "auto" and goal is None:
        raise ValueError("plan_ssd: alpha must be a number or 'adaptive' for until=None, got 'auto'")
    if alpha != "auto" and goal is not None:
        raise ValueError(f"plan_ssd: until must be None where alpha is given, got {goal!r}")
    return goal


def _checked_factors(lambda_: float, exponent: float, beta_min: float, beta_max: float) -> dict[str, float]:
    factors = {
        "lambda_": checked("lambda_", lambda_),
        "exponent": checked("exponent", exponent),
        "beta_min": checked("beta_min", beta_min),
        "beta_max": checked("beta_max", beta_max),
    }
    if factors["exponent"] == 0:
        raise ValueError("plan_ssd: exponent must be positive, got 0")
    if factors["beta_min"] > factors["beta_max"]:
        raise ValueError(f"plan_ssd: beta_min must not exceed beta_max, got {beta_min} and {beta_max}")
    return factors
