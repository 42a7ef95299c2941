"""A dampening that has been worked out: looked at, applied, reverted, purged."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from unlearn_ext import ops
from unlearn_ext._internal.checksum import checksum
from unlearn_ext._internal.names import parameters_by_name
from unlearn_ext.fisher.importance import Importance
from unlearn_ext.methods.ssd_sweep import Sweep, SweepRow
from unlearn_ext.results import UnlearnResult

# The adaptive rule selects what matters at least this many times as much to a sample to forget as to one to
# retain. Without it the rule dampens its share of the scalars also where nothing sets the forget set apart.
_LEAST_ODDS = 2.0


@dataclass(frozen=True, slots=True)
class _JournalEntry:
    """What reverting one parameter takes: the bits of the scalars that changed, and where they are."""

    selected: Tensor  # packed mask over the parameter
    values: Tensor  # their original values, row-major
    checksum_after: int


class SsdPlan:
    """A dampening that has been worked out and not, or not yet, carried out. Made by ``plan_ssd``.

    Attributes:
        importance_forget: Importances on the forget set; None after ``purge``.
        importance_full: Importances on the full set; None after ``purge``.
        alpha: The threshold, a number also for ``"adaptive"``.
    """

    def __init__(
        self,
        model: nn.Module,
        importance_forget: Importance,
        importance_full: Importance,
        *,
        alpha: float,
        factors: Mapping[str, float],
        hyperparameters: Mapping[str, object],
        seconds: Mapping[str, float],
    ) -> None:
        self.importance_forget: Importance | None = importance_forget
        self.importance_full: Importance | None = importance_full
        self.alpha = alpha
        self._model = model
        self._factors = dict(factors)
        self._hyperparameters = dict(hyperparameters)
        self._seconds = dict(seconds)
        self._journal: dict[str, _JournalEntry] | None = None

    def summary(self) -> str:
        """Say in a few lines what ``apply`` would do.

        Returns:
            Data set sizes, settings, selected share, mean factor, and the parameters hit most.

        Raises:
            RuntimeError: If the plan has been purged.
        """
        full, forget = self._importances()
        counts = ops.selected_counts(list(full.values()), list(forget.values()), [self.alpha])[0].tolist()
        shares = {name: count / max(1, full[name].numel()) for name, count in zip(full, counts, strict=True)}
        total = sum(full[name].numel() for name in full)
        factor = self._mean_factor(self.alpha, self._factors["lambda_"], sum(counts))
        rule = "adaptive" if self._hyperparameters["alpha"] == "adaptive" else "given"
        lines = [
            f"SSD: forget {forget.n_samples} of {full.n_samples} samples, "
            f"{full.estimator} importances of power {full.power}",
            f"alpha {self.alpha:.6g} ({rule}), lambda {self._factors['lambda_']:g}",
            f"selected {sum(counts):,} of {total:,} scalars ({sum(counts) / max(1, total):.3%}), "
            f"mean factor {factor:.4f}",
        ]
        most = sorted(((share, name) for name, share in shares.items() if share), reverse=True)[:10]
        return "\n".join([*lines, *(f"  {share:8.3%}  {name}" for share, name in most)])

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

    def apply(self) -> UnlearnResult:
        """Dampen the model in place.

        Every parameter keeps its storage, every scalar that is not selected keeps its bits. The original
        values of the selected ones are kept for ``revert``.

        Returns:
            The record of the run.

        Raises:
            RuntimeError: If the plan has been applied, or purged.
            ValueError: If the model no longer has the parameters that the plan was made for.
        """
        if self._journal is not None:
            raise RuntimeError("SsdPlan.apply: the plan has been applied already; revert() it first")
        full, forget = self._importances()
        started = time.perf_counter()
        parameters = parameters_of(self._model, full)
        tensors = [parameter.detach() for parameter in parameters.values()]
        fulls = [full[name].to(tensor.device) for name, tensor in zip(parameters, tensors, strict=True)]
        forgets = [forget[name].to(tensor.device) for name, tensor in zip(parameters, tensors, strict=True)]
        originals: list[tuple[str, Tensor, Tensor, Tensor]] = []  # name, parameter, selected, values
        for name, tensor, whole, part in zip(parameters, tensors, fulls, forgets, strict=True):
            selected = selection(whole, part, self.alpha)
            values = tensor[selected]
            if values.numel():
                originals.append((name, tensor, selected, values))
        try:
            ops.selective_dampen_(tensors, fulls, forgets, alpha=self.alpha, **self._factors)
            changed = {
                name: int((tensor[selected] != values).sum()) for name, tensor, selected, values in originals
            }
            journal = {
                name: _JournalEntry(ops.pack_mask(selected), values, checksum(tensor))
                for name, tensor, selected, values in originals
            }
            seconds = time.perf_counter() - started
            result = self._result(sum(len(values) for *_, values in originals), changed, seconds)
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
        parameters = parameters_of(self._model, self._journal)
        for name, entry in self._journal.items():
            if checksum(parameters[name].detach()) != entry.checksum_after:
                raise RuntimeError(f"SsdPlan.revert: {name} has changed since apply()")
        for name, entry in self._journal.items():
            tensor = parameters[name].detach()
            selected = ops.unpack_mask(entry.selected, list(tensor.shape)).to(tensor.device)
            tensor[selected] = entry.values.to(tensor.device)
        self._journal = None

    def purge(self) -> None:
        """Drop the journal and the importances: they derive from the data that was to be forgotten.

        Afterwards the plan can only say which ``alpha`` it used. The model stays as it is.
        """
        self.importance_forget = self.importance_full = None
        self._journal = None

    def _importances(self) -> tuple[Importance, Importance]:
        if self.importance_full is None or self.importance_forget is None:
            raise RuntimeError("SsdPlan: the plan has been purged")
        return self.importance_full, self.importance_forget

    def _result(self, selected: int, changed: Mapping[str, int], seconds: float) -> UnlearnResult:
        full, forget = self._importances()
        sizes = {name: parameter.numel() for name, parameter in parameters_by_name(self._model).items()}
        importance_phase = {
            "phase": "importance",
            "n_samples_forget": forget.n_samples,
            "n_samples_full": full.n_samples,
            "estimator": full.estimator,
            "power": full.power,
        }
        dampening_phase = {
            "phase": "dampening",
            "alpha": self.alpha,
            "selected": selected,
            "changed": sum(changed.values()),
        }
        return UnlearnResult(
            method="ssd",
            hyperparameters=self._hyperparameters,
            seconds={**self._seconds, "dampening": seconds},
            changed=sum(changed.values()) / max(1, sum(sizes.values())),
            changed_per_parameter={name: changed.get(name, 0) / max(1, size) for name, size in sizes.items()},
            history=(importance_phase, dampening_phase),
        )

    def _mean_factor(self, alpha: float, lambda_: float, count: int) -> float:
        if count == 0:
            return math.nan
        full, forget = self._importances()
        shrunk = 0.0
        for name in full:
            factors = torch.ones_like(full[name])
            ops.selective_dampen_(
                [factors], [full[name]], [forget[name]], alpha=alpha, **{**self._factors, "lambda_": lambda_}
            )
            shrunk += float((1 - factors.double()).sum())
        return 1 - shrunk / count


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
