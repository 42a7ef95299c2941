"""A dampening that has been worked out: looked at, applied, reverted, purged."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from unlearn_ext import ops
from unlearn_ext._internal.checksum import checksum
from unlearn_ext._internal.dtensors import agreed_by_all, is_dtensor, local_of, totals
from unlearn_ext._internal.names import parameters_by_name
from unlearn_ext.distributed.fsdp import reshard
from unlearn_ext.fisher.importance import Importance
from unlearn_ext.methods.ssd_journal import Entry, differing, entry, is_as_noted, write
from unlearn_ext.methods.ssd_search import Candidate, Outcome
from unlearn_ext.methods.ssd_sweep import Sweep, SweepRow
from unlearn_ext.methods.until import UnlearningFailed, Watch, figures
from unlearn_ext.results import UnlearnResult

# The adaptive rule selects what matters at least this many times as much to a sample to forget as to one to
# retain. Without it the rule dampens its share of the scalars also where nothing sets the forget set apart.
_LEAST_ODDS = 2.0


@dataclass(frozen=True, slots=True)
class Found:
    """What a closed loop found, kept without a copy of the model. Made by ``found_by``.

    Attributes:
        outcome: What was tried and chosen; its weights are dropped.
        watch: Who measured.
        journal: What is to be written.
        checksums: Of all parameters as they were.
        strict: Whether a goal that was not reached is an error.
    """

    outcome: Outcome
    watch: Watch
    journal: Mapping[str, Entry]
    checksums: Mapping[str, int]
    strict: bool

    @property
    def reached(self) -> bool:
        """Whether the goal is reached, by what was chosen or from the start."""
        return self.outcome.reached

    def figures(self) -> tuple[dict[str, float], dict[str, float]]:
        """Return what was measured before, and of the chosen weights."""
        sets = ("forget", "retain") if self.watch.has_retain else ("forget",)
        before = figures({name: self.watch.before(name) for name in sets})
        if not self.outcome.chosen:
            return before, before
        last = self.outcome.chosen[-1]
        measured = {"forget": last.forget} | ({} if last.retain is None else {"retain": last.retain})
        return before, figures(measured)


def found_by(model: nn.Module, outcome: Outcome, watch: Watch, *, strict: bool) -> Found:
    """Keep of an outcome what applying it takes.

    Args:
        model: The model, as it was before the search.
        outcome: Of ``search``; gives up its weights.
        watch: Who measured.
        strict: See ``Found``.

    Returns:
        The record.
    """
    reshard(model)
    parameters = {name: local_of(parameter.detach()) for name, parameter in parameters_by_name(model).items()}
    journal = {}
    for name, whole in outcome.weights.items():
        target = local_of(whole)
        changed = differing(target, parameters[name])
        if bool(changed.any()):
            journal[name] = entry(changed, target[changed], parameters[name])
    outcome.weights = {}
    sums = {name: checksum(tensor) if tensor.numel() else 0 for name, tensor in parameters.items()}
    return Found(outcome, watch, journal, sums, strict)


class SsdPlan:
    """A dampening that has been worked out and not, or not yet, carried out. Made by ``plan_ssd``.

    Attributes:
        importance_forget: Importances on the forget set; None after ``purge``, and where the request was
            refused before any were measured.
        importance_full: Importances on the full set; likewise.
        alpha: The threshold, a number also for ``"adaptive"``; for ``"auto"`` that of the last round's
            choice, NaN where there is none.
        reached: Whether the closed loop reached its goal; None where there was none.
        candidates: What the closed loop tried, in order.
    """

    def __init__(
        self,
        model: nn.Module,
        importance_forget: Importance | None,
        importance_full: Importance | None,
        *,
        alpha: float,
        factors: Mapping[str, float],
        hyperparameters: Mapping[str, object],
        seconds: Mapping[str, float],
        found: Found | None = None,
    ) -> None:
        self.importance_forget: Importance | None = importance_forget
        self.importance_full: Importance | None = importance_full
        self.alpha = alpha
        self.reached = None if found is None else found.reached
        self.candidates: tuple[Candidate, ...] = () if found is None else tuple(found.outcome.candidates)
        self._model = model
        self._factors = dict(factors)
        self._hyperparameters = dict(hyperparameters)
        self._seconds = dict(seconds)
        self._found = found
        self._journal: dict[str, Entry] | None = None
        self._purged = False

    def summary(self) -> str:
        """Say in a few lines what ``apply`` would do, and why.

        Returns:
            Data set sizes, settings, selected share, mean factor, and the parameters hit most; of a closed
            loop the goal, the candidates that were tried, those that were chosen, and the reason.

        Raises:
            RuntimeError: If the plan has been purged.
        """
        if self._found is not None:
            return self._loop_summary(self._found)
        full, forget = self._importances()
        counts = ops.selected_counts(list(full.values()), list(forget.values()), [self.alpha])[0].tolist()
        shares = {name: count / max(1, full[name].numel()) for name, count in zip(full, counts, strict=True)}
        total = sum(full[name].numel() for name in full)
        factor = self._mean_factor(self.alpha, self._factors["lambda_"], sum(counts))
        rule = "adaptive" if self._hyperparameters["alpha"] == "adaptive" else "given"
        lines = [
            self._sizes(forget, full),
            f"alpha {self.alpha:.6g} ({rule}), lambda {self._factors['lambda_']:g}",
            f"selected {sum(counts):,} of {total:,} scalars ({sum(counts) / max(1, total):.3%}), "
            f"mean factor {factor:.4f}",
        ]
        return "\n".join([*lines, *_hit_most(shares)])

    def _loop_summary(self, found: Found) -> str:
        if self._purged:
            raise RuntimeError("SsdPlan: the plan has been purged")
        watch, outcome = found.watch, found.outcome
        before, after = found.figures()
        lines = ["SSD: refused before any importance was measured"]
        if self.importance_forget is not None and self.importance_full is not None:
            lines = [self._sizes(self.importance_forget, self.importance_full)]
        of = (
            "% of retain perplexity gained" if watch.yardstick == "loss" else "points of retain accuracy lost"
        )
        lines += [
            f"goal: {watch.goal}, at most {100 * watch.budget:g} {of}"
            if watch.has_retain
            else f"goal: {watch.goal}; nothing watches the retain set, of which there are no data",
            f"lambda {self._factors['lambda_']:g}; before: {_in_words(before)}",
        ]
        lines += [
            f"{'->' if any(candidate is chosen for chosen in outcome.chosen) else '  '} {candidate}"
            for candidate in outcome.candidates
        ]
        lines.append(f"{'reached' if found.reached else 'not reached'}: {outcome.reason}")
        if outcome.chosen:
            lines.append(f"after: {_in_words(after)}, in {watch.passes:.1f} forward passes")
        reshard(self._model)
        parameters = parameters_by_name(self._model)
        written = _over_ranks(parameters, {name: len(e.values) for name, e in found.journal.items()})
        shares = {name: number / max(1, parameters[name].numel()) for name, number in written.items()}
        return "\n".join([*lines, *_hit_most(shares)])

    @staticmethod
    def _sizes(forget: Importance, full: Importance) -> str:
        return (
            f"SSD: forget {forget.n_samples} of {full.n_samples} samples, "
            f"{full.estimator} importances of power {full.power}"
        )

    def sweep(
        self, alphas: Iterable[float | Literal["adaptive"]], lambdas: Iterable[float] = (1.0,)
    ) -> Sweep:
        """Work out the selected share and the mean factor over a grid; the model is not touched.

        Args:
            alphas: Thresholds, >= 0, or ``"adaptive"``.
            lambdas: Dampening constants, >= 0.

        Returns:
            A table with one row per (alpha, lambda).

        Raises:
            ValueError: If a value is out of range.
            RuntimeError: If the plan has been purged.
        """
        full, forget = self._importances()
        thresholds = [threshold_of(alpha, full, forget) for alpha in alphas]
        constants = [checked("lambda_", value) for value in lambdas]
        counts = ops.selected_counts(list(full.values()), list(forget.values()), thresholds).sum(1).tolist()
        total = max(1, sum(tensor.numel() for tensor in full.values()))
        return Sweep(
            tuple(
                SweepRow(alpha, lambda_, count / total, self._mean_factor(alpha, lambda_, count))
                for alpha, count in zip(thresholds, counts, strict=True)
                for lambda_ in constants
            )
        )

    @property
    def is_applied(self) -> bool:
        """Whether there is something that ``revert`` would put back."""
        return self._journal is not None

    def apply(self) -> UnlearnResult:
        """Dampen the model in place; where a closed loop did not reach its goal, leave it as it is.

        Every parameter keeps its storage, every scalar that is not selected keeps its bits. The original
        values of the selected ones are kept for ``revert``.

        Returns:
            The record of the run.

        Raises:
            RuntimeError: If the plan has been applied, or purged; of a closed loop also if the model has
                changed since it was measured.
            UnlearningFailed: If the closed loop did not reach its goal and ``strict`` was given; the model is
                as it was. Without ``strict`` that is a warning.
            ValueError: If the model no longer has the parameters that the plan was made for.
        """
        if self._purged:
            raise RuntimeError("SsdPlan: the plan has been purged")
        if self._journal is not None:
            raise RuntimeError("SsdPlan.apply: the plan has been applied already; revert() it first")
        if self._found is not None:
            return self._apply_found(self._found)
        full, forget = self._importances()
        started = time.perf_counter()
        reshard(self._model)
        parameters = parameters_of(self._model, full)
        tensors = [local_of(parameter.detach()) for parameter in parameters.values()]
        named = list(zip(parameters, tensors, strict=True))
        fulls = [local_of(full[name]).to(tensor.device) for name, tensor in named]
        forgets = [local_of(forget[name]).to(tensor.device) for name, tensor in named]
        originals: list[tuple[str, Tensor, Tensor, Tensor]] = []  # name, parameter, selected, values
        for name, tensor, whole, part in zip(parameters, tensors, fulls, forgets, strict=True):
            selected = selection(whole, part, self.alpha)
            values = tensor[selected]
            if values.numel():
                originals.append((name, tensor, selected, values))
        try:
            ops.selective_dampen_(tensors, fulls, forgets, alpha=self.alpha, **self._factors)
            own = {name: int((tensor[chosen] != values).sum()) for name, tensor, chosen, values in originals}
            journal = {name: entry(selected, values, tensor) for name, tensor, selected, values in originals}
            changed = _over_ranks(parameters, own)
            selected_of = {name: len(values) for name, *_, values in originals}
            n_selected = sum(_over_ranks(parameters, selected_of).values())
            seconds = time.perf_counter() - started
            result = self._result(n_selected, changed, seconds)
            self._journal = journal
        except BaseException:
            for _, tensor, selected, values in originals:
                tensor[selected] = values
            raise
        return result

    def revert(self) -> None:
        """Put back the original bits; the plan can be applied again.

        Raises:
            RuntimeError: If the plan is not applied, or a parameter that it touched has changed since.
                Nothing is written then.
        """
        if self._journal is None:
            raise RuntimeError("SsdPlan.revert: the plan is not applied, or its journal has been purged")
        reshard(self._model)
        parameters = parameters_of(self._model, self._journal)
        own = {name: local_of(parameter.detach()) for name, parameter in parameters.items()}
        every = list(self._model.parameters())
        if not agreed_by_all(is_as_noted(self._journal, own), every) and any(map(is_dtensor, every)):
            raise RuntimeError(
                "SsdPlan.revert: a parameter has changed since apply(), on this rank or another"
            )
        write(self._journal, own, "SsdPlan.revert", "apply()")
        self._journal = None

    def purge(self) -> None:
        """Drop the journal and the importances: they derive from the data that was to be forgotten.

        Afterwards the plan can only say which ``alpha`` it used. The model stays as it is.
        """
        self.importance_forget = self.importance_full = None
        self._journal = self._found = None
        self._purged = True

    def _importances(self) -> tuple[Importance, Importance]:
        if self.importance_full is None or self.importance_forget is None:
            why = "has been purged" if self._purged else "was refused before any importance was measured"
            raise RuntimeError(f"SsdPlan: the plan {why}")
        return self.importance_full, self.importance_forget

    def _apply_found(self, found: Found) -> UnlearnResult:
        started = time.perf_counter()
        reshard(self._model)
        parameters = parameters_of(self._model, found.checksums)
        own = {name: local_of(parameter.detach()) for name, parameter in parameters.items()}
        differ = [
            name
            for name, known in found.checksums.items()
            if own[name].numel() and checksum(own[name]) != known
        ]
        if not agreed_by_all(not differ, parameters.values()):
            name = differ[0] if differ else "a parameter's shard on another rank"
            raise RuntimeError(f"SsdPlan.apply: {name} has changed since plan_ssd() measured the model")
        undo = write(found.journal, own, "SsdPlan.apply", "plan_ssd()")
        try:
            changed = _over_ranks(parameters, {name: len(values.values) for name, values in undo.items()})
            result = self._loop_result(found, changed, time.perf_counter() - started)
            self._journal = undo if found.reached else None
        except BaseException:
            write(undo, own, "SsdPlan.apply", "it was changed")
            raise
        if found.reached:
            if not found.outcome.chosen:
                warnings.warn(f"ssd: nothing was changed: {found.outcome.reason}", stacklevel=3)
            return result
        message = f"ssd: the model is as it was: {found.outcome.reason}"
        if found.strict:
            raise UnlearningFailed(message, result)
        self._journal = undo
        warnings.warn(message, stacklevel=3)
        return result

    def _loop_result(self, found: Found, changed: Mapping[str, int], seconds: float) -> UnlearnResult:
        history: list[dict[str, object]] = []
        if self.importance_forget is not None and self.importance_full is not None:
            history.append(_importance_phase(self.importance_forget, self.importance_full))
        for candidate in found.outcome.candidates:
            history.append(
                {
                    "phase": "candidate",
                    "round": candidate.round,
                    "scope": candidate.scope,
                    "k": candidate.k,
                    "alpha": candidate.alpha,
                    "selected": candidate.selected,
                    "forget_accuracy": candidate.forget.accuracy,
                    "retain_accuracy": None if candidate.retain is None else candidate.retain.accuracy,
                    "reached": candidate.reached,
                    "chosen": any(candidate is chosen for chosen in found.outcome.chosen),
                }
            )
        history.append(
            {"phase": "dampening", "changed": sum(changed.values()), "reason": found.outcome.reason}
        )
        before, after = found.figures()
        return self._record(
            changed,
            seconds,
            history,
            reached=found.reached,
            before=before,
            after=after,
            passes=found.watch.passes,
        )

    def _result(self, selected: int, changed: Mapping[str, int], seconds: float) -> UnlearnResult:
        full, forget = self._importances()
        dampening_phase = {
            "phase": "dampening",
            "alpha": self.alpha,
            "selected": selected,
            "changed": sum(changed.values()),
        }
        return self._record(changed, seconds, [_importance_phase(forget, full), dampening_phase])

    def _record(
        self,
        changed: Mapping[str, int],
        seconds: float,
        history: list[dict[str, object]],
        **closed_loop: Any,  # noqa: ANN401 - fields of the result
    ) -> UnlearnResult:
        sizes = {name: parameter.numel() for name, parameter in parameters_by_name(self._model).items()}
        return UnlearnResult(
            method="ssd",
            hyperparameters=self._hyperparameters,
            seconds={**self._seconds, "dampening": seconds},
            changed=sum(changed.values()) / max(1, sum(sizes.values())),
            changed_per_parameter={name: changed.get(name, 0) / max(1, size) for name, size in sizes.items()},
            history=tuple(history),
            coverage={} if self.importance_forget is None else dict(self.importance_forget.coverage),
            **closed_loop,
        )

    def _mean_factor(self, alpha: float, lambda_: float, count: int) -> float:
        if count == 0:
            return math.nan
        full, forget = self._importances()
        shrunk = []
        for name in full:
            whole, part = local_of(full[name]), local_of(forget[name])
            factors = torch.ones_like(whole)
            ops.selective_dampen_(
                [factors], [whole], [part], alpha=alpha, **{**self._factors, "lambda_": lambda_}
            )
            shrunk.append(float((1 - factors.double()).sum()))
        return 1 - sum(totals(shrunk, list(full.values()))) / count


def _over_ranks(parameters: Mapping[str, nn.Parameter], own: Mapping[str, int]) -> dict[str, int]:
    # What every rank has counted of its shards, added up.
    numbers = totals([own.get(name, 0) for name in parameters], list(parameters.values()))
    return {name: int(number) for name, number in zip(parameters, numbers, strict=True)}


def _importance_phase(forget: Importance, full: Importance) -> dict[str, object]:
    return {
        "phase": "importance",
        "n_samples_forget": forget.n_samples,
        "n_samples_full": full.n_samples,
        "estimator": full.estimator,
        "power": full.power,
    }


def _hit_most(shares: Mapping[str, float]) -> list[str]:
    most = sorted(((share, name) for name, share in shares.items() if share), reverse=True)[:10]
    return [f"  {share:8.3%}  {name}" for share, name in most]


def _in_words(measured: Mapping[str, float]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.4g}"
        if name.endswith("loss")
        else f"{name.replace('_', ' ')} {value:.2%}"
        for name, value in measured.items()
    )


def checked(name: str, value: object) -> float:
    """Return a setting as a number.

    Args:
        name: For the message.
        value: What the user passed.

    Returns:
        The number.

    Raises:
        ValueError: If it is not a finite number >= 0.
    """
    if isinstance(value, (str, bytes)) or not hasattr(value, "__float__"):
        raise ValueError(f"plan_ssd: {name} must be a number, got {value!r}")
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"plan_ssd: {name} must be finite and >= 0, got {number}")
    return number


def threshold_of(alpha: float | Literal["adaptive"], full: Importance, forget: Importance) -> float:
    """Return the threshold on forget / full.

    Args:
        alpha: A number, or the adaptive rule.
        full: Importances on the full set.
        forget: Importances on the forget set.

    Returns:
        The number.
    """
    if alpha != "adaptive":
        return checked("alpha", alpha)
    share = forget.n_samples / full.n_samples
    q = 1 - math.log1p(100 * share) / 100
    quantile = float(ops.ratio_quantile(list(full.values()), list(forget.values()), q))
    if full.estimator == "batch":
        return quantile
    # forget > _LEAST_ODDS * retain, with the retain set's importances written as full less forget.
    least = _LEAST_ODDS / (1 + (_LEAST_ODDS - 1) * share)
    # What the forget set alone uses (the embedding of a word of its own, say) has the largest possible ratio,
    # 1 / share. Where that is more than the rule selects, the quantile would be this ratio and select
    # nothing.
    return min(max(quantile, least), 0.999 / share)


def parameters_of(
    model: nn.Module, named: Mapping[str, object], who: str = "SsdPlan", *, trainable: bool = False
) -> dict[str, nn.Parameter]:
    """Look up a model's parameters by name.

    Args:
        model: The model.
        named: Names, perhaps with tensors of the parameters' shapes.
        who: For the message.
        trainable: Refuse frozen ones.

    Returns:
        Name to parameter, in the order of ``named``.

    Raises:
        ValueError: If the model has no such parameter, it is frozen, or of another shape.
    """
    parameters = parameters_by_name(model)
    for name, value in named.items():
        found = parameters.get(name)
        if found is None or (trainable and not found.requires_grad):
            kind = "a parameter of" if found is None else "trainable in"
            raise ValueError(f"{who}: {name} must be {kind} the model")
        if isinstance(value, Tensor) and value.shape != found.shape:
            raise ValueError(
                f"{who}: importances of {name} must have shape {list(found.shape)}, got {list(value.shape)}"
            )
    return {name: parameters[name] for name in named}


def selection(full: Tensor, forget: Tensor, alpha: float) -> Tensor:
    """Mark the scalars of a parameter that are dampened.

    Args:
        full: Importances on the full set.
        forget: Importances on the forget set.
        alpha: The threshold.

    Returns:
        bool, of the parameter's shape.
    """
    # The op itself decides, so that journal and dampening cannot disagree: lambda 0 zeroes what is selected.
    marks = torch.ones_like(full)
    ops.selective_dampen_([marks], [full], [forget], alpha=alpha, lambda_=0.0)
    return marks == 0
