"""What a batch is, how a model reads one, and how a data set is split into what to forget and what to keep.

*Data* is any iterable of batches that can be read more than once: a ``DataLoader``, a list, ... A *batch* is

- a tuple or list ``(inputs, targets, ...)``: the model is called with ``inputs``, or
- a mapping: the model is called with its entries as keyword arguments, all but ``labels``.

A *sample* is one entry along the leading dimension: an image, a sequence, a row. Every tensor of a batch
whose leading dimension is the number of samples holds one entry per sample; all others are shared.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, Subset, TensorDataset

Batch: TypeAlias = Sequence[Any] | Mapping[str, Any]
Batches: TypeAlias = Iterable[Batch]
_Nested = TypeVar("_Nested")
_Sample = TypeVar("_Sample", covariant=True)


def check_batches(data: object, argument: str = "data") -> Batches:
    """Return ``data`` if it can be read more than once, batch by batch.

    Args:
        data: What the user passed.
        argument: The name to use in messages.

    Returns:
        ``data`` itself.

    Raises:
        TypeError: If ``data`` is not an iterable of batches at all.
        ValueError: If ``data`` is a one-shot iterator, or a data set that still has to be batched.

    Example:
        >>> check_batches(iter([]), "forget")
        Traceback (most recent call last):
        ValueError: forget must be re-iterable (a DataLoader, a list, ...), got a one-shot list_iterator
    """
    kind = type(data).__name__
    is_map_style = isinstance(data, Dataset) and not isinstance(data, IterableDataset)
    if is_map_style or (hasattr(data, "__getitem__") and not hasattr(data, "__iter__")):
        raise ValueError(f"{argument} must yield batches, got the data set {kind}; wrap it in a DataLoader")
    if isinstance(data, (Tensor, Mapping, str, bytes)) or not isinstance(data, Iterable):
        raise TypeError(f"{argument} must be an iterable of batches, got {kind}")
    if isinstance(data, Iterator):
        raise ValueError(f"{argument} must be re-iterable (a DataLoader, a list, ...), got a one-shot {kind}")
    return data


def map_tensors(function: Callable[[Tensor], Tensor], batch: _Nested) -> _Nested:
    """Apply ``function`` to every tensor of a nested tuple, list or mapping.

    Args:
        function: Called on the tensors in reading order.
        batch: A tensor, or tuples, lists and mappings of them; anything else passes through.

    Returns:
        The same structure; mappings come back as plain dictionaries, named tuples as themselves.

    Example:
        >>> map_tensors(lambda tensor: tensor + 1, {"x": torch.tensor(1), "name": "a"})
        {'x': tensor(2), 'name': 'a'}
    """
    mapped: object = batch
    if isinstance(batch, Tensor):
        mapped = function(batch)
    elif isinstance(batch, Mapping):
        mapped = {key: map_tensors(function, value) for key, value in batch.items()}
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        mapped = type(batch)(*(map_tensors(function, value) for value in batch))
    elif isinstance(batch, (tuple, list)):
        mapped = type(batch)(map_tensors(function, value) for value in batch)
    return cast("_Nested", mapped)


def tensors_in(batch: object) -> Iterator[Tensor]:
    """Yield the tensors of a nested tuple, list or mapping, in the order of ``map_tensors``.

    Args:
        batch: A tensor, or tuples, lists and mappings of them.

    Yields:
        Every tensor.
    """
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, (tuple, list, Mapping)):
        for value in batch.values() if isinstance(batch, Mapping) else batch:
            yield from tensors_in(value)


def device_of(model: nn.Module) -> torch.device:
    """Return the device of the model's first parameter or buffer, the CPU if it has neither.

    Args:
        model: The model.

    Returns:
        The device that batches are moved to.
    """
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")


def read_batches(
    data: Batches, device: torch.device, *, description: str = "", progress: bool = False
) -> Iterator[Batch]:
    """Yield the batches of ``data`` with their tensors on ``device``.

    Args:
        data: Re-iterable batches.
        device: Where the tensors go.
        description: Text in front of the progress bar.
        progress: Show a bar while reading; only on a terminal, and only where tqdm is installed.

    Yields:
        One batch after the other.

    Raises:
        TypeError: If an item is neither a tuple, nor a list, nor a mapping.
    """
    batches: Iterable[object] = data
    if progress and sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            pass
        else:
            batches = tqdm(data, desc=description, unit="batch", leave=False)
    for index, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list, Mapping)):
            hint = "; give a single batch as [(inputs, targets)]" if isinstance(batch, Tensor) else ""
            raise TypeError(
                f"batch {index} must be a tuple, a list or a mapping, got {type(batch).__name__}{hint}"
            )
        # Without blocking only towards a GPU: a copy to the CPU could be read before it has arrived.
        yield map_tensors(lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"), batch)


def count_samples(batch: Batch) -> int:
    """Return the number of samples of a batch: the leading dimension of its first tensor.

    Args:
        batch: A batch in either form.

    Returns:
        The number of samples.

    Raises:
        ValueError: If no tensor of the batch has a leading dimension.

    Example:
        >>> count_samples((torch.zeros(4, 3), torch.zeros(4)))
        4
    """
    for tensor in tensors_in(batch):
        if tensor.ndim:
            return tensor.shape[0]
    raise ValueError("a batch must hold a tensor with a leading sample dimension, got none")


def take_samples(batch: Batch, start: int, stop: int) -> Batch:
    """Return the batch that holds the samples ``start`` to ``stop - 1`` only.

    Args:
        batch: A batch in either form.
        start: First sample.
        stop: One past the last sample.

    Returns:
        A batch of the same form whose per-sample tensors are views; shared tensors stay whole.

    Example:
        >>> take_samples((torch.arange(4), torch.tensor(7)), 1, 3)
        (tensor([1, 2]), tensor(7))
    """
    n = count_samples(batch)
    return map_tensors(lambda tensor: tensor[start:stop] if is_per_sample(tensor, n) else tensor, batch)


def is_per_sample(tensor: Tensor, n: int) -> bool:
    """Return whether a tensor of a batch holds one entry per sample.

    Args:
        tensor: A tensor of the batch.
        n: The number of samples of the batch.

    Returns:
        True if its leading dimension is ``n``.
    """
    return tensor.ndim > 0 and tensor.shape[0] == n


def targets(batch: Batch) -> Tensor:
    """Return the labels of a batch: the second entry of a tuple, ``labels`` of a mapping.

    Args:
        batch: A batch in either form.

    Returns:
        The labels, as they are.

    Raises:
        ValueError: If the batch holds no labels.
    """
    if isinstance(batch, Mapping):
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            raise ValueError(f"a mapping must hold the tensor 'labels', got the keys {list(batch)}")
        return labels
    labels = batch[1] if len(batch) > 1 else None
    if not isinstance(labels, Tensor):
        kinds = ", ".join(type(entry).__name__ for entry in batch)
        raise ValueError(f"a batch must hold (inputs, targets) with targets a tensor, got ({kinds})")
    return labels


def with_targets(batch: Batch, labels: Tensor) -> Batch:
    """Return the batch with other labels; the batch itself is left alone.

    Args:
        batch: A batch in either form that holds labels.
        labels: What to put in their place.

    Returns:
        A batch of the same form.
    """
    if isinstance(batch, Mapping):
        return {**batch, "labels": labels}
    replaced = [batch[0], labels, *batch[2:]]
    if isinstance(batch, tuple):
        return type(batch)(*replaced) if hasattr(batch, "_fields") else tuple(replaced)
    return replaced


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """Run the model on a batch and return its logits.

    A tuple's first entry is the only argument; a mapping's entries are keyword arguments, without ``labels``
    (the package computes its own loss, per sample). An encoder-decoder model that gets no
    ``decoder_input_ids`` derives them from the labels, so it is given these too.

    Args:
        model: The model; its output is a tensor, an object or mapping with ``logits``, or a tuple that starts
            with them.
        batch: A batch in either form, on the model's device.

    Returns:
        The logits: ``[N, C]``, ``[N, T, C]`` or ``[N, C, ...]``.

    Raises:
        TypeError: If there are no logits in the model's output.
    """
    if isinstance(batch, Mapping):
        needs_labels = _is_encoder_decoder(model) and "decoder_input_ids" not in batch
        output = model(**{key: value for key, value in batch.items() if key != "labels" or needs_labels})
    else:
        output = model(batch[0])
    found = output
    if hasattr(output, "logits"):
        found = output.logits
    elif isinstance(output, Mapping):
        found = output.get("logits")
    elif isinstance(output, tuple) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise TypeError(f"the model must return logits, got {type(output).__name__}")
    return found


def scores_and_labels(model: nn.Module, batch: Batch, *, shift: bool | None = None) -> tuple[Tensor, Tensor]:
    """Run the model and line its logits up with the labels, classes in the last dimension.

    Args:
        model: The model.
        batch: A batch with integer labels.
        shift: Whether position ``t`` predicts the label of position ``t + 1``. None decides by the form: a
            mapping whose logits are ``[N, T, C]`` and whose labels are ``[N, T]`` is a causal language
            model's and is shifted, unless the model's ``config`` says encoder-decoder; a tuple never is.

    Returns:
        Scores ``[N, ..., C]`` (float32 for half-precision models) and labels ``[N, ...]``.

    Raises:
        ValueError: If there are no integer labels, or their shape does not go with the logits.
    """
    labels = targets(batch)
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers, got {labels.dtype}")
    scores = logits(model, batch)
    if scores.dtype in (torch.float16, torch.bfloat16):
        scores = scores.float()
    classes_last = scores.shape[:-1] == labels.shape
    if not classes_last and (scores.ndim < 3 or scores.shape[:1] + scores.shape[2:] != labels.shape):
        raise ValueError(
            f"labels must have the shape of the logits without the class dimension, got labels "
            f"{list(labels.shape)} for logits {list(scores.shape)}"
        )
    if shift is None:
        sequences = classes_last and labels.ndim == 2
        shift = sequences and isinstance(batch, Mapping) and not _is_encoder_decoder(model)
    if not classes_last:
        scores = scores.movedim(1, -1)
    return (scores[:, :-1], labels[:, 1:]) if shift else (scores, labels)


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def split(
    dataset: Dataset[_Sample] | Sequence[_Sample],
    *,
    ids: Iterable[int] | None = None,
    classes: Iterable[Hashable] | Hashable | None = None,
) -> tuple[Subset[_Sample], Subset[_Sample]]:
    """Split a data set into what to forget and what to retain.

    Labels are read from ``dataset.targets`` or ``dataset.labels`` (as torchvision keeps them) or from the
    second tensor of a ``TensorDataset``, through any ``Subset``; elsewhere every sample is read once.

    Args:
        dataset: A map-style data set, or a list of ``(input, label)`` pairs or of mappings with ``labels``.
        ids: The samples to forget, as distinct indices in ``[0, len(dataset))``.
        classes: The class or classes to forget.

    Returns:
        ``(forget, retain)``: views into ``dataset``, both in its order.

    Raises:
        TypeError: If ``dataset`` has no length or an id is not an integer.
        ValueError: If not exactly one of ``ids`` and ``classes`` is given, an id is out of range or repeated,
            no sample has a named class, or one of the two parts would be empty.

    Example:
        >>> forget, retain = split([("a", 0), ("b", 1), ("c", 0)], classes=0)
        >>> list(forget), list(retain)
        ([('a', 0), ('c', 0)], [('b', 1)])
    """
    if (ids is None) == (classes is None):
        raise ValueError("split: exactly one of ids and classes must be given")
    if not (hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")):
        raise TypeError(f"split: dataset must have a length and an index, got {type(dataset).__name__}")
    n = len(dataset)
    chosen = _checked_ids(ids, n) if ids is not None else _ids_of_classes(dataset, n, classes)
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


def _ids_of_classes(dataset: object, n: int, classes: Iterable[Hashable] | Hashable) -> set[int]:
    named = _plain(classes)
    single = isinstance(named, (str, bytes)) or not isinstance(named, Iterable)
    wanted = {_plain(name) for name in ([named] if single else cast("Iterable[object]", named))}
    labels = _labels(dataset, n)
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
