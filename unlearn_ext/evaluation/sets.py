"""The three sets of a comparison, what is in them, and how the test set is split."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from unlearn_ext._internal.seeding import seeded
from unlearn_ext.evaluation.keys import sample_hashes
from unlearn_ext.tasks.batches import (
    Batch,
    Batches,
    check_batches,
    count_samples,
    is_per_sample,
    map_tensors,
    read_batches,
)
from unlearn_ext.tasks.outputs import targets


class Sets:
    """The three sets, what is in them, and how the test set is split.

    Attributes:
        all: The three by name.
        sizes: Their numbers of samples.
        fingerprints: What stands for their content, where they were hashed.
        classes: The forgotten classes; None where other samples of the same classes are kept.
        tests: The test set, split by the forgotten classes if there are any.
    """

    def __init__(self, forget: Batches, retain: Batches, test: Batches, *, hashed: bool) -> None:
        self.all: dict[str, Batches] = {"forget": forget, "retain": retain, "test": test}
        for name, data in self.all.items():
            check_batches(data, f"compare: {name}")
        surveys = {}
        for name, data in self.all.items():
            with seeded(0, data):
                surveys[name] = _survey(name, data, hashed=hashed)
        self.sizes = {name: survey.count for name, survey in surveys.items()}
        self.fingerprints = {name: survey.fingerprint for name, survey in surveys.items()}
        ours, others = surveys["forget"].classes, surveys["retain"].classes
        self.classes: list[int] | None = None
        if ours and others is not None and not ours & others:
            self.classes = sorted(ours)
        self.tests: dict[str, Batches] = {"test": test}
        if self.classes is not None:
            self.tests = {
                "test_retained": _Filtered(test, self.classes, inside=False),
                "test_forgotten": _Filtered(test, self.classes, inside=True),
            }

    @property
    def unseen(self) -> Batches:
        """What forget samples are compared with by the attack."""
        return self.tests["test" if self.classes is None else "test_forgotten"]


@dataclass(frozen=True, slots=True)
class _Survey:
    count: int
    classes: frozenset[int] | None  # None where samples have no single integer label
    fingerprint: str


def _survey(name: str, data: Batches, *, hashed: bool) -> _Survey:
    cpu = torch.device("cpu")
    count, largest, n_batches, sum_of_hashes = 0, 0, 0, 0
    classes: set[int] | None = set()
    for batch in read_batches(data, cpu):
        n = count_samples(batch)
        count, largest, n_batches = count + n, max(largest, n), n_batches + 1
        found = _class_labels(batch)
        classes = None if found is None or classes is None else classes | set(found.tolist())
        if hashed:
            sum_of_hashes += sum(sample_hashes(batch))
    if count == 0:
        raise ValueError(f"compare: {name} must hold at least one sample, got none")
    # A sum, so that the order does not matter: loaders shuffle.
    fingerprint = f"{sum_of_hashes % 2**256:064x}/{count}/{n_batches}/{largest}" if hashed else ""
    return _Survey(count, None if classes is None else frozenset(classes), fingerprint)


def _class_labels(batch: Batch) -> Tensor | None:
    try:
        labels = targets(batch)
    except ValueError:
        return None
    return labels if labels.ndim == 1 and not labels.is_floating_point() else None


class _Filtered:
    """The samples of some classes, or of all others; re-iterable."""

    def __init__(self, data: Batches, classes: Iterable[int], *, inside: bool) -> None:
        self._data = data
        self._classes = torch.tensor(sorted(classes))
        self._inside = inside

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._data:
            labels = targets(batch)
            chosen = torch.isin(labels.cpu(), self._classes) == self._inside
            if bool(chosen.any()):
                n = count_samples(batch)
                yield take(batch, n, chosen)


def take(batch: Batch, n: int, chosen: Tensor) -> Batch:
    """Return the batch of some samples.

    Args:
        batch: A batch in either form.
        n: Its number of samples.
        chosen: bool ``[n]``, or indices.

    Returns:
        A batch of the same form.
    """
    return map_tensors(
        lambda tensor: tensor[chosen.to(tensor.device)] if is_per_sample(tensor, n) else tensor, batch
    )
