"""A data set split into what to forget and what to retain."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast

from torch.utils.data import Dataset, Subset, TensorDataset

_Sample = TypeVar("_Sample", covariant=True)


def split(
    dataset: Dataset[_Sample] | Sequence[_Sample],
    *,
    ids: Iterable[int] | None = None,
    classes: Iterable[Hashable] | Hashable | None = None,
    column: Hashable | None = None,
    where: Callable[[_Sample], object] | None = None,
) -> tuple[Subset[_Sample], Subset[_Sample]]:
    """Split a data set into what to forget and what to retain.

    Labels are read from ``dataset.targets`` or ``dataset.labels`` (as torchvision keeps them) or from the
    second tensor of a ``TensorDataset``, through any ``Subset``; elsewhere every sample is read once.

    Args:
        dataset: A map-style data set, or a list of ``(input, label)`` pairs or of mappings with ``labels``.
        ids: The samples to forget, as distinct indices in ``[0, len(dataset))``.
        classes: The class or classes to forget.
        column: Where ``classes`` are looked up instead of the labels: a key of samples that are mappings,
            such as ``"user"``, a position in those that are tuples, or a column that the data set keeps (that
            of a Hugging Face ``Dataset``, or a list or array kept as an attribute).
        where: ``where(sample)`` is true for what is to be forgotten; every sample is read once.

    Returns:
        ``(forget, retain)``: views into ``dataset``, both in its order.

    Raises:
        TypeError: If ``dataset`` has no length or an id is not an integer.
        ValueError: If not exactly one of ``ids``, ``classes`` and ``where`` is given, an id is out of range
            or repeated, no sample has a named class, or one of the two parts would be empty.

    Example:
        >>> forget, retain = split([("a", 0), ("b", 1), ("c", 0)], classes=0)
        >>> list(forget), list(retain)
        ([('a', 0), ('c', 0)], [('b', 1)])
        >>> rows = [{"user": "anna", "text": "hi"}, {"user": "bo", "text": "ho"}]
        >>> list(split(rows, column="user", classes="anna")[0])
        [{'user': 'anna', 'text': 'hi'}]
    """
    if (ids is not None) + (classes is not None) + (where is not None) != 1:
        raise ValueError("split: exactly one of ids and classes must be given, or where")
    if column is not None and classes is None:
        raise ValueError(f"split: classes must name the values of column {column!r} to forget, got none")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(f"split: dataset must have a length and an index, got {type(dataset).__name__}")
    n = len(dataset)
    if where is not None:
        chosen = {index for index in range(n) if bool(where(dataset[index]))}
    elif ids is not None:
        chosen = _checked_ids(ids, n)
    else:
        chosen = _ids_of_classes(dataset, n, classes, column)
    forget = [index for index in range(n) if index in chosen]
    retain = [index for index in range(n) if index not in chosen]
    for name, part in (("forget", forget), ("retain", retain)):
        if not part:
            raise ValueError(f"split: the {name} set must not be empty, got {len(chosen)} of {n} to forget")
    # Subset asks for a Dataset but only indexes it; a list serves as well.
    source = cast("Dataset[_Sample]", dataset)
    return Subset(source, forget), Subset(source, retain)


def _checked_ids(ids: Iterable[int], n: int) -> set[int]:
    chosen: set[int] = set()
    for index in cast("Iterable[object]", _plain(ids)):
        if isinstance(index, bool) or not hasattr(index, "__index__"):
            raise TypeError(
                f"split: ids must be integers, got {index!r}; mask.nonzero() gives those of a mask"
            )
        number = int(index.__index__())
        if not 0 <= number < n:
            raise ValueError(f"split: ids must lie in [0, {n}), got {number}")
        if number in chosen:
            raise ValueError(f"split: ids must be distinct, got {number} twice")
        chosen.add(number)
    return chosen


def _ids_of_classes(
    dataset: object, n: int, classes: Iterable[Hashable] | Hashable, column: Hashable | None
) -> set[int]:
    named = _plain(classes)
    single = isinstance(named, (str, bytes)) or not isinstance(named, Iterable)
    wanted = {_plain(name) for name in ([named] if single else cast("Iterable[object]", named))}
    labels = _labels(dataset, n) if column is None else _column(dataset, n, column)
    known = set(labels)
    for name in wanted - known:
        shown = ", ".join(sorted(map(repr, known))[:20]) + (", ..." if len(known) > 20 else "")
        raise ValueError(f"split: classes must occur in the data set, got {name!r}; there are {shown}")
    return {index for index, label in enumerate(labels) if label in wanted}


def _labels(dataset: Any, n: int) -> list[object]:  # noqa: ANN401 - anything with an index
    stored = _stored_labels(dataset)
    # Stored labels are trusted only if they are what indexing the data set gives.
    if stored is not None and len(stored) == n and (n == 0 or _label_of(dataset[0]) == stored[0]):
        return stored
    return [_label_of(dataset[index]) for index in range(n)]


def _column(dataset: Any, n: int, column: Hashable) -> list[object]:  # noqa: ANN401
    if column in (getattr(dataset, "column_names", None) or ()):  # Hugging Face's: no sample is decoded
        return [_hashable(_plain(value), column) for value in dataset[column]]
    first = dataset[0] if n else None
    if isinstance(first, Mapping) or (isinstance(first, (tuple, list)) and isinstance(column, int)):
        try:
            return [_hashable(_plain(dataset[index][column]), column) for index in range(n)]
        except (KeyError, IndexError) as error:
            raise ValueError(f"split: column must name an entry of every sample, got {column!r}") from error
    source: Any = dataset
    places: Sequence[int] = range(n)
    while isinstance(source, Subset):
        places = [source.indices[place] for place in places]
        source = source.dataset
    stored = _plain(getattr(source, str(column), None))
    if not isinstance(stored, (list, tuple)):
        raise ValueError(
            f"split: column must be a key of the samples or a list that the data set keeps, got {column!r} "
            f"for samples of type {type(first).__name__}; where=lambda sample: ... tells any others apart"
        )
    return [_hashable(_plain(stored[place]), column) for place in places]


def _hashable(value: object, column: Hashable) -> object:
    if not isinstance(value, Hashable):
        raise ValueError(f"split: the values of column {column!r} must be single values, got {value!r}")
    return value


def _stored_labels(dataset: object) -> list[object] | None:
    if isinstance(dataset, Subset):
        inner = _stored_labels(dataset.dataset)
        return None if inner is None else [inner[index] for index in dataset.indices]
    stored: object = None
    if isinstance(dataset, TensorDataset):
        stored = dataset.tensors[1] if len(dataset.tensors) > 1 else None
    elif getattr(dataset, "target_transform", None) is None:
        stored = getattr(dataset, "targets", getattr(dataset, "labels", None))
    plain = _plain(stored)
    return [_plain(label) for label in plain] if isinstance(plain, (list, tuple)) else None


def _label_of(sample: object) -> object:
    label: object = None
    if isinstance(sample, Mapping):
        label = sample.get("labels", sample.get("label"))
    elif isinstance(sample, (tuple, list)) and len(sample) > 1:
        label = sample[1]
    label = _plain(label)
    if label is None or not isinstance(label, Hashable):
        raise ValueError(
            f"split: samples must be (input, label) or mappings with 'labels' to be told apart by class, "
            f"got the label {label!r} in a {type(sample).__name__}"
        )
    return label


def _plain(value: object) -> object:
    # Tensors and arrays as Python numbers or nested lists, so that labels compare and hash by value.
    return value.tolist() if hasattr(value, "tolist") else value
