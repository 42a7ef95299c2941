"""The three sets of a comparison, what is in them, and how the test set is split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.seeding import seeded
from unlearn_ext.evaluation.keys import NoKeyError, Untold, sample_hashes
from unlearn_ext.tasks import Task, infer, resolve
from unlearn_ext.tasks.batches import Batch, Batches, check_batches, device_of, moved, read_batches


class Sets:
    """The three sets, what is in them, and how the test set is split.

    Args:
        model: The model that they are for; left as it is.
        forget: The forget set.
        retain: The retain set.
        test: The test set.
        task: Reads the batches; None infers it from the model and each batch.
        hashed: Whether their content is to be told.

    Attributes:
        all: The three by name.
        sizes: Their numbers of samples.
        fingerprints: What stands for their content, where they were hashed.
        task: The task in words.
        classes: The forgotten classes; None where other samples of the same classes are kept.
        tests: The test set, split by the forgotten classes if there are any.

    Raises:
        TypeError: If a set is no iterable of batches.
        ValueError: If a set is a one-shot iterator or empty, or the task does not go with model and data.
    """

    def __init__(
        self,
        model: nn.Module,
        forget: Batches,
        retain: Batches,
        test: Batches,
        *,
        task: Task | None,
        hashed: bool,
    ) -> None:
        judge = resolve(task, who="compare")
        self.all: dict[str, Batches] = {"forget": forget, "retain": retain, "test": test}
        for name, data in self.all.items():
            check_batches(data, f"compare: {name}")
        surveys = {}
        for name, data in self.all.items():
            with seeded(0, data):
                surveys[name] = _survey(name, data, model, task, judge, hashed=hashed)
        self.sizes = {name: survey.count for name, survey in surveys.items()}
        self.fingerprints = {name: survey.fingerprint for name, survey in surveys.items()}
        self.task = surveys["forget"].task
        ours, others = surveys["forget"].classes, surveys["retain"].classes
        self.classes: list[int] | None = None
        if ours and others is not None and not ours & others:
            self.classes = sorted(ours)
        self.tests: dict[str, Batches] = {"test": test}
        if self.classes is not None:
            self.tests = {
                "test_retained": _Filtered(test, judge, self.classes, inside=False),
                "test_forgotten": _Filtered(test, judge, self.classes, inside=True),
            }

    @property
    def unseen(self) -> Batches:
        """What forget samples are compared with by the attack."""
        return self.tests["test" if self.classes is None else "test_forgotten"]


@dataclass(frozen=True, slots=True)
class _Survey:
    count: int
    classes: frozenset[int] | None  # None where samples have no single integer label
    fingerprint: str | Untold
    task: str


def _survey(
    name: str, data: Batches, model: nn.Module, task: Task | None, judge: Task, *, hashed: bool
) -> _Survey:
    count, largest, n_batches, sum_of_hashes = 0, 0, 0, 0
    classes: set[int] | None = set()
    unknown: Untold | None = None
    told = ""
    for batch in read_batches(data, torch.device("cpu")):
        if not told:
            told = _tried(name, batch, model, task, judge)
        n = judge.count(batch)
        count, largest, n_batches = count + n, max(largest, n), n_batches + 1
        found = judge.classes_of(batch)
        classes = None if found is None or classes is None else classes | _classes_in(found, judge)
        if hashed and unknown is None:
            try:
                sum_of_hashes += sum(sample_hashes(batch, judge))
            except NoKeyError as error:
                unknown = Untold(f"the {name} set has {error}")
    if count == 0:
        raise ValueError(f"compare: {name} must hold at least one sample, got none")
    # A sum, so that the order does not matter: loaders shuffle.
    text = f"{sum_of_hashes % 2**256:064x}/{count}/{n_batches}/{largest}" if hashed else ""
    return _Survey(count, None if classes is None else frozenset(classes), unknown or text, told)


def _classes_in(labels: torch.Tensor, judge: Task) -> set[int]:
    # A label that says "does not count" is no class: neither one to be forgotten, nor one that sets share.
    ignored = getattr(judge, "ignore_index", -100)
    return {label for label in labels.tolist() if label not in (ignored, -100)}


def _tried(name: str, batch: Batch, model: nn.Module, task: Task | None, judge: Task) -> str:
    # A task that does not go with the model or the data would fail every row, after all the training.
    try:
        found = infer(model, batch) if task is None else task
        if judge.count(batch):
            with borrowed(model), torch.no_grad():
                there = moved(batch, device_of(model))
                outputs = judge.forward(model, there)
                try:
                    judge.labels(there)
                except ValueError:  # without labels: the figures that need them say so
                    return repr(found)
                judge.losses(outputs, there)
    except NotImplementedError:
        pass  # what a task lacks is told by the figures that need it
    except (TypeError, ValueError) as error:
        raise type(error)(f"compare: {name}: {error}") from error
    return repr(found)


class _Filtered:
    """The samples of some classes, or of all others; re-iterable."""

    def __init__(self, data: Batches, task: Task, classes: Iterable[int], *, inside: bool) -> None:
        self._data = data
        self._task = task
        self._classes = torch.tensor(sorted(classes))
        self._inside = inside

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._data:
            labels = self._task.classes_of(batch)
            if labels is None:
                raise ValueError("test must have a class for each sample, as the forget set has, got none")
            chosen = torch.isin(labels.cpu(), self._classes) == self._inside
            if bool(chosen.any()):
                yield self._task.select(batch, chosen.nonzero().flatten().tolist())
