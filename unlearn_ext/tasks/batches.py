"""What a batch is, how a model reads one, and how a data set is split into what to forget and what to keep.

*Data* is any iterable of batches that can be read more than once: a ``DataLoader``, a list, ... A *batch* is

- a tuple or list ``(inputs, targets, ...)``: the model is called with ``inputs``, or
- a mapping: the model is called with its entries as keyword arguments, all but ``labels``.

A *sample* is one entry along the leading dimension: an image, a sequence, a row. Every tensor of a batch
whose leading dimension is the number of samples holds one entry per sample; all others are shared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset

Batch: TypeAlias = Sequence[Any] | Mapping[str, Any]

Batches: TypeAlias = Iterable[Batch]

_Nested = TypeVar("_Nested")


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


def map_tensors(
    function: Callable[[Tensor], Tensor],
    batch: _Nested,
    others: Callable[[Any], object] | None = None,
) -> _Nested:
    """Apply ``function`` to every tensor of a nested tuple, list or mapping.

    Args:
        function: Called on the tensors in reading order.
        batch: A tensor, or tuples, lists and mappings of them; anything else passes through.
        others: Called on objects with a method ``to``, if given.

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
        mapped = {key: map_tensors(function, value, others) for key, value in batch.items()}
    elif isinstance(batch, tuple) and hasattr(batch, "_fields"):
        mapped = type(batch)(*(map_tensors(function, value, others) for value in batch))
    elif isinstance(batch, (tuple, list)):
        mapped = type(batch)(map_tensors(function, value, others) for value in batch)
    elif others is not None and callable(getattr(batch, "to", None)):
        mapped = others(batch)
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
        data: Re-iterable batches: tuples, lists, mappings, or objects of a user's own (a graph, say) with a
            method ``to(device)``, which their task reads.
        device: Where the tensors go.
        description: Text in front of the progress bar.
        progress: Show a bar while reading, where tqdm is installed.

    Yields:
        One batch after the other.

    Raises:
        TypeError: If an item is no batch.
    """
    batches: Iterable[object] = data
    if progress:
        try:
            from tqdm.auto import tqdm
        except ImportError:
            pass
        else:
            batches = tqdm(data, desc=description, unit="batch", leave=False)
    for index, batch in enumerate(batches):
        if not isinstance(batch, (tuple, list, Mapping)) and (
            isinstance(batch, Tensor) or not hasattr(batch, "to")
        ):
            hint = "; a class of one's own needs a method to(device), and a task that reads it"
            if isinstance(batch, Tensor):
                hint = "; give a single batch as [(inputs, targets)]"
            raise TypeError(
                f"batch {index} must be a tuple, a list or a mapping, got {type(batch).__name__}{hint}"
            )
        yield cast("Batch", moved(batch, device))


def moved(batch: _Nested, device: torch.device) -> _Nested:
    """Move the tensors of a batch.

    Args:
        batch: A batch in any form; objects of a user's own inside it move themselves by ``to(device)``.
        device: Where they go.

    Returns:
        A batch of the same form.
    """
    # Without blocking only towards a GPU: a copy to the CPU could be read before it has arrived.
    waits = device.type != "cuda"
    return map_tensors(
        lambda tensor: tensor.to(device, non_blocking=not waits), batch, others=lambda part: part.to(device)
    )


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
    raise ValueError(
        "a batch must hold a tensor with a leading sample dimension, got none; arrays of NumPy become "
        "tensors by torch.as_tensor, and samples batches by a DataLoader with a batch_size"
    )


def take(batch: _Nested, n: int, samples: Sequence[int] | slice | Tensor) -> _Nested:
    """Return the batch of some samples.

    Args:
        batch: A batch in any form.
        n: Its number of samples.
        samples: Which ones: positions, of which one may come several times, a slice, or bool ``[n]``.

    Returns:
        A batch of the same form. Per-sample tensors are views where ``samples`` is a slice; tensors that the
        samples share, whose leading dimension is not ``n``, stay whole.

    Example:
        >>> take((torch.arange(4), torch.tensor(7)), 4, [2, 2, 0])
        (tensor([2, 2, 0]), tensor(7))
    """
    chosen = samples if isinstance(samples, (slice, Tensor)) else torch.as_tensor(list(samples))

    def part(tensor: Tensor) -> Tensor:
        if not is_per_sample(tensor, n):
            return tensor
        return tensor[chosen.to(tensor.device) if isinstance(chosen, Tensor) else chosen]

    return map_tensors(part, batch)


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
    return take(batch, count_samples(batch), slice(start, stop))


def is_per_sample(tensor: Tensor, n: int) -> bool:
    """Return whether a tensor of a batch holds one entry per sample.

    Args:
        tensor: A tensor of the batch.
        n: The number of samples of the batch.

    Returns:
        True if its leading dimension is ``n``.
    """
    return tensor.ndim > 0 and tensor.shape[0] == n
