"""One loader of forget and retain batches side by side, read as the two sets that methods take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import cast

from unlearn_ext.tasks.batches import Batch, check_batches


class _Side:
    """One of the sets of a loader; re-iterable."""

    def __init__(self, loader: Iterable[Mapping[str, Batch]], name: str) -> None:
        self._loader, self._name = loader, name

    def __iter__(self) -> Iterator[Batch]:
        for index, batch in enumerate(self._loader):
            if not isinstance(batch, Mapping) or self._name not in batch:
                found = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
                raise ValueError(
                    f"forget_and_retain: batch {index} must be a mapping with {self._name!r}, got {found}"
                )
            yield batch[self._name]

    def __len__(self) -> int:
        return len(self._loader)  # type: ignore[arg-type] # TypeError as the loader raises it


def forget_and_retain(loader: Iterable[Mapping[str, Batch]]) -> tuple[Iterable[Batch], Iterable[Batch]]:
    """Read a loader of ``{"forget": batch, "retain": batch}`` as the two sets that methods take.

    That is how OpenUnlearning and others feed a trainer: a retain sample drawn beside every forget sample.
    Each set is read through the loader anew. The retain set is then as large as the forget set: where the
    whole of it is at hand, methods that watch it (``ssd``, ``newton``) are better given that.

    Args:
        loader: Re-iterable; other keys are left aside.

    Returns:
        ``(forget, retain)``, both re-iterable, as in ``ux.methods.npo(model, *forget_and_retain(loader))``.

    Raises:
        TypeError: If it is no iterable of batches.
        ValueError: If it is a one-shot iterator; while reading, if a batch lacks a set.

    Example:
        >>> forget, retain = forget_and_retain([{"forget": (1,), "retain": (2,)}])
        >>> list(forget), list(retain)
        ([(1,)], [(2,)])
    """
    known = cast("Iterable[Mapping[str, Batch]]", check_batches(loader, "forget_and_retain: loader"))
    return _Side(known, "forget"), _Side(known, "retain")
