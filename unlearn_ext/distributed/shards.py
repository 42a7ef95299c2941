"""Every rank its own batches of one loader, and what other ways of sharing data out get wrong."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

from unlearn_ext._internal.seeding import seeded
from unlearn_ext.distributed.group import Group, ranks_of
from unlearn_ext.tasks.batches import Batch, Batches, check_batches


class Shards:
    """The batches of a loader that fall to one rank: batch ``i`` to rank ``i`` modulo their number.

    Nothing is repeated to fill up and nothing left out, so that some ranks may have a batch less, or none.
    Made by ``shard_batches``.

    Args:
        data: Re-iterable batches, the same on every rank.
        rank: This rank.
        world: Number of ranks.
        seed: Decides the order of a loader that shuffles, together with the number of the pass.

    Attributes:
        rank: As given.
        world: As given.

    Example:
        >>> list(Shards([("a",), ("b",), ("c",)], 0, 2)), list(Shards([("a",), ("b",), ("c",)], 1, 2))
        ([('a',), ('c',)], [('b',)])
    """

    def __init__(self, data: Batches, rank: int, world: int, seed: int = 0) -> None:
        self.rank, self.world = rank, world
        self._data, self._seed = data, seed
        self._passes = 0

    @property
    def state(self) -> tuple[int, int, int]:
        """What must be the same on all ranks for their shards to make up the whole: world, seed and pass."""
        return self.world, self._seed, self._passes

    def __iter__(self) -> Iterator[Batch]:
        # All ranks must see one order: what a loader draws for it, it draws up to its first batch.
        with seeded(self._seed + self._passes, self._data):
            self._passes += 1
            reader = iter(self._data)
            batch = next(reader, None)
        index = 0
        while batch is not None:
            if index % self.world == self.rank:
                yield batch
            batch = next(reader, None)
            index += 1

    def __len__(self) -> int:
        whole = len(self._data)  # type: ignore[arg-type]
        return max(0, -(-(whole - self.rank) // self.world))


def shard_batches(loader: Batches, group: Group, *, seed: int = 0) -> Shards:
    """Give every rank of a process group its own batches of a loader.

    Every rank makes the same loader, and takes every world-th batch of it. Unlike with a
    ``DistributedSampler`` no sample comes twice to fill the last round up, which would count it twice in
    every sum. Ranks may have different numbers of batches; what takes ``process_group`` knows.

    A loader that shuffles is given the same order on all ranks, another one in every pass. All ranks must
    pass over their shards equally often, which is checked where ``process_group`` is passed. Every rank reads
    the whole loader: where reading is slow, shard the data set instead.

    Args:
        loader: Re-iterable batches, the same on every rank.
        group: The process group.
        seed: For the order of a loader that shuffles.

    Returns:
        This rank's batches; re-iterable.

    Raises:
        TypeError: If ``loader`` is no iterable of batches, or ``group`` no process group.
        ValueError: If ``loader`` is a one-shot iterator or a shard already, or this process not in the group.
    """
    check_batches(loader, "shard_batches: loader")
    if isinstance(loader, Shards) or (why := sharded_by(loader)):
        kind = "one of shard_batches" if isinstance(loader, Shards) else f"one with a {why}"
        raise ValueError(
            f"shard_batches: loader must be the whole loader, the same on every rank, got {kind}, which is a "
            "shard already"
        )
    ranks = ranks_of(group, "shard_batches")
    return Shards(loader, ranks.rank, ranks.world, seed)


def sharded_by(data: object) -> str:
    """Say by what a loader is seen to be one of several shards.

    Args:
        data: Batches.

    Returns:
        Name of the class that shares the data out; empty where nothing is seen.
    """
    if isinstance(data, Shards):
        return "shard_batches" if data.world > 1 else ""
    # By name: none of these libraries need be installed.
    for owner in (data, getattr(data, "sampler", None), getattr(data, "batch_sampler", None)):
        for place in (owner, getattr(owner, "sampler", None), getattr(owner, "dataset", None)):
            parts = (getattr(place, "num_replicas", 1), getattr(place, "num_processes", 1))
            name = type(place).__name__
            if name in _SHARING and max(part for part in parts if isinstance(part, int)) > 1:
                return name
    return ""


_SHARING = ("DistributedSampler", "BatchSamplerShard", "IterableDatasetShard")


def padded_by(data: object) -> str:
    """Say by what samples of a loader come twice, to give every rank as many.

    Args:
        data: Batches.

    Returns:
        Name of the class that does so; empty where nothing is seen.
    """
    for owner in (data, getattr(data, "batch_sampler", None)):
        for place in (owner, getattr(owner, "sampler", None)):
            name = type(place).__name__
            if name == "DistributedSampler":
                n, total = _length(getattr(place, "dataset", None)), getattr(place, "total_size", 0)
                if not getattr(place, "drop_last", False) and n is not None and total > n:
                    return name
            if name == "BatchSamplerShard" and getattr(place, "even_batches", False):
                return f"{name} (even_batches=True)"
    return ""


def warn_if_padded(who: str, data: object, *, stacklevel: int) -> None:
    """Warn where samples count twice.

    Args:
        who: The function that reads the data.
        data: Batches, or anything else.
        stacklevel: As for ``warnings.warn``.
    """
    if why := padded_by(data):
        warnings.warn(
            f"{who}: the {why} repeats samples to give every rank as many, and what is repeated counts "
            "twice; ux.data.shard_batches(loader, group) repeats none",
            stacklevel=stacklevel + 1,
        )


def warn_if_alone(who: str, data: object, *, stacklevel: int) -> None:
    """Warn where one of several shards is read, and no process group was given.

    Args:
        who: The function that reads the data.
        data: Batches, or anything else.
        stacklevel: As for ``warnings.warn``.
    """
    if why := sharded_by(data):
        warnings.warn(
            f"{who}: the data are one rank's share ({why}), and no process_group was given: the result is of "
            "this share alone; pass process_group=torch.distributed.group.WORLD",
            stacklevel=stacklevel + 1,
        )


def _length(data: object) -> int | None:
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return None
