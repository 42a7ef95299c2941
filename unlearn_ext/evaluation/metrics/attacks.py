"""Membership inference: can forget samples be told as members of the training set?"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext.tasks.base import Outputs, Task
from unlearn_ext.tasks.batches import Batch, Batches, check_batches, device_of, read_batches
from unlearn_ext.tasks.classification import Categorical
from unlearn_ext.tasks.losses import task_of
from unlearn_ext.tasks.positions import mean_over_positions

_Numbers: TypeAlias = npt.NDArray[np.float64]
_Ranks: TypeAlias = npt.NDArray[np.intp]

Convention: TypeAlias = Literal["ssd", "salun", "scrub"]

CONVENTIONS: tuple[Convention, ...] = ("ssd", "salun", "scrub")


class Interval(NamedTuple):
    """A 95 % bootstrap interval.

    Attributes:
        low: 2.5 % quantile.
        high: 97.5 % quantile.
    """

    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Attack:
    """What a membership inference attack made of a model; see ``mia``.

    Attributes:
        convention: Whose definition ``score`` follows; None for the attack by loss alone.
        score: The convention's number, in [0, 1]; None without a convention.
        ideal: What ``score`` would be for a perfectly unlearned model: ``"retrained"`` (that model's score)
            or a number.
        auc: Area under the ROC curve of telling forget samples (positive) from test samples by their loss:
            0.5 is chance; below it, forget samples have *higher* losses than unseen ones.
        auc_interval: Bootstrap interval of ``auc``.
        tpr: Share of the forget samples recognised at a threshold that 1 % of the test samples pass.
        tpr_interval: Bootstrap interval of ``tpr``.
        reference_score: ``score`` of the retrained model, if one was given.
        reference_auc: ``auc`` of the retrained model, if one was given.
    """

    convention: Convention | None
    score: float | None
    ideal: str | float
    auc: float
    auc_interval: Interval
    tpr: float
    tpr_interval: Interval
    reference_score: float | None = None
    reference_auc: float | None = None

    @property
    def verdict(self) -> str:
        """Say on which side of the retrained model this one lies.

        ``"no reference"``, ``"like the reference"`` (its AUC lies in the interval), ``"still recognised"``
        (forget samples are easier to tell as members) or ``"over-unlearned"`` (they stand out as the
        opposite of members, which gives them away just as well).
        """
        if self.reference_auc is None:
            return "no reference"
        if self.auc_interval.low <= self.reference_auc <= self.auc_interval.high:
            return "like the reference"
        return "still recognised" if self.auc > self.reference_auc else "over-unlearned"


def mia(
    model: nn.Module,
    *sets: Any,  # noqa: ANN401 - the older form: retain, forget, test, convention
    forget: Batches | None = None,
    retain: Batches | None = None,
    test: Batches | None = None,
    convention: Convention | None = "ssd",
    reference: nn.Module | None = None,
    calibration: Sequence[nn.Module] = (),
    task: Task | None = None,
    shift: bool | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
) -> Attack:
    """Attack a model by membership inference: can forget samples be told as members of the training set?

    ``auc`` and ``tpr`` are those of the plain attack by loss, forget against test. ``convention=None`` makes
    this attack alone, which reads no retain set and needs no scikit-learn. Over-unlearning shows as an
    ``auc`` below the reference's; see ``Attack.verdict``. With ``calibration`` the attack looks at the loss
    less its mean over models that do not know the forget set: hard samples are not taken for unseen ones.

    ``score`` is one of three published numbers, which are not comparable with each other:

        ssd     logistic regression (balanced classes) on the entropy of the prediction, fitted on retain
                (member) against test; share of the forget set told as members. A retrained model's score is
                what to aim for; lower is not better.
        salun   support vector machine (RBF, C = 3) on the probability of the label, fitted on as many retain
                samples as there are test samples (members) against test; share of the forget set told as
                *non*-members. Again the retrained model's score is the aim.
        scrub   logistic regression on the loss, forget against test samples, accuracy over five stratified
                folds; 0.5 is ideal. For class forgetting give the test samples of that class only.

    Args:
        model: The unlearned model.
        *sets: The older form: retain, forget, test and the convention by position.
        forget: Training samples that were to be forgotten.
        retain: Training samples that were kept; needed for ``"ssd"`` and ``"salun"``.
        test: Samples that no model was trained on.
        convention: Whose definition ``score`` follows; None for none.
        reference: A model retrained without the forget set.
        calibration: Models trained without the forget and the test set.
        task: What the model is for; None infers it. See ``ux.tasks``. Without classes there is the attack by
            loss alone.
        shift: The older form of ``task``: True for a causal language model, False for labels at their own
            positions.
        bootstrap: Resamples behind the intervals; 0 for none (NaN).
        seed: Of the resamples, the choice of retain samples and the folds.

    Returns:
        The outcome.

    Raises:
        ImportError: If a convention is asked for and scikit-learn is not installed.
        NotImplementedError: If the task has no probabilities for a convention to look at.
        TypeError: If a set is given twice, or there are more arguments by position than the older form had.
        ValueError: If the convention is unknown, or a set is missing, empty or too small for the convention.

    Source:
        ssd: code released with Foster, Schoepf & Brintrup, AAAI 2024; salun: Fan et al., ICLR 2024; scrub:
        Kurmanji et al., NeurIPS 2023. TPR at 1 % FPR: Carlini et al., "Membership Inference Attacks From
        First Principles", S&P 2022. Calibration: Watson, Guo, Cormode & Sablayrolles, "On the Importance of
        Difficulty Calibration in Membership Inference Attacks", ICLR 2022.

    Example:
        >>> known, unknown = torch.tensor([[2.0, 0.0]] * 5), torch.tensor([[1.0, 0.0]] * 5)
        >>> labels = torch.zeros(5, dtype=torch.long)
        >>> attack = mia(nn.Identity(), forget=[(known, labels)], test=[(unknown, labels)], convention=None)
        >>> attack.auc, attack.tpr
        (1.0, 1.0)
    """
    named: dict[str, Any] = {"retain": retain, "forget": forget, "test": test}
    if len(sets) > len(named) + 1:
        raise TypeError(f"mia: at most 4 arguments must follow the model by position, got {len(sets)}")
    for name, given in zip((*named, "convention"), sets, strict=False):
        if name == "convention":
            convention = given
        elif named[name] is not None:
            raise TypeError(f"mia: {name} must be given once, got it by position and by name")
        else:
            named[name] = given
    if convention is not None and convention not in CONVENTIONS:
        raise ValueError(f"mia: convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    read = {"forget": named["forget"], "test": named["test"]}
    if convention in ("ssd", "salun"):
        read["retain"] = named["retain"]
    for name, data in read.items():
        if data is None:
            hint = "; convention=None needs none" if name == "retain" else ""
            raise ValueError(f"mia: {name} must be given{hint}, got None")
    losses = _CalibratedLosses(calibration, read, shift, task)

    def measured(subject: nn.Module) -> tuple[float | None, _Numbers, _Numbers]:
        features = {
            name: _features(subject, data, name, shift, task, convention) for name, data in read.items()
        }
        score = None if convention is None else _SCORES[convention](features, seed)
        return score, -losses("forget", features), -losses("test", features)

    score, members, others = measured(model)
    ranked = _Ranked(members, others)
    auc, tpr = ranked.auc(), ranked.tpr()
    draws = np.random.default_rng(seed)
    resampled = np.array([ranked.resampled(draws) for _ in range(bootstrap)]).reshape(-1, 2)
    bounds = np.quantile(resampled, [0.025, 0.975], axis=0) if bootstrap else np.full((2, 2), math.nan)
    reference_score = reference_auc = None
    if reference is not None:
        reference_score, theirs, unseen = measured(reference)
        reference_auc = _Ranked(theirs, unseen).auc()
    return Attack(
        convention=convention,
        score=score,
        ideal=0.5 if convention == "scrub" else "retrained",
        auc=auc,
        auc_interval=Interval(float(bounds[0, 0]), float(bounds[1, 0])),
        tpr=tpr,
        tpr_interval=Interval(float(bounds[0, 1]), float(bounds[1, 1])),
        reference_score=reference_score,
        reference_auc=reference_auc,
    )


class _Features(NamedTuple):
    """One number per sample; means over a sample's positions where it has several."""

    entropy: _Numbers  # of the prediction, nats
    confidence: _Numbers  # probability of the label
    loss: _Numbers


def _features(
    model: nn.Module,
    data: Batches,
    name: str,
    shift: bool | None = None,
    task: Task | None = None,
    convention: Convention | None = "ssd",
) -> _Features:
    # What the convention does not look at is NaN: not every task has it.
    collected: list[Tensor] = []
    with borrowed(model), torch.no_grad():
        for batch in read_batches(check_batches(data, name), device_of(model)):
            judge = task_of(model, batch, shift) if task is None else task
            outputs = judge.forward(model, batch)
            if isinstance(outputs, Tensor):
                outputs = outputs.double()  # so that sure answers do not tie
            loss = judge.losses(outputs, batch).double()
            try:
                counted = judge.counted(outputs, batch)
            except NotImplementedError:  # there are no classes; every sample counts
                counted = torch.ones_like(loss, dtype=torch.bool)
            entropy = confidence = torch.full_like(loss, torch.nan)
            if convention == "ssd":
                log_p = judge.log_scores(outputs, batch)
                entropy = mean_over_positions(
                    -(log_p.exp() * log_p.clamp(min=-1e300)).sum(-1), counted
                ).double()
            if convention == "salun":
                confidence = _confidence(judge, outputs, batch, counted).double()
            known = counted.reshape(len(loss), -1).any(-1)
            collected.append(torch.stack([entropy, confidence, loss])[:, known].cpu())
    if not collected or sum(part.shape[1] for part in collected) == 0:
        raise ValueError(f"mia: the {name} set must hold at least one labelled sample, got none")
    return _Features(*torch.cat(collected, dim=1).numpy())


def _confidence(task: Task, outputs: Outputs, batch: Batch, counted: Tensor) -> Tensor:
    if not isinstance(task, Categorical):
        return task.log_odds(outputs, batch).sigmoid()
    logits, labels = task.aligned(outputs, batch)
    index = labels.where(counted, 0).unsqueeze(-1)
    return mean_over_positions(logits.softmax(-1).gather(-1, index).squeeze(-1), counted)


class _CalibratedLosses:
    """Losses less their mean over models that do not know the forget set; plain ones where there is none."""

    def __init__(
        self, models: Sequence[nn.Module], sets: Mapping[str, Batches], shift: bool | None, task: Task | None
    ) -> None:
        self._usual: dict[str, _Numbers] = {}
        if models:
            for name in ("forget", "test"):
                losses = [_features(model, sets[name], name, shift, task, None).loss for model in models]
                self._usual[name] = np.mean(losses, axis=0)

    def __call__(self, name: str, features: Mapping[str, _Features]) -> _Numbers:
        loss = features[name].loss
        return loss - self._usual[name] if name in self._usual else loss


class _Ranked:
    """Two samples by the ranks of their values: the sort is done once, a resample only counts."""

    def __init__(self, members: _Numbers, others: _Numbers, fpr: float = 0.01) -> None:
        distinct, ranks = np.unique(np.concatenate([members, others]), return_inverse=True)
        ranks = ranks.reshape(-1)
        self._n = len(distinct)
        self._members, self._others = ranks[: len(members)], ranks[len(members) :]
        self._allowed = math.floor(fpr * len(others) + 1e-9)  # false positives

    def auc(self) -> float:
        return self._auc(*self._counts(self._members, self._others))

    def tpr(self) -> float:
        return self._tpr(*self._counts(self._members, self._others))

    def resampled(self, draws: np.random.Generator) -> tuple[float, float]:
        members = draws.choice(self._members, len(self._members))
        others = draws.choice(self._others, len(self._others))
        counts = self._counts(members, others)
        return self._auc(*counts), self._tpr(*counts)

    def _counts(self, members: _Ranks, others: _Ranks) -> tuple[_Ranks, _Ranks]:
        return np.bincount(members, minlength=self._n), np.bincount(others, minlength=self._n)

    @staticmethod
    def _auc(members: _Ranks, others: _Ranks) -> float:
        # Mann-Whitney: the share of pairs in the right order, ties counting half.
        upto = np.cumsum(others)
        return float((members * (2 * upto - others)).sum() / (2 * members.sum() * upto[-1]))

    def _tpr(self, members: _Ranks, others: _Ranks) -> float:
        # Above the lowest threshold that no more than the allowed number of the others pass.
        above = np.cumsum(others[::-1])[::-1] - others
        within = np.flatnonzero((above <= self._allowed) & (above + others > self._allowed))
        threshold = within[0] if len(within) else -1
        return float(members[threshold + 1 :].sum() / members.sum())


def _ssd_score(sets: Mapping[str, _Features], seed: int) -> float:
    linear = sklearn("linear_model")
    judge = linear.LogisticRegression(class_weight="balanced", solver="lbfgs", random_state=seed)
    judge.fit(*_labelled(sets["retain"].entropy, sets["test"].entropy))
    return float(judge.predict(sets["forget"].entropy[:, None]).mean())


def _salun_score(sets: Mapping[str, _Features], seed: int) -> float:
    retain, forget, test = (sets[name].confidence for name in ("retain", "forget", "test"))
    # The first samples in the release; a draw does not depend on how the set is ordered.
    chosen = np.random.default_rng(seed).permutation(len(retain))[: len(test)]
    judge = sklearn("svm").SVC(C=3, gamma="auto", kernel="rbf")
    judge.fit(*_labelled(retain[chosen], test))
    return float(1 - judge.predict(forget[:, None]).mean())


def _scrub_score(sets: Mapping[str, _Features], seed: int) -> float:
    forget, test = sets["forget"], sets["test"]
    selection, linear = sklearn("model_selection"), sklearn("linear_model")
    n = min(len(forget.loss), len(test.loss))
    if n < 5:
        raise ValueError(f"mia: forget and test must hold at least 5 samples each for 'scrub', got {n}")
    draws = np.random.default_rng(seed)
    sides = [draws.permutation(side)[:n] for side in (forget.loss, test.loss)]
    x, y = _labelled(*sides)
    folds = selection.StratifiedKFold(5, shuffle=True, random_state=seed)
    return float(selection.cross_val_score(linear.LogisticRegression(), x, y, cv=folds).mean())


_SCORES: dict[str, Callable[[Mapping[str, _Features], int], float]] = {
    "ssd": _ssd_score,
    "salun": _salun_score,
    "scrub": _scrub_score,
}


def _labelled(members: _Numbers, others: _Numbers) -> tuple[_Numbers, _Numbers]:
    return np.concatenate([members, others])[:, None], np.repeat([1.0, 0.0], [len(members), len(others)])


def _auc(members: _Numbers, others: _Numbers) -> float:
    return _Ranked(members, others).auc()


def _tpr(members: _Numbers, others: _Numbers, fpr: float = 0.01) -> float:
    return _Ranked(members, others, fpr).tpr()


def sklearn(module: str) -> Any:  # noqa: ANN401 - an optional module
    """Import a module of scikit-learn.

    Args:
        module: Its name below ``sklearn``.

    Returns:
        The module.

    Raises:
        ImportError: If scikit-learn is not installed; the message says how to.
    """
    import importlib

    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise ImportError(
            "membership inference needs scikit-learn: pip install 'unlearn_ext[metrics]'"
        ) from error
