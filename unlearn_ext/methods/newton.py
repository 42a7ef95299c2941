"""One second-order step against samples that a network knows by heart.

With the Kronecker factors A, G of the retain set, for the weight of every layer

    theta <- theta + gamma (G + c tr(G)/dim I)^-1 V (A + c tr(A)/dim I)^-1
    V = grad [mean_i w_i logodds_i(retain) - mean_i w_i logodds_i(forget)]       w_i ~ (1 - p_i)^(1/2)

where gamma is the least with which the forget samples are answered no better than unseen ones. What forget
and retain samples have in common cancels out of V; without it the step costs more of what is kept.

Source:
    Ours. The Newton step of removing samples: Guo, Goldstein, Hannun & van der Maaten, "Certified Data
    Removal from Machine Learning Models", ICML 2020; by Kronecker factors, as influence functions use them:
    Grosse et al., "Studying Large Language Model Generalization with Influence Functions", 2023.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from unlearn_ext._internal.plain import callable_name
from unlearn_ext.distributed import Group, lockstep, ranks_of
from unlearn_ext.fisher.kfac import KroneckerFactors
from unlearn_ext.fisher.kfac_pass import kfac_factors
from unlearn_ext.methods.newton_guards import Answers, Guard, answers
from unlearn_ext.methods.newton_step import Step, direction
from unlearn_ext.methods.run import Run, unlearning
from unlearn_ext.methods.until import UnlearningFailed
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batches, check_batches
from unlearn_ext.tasks.losses import LossFn, resolve

_START = 1e-3  # the largest relative change of a layer that is tried first
_DOUBLINGS = 14
_FINE = 1.05  # how near to the first success the search comes
_FEW = 50  # validation samples below which the comparison means little


@lockstep
def newton(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    validation: Batches | None = None,
    factors: KroneckerFactors | None = None,
    budget: float = 0.02,
    validation_budget: float = 0.03,
    class_budget: float = 0.10,
    damping: float = 0.01,
    strict: bool = False,
    task: Task | None = None,
    loss_fn: LossFn | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    process_group: Group = None,
) -> UnlearnResult:
    """Forget samples learnt by heart in one second-order step, scaled until they are like unseen ones.

    For random samples, duplicates or wrong labels, where dampening, masks and relabelling do next to nothing
    or far too much. Parameters of layers without Kronecker factors (norms, attention's own projections) stay.

    The step is doubled, from a largest relative change of a layer of 1e-3, to the first point where accuracy
    on the forget set is at most that of the untouched model on the validation set, then narrowed down to 5 %.
    It is taken only if it costs no more than the budgets allow. Otherwise every bit is put back, ``reached``
    is False and a warning says what was tried. What the validation set shows
    counts
    beyond chance only, by a sign test; a class that the request is about (a share of the forget set more than
    twice its share of the validation set) has to stay within its budget whatever chance may do.

    Limits that were measured: a quarter or half of the data, and most whole classes, are refused (for classes
    use ``ssd``); forgotten samples are learnt again faster than new ones.

    Args:
        model: The model, changed in place; eval mode, so buffers stay.
        forget: The forget set.
        retain: The retain set, for the factors, and watched. With ``factors`` it may be left out; then
            nothing watches what is kept but ``validation``.
        validation: Samples that the model never saw, at least 50; not test data.
        factors: ``kfac_factors(model, retain)``, kept from before. They are decomposed once and serve many
            requests.
        budget: How much retain accuracy may be lost, as a share.
        validation_budget: The same for the validation set.
        class_budget: The same for every class of the validation set, where samples have one label each.
        damping: ``c``, relative to the mean eigenvalue of a factor; > 0.
        strict: Raise where the goal is not reached.
        task: What the model is for; inferred, or refused, where it is not given. It must have log-odds.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``: what to raise on the forget set instead of the
            weighted log-odds, all samples alike.
        generator: For the draws of the factors.
        progress: Show a progress bar on a terminal, where tqdm is installed.
        process_group: Ranks that call this together, each with its own share of every set, perhaps none; see
            ``fisher_diagonal``. Every rank ends with the same weights, which is verified.

    Returns:
        The record of the run, with ``reached``, and what was measured before and after.

    Raises:
        ValueError: If ``validation``, or ``retain`` without ``factors``, is missing, a set is empty or a
            setting is out of range, or the factors are not this model's.
        UnlearningFailed: If the goal is not reached and ``strict`` is set.
        FloatingPointError: If a gradient or a factor is NaN or infinite.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))
        >>> x, y = torch.randn(80, 8), torch.randint(2, (80,))
        >>> optimizer = torch.optim.Adam(model.parameters(), 0.01)
        >>> for _ in range(100):
        ...     optimizer.zero_grad()
        ...     nn.functional.cross_entropy(model(x[:60]), y[:60]).backward()
        ...     optimizer.step()
        >>> sets = [[(x[part], y[part])] for part in (slice(6), slice(6, 60), slice(60, 80))]
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     result = newton(model, sets[0], sets[1], validation=sets[2])
        >>> result.reached
        True
    """
    _check(forget, retain, validation, factors, damping)
    task = resolve(task, who="newton")
    ranks = ranks_of(process_group, "newton")
    guard = Guard(budget, validation_budget, class_budget)
    settings = {
        "budget": budget,
        "validation_budget": validation_budget,
        "class_budget": class_budget,
        "damping": damping,
        "factors": "given" if factors is not None else None,
        "loss_fn": None if loss_fn is None else callable_name(loss_fn),
    }
    sets = {"forget": forget, "validation": validation, "retain": retain}
    watched = {name: data for name, data in sets.items() if data is not None}
    with unlearning(
        model,
        "newton",
        settings,
        generator=generator,
        data=watched.values(),
        changes=(),
        ranks=ranks,
    ) as run:
        if factors is None:
            with run.phase("factors"):
                given = False
                found = kfac_factors(
                    model, watched["retain"], task=task, progress=progress, process_group=ranks
                )
        else:
            given, found = True, factors
        left_out = sorted(name for name, how in found.coverage.items() if how != "factored")
        run.record("factors", n_samples=found.n_samples, left_out=left_out)
        with run.phase("measure"):
            before = {name: answers(model, task, data, name, ranks) for name, data in watched.items()}
        if before["validation"].counted < _FEW:
            warnings.warn(
                f"newton: validation should hold at least {_FEW} samples, got "
                f"{before['validation'].counted}: how unseen samples are answered is not known well",
                stacklevel=3,
            )
        with run.phase("direction"):
            step = direction(
                model,
                forget,
                retain,
                found,
                task=task,
                loss_fn=loss_fn,
                damping=damping,
                keep=given,
                ranks=ranks,
            )
            run.keep(step.names(model))
        with run.phase("search"):
            size = _search(
                run, step, task, forget, *(before[name].accuracy for name in ("validation", "forget"))
            )
        with run.phase("guards"):
            after = (
                before
                if size == 0
                else {name: answers(model, task, data, name, ranks) for name, data in watched.items()}
            )
        if size is None:
            lost = ["no step that makes the forget samples like unseen ones"]
        else:
            lost = guard.broken(before, after)
        if lost:
            step.take_back()
        run.record("outcome", step=size, lost=lost)
    tried = [float(str(entry["step"])) for entry in run.history if entry["phase"] == "search"]
    result = replace(
        run.result(),
        reached=not lost,
        before=_figures(before),
        after=_figures(before if lost else after),
        # Answers before and after, and the search on the forget set.
        passes=2.0
        + len(tried) * len(before["forget"].right) / sum(len(part.right) for part in before.values()),
    )
    if lost:
        message = (
            f"newton: forget must be forgotten within the budget, got {'; '.join(lost)} ({len(tried)} steps "
            f"tried, up to a relative change of a layer of {max(tried, default=0):.3g}); "
            "the model is as it was"
        )
        if strict:
            raise UnlearningFailed(message, result)
        warnings.warn(message, stacklevel=3)
    return result


def _passes(sets: Mapping[str, Answers], tried: int) -> float:
    # Answers before and after, and the search on the forget set.
    whole = sum(len(part.right) for part in sets.values())
    return 2.0 + tried * len(sets["forget"].right) / whole


def _figures(sets: Mapping[str, Answers]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, part in sets.items():
        found |= {f"{name}_accuracy": part.accuracy, f"{name}_loss": part.loss}
    return found


def _check(
    forget: Batches,
    retain: Batches | None,
    validation: Batches | None,
    factors: KroneckerFactors | None,
    damping: float,
) -> None:
    check_batches(forget, "newton: forget")
    if validation is None:
        raise ValueError(
            "newton: validation must be given, got None: it says how samples that the model never saw are "
            "answered; 50 that were held back are enough, test data are not meant for it"
        )
    check_batches(validation, "newton: validation")
    if retain is not None:
        check_batches(retain, "newton: retain")
    elif factors is None:
        raise ValueError("newton: retain must be given where there are no factors, got None")
    if factors is not None and not isinstance(factors, KroneckerFactors):
        raise TypeError(f"newton: factors must be KroneckerFactors, got {type(factors).__name__}")
    if not (math.isfinite(damping) and damping > 0):
        raise ValueError(f"newton: damping must be finite and > 0, got {damping}")


def _search(run: Run, step: Step, task: Task, forget: Batches, target: float, before: float) -> float | None:
    # The least step with which accuracy on the forget set is at most the target, from below: far beyond it, a
    # model that knows nothing would do as well.

    def reached(size: float) -> bool:
        step.take(size)
        accuracy = answers(run.model, task, forget, "forget", run.ranks).accuracy
        run.record("search", step=size, forget=accuracy)
        return accuracy <= target

    if before <= target:
        return 0.0
    high = _START
    for _ in range(_DOUBLINGS):
        if reached(high):
            break
        high *= 2
    else:
        return None
    low = high / 2
    while high > _FINE * low:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if reached(middle) else (middle, high)
    step.take(high)
    return high
