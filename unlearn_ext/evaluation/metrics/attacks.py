"""Membership inference: can forget samples be told as members of the training set?"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.seeding import seeded
from unlearn_ext.distributed import Group, Ranks, lockstep, ranks_of
from unlearn_ext.evaluation.metrics.answers import answers, log_probabilities, task_for
from unlearn_ext.tasks import Task
from unlearn_ext.tasks.batches import Batch, Batches, map_tensors
from unlearn_ext.tasks.positions import mean_over_positions

_Numbers: TypeAlias = npt.NDArray[np.float64]
_Ranks: TypeAlias = npt.NDArray[np.intp]

Convention: TypeAlias = Literal["ssd", "salun", "scrub", "loss"]

CONVENTIONS: tuple[Convention, ...] = ("ssd", "salun", "scrub", "loss")


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
        convention: Whose definition ``score`` follows.
        score: The convention's number, in [0, 1].
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

    convention: Convention
    score: float
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


@lockstep
def mia(
    model: nn.Module,
    *older: Any,  # noqa: ANN401 - three sets and a word
    retain: Batches | None = None,
    forget: Batches | None = None,
    test: Batches | None = None,
    convention: Convention = "ssd",
    reference: nn.Module | None = None,
    calibration: Sequence[nn.Module] = (),
    task: Task | None = None,
    shift: bool | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    process_group: Group = None,
) -> Attack:
    """Attack a model by membership inference: can forget samples be told as members of the training set?

    ``score`` is one of three published numbers, which are not comparable with each other, or the AUC:

        ssd     logistic regression (balanced classes) on the entropy of the prediction, fitted on retain
                (member) against test; share of the forget set told as members. A retrained model's score is
                what to aim for; lower is not better.
        salun   support vector machine (RBF, C = 3) on the probability of the label, fitted on as many retain
                samples as there are test samples (members) against test; share of the forget set told as
                *non*-members. Again the retrained model's score is the aim.
        scrub   logistic regression on the loss, forget against test samples, accuracy over five stratified
                folds; 0.5 is ideal. For class forgetting give the test samples of that class only.
        loss    ``auc`` itself. Needs neither scikit-learn nor a task with classes; reads no retain sample.

    ``auc`` and ``tpr`` do not depend on the convention: they are those of the plain attack by loss, forget
    against test, with the task's loss. Over-unlearning shows as an ``auc`` below the reference's; see
    ``Attack.verdict``. With ``calibration`` they look at the loss less its mean over models that do not know
    the forget set, so that hard samples are not taken for unseen ones.

    Args:
        model: The unlearned model.
        *older: The older form, by position: ``retain, forget, test`` and ``convention``, in this order, which
            is not that of the methods. Better to name them.
        retain: Training samples that were kept; not read for ``"scrub"`` and ``"loss"``.
        forget: Training samples that were to be forgotten.
        test: Samples that no model was trained on.
        convention: Whose definition ``score`` follows.
        reference: A model retrained without the forget set.
        calibration: Models trained without the forget and the test set.
        task: What the model is for; None infers it from the model and the batch. See ``ux.tasks``.
        shift: The older way to say it: True for ``ux.tasks.CausalLM()``, False for
            ``ux.tasks.Classification()``.
        bootstrap: Resamples behind the intervals; 0 for none (NaN).
        seed: Of the resamples, the choice of retain samples and the folds.
        process_group: Ranks that call this together, each with its own share of every set, perhaps none: the
            attack is on all data, and the same on every rank.

    Returns:
        The outcome.

    Raises:
        FloatingPointError: If an output or a loss of the model is NaN, or losses are infinite where that has
            no meaning: for ``"scrub"``, and in both the model and a calibration model.
        ImportError: If scikit-learn is needed and not installed.
        NotImplementedError: If the task lacks what the convention needs.
        TypeError: If a set is given by position and by name.
        ValueError: If the convention is unknown, or a set is missing, empty or too small for the convention.

    Source:
        ssd: code released with Foster, Schoepf & Brintrup, AAAI 2024; salun: Fan et al., ICLR 2024; scrub:
        Kurmanji et al., NeurIPS 2023. TPR at 1 % FPR: Carlini et al., "Membership Inference Attacks From
        First Principles", S&P 2022. Calibration: Watson, Guo, Cormode & Sablayrolles, "On the Importance of
        Difficulty Calibration in Membership Inference Attacks", ICLR 2022.

    Example:
        >>> known, unknown = torch.tensor([[2.0, 0.0]] * 5), torch.tensor([[1.0, 0.0]] * 5)
        >>> labels = torch.zeros(5, dtype=torch.long)
        >>> attack = mia(nn.Identity(), forget=[(known, labels)], test=[(unknown, labels)], convention="loss")
        >>> attack.auc, attack.tpr
        (1.0, 1.0)
    """
    given = {"retain": retain, "forget": forget, "test": test}
    names = (*given, "convention")
    if len(older) > len(names):
        raise TypeError(
            f"mia: at most {len(names)} arguments may follow the model by position, got {len(older)}"
        )
    for name, value in zip(names, older, strict=False):
        if given.get(name) is not None or (name == "convention" and convention != "ssd"):
            raise TypeError(f"mia: {name} must be given once, got it by position and by name")
        if name == "convention":
            convention = value
        else:
            given[name] = value
    if convention not in CONVENTIONS:
        raise ValueError(f"mia: convention must be one of {', '.join(CONVENTIONS)}, got {convention!r}")
    if bootstrap < 0:
        raise ValueError(f"mia: bootstrap must be at least 0, got {bootstrap}")
    if not _NEEDS[convention]:  # fitted on no members
        given["retain"] = None
    sets = {name: data for name, data in given.items() if data is not None}
    for name in ("retain", "forget", "test") if _NEEDS[convention] else ("forget", "test"):
        if name not in sets:
            raise ValueError(f"mia: {name} must be given, got none")

    together = ranks_of(process_group, "mia")
    judge = task_for("mia", task, shift)
    usual: dict[str, _Numbers] = {}
    if calibration:
        for name in ("forget", "test"):
            per_model = [
                _features(known, sets[name], name, judge, "loss", together).loss for known in calibration
            ]
            usual[name] = np.mean(per_model, axis=0)

    def measured(subject: nn.Module) -> tuple[float, _Ranked]:
        features = {
            name: _features(subject, data, name, judge, convention, together) for name, data in sets.items()
        }
        members, others = (
            _calibrated(features[name].loss, usual.get(name), name) for name in ("forget", "test")
        )
        ranks = _Ranked(members, others)
        fitted = _SCORES.get(convention)  # none for the attack by loss, whose score is the AUC
        if fitted is None:
            return ranks.auc(), ranks
        return fitted(features.get("retain"), features["forget"], features["test"], seed), ranks

    score, ranks = measured(model)
    auc, tpr = ranks.auc(), ranks.tpr()
    draws = np.random.default_rng(seed)
    resampled = np.array([ranks.resampled(draws) for _ in range(bootstrap)]).reshape(-1, 2)
    bounds = np.quantile(resampled, [0.025, 0.975], axis=0) if bootstrap else np.full((2, 2), math.nan)
    reference_score = reference_auc = None
    if reference is not None:
        reference_score, compared = measured(reference)
        reference_auc = compared.auc()
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


def _calibrated(loss: _Numbers, usual: _Numbers | None, name: str) -> _Numbers:
    # High for members. What both answer with infinite loss has no rank: as NaN it would count as a member.
    if usual is None:
        return -loss
    if (np.isinf(loss) & np.isinf(usual)).any():
        raise FloatingPointError(
            f"mia: the losses of the {name} set must be finite in the model or the calibration models, got "
            "infinity in both; leave calibration out, or use models that rule out no class"
        )
    return usual - loss


class _Features(NamedTuple):
    """One number per sample; None where the convention does without."""

    loss: _Numbers  # the task's
    entropy: _Numbers | None = None  # of the prediction, nats, a mean over the positions that count
    confidence: _Numbers | None = None  # probability of the truth, from the mean of its log-odds


def _features(
    model: nn.Module, data: Batches, name: str, task: Task, convention: Convention, ranks: Ranks
) -> _Features:
    found: dict[str, list[Tensor]] = {"loss": []}
    for needed in _NEEDS[convention]:
        found[needed] = []
    # A loader that shuffles gives every model the samples in the same order: calibration goes by sample.
    with seeded(0, data), borrowed(model), torch.no_grad():
        for batch, narrow in answers("mia", model, task, data, name=name):
            # In double precision, so that confident samples do not share one loss of 0.
            outputs = map_tensors(lambda part: part.double() if part.is_floating_point() else part, narrow)
            counted = counted_in(task, outputs, batch)
            kept = counted.any(-1)
            loss = task.losses(outputs, batch) if task.loss_fn is None else task.loss_fn(model, batch)
            found["loss"].append(loss[kept].double().cpu())
            if "entropy" in found:
                logs = log_probabilities(f"mia: convention={convention!r}", task, outputs, batch)
                entropy = -(logs.exp() * logs.clamp(min=-1e300)).sum(-1).reshape(counted.shape)
                found["entropy"].append(mean_over_positions(entropy, counted)[kept].cpu())
            if "confidence" in found:
                found["confidence"].append(task.log_odds(outputs, batch).sigmoid()[kept].double().cpu())
    none = torch.zeros(0, dtype=torch.float64)
    columns = ranks.concatenated(f"the {name} set", [torch.cat([none, *parts]) for parts in found.values()])
    if not columns[0].numel():
        raise ValueError(f"mia: the {name} set must hold at least one labelled sample, got none")
    features = _Features(**{key: whole.numpy() for key, whole in zip(found, columns, strict=True)})
    if np.isnan(features.loss).any():
        raise FloatingPointError(f"mia: the losses of the {name} set must be numbers, got NaN")
    return features


def counted_in(task: Task, outputs: Any, batch: Batch) -> Tensor:  # noqa: ANN401 - a task's own
    """Say what of a batch counts.

    Args:
        task: What the model is for.
        outputs: What its ``forward`` returned.
        batch: The batch.

    Returns:
        bool ``[N, positions]``; a sample counts where one of its positions does.
    """
    try:
        counted = task.counted(outputs, batch)
    except NotImplementedError:  # without classes every sample counts
        loss = task.losses(outputs, batch)
        return torch.ones(loss.shape[0], 1, dtype=torch.bool, device=loss.device)
    return counted.reshape(counted.shape[0], -1)


class _Ranked:
    """Two samples by the ranks of their values: sorting is done once, a resample only counts."""

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


def _ssd_score(retain: _Features | None, forget: _Features, test: _Features, seed: int) -> float:
    linear = sklearn("linear_model")
    judge = linear.LogisticRegression(class_weight="balanced", solver="lbfgs", random_state=seed)
    judge.fit(*_labelled(_known(retain, "entropy"), _known(test, "entropy")))
    return float(judge.predict(_known(forget, "entropy")[:, None]).mean())


def _salun_score(retain: _Features | None, forget: _Features, test: _Features, seed: int) -> float:
    # The first samples in the release; a draw does not depend on how the set is ordered.
    members, others = _known(retain, "confidence"), _known(test, "confidence")
    chosen = np.random.default_rng(seed).permutation(len(members))[: len(others)]
    judge = sklearn("svm").SVC(C=3, gamma="auto", kernel="rbf")
    judge.fit(*_labelled(members[chosen], others))
    return float(1 - judge.predict(_known(forget, "confidence")[:, None]).mean())


def _scrub_score(retain: _Features | None, forget: _Features, test: _Features, seed: int) -> float:
    selection, linear = sklearn("model_selection"), sklearn("linear_model")
    n = min(len(forget.loss), len(test.loss))
    if n < 5:
        raise ValueError(f"mia: forget and test must hold at least 5 samples each for 'scrub', got {n}")
    if not (np.isfinite(forget.loss).all() and np.isfinite(test.loss).all()):
        raise FloatingPointError(
            "mia: losses must be finite for 'scrub', got infinity; use convention='loss'"
        )
    draws = np.random.default_rng(seed)
    sides = [draws.permutation(side)[:n] for side in (forget.loss, test.loss)]
    x, y = _labelled(*sides)
    folds = selection.StratifiedKFold(5, shuffle=True, random_state=seed)
    return float(selection.cross_val_score(linear.LogisticRegression(), x, y, cv=folds).mean())


def _known(features: _Features | None, name: str) -> _Numbers:
    # The convention needs them, so they were collected.
    return cast("_Numbers", getattr(features, name))


# What a convention reads besides the losses.
_NEEDS: dict[Convention, tuple[str, ...]] = {
    "ssd": ("entropy",),
    "salun": ("confidence",),
    "scrub": (),
    "loss": (),
}

_SCORES: dict[str, Callable[[_Features | None, _Features, _Features, int], float]] = {
    "ssd": _ssd_score,
    "salun": _salun_score,
    "scrub": _scrub_score,
}


def _labelled(members: _Numbers, others: _Numbers) -> tuple[_Numbers, _Numbers]:
    return np.concatenate([members, others])[:, None], np.repeat([1.0, 0.0], [len(members), len(others)])


def auc(members: _Numbers, others: _Numbers) -> float:
    """Return the area under the ROC curve: the share of pairs in the right order, ties counting half.

    Args:
        members: Scores of what is to be told, ``[N]``.
        others: Scores of the rest, ``[M]``; lower ones are right.

    Returns:
        A number in [0, 1].

    Example:
        >>> auc(np.array([1.0, 2.0]), np.array([0.0, 1.0]))
        0.875
    """
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
