"""One second-order step against samples that a network knows by heart.

With the Kronecker factors A, G of the retain set, for the weight of every layer

    theta <- theta + gamma (G + c tr(G)/dim I)^-1 V (A + c tr(A)/dim I)^-1
    V = grad [mean_i w_i logodds_i(retain) - mean_i w_i logodds_i(forget)]       w_i ~ (1 - p_i)^(1/2)

where gamma is the least with which the forget samples are answered no better than unseen ones. What forget
and retain samples have in common cancels out of V; without it the step costs more of what is kept.

Texts are judged by their loss, and the way there is made in several such steps, each along the direction at
the weights as they then are: one straight step costs retained texts several times as much.

Source:
    Ours. The Newton step of removing samples: Guo, Goldstein, Hannun & van der Maaten, "Certified Data
    Removal from Machine Learning Models", ICML 2020; by Kronecker factors, as influence functions use them:
    Grosse et al., "Studying Large Language Model Generalization with Influence Functions", 2023.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import nn

from unlearn_ext._internal.chosen import Params, Patterns, choice, restricted
from unlearn_ext._internal.modules import check_model
from unlearn_ext._internal.plain import callable_name
from unlearn_ext.distributed import Group, MeshRanks, lockstep_on_mesh, ranks_of
from unlearn_ext.distributed.fsdp import reshard
from unlearn_ext.distributed.group import on_all
from unlearn_ext.fisher.kfac import KroneckerFactors
from unlearn_ext.fisher.kfac_pass import kfac_factors
from unlearn_ext.methods.common import check_count
from unlearn_ext.methods.newton_guards import Answers, Guard, answers, unseen_accuracy
from unlearn_ext.methods.newton_step import Step, direction
from unlearn_ext.methods.run import Run, unlearning
from unlearn_ext.methods.until import FORGOTTEN, UnlearningFailed, Until, check_goal
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.base import Task, Yardstick
from unlearn_ext.tasks.batches import Batches, check_batches
from unlearn_ext.tasks.losses import LossFn, resolve

_START = 1e-3  # the largest relative change of a layer that is tried first
_DOUBLINGS = 14
# What the retain set's gradient is multiplied by, at first and where that breaks a budget: more of it costs
# unseen samples less and retained ones more.
_RETAIN_WEIGHTS = (1.0, 2.0)
_IN_WORDS = {
    "unseen": "makes the forget samples like unseen ones",
    "forgotten": "makes the forget samples forgotten",
}
_FINE = 1.05  # how near to the first success the search comes
_FEW = 50  # validation samples below which the comparison means little
# By what is watched. See Note [Steps for texts].
_ROUNDS: dict[Yardstick, int] = {"accuracy": 1, "loss": 4}
_DAMPING: dict[Yardstick, float] = {"accuracy": 0.01, "loss": 0.1}


@lockstep_on_mesh
def newton(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    validation: Batches | None = None,
    factors: KroneckerFactors | None = None,
    until: Until = "unseen",
    budget: float = 0.02,
    validation_budget: float = 0.03,
    class_budget: float = 0.10,
    damping: float | None = None,
    rounds: int | None = None,
    strict: bool = False,
    task: Task | None = None,
    loss_fn: LossFn | None = None,
    params: Params = None,
    include: Patterns = None,
    exclude: Patterns = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    process_group: Group = None,
) -> UnlearnResult:
    """Forget samples learnt by heart in one second-order step, scaled until they are like unseen ones.

    For random samples, duplicates or wrong labels, where dampening, masks and relabelling do next to nothing
    or far too much. Parameters of layers without Kronecker factors (norms, attention's own projections) stay.

    The step is doubled, from a largest relative change of a layer of 1e-3, to the first point where accuracy
    on the forget set is at most that of the untouched model on the validation set (where the forget set has
    more of some classes than chance explains: on unseen samples of its classes, if that is lower), then
    narrowed down to 5 %. It is taken only if it costs no more than the budgets allow; where it costs more, a
    second one is tried for which the retain set's gradient weighs twice as much. Otherwise every bit is put
    back, ``reached`` is False and a warning says what was tried. What the validation set shows counts beyond
    chance only, by a sign test; a class that the request is about (a share of the forget set more than twice
    its share of the validation set) has to stay within its budget whatever chance may do.

    For texts (tasks of language models) the goal is a loss on the forget set no lower than on the validation
    set, both by the model as it ends, reached in ``rounds`` equal parts, and ``budget`` the share by which
    the perplexity on the retain set may rise. Validation texts should be of the kind that is forgotten: other
    users' texts where a user is forgotten, other texts of the same users where single texts are.

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
        until: The goal: ``"unseen"`` as above, ``"forgotten"`` (accuracy on the forget set at most 1 %), an
            accuracy, or a function of the model that says whether it will do.
        budget: How much retain accuracy may be lost, as a share; of texts, how far the perplexity may rise.
        validation_budget: How much validation accuracy may be lost, as a share.
        class_budget: The same for every class of the validation set, where samples have one label each.
        damping: ``c``, relative to the mean eigenvalue of a factor; > 0. None: 0.1 for texts, else 0.01.
        rounds: In how many steps the goal is approached. None: 4 for texts, else 1.
        strict: Raise where the goal is not reached.
        task: What the model is for; inferred, or refused, where it is not given. It must have log-odds.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``: what to raise on the forget set instead of the
            weighted log-odds, all samples alike.
        params: Names of trainable parameters; ``"adapters"``, those of PEFT's active adapters and of the
            modules that are trained and saved beside them; or ``"base"``, the weights underneath, frozen or
            not, with the adapters in effect. None: all that are trainable.
        include: Parameters that may change: names of them or of their modules, the last parts of such names,
            or regular expressions that match a whole name. None: all of these.
        exclude: Parameters that may not change, likewise. A layer of which either leaves a part stays.
        generator: For the draws of the factors.
        progress: Show a progress bar on a terminal, where tqdm is installed.
        process_group: Ranks that call this together, each with its own share of every set, perhaps none; see
            ``fisher_diagonal``. Every rank ends with the same weights, which is verified. None for a model
            that ``fully_shard`` has sharded, of which all ranks of its mesh call this: ``docs/sharded.md``.

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
    ranks = ranks_of(process_group, "newton")
    is_sharded = isinstance(ranks, MeshRanks)
    task = resolve(task, who="newton")
    check_model(model, "newton", may_be_sharded=is_sharded)
    yardstick = task.yardstick(model)
    damping = _DAMPING[yardstick] if damping is None else damping
    rounds = _ROUNDS[yardstick] if rounds is None else rounds
    _check(forget, retain, validation, factors, damping)
    if until is None:
        raise ValueError(
            "newton: until must be a goal, which is what decides the length of the step, got None"
        )
    check_goal("newton", until, budget, validation)
    check_count("newton", "rounds", rounds, 1)
    guard = Guard(budget, validation_budget, class_budget, yardstick)
    # A number of the user's is an accuracy, also for texts.
    by: Yardstick = yardstick if until == "unseen" else "accuracy"
    choices = choice(params, include, exclude)
    settings = {
        "until": until,
        "budget": budget,
        "validation_budget": validation_budget,
        "class_budget": class_budget,
        "damping": damping,
        "rounds": rounds,
        "factors": "given" if factors is not None else None,
        "loss_fn": None if loss_fn is None else callable_name(loss_fn),
        **choices,
    }
    sets = {"forget": forget, "validation": validation, "retain": retain}
    watched = {name: data for name, data in sets.items() if data is not None}
    with (
        restricted(model, "newton", is_sharded, **choices) as names,
        unlearning(
            model,
            "newton",
            settings,
            generator=generator,
            data=watched.values(),
            changes=(),
            ranks=ranks,
        ) as run,
    ):
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
        run.coverage = dict(found.coverage)
        with run.phase("measure"):
            before = {name: answers(model, task, data, name, ranks) for name, data in watched.items()}
        for name, part in before.items():
            if not math.isfinite(part.loss):  # such samples would count as forgotten
                raise FloatingPointError(
                    f"newton: losses on the {name} set must be finite, got a mean of {part.loss}"
                )
        if before["validation"].counted < _FEW:
            warnings.warn(
                f"newton: validation should hold at least {_FEW} samples, got "
                f"{before['validation'].counted}: how unseen samples are answered is not known well",
                stacklevel=3,
            )

        def next_step(retain_weight: float) -> Step:
            step = direction(
                model,
                forget,
                retain,
                found,
                task=task,
                loss_fn=loss_fn,
                damping=damping,
                keep=given or rounds > 1,
                only_trainable=names is not None,
                retain_weight=retain_weight,
                ranks=ranks,
            )
            run.keep(step.names(model))
            return step

        tried: list[float] = []
        told: list[str] = []
        read = searched = 0
        for weight in _RETAIN_WEIGHTS if retain is not None else _RETAIN_WEIGHTS[:1]:
            # See Note [Unseen texts are looked at again].
            moving = validation if by == "loss" else None
            way = _Way(run, task, forget, by, tried, until if callable(until) else None, moving)
            step = functools.partial(next_step, weight)
            goal = _goal(until, before, by)
            size = way.gone(step, before["forget"].known(by), goal, rounds)
            searched += way.searched
            with run.phase("guards"):
                after = (
                    before
                    if size == 0
                    else {name: answers(model, task, data, name, ranks) for name, data in watched.items()}
                )
                read += size != 0
            lost = (
                [f"no step that {_IN_WORDS.get(str(until), 'reaches until')}"]
                if size is None
                else guard.broken(before, after)
            )
            run.record("outcome", step=size, lost=lost, retain_weight=weight)
            if not lost:
                break
            way.take_back()
            told += (
                lost if not told else [f"with the retain set weighing {weight:g} times as much: {lost[0]}"]
            )
            if size is None:
                break
    result = replace(
        run.result(),
        reached=not lost,
        before=_figures(before),
        after=_figures(before if lost else after),
        passes=_passes(before, read, searched),
    )
    if lost:
        message = (
            f"newton: forget must be forgotten within the budget, got {'; '.join(told)} ({len(tried)} steps "
            f"tried, up to a relative change of a layer of {max(tried, default=0):.3g}); "
            "the model is as it was"
        )
        if strict:
            raise UnlearningFailed(message, result)
        warnings.warn(message, stacklevel=3)
    return result


def _passes(sets: Mapping[str, Answers], after: int, searched: int) -> float:
    # Answers before and after every attempt, and the samples that the search has read.
    return 1.0 + after + searched / sum(len(part.right) for part in sets.values())


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


def _goal(until: Until, before: Mapping[str, Answers], yardstick: Yardstick) -> float:
    # How well the forget set may be known.
    if isinstance(until, (int, float)):
        return float(until)
    if until == "forgotten":
        return FORGOTTEN
    unseen = before["validation"]
    return unseen_accuracy(unseen, before["forget"]) if yardstick == "accuracy" else unseen.known(yardstick)


class _Way:
    """The steps towards the goal: each is the least with which its part of the way is made.

    Args:
        run: The run.
        task: What the model is for.
        forget: The forget set.
        yardstick: What is watched.
        tried: Takes up the sizes of steps that were tried.
        will_do: Judges the model in place of a goal for the forget set.
        validation: Samples that may be known no less than the forget set at the end, by the model as it then
            is; None: the goal alone counts.

    Attributes:
        searched: Number of samples read by the search.
    """

    def __init__(
        self,
        run: Run,
        task: Task,
        forget: Batches,
        yardstick: Yardstick,
        tried: list[float],
        will_do: Callable[[nn.Module], bool] | None,
        validation: Batches | None,
    ) -> None:
        self._run, self._task, self._forget, self._by = run, task, forget, yardstick
        self._will_do, self._validation = will_do, validation
        self._steps: list[Step] = []
        self._tried = tried
        self.searched = 0

    def gone(self, next_step: Callable[[], Step], start: float, goal: float, rounds: int) -> float | None:
        """Go there.

        Args:
            next_step: Works out the step at the weights as they are.
            start: How well the forget set is known at first.
            goal: How well it may be known in the end; not looked at where something else judges.
            rounds: Number of steps; one where something else judges.

        Returns:
            The sum of the steps' sizes; 0.0 where nothing is to be done, None where the goal is not reached.
        """
        if self._will_do is not None:
            rounds = 1
        if start <= goal if self._will_do is None else self._judged(self._will_do):
            return 0.0
        total, first = 0.0, _START
        for number in range(1, rounds + 1):
            with self._run.phase("direction"):
                self._steps.append(next_step())
            # The last part ends at the goal itself, whatever rounding says.
            target = goal if number == rounds else start + (goal - start) * number / rounds
            with self._run.phase("search"):
                size = self._searched(self._steps[-1], target, first, is_last=number == rounds)
            if size is None:
                return None
            total, first = total + size, size / 4
        return total

    def take_back(self) -> None:
        """Put back every bit."""
        for step in self._steps[:1]:
            step.take_back()

    def _answers(self, data: Batches, name: str) -> Answers:
        found = answers(self._run.model, self._task, data, name, self._run.ranks)
        self.searched += len(found.right)
        return found

    def _judged(self, will_do: Callable[[nn.Module], bool]) -> bool:
        found = on_all(self._run.ranks, "until", lambda: bool(will_do(self._run.model)))
        reshard(self._run.model)
        return found

    def _searched(self, step: Step, target: float, first: float, *, is_last: bool) -> float | None:
        # From below: far beyond the goal, a model that knows nothing would do as well.
        def reached(size: float) -> bool:
            step.take(size)
            found = self._answers(self._forget, "forget")
            self._run.record("search", step=size, forget=found.loss if self._by == "loss" else found.accuracy)
            self._tried.append(size)
            if self._will_do is not None:
                return self._judged(self._will_do)
            known = found.known(self._by)
            if known > target or self._validation is None or not is_last:
                return known <= target
            return known <= self._answers(self._validation, "validation").known(self._by)

        high = first
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


# Note [Unseen texts are looked at again]
# A step raises the loss on unseen texts too, by some hundredths. Who tells forgotten texts from unseen ones
# has the model as it is in the end, so that is where the two losses are compared. Accuracies are not: they
# fall in steps of a sample, and guards ask for what unseen samples lost.

# Note [Steps for texts]
# Texts are spread over far more of the weights than labels: one straight step to the goal costs the retained
# texts' perplexity several times what four shorter ones cost, each along the direction at the weights reached
# so far. Damping by a tenth of the mean eigenvalue costs less than by a hundredth. Both were chosen on a
# model of the kind of bench.texts, which measures the defaults.
