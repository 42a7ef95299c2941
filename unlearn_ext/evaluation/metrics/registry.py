"""The metrics by name: what a comparison, its page, the command line and the record know of each.

A metric is added by one entry of ``REGISTRY``: its name, how it is headed, its unit, what it means, and the
function that takes the figure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias

from torch import nn

from unlearn_ext._internal.names import parameters_by_name
from unlearn_ext.evaluation.metrics.accuracy import accuracy
from unlearn_ext.evaluation.metrics.attacks import Attack, mia
from unlearn_ext.evaluation.metrics.divergences import activation_distance, js_divergence
from unlearn_ext.evaluation.metrics.measures import Measure
from unlearn_ext.evaluation.metrics.relearning import anamnesis_index, relearn_steps
from unlearn_ext.tasks import Task
from unlearn_ext.tasks.batches import Batch, Batches

Unit: TypeAlias = Literal["percent", "points", "seconds", "number"]

# Share of the original accuracy on the forget set that counts as having relearned it, and where to give up.
_RELEARNED, _MOST_STEPS = 0.95, 1000


@dataclass(frozen=True, slots=True)
class Subject:
    """A model to be measured, and what there is to measure it by.

    Attributes:
        model: The model: unlearned, original or retrained.
        original: The model before unlearning.
        task: What the models are for; None infers it.
        sets: The sets ``"forget"``, ``"retain"`` and ``"test"``.
        tests: The test set: ``"test"``, or where whole classes are forgotten ``"test_retained"`` and
            ``"test_forgotten"``.
        is_reference: Whether this is the retrained model.
        seconds: What unlearning or retraining took; None if the model was given.
        reached: Whether the method reached its goal; None where it has none.
        reference: Returns the retrained model. LookupError if there is none.
        reference_figures: Its figures; empty where they are not known.
        reference_why: Why there is no retrained model; None if there is.
        figures: What has been measured of this model so far.
        memory: What one metric leaves for the next: ``mia`` its attack.
    """

    model: nn.Module
    original: nn.Module
    task: Task | None
    sets: Mapping[str, Batches]
    tests: Mapping[str, Batches]
    is_reference: bool
    seconds: float | None
    reached: bool | None
    reference: Callable[[], nn.Module]
    reference_figures: Mapping[str, Measure]
    reference_why: str | None
    figures: Mapping[str, Measure]
    memory: dict[str, Any] = field(default_factory=dict)

    @property
    def unseen(self) -> Batches:
        """What forget samples are compared with by the attack."""
        return self.tests["test_forgotten" if "test_forgotten" in self.tests else "test"]


@dataclass(frozen=True, slots=True)
class Metric:
    """A metric of a comparison.

    Attributes:
        name: Of its column.
        title: What heads the column.
        unit: ``"percent"`` and ``"points"`` are shown times 100.
        meaning: What it is, in a sentence or two for the reader of the page.
        function: Takes the figure of a ``Subject``: a number, or a ``Measure`` with interval or note. What it
            raises becomes the reason why there is none.
        group: What ``compare(metrics=...)`` calls it, alone or with others; its name by default.
        chosen: Whether a comparison has it ``"always"``, by ``"default"`` or where it is ``"asked"`` for.
        needs: The part of the test set without which it has no column; None if it does without.
        kind: ``"kept"`` or ``"forgotten"`` for an accuracy on such data, drawn as a bar; ``"summary"`` for
            what is computed from the other figures, after them; ``""`` for anything else.
        in_gap: Whether it counts in the gap to the retrained model.
        examines: What of a full examination it covers, for the record; see ``report.EXAMINATIONS``.
        other_names: What else a record may call it.
        given: The caller's own function behind it; None for a metric of ``REGISTRY``.
    """

    name: str
    title: str
    unit: Unit
    meaning: str
    function: Callable[[Subject], float | Measure]
    group: str = ""
    chosen: Literal["always", "default", "asked"] = "default"
    needs: str | None = None
    kind: Literal["kept", "forgotten", "summary", ""] = ""
    in_gap: bool = False
    examines: str | None = None
    other_names: tuple[str, ...] = ()
    given: Callable[[nn.Module], float] | None = None

    @property
    def asked_as(self) -> str:
        """What ``compare(metrics=...)`` calls it."""
        return self.group or self.name


def of_caller(name: str, function: Callable[[nn.Module], float] | None = None) -> Metric:
    """Make a metric of a function of the caller's.

    Args:
        name: Its name.
        function: Takes the figure of a model; None where none is to be taken any more.

    Returns:
        The metric.
    """

    def measured(subject: Subject) -> float:
        if function is None:
            raise LookupError("its function is not known here")
        return function(subject.model)

    return Metric(
        name,
        name.replace("|", "/"),
        "number",
        "A measure of the caller's.",
        measured,
        chosen="asked",
        given=function,
    )


def metric(name: str) -> Metric:
    """Return a metric of ``REGISTRY``, or what to show for a name that is not there.

    Args:
        name: Of a column.

    Returns:
        The metric.

    Example:
        >>> metric("retain").unit, metric("mine").title
        ('percent', 'mine')
    """
    return REGISTRY.get(name) or of_caller(name)


def default_names() -> tuple[str, ...]:
    """Return what a comparison measures by default, as ``compare(metrics=...)`` takes it.

    Returns:
        Names in their order.
    """
    return tuple(dict.fromkeys(entry.asked_as for entry in REGISTRY.values() if entry.chosen == "default"))


def all_names() -> tuple[str, ...]:
    """Return all that ``compare(metrics=...)`` takes by name.

    Returns:
        Names in their order.
    """
    return tuple(dict.fromkeys(entry.asked_as for entry in REGISTRY.values() if entry.chosen != "always"))


def _accuracy_on(name: str) -> Callable[[Subject], float]:
    def measured(subject: Subject) -> float:
        return accuracy(subject.model, {**subject.sets, **subject.tests}[name], task=subject.task)

    return measured


def _attack(subject: Subject) -> Attack:
    if "mia" not in subject.memory:
        # By the loss alone: that is what the columns show, for any task and without scikit-learn.
        subject.memory["mia"] = mia(
            subject.model,
            forget=subject.sets["forget"],
            test=subject.unseen,
            convention="loss",
            task=subject.task,
        )
    return subject.memory["mia"]  # type: ignore[no-any-return]


def _mia_auc(subject: Subject) -> Measure:
    attack = _attack(subject)
    theirs = None if subject.is_reference else subject.reference_figures.get("mia_auc", Measure(None)).value
    note = None if theirs is None else replace(attack, reference_auc=theirs).verdict
    return Measure(attack.auc, None, *attack.auc_interval, note=note)


def _mia_tpr(subject: Subject) -> Measure:
    attack = _attack(subject)
    return Measure(attack.tpr, None, *attack.tpr_interval)


def _js(subject: Subject) -> float:
    return js_divergence(subject.model, subject.reference(), subject.sets["forget"], task=subject.task)


def _activation_distance(subject: Subject) -> float:
    return activation_distance(subject.model, subject.reference(), subject.sets["forget"], task=subject.task)


def _gap(subject: Subject) -> float:
    if subject.is_reference:
        return 0.0
    if subject.reference_why is not None:
        raise LookupError(subject.reference_why)
    gaps = []
    for name, ours in subject.figures.items():
        theirs = subject.reference_figures.get(name, Measure(None)).value
        if metric(name).in_gap and ours.value is not None and theirs is not None:
            gaps.append(abs(ours.value - theirs))
    if not gaps:
        raise LookupError("there is no accuracy and no AUC to compare")
    return sum(gaps) / len(gaps)


def _relearn_steps(subject: Subject) -> float:
    forget = subject.sets["forget"]
    target = _RELEARNED * accuracy(subject.original, forget, task=subject.task)
    return relearn_steps(subject.model, forget, target, task=subject.task, most=_MOST_STEPS)


def _anamnesis_index(subject: Subject) -> float:
    forget = subject.sets["forget"]
    return anamnesis_index(
        subject.model,
        subject.original,
        subject.reference(),
        _Joined(subject.sets["retain"], forget),
        forget,
        margin=1 - _RELEARNED,
        task=subject.task,
        most=_MOST_STEPS,
    )


class _Joined:
    """The batches of several sets, one set after the other; re-iterable."""

    def __init__(self, *sets: Batches) -> None:
        self._sets = sets

    def __iter__(self) -> Iterator[Batch]:
        for data in self._sets:
            yield from data


def _changed(subject: Subject) -> float | Measure:
    if subject.is_reference:
        return Measure(None, "it was trained afresh")
    before = parameters_by_name(subject.original)
    changed = sum(
        int((p.detach() != before[name].detach()).sum())
        for name, p in parameters_by_name(subject.model).items()
    )
    share = changed / max(1, sum(p.numel() for p in before.values()))
    return Measure(share, note="goal not reached" if subject.reached is False else None)


def _seconds(subject: Subject) -> float | Measure:
    if subject.seconds is None:
        return Measure(None, "it was given, not trained here")
    return subject.seconds


_BY_ACCURACY = "accuracy on the forget and retain sets"
_BY_LOSS = "membership inference by the loss"
_BY_DISTANCE = "distance of the predictions to those of a model retrained without the forget set"
_BY_RELEARNING = "speed of relearning"

_METRICS = (
    Metric(
        "retain",
        "retain, %",
        "percent",
        "Accuracy on the training samples that were kept.",
        _accuracy_on("retain"),
        kind="kept",
        in_gap=True,
        examines=_BY_ACCURACY,
    ),
    Metric(
        "forget",
        "forget, %",
        "percent",
        "Accuracy on the training samples that were to be forgotten.",
        _accuracy_on("forget"),
        kind="forgotten",
        in_gap=True,
        examines=_BY_ACCURACY,
    ),
    Metric(
        "test",
        "test, %",
        "percent",
        "Accuracy on samples that no model was trained on.",
        _accuracy_on("test"),
        needs="test",
        kind="kept",
        in_gap=True,
    ),
    Metric(
        "test_retained",
        "test, kept classes, %",
        "percent",
        "Accuracy on unseen samples of the classes kept.",
        _accuracy_on("test_retained"),
        group="test",
        needs="test_retained",
        kind="kept",
        in_gap=True,
    ),
    Metric(
        "test_forgotten",
        "test, forgotten classes, %",
        "percent",
        "Accuracy on unseen samples of the forgotten classes.",
        _accuracy_on("test_forgotten"),
        group="test",
        needs="test_forgotten",
        kind="forgotten",
        in_gap=True,
    ),
    Metric(
        "mia_auc",
        "MIA AUC",
        "number",
        "Membership inference by the loss, forget against test samples: area under the ROC curve, 95 % "
        "bootstrap interval, and on which side of the retrained model it lies. 0.5 is chance; the aim is the "
        "retrained model's, not the lowest.",
        _mia_auc,
        group="mia",
        in_gap=True,
        examines=_BY_LOSS,
    ),
    Metric(
        "mia_tpr",
        "TPR at 1 % FPR",
        "number",
        "Share of the forget samples that the same attack recognises at a threshold which 1 % of the test "
        "samples pass.",
        _mia_tpr,
        group="mia",
        examines=_BY_LOSS,
    ),
    Metric(
        "js",
        "JS to retrained",
        "number",
        "Jensen-Shannon divergence, in bits, from the predictions of the retrained model on the forget set.",
        _js,
        examines=_BY_DISTANCE,
        other_names=("js_divergence",),
    ),
    Metric(
        "activation_distance",
        "activation distance",
        "number",
        "Mean Euclidean distance of the predicted probabilities on the forget set from the retrained "
        "model's.",
        _activation_distance,
        examines=_BY_DISTANCE,
    ),
    Metric(
        "relearn_steps",
        "relearning, steps",
        "number",
        f"Steps of Adam on the forget set until its accuracy is back at {_RELEARNED:.0%} of the original "
        "model's.",
        _relearn_steps,
        chosen="asked",
        examines=_BY_RELEARNING,
    ),
    Metric(
        "anamnesis_index",
        "anamnesis index",
        "number",
        "Steps of training until the forget set is known again, over those of the retrained model: 1 is "
        "ideal; far below 1 it was still known, far above 1 its absence shows.",
        _anamnesis_index,
        chosen="asked",
        examines=_BY_RELEARNING,
    ),
    Metric(
        "gap",
        "gap to retrained, points",
        "points",
        "Mean absolute difference to the retrained model of the same seed, over the accuracies and the AUC "
        "in this table, in points of 0.01.",
        _gap,
        kind="summary",
        examines=_BY_DISTANCE,
    ),
    Metric(
        "changed",
        "changed, %",
        "percent",
        "Share of the scalar parameters whose value changed.",
        _changed,
        chosen="always",
    ),
    Metric(
        "seconds",
        "seconds",
        "seconds",
        "Wall-clock time of unlearning, or of retraining.",
        _seconds,
        chosen="always",
    ),
)

REGISTRY: dict[str, Metric] = {entry.name: entry for entry in _METRICS}
