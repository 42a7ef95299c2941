"""Batches of two sets at once, ``inputs["forget"]`` and ``inputs["retain"]``, as OpenUnlearning has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, Protocol, cast

import torch
from torch.utils.data import Dataset

_SETS = ("forget", "retain")


class Sized(Protocol):
    """A set that is read by position: a ``torch.utils.data.Dataset``, one of ``datasets``, a list."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, index: int, /) -> Any:  # noqa: ANN401 - whatever the collator takes
        """Return a sample."""


class ForgetRetainDataset(Dataset[dict[str, Any]]):
    """Every sample of one set, beside a random one of the other.

    The companion is drawn anew each time from torch's global random state, which the Trainer seeds, also in
    the workers of a loader.

    Args:
        forget: The forget set.
        retain: The retain set.
        anchor: The set that is gone through once per epoch.

    Raises:
        ValueError: If a set is empty or there is no such anchor.

    Example:
        >>> pairs = ForgetRetainDataset([{"ids": 1}, {"ids": 2}], [{"ids": 7}])
        >>> len(pairs), pairs[1]
        (2, {'forget': {'ids': 2}, 'retain': {'ids': 7}})
    """

    def __init__(self, forget: Sized, retain: Sized, anchor: Literal["forget", "retain"] = "forget") -> None:
        if anchor not in _SETS:
            raise ValueError(f"ForgetRetainDataset: anchor must be 'forget' or 'retain', got {anchor!r}")
        self._sets: Mapping[str, Sized] = {"forget": forget, "retain": retain}
        for name, data in self._sets.items():
            if len(data) == 0:
                raise ValueError(f"ForgetRetainDataset: {name} must hold at least one sample, got none")
        self._anchor = anchor

    def __len__(self) -> int:
        """Return the number of samples of the set that is gone through."""
        return len(self._sets[self._anchor])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sample of it, and a random one of the other set.

        Args:
            index: Its number.

        Returns:
            ``{"forget": ..., "retain": ...}``.
        """
        return {
            name: data[index] if name == self._anchor else data[int(torch.randint(len(data), ()))]
            for name, data in self._sets.items()
        }


class ForgetRetainCollator:
    """Collates the samples of each set by themselves.

    The Trainer must be told ``remove_unused_columns=False``, since no model has arguments of these names.

    Args:
        collator: What makes a batch of samples of one set, such as ``DataCollatorForLanguageModeling``; by
            default ``default_data_collator`` of transformers.

    Example:
        >>> pairs = ForgetRetainDataset([torch.ones(2)], [torch.zeros(2), torch.zeros(2)])
        >>> batch = ForgetRetainCollator(torch.stack)([pairs[0], pairs[0]])
        >>> batch["forget"].shape, batch["retain"].shape
        (torch.Size([2, 2]), torch.Size([2, 2]))
    """

    def __init__(self, collator: Callable[[list[Any]], Any] | None = None) -> None:
        self._collator = collator

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate.

        Args:
            samples: Of a ``ForgetRetainDataset``.

        Returns:
            ``{"forget": batch, "retain": batch}``.

        Raises:
            ValueError: If a sample lacks one of the two.
        """
        for sample in samples:
            missing = [name for name in _SETS if name not in sample]
            if missing:
                raise ValueError(
                    f"ForgetRetainCollator: samples must hold 'forget' and 'retain', got {list(sample)}; the "
                    "Trainer drops what its model does not take unless TrainingArguments have "
                    "remove_unused_columns=False"
                )
        collate = self._collator or _default()
        return {name: collate([sample[name] for sample in samples]) for name in _SETS}


def _default() -> Callable[[list[Any]], Any]:
    from transformers import default_data_collator

    return cast("Callable[[list[Any]], Any]", default_data_collator)
