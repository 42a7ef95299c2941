"""The closed loop of selective synaptic dampening: candidates are tried until the forget set is forgotten.

A candidate dampens the share s_k = min(1, 2^k ln(1 + 100 n_f / n) / 100) of all scalars that matters most to
the forget set, within a scope: first the matrices and kernels of the second half of the parameters, in order
of first use, then all. What no single candidate reaches within the budget is tried in rounds, each of which
starts from the best affordable candidate of the one before, with importances measured anew.

Source:
    The dampening: Foster, Schoepf & Brintrup, AAAI 2024; the share at k = 0: Schoepf, Foster & Brintrup,
    2024 (ASSD). Scopes, rounds and acceptance are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from unlearn_ext import ops
from unlearn_ext._internal.names import parameters_by_name
from unlearn_ext._internal.undo import Undone
from unlearn_ext.fisher.importance import Importance
from unlearn_ext.methods.until import Measured, Watch

LEAST, FIRST, MOST = -3, 1, 4  # k: the smallest share, the one that is tried first, and the largest
ROUNDS = 4

# Retain accuracy that a candidate of the first round may cost without a look at a smaller one.
_EASY = 0.005

Importances = tuple[Importance, Importance]
"""On the forget set and on the full set."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """One dampening that was tried, and what came of it.

    Attributes:
        round: Counted from 1.
        scope: Which parameters it may touch.
        k: Its share of the scalars is ``2^k`` times that of the adaptive rule.
        alpha: The threshold that this share comes to.
        selected: Number of scalars it dampens.
        forget: What was then measured on the forget set.
        retain: The same on the retain set; None where it was not looked at.
        lost: Retain accuracy lost since before the first round; None where it was not looked at.
        reached: Whether the goal was.
    """

    round: int
    scope: str
    k: int
    alpha: float
    selected: int
    forget: Measured
    retain: Measured | None
    lost: float | None
    reached: bool

    def __str__(self) -> str:
        lost = "not looked at" if self.lost is None else f"{100 * self.lost:.2f} %"
        return (
            f"round {self.round}, {self.scope}: alpha {self.alpha:.6g} selects {self.selected:,}; forget "
            f"accuracy {self.forget.accuracy:.2%}, loss {self.forget.loss:.4g}, lost on retain: {lost}"
            f"{'; goal reached' if self.reached else ''}"
        )


@dataclass(slots=True)
class Outcome:
    """What a search came to.

    Attributes:
        candidates: All that were tried, in order.
        chosen: Those to apply, one per round; empty where none would do.
        weights: Parameter name to the values that ``chosen`` leads to.
        reached: Whether the goal is reached, by what was chosen or from the start.
        reason: Why it ended as it did.
    """

    candidates: list[Candidate] = field(default_factory=list)
    chosen: list[Candidate] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    reached: bool = False
    reason: str = ""


def scopes_of(names: Mapping[str, Tensor], in_order: list[str]) -> dict[str, list[str]]:
    """Say which parameters the candidates may touch.

    Args:
        names: Parameters by name.
        in_order: Their names in the order of first use.

    Returns:
        Scope to names, in the order in which they are tried; one that is empty, or all, is left out.
    """
    late = [name for name in in_order[len(in_order) // 2 :] if names[name].ndim >= 2]
    scopes = {"late matrices": late, "all parameters": list(names)}
    if len(late) in (0, len(names)):
        del scopes["late matrices"]
    return scopes


class _Round:
    """The candidates of one round: weights that it started from, importances, and what has been tried."""

    def __init__(
        self,
        number: int,
        parameters: Mapping[str, nn.Parameter],
        importances: Importances,
        scopes: Mapping[str, list[str]],
        factors: Mapping[str, float],
        watch: Watch,
    ) -> None:
        self.number, self.scopes = number, scopes
        self.allowed = min(_EASY * number, watch.budget)
        self._part, self._full = importances
        self._watch, self._factors = watch, factors
        self._parameters = {name: parameter.detach() for name, parameter in parameters.items()}
        self._start = {name: tensor.clone() for name, tensor in self._parameters.items()}
        self._touched: set[str] = set()
        self._alphas: dict[int, float] = {}
        self.tried: dict[tuple[str, int], Candidate] = {}
        self._applied: tuple[str, int] | None = None

    def alpha(self, k: int) -> float:
        if k not in self._alphas:
            self._alphas[k] = alpha_at(k, self._part, self._full)
        return self._alphas[k]

    def put_back(self) -> None:
        for name in self._touched:
            self._parameters[name].copy_(self._start[name])
        self._touched.clear()
        self._applied = None

    def apply(self, scope: str, k: int) -> int:
        # Puts the model into a candidate's state; how many scalars it selects.
        if self._applied == (scope, k):
            return self.tried[scope, k].selected
        self.put_back()
        names = self.scopes[scope]
        fulls, parts = ([which[name] for name in names] for which in (self._full, self._part))
        self._touched.update(names)
        ops.selective_dampen_(
            [self._parameters[name] for name in names], fulls, parts, alpha=self.alpha(k), **self._factors
        )
        self._applied = (scope, k)
        return int(ops.selected_counts(fulls, parts, [self.alpha(k)]).sum())

    def look(self, scope: str, k: int, *, at_retain: bool = False) -> Candidate:
        # Tries a candidate, or remembers it; on the retain set only where that is asked for.
        found = self.tried.get((scope, k)) or self._same(scope, k)
        if found is None:
            selected = self.apply(scope, k)
            forget = self._watch.now("forget")
            reached = self._watch.reached(forget)
            found = Candidate(self.number, scope, k, self.alpha(k), selected, forget, None, None, reached)
        if at_retain and found.retain is None and self._watch.has_retain:
            self.tried[scope, k] = found
            self.apply(scope, k)
            retain = self._watch.now("retain")
            found = replace(found, retain=retain, lost=self._watch.lost(retain))
        self.tried[scope, k] = found
        return found

    def _same(self, scope: str, k: int) -> Candidate | None:
        # Thresholds meet at their bounds.
        same = (
            replace(found, k=k)
            for (other, _), found in self.tried.items()
            if other == scope and found.alpha == self.alpha(k)
        )
        return next(same, None)

    def best_reached(self, scope: str) -> Candidate | None:
        # Up until the goal is reached, then down while that costs too much.
        k = FIRST
        found = self.look(scope, k)
        while not found.reached and k < MOST:
            k += 1
            found = self.look(scope, k)
        if not found.reached:
            return None
        best = found = self.look(scope, k, at_retain=True)
        # Without retain data the least dampening that reaches the goal is what is known to cost least.
        while k > LEAST and (found.lost is None or found.lost > self.allowed):
            k -= 1
            found = self.look(scope, k)
            if not found.reached:
                break
            found = self.look(scope, k, at_retain=True)
            if best.lost is None or found.lost is None or found.lost < best.lost:
                best = found
        return best

    def most_affordable(self, scope: str) -> Candidate | None:
        for k in range(MOST, LEAST - 1, -1):
            found = self.look(scope, k, at_retain=True)
            if found.lost is not None and found.lost <= self.allowed:
                return found
        return None


def alpha_at(k: int, part: Importance, full: Importance) -> float:
    """Return the threshold of a candidate.

    Args:
        k: See ``Candidate``.
        part: Importances on the forget set.
        full: Importances on the full set.

    Returns:
        The number.
    """
    rho = part.n_samples / full.n_samples
    share = min(1.0, 2.0**k * math.log1p(100 * rho) / 100)
    quantile = float(ops.ratio_quantile(list(full.values()), list(part.values()), 1 - share))
    if full.estimator == "batch":
        return quantile
    # What is to be dampened must matter more (from k = 0 down: twice as much) to a sample to forget than to
    # one to retain, and the largest possible ratio, 1 / rho, must be selected.
    odds = 2.0 if k <= 0 else 1.0
    return min(max(quantile, odds / (1 + (odds - 1) * rho)), 0.999 / rho)


def search(
    model: nn.Module,
    importances: Importances,
    watch: Watch,
    scopes: Mapping[str, list[str]],
    factors: Mapping[str, float],
    again: Callable[[], Importances | None],
) -> Outcome:
    """Look for a dampening that reaches the goal within the budget. The model is left as it was.

    Args:
        model: The model.
        importances: On the forget set and on the full set, on the parameters' devices.
        watch: Measures and judges.
        scopes: Of ``scopes_of``.
        factors: Settings of ``selective_dampen_`` other than the threshold.
        again: Measures the importances of the model as it is, on the forget samples that it still knows and
            on the full set; None where that cannot be done or no sample is left.

    Returns:
        What was tried, and what to apply.
    """
    parameters = parameters_by_name(model)
    parameters = {name: parameters[name] for name in importances[0]}
    outcome = Outcome()
    so_far: list[Candidate] = []
    least = math.inf
    with torch.no_grad(), _put_back(parameters):
        known = watch.knows(watch.before("forget"))
        for number in range(1, ROUNDS + 1):
            now = _Round(number, parameters, importances, scopes, factors, watch)
            accepted = False
            for scope in scopes:
                best = now.best_reached(scope)
                if best is None:
                    continue
                lost = 0.0 if best.lost is None else best.lost
                if lost < least and lost <= watch.budget:
                    least = lost
                    now.apply(scope, best.k)
                    outcome.chosen, outcome.reached = [*so_far, best], True
                    outcome.weights = {name: p.detach().clone() for name, p in parameters.items()}
                accepted = lost <= now.allowed
                if accepted:
                    break
            step = None
            if not accepted and watch.has_retain and number < ROUNDS:
                steps = [found for scope in scopes if (found := now.most_affordable(scope)) is not None]
                step = min(steps, key=lambda found: watch.knows(found.forget), default=None)
            outcome.candidates += now.tried.values()
            if accepted or step is None or not watch.knows(step.forget) < known:
                break
            now.apply(step.scope, step.k)
            known = watch.knows(step.forget)
            so_far.append(step)
            renewed = again()
            if renewed is None:
                break
            importances = renewed
    outcome.reason = _reason(outcome, watch)
    return outcome


def _reason(outcome: Outcome, watch: Watch) -> str:
    if outcome.reached:
        last = outcome.chosen[-1]
        cost = "nothing watched the rest: there are no retain data"
        if last.lost is not None:
            cost = watch.in_words(last.lost)
        how = _how_known(watch, last.forget)
        return f"forget {how} after {last.round} round(s), {cost}"
    tried = len(outcome.candidates)
    costs = [found.lost for found in outcome.candidates if found.reached and found.lost is not None]
    if costs:
        return (
            f"of {tried} candidates those that forget cost {watch.in_words(min(costs))} "
            f"or more, beyond the budget of {100 * watch.budget:g}"
        )
    least = min((found.forget for found in outcome.candidates), key=watch.knows)
    return (
        f"none of {tried} candidates brought the forget set to the goal ({watch.goal}); the best of them "
        f"came to {_how_known(watch, least)}"
    )


def _how_known(watch: Watch, forget: Measured) -> str:
    if watch.yardstick == "loss":
        return f"loss {forget.loss:.4g}"
    return f"accuracy {forget.accuracy:.2%}"


@contextmanager
def _put_back(parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    originals = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def write() -> None:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(originals[name])

    with Undone(write):
        yield
