"""Whether a set yields the same samples in every pass, told without keeping any of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler, WeightedRandomSampler

from unlearn_ext._internal.dtensors import is_dtensor
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, is_per_sample, tensors_in
from unlearn_ext.tasks.infer import INFERRED, infer
from unlearn_ext.tasks.language import CausalLM, Sequence2Sequence

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_READ = 256  # words of a sample's input; of a longer one as many, evenly spaced, and the sum of all
_MODULUS = 2**64
_HALF = 2**32

# How loaders draw other samples in every pass, and what to do about it.
_ANEW = (
    "the WeightedRandomSampler draws them anew, shuffle=True draws each once",
    "a sampler with replacement draws them anew, shuffle=True draws each once",
    "num_samples of the RandomSampler leaves some out in each",
    "drop_last=True leaves some out in each, other ones: drop_last=False",
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What one pass saw: sums, modulo 2^64, of a hash per sample, so that order and batches do not matter.

    Attributes:
        samples: Number of samples.
        labels: Of what nothing may change from pass to pass: one label per sample, or a text to be written.
        rest: Of all else that samples have: inputs, which random augmentation changes, and labels that
            change with them (maps of a crop, mixtures of two classes, masked words).
        anew: How some rank's loader is seen to draw other samples in every pass; empty where none is.
    """

    samples: int
    labels: int = 0
    rest: int = 0
    anew: str = field(default="", compare=False)

    @classmethod
    def of(cls, samples: int, sums: Sequence[float]) -> Reading:
        """Put the sums of all ranks into the form of one rank's.

        Args:
            samples: Number of samples of all ranks.
            sums: What ``Tally.sums`` gives, added up over them.

        Returns:
            The reading.
        """
        labels, labels_high, rest, rest_high, *ways = map(int, sums)
        anew = next((text for text, is_so in zip(_ANEW, ways, strict=True) if is_so), "")
        return cls(
            samples,
            (labels + _HALF * labels_high) % _MODULUS,
            (rest + _HALF * rest_high) % _MODULUS,
            anew,
        )


class Tally:
    """Takes up the batches of a pass, on their own device and without waiting for it.

    Args:
        model: The model that they are for.
        task: What it is for; None infers it.
        data: The set.

    Example:
        >>> x, y = torch.randn(6, 3), torch.arange(6)
        >>> found = []
        >>> for order in ([[0, 1, 2, 3], [4, 5]], [[5, 2], [4, 0, 1, 3]]):
        ...     tally = Tally(nn.Linear(3, 6), None)
        ...     for chosen in order:
        ...         tally.add((x[chosen], y[chosen]), len(chosen))
        ...     found.append(tally.sums())
        >>> found[0] == found[1]
        True
    """

    def __init__(self, model: nn.Module, task: Task | None, data: object = None) -> None:
        self._model, self._task, self._data = model, task, data
        self._sums: Tensor | None = None

    def add(self, batch: Batch, n: int) -> None:
        """Take up a batch.

        Args:
            batch: The batch.
            n: Its number of samples.
        """
        task = infer(self._model, batch) if self._task in (None, INFERRED) else self._task
        try:
            labels: Tensor | None = task.labels(batch)
        except Exception:  # of a user's function, perhaps; a loss may do without labels, and so does this
            labels = None
        if labels is not None and not _is_read(labels, n):
            labels = None
        stays = labels is not None and (
            labels.numel() == n or isinstance(task, (CausalLM, Sequence2Sequence))
        )
        parts = {} if labels is None else {bool(stays): _of_labels(labels, n)}
        if not task.has_own_select:  # what is one sample's, only such a task knows
            for tensor in _inputs(batch, labels):
                if _is_read(tensor, n):
                    hashed, known = _of_inputs(tensor, n), parts.get(False)
                    parts[False] = hashed if known is None else _mixed(known) + hashed.to(known.device)
        for stays, hashed in parts.items():
            if self._sums is None:
                self._sums = torch.zeros(2, dtype=torch.int64, device=hashed.device)
            self._sums[0 if stays else 1] += _mixed(hashed).sum().to(self._sums.device)

    def sums(self) -> list[int]:
        """Return what the pass saw, to be added up over ranks.

        Returns:
            Of this rank, numbers for ``Reading.of``, small enough to be added up in float64 exactly.
        """
        found = [] if self._sums is None else [number % _MODULUS for number in self._sums.tolist()]
        halves = [half for number in found or [0, 0] for half in (number % _HALF, number // _HALF)]
        way = chosen_anew(self._data)
        return halves + [int(way == text) for text in _ANEW]


def difference(name: str, first: Reading, later: Reading) -> tuple[str, bool]:
    """Say in what a later reading of a set differs from the first.

    Args:
        name: Its name.
        first: The first reading.
        later: The later one.

    Returns:
        Text, empty where nothing differs; and whether the samples must be others, so that figures of the
        two passes do not compare. Where only inputs differ they may be the same, with random augmentation.
    """
    if later.samples != first.samples:
        return (
            f"the {name} set had {first.samples} samples in the first pass and {later.samples} in a later "
            "one: it must yield the same ones in every pass"
        ), True
    if later == first:
        if not later.anew:
            return "", False
        # Random states are put back around what is measured: that much is alike.
        return f"the {name} set had other samples in the passes of the method, perhaps: {later.anew}", False
    why = f"; {later.anew}" if later.anew else ""
    if later.labels != first.labels or why:
        told = "its labels differ" if later.labels != first.labels else "its inputs differ"
        return (
            f"the {name} set had other samples, as many, in a later pass than in the first ({told}): it must "
            f"yield the same ones in every pass{why}"
        ), True
    return (
        f"the {name} set had other inputs, with the same labels, in a later pass than in the first: samples "
        "augmented at random, or other samples"
    ), False


def chosen_anew(data: object) -> str:
    """Say how a loader draws other samples in every pass.

    Args:
        data: Batches.

    Returns:
        The way and what to do about it; empty where nothing is seen.
    """
    if not isinstance(data, DataLoader):
        return ""
    batches = data.batch_sampler
    sampler = getattr(batches, "sampler", data.sampler)
    if isinstance(sampler, WeightedRandomSampler):
        return _ANEW[0]
    if getattr(sampler, "replacement", False):
        return _ANEW[1]
    if not isinstance(sampler, RandomSampler):
        return ""
    if sampler.num_samples != len(sampler.data_source):
        return _ANEW[2]
    size = getattr(batches, "batch_size", None)
    if getattr(batches, "drop_last", False) and size and len(sampler) % size:
        return _ANEW[3]
    return ""


def _is_read(tensor: Tensor, n: int) -> bool:
    return (
        not tensor.is_nested
        and is_per_sample(tensor, n)
        and tensor.layout == torch.strided
        and not tensor.is_quantized
        and not is_dtensor(tensor)
        and not tensor.is_meta
    )


def _inputs(batch: Batch, labels: Tensor | None) -> list[Tensor]:
    # Texts are padded to the longest of their batch: what is padding is no part of a sample.
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    found = []
    for tensor in tensors_in(batch):
        if tensor is labels or tensor is mask:
            continue
        whole = not tensor.is_floating_point() and not tensor.is_complex()
        if isinstance(mask, Tensor) and whole and tensor.shape == mask.shape and tensor.ndim == 2:
            found.append(torch.where(mask != 0, tensor.long(), -1))
        else:
            found.append(tensor)
    return found


def _of_labels(labels: Tensor, n: int) -> Tensor:
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    return _of_tokens(labels, n, 0) if whole and labels.numel() != n else _of_words(_words(labels, n))


def _of_tokens(tokens: Tensor, n: int, least: int) -> Tensor:
    # How often each occurs in a sample but for those below ``least``: how much padding there is depends on
    # the batch, and it lies on either side.
    each = tokens.reshape(n, -1 if tokens.numel() else 0).long()
    return (each * (each * -7046029254386353131 + 6364136223846793005) * (each >= least)).sum(1)


def _of_inputs(tensor: Tensor, n: int) -> Tensor:
    if tensor.dtype == torch.int64 and tensor.ndim == 2:
        return _of_tokens(tensor, n, 1)  # 0 is what most pad with
    words = _words(tensor, n)
    if words.shape[1] <= _READ:
        return _of_words(words)
    step = words.shape[1] // _READ
    return _of_words(words[:, ::step]) * 3 + _sum_of_all(words)


def _sum_of_all(words: Tensor) -> Tensor:
    # Eight bytes at a time, which costs a quarter; how, no more than a sample's size may decide.
    if words.shape[1] * words.element_size() % 8:
        return words.sum(1, dtype=torch.int64)
    is_aligned = words.storage_offset() * words.element_size() % 8 == 0
    return (words if is_aligned else words.clone()).view(torch.int64).sum(1)


def _words(tensor: Tensor, n: int) -> Tensor:
    plain = tensor.detach()
    plain = torch.view_as_real(plain.resolve_conj()) if plain.is_complex() else plain
    return plain.reshape(n, -1 if plain.numel() else 0).contiguous().view(_WORDS[plain.element_size()])


def _of_words(words: Tensor) -> Tensor:
    odd = (2 * torch.arange(words.shape[1], device=words.device) + 1) * -7046029254386353131
    return (words.long() * odd).sum(1)


def _mixed(hashed: Tensor) -> Tensor:
    # Without this the sum over samples would be that of their words. The constants are those of splitmix64.
    hashed = (hashed ^ (hashed >> 30)) * -4658895280553007687
    hashed = (hashed ^ (hashed >> 27)) * -7723592293110705685
    return hashed ^ (hashed >> 31)
