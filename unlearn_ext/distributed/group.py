"""The ranks of a process group: what they tell each other, and that all of them fail where one does.

Ranks meet at *exchanges*, in the same order on every rank. Each brings its own message, or the news that it
has failed: then every rank raises, there and then, and nobody is left waiting in a collective.
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from unlearn_ext.distributed.reduce import sum_in_order

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

Group: TypeAlias = "ProcessGroup | Ranks | None"
"""What ``process_group`` may be: a group of ``torch.distributed``, or None for one process alone."""

_Value = TypeVar("_Value")


@dataclass(frozen=True, slots=True)
class _Message:
    # What a rank brings to an exchange.
    step: str
    value: object = None
    failure: tuple[str, str] | None = None  # name of a built-in exception, and its text


class Ranks:
    """The ranks of one call. Made by ``ranks_of``.

    Args:
        group: The process group; None for one process alone, for which every exchange is trivial.
        who: The function that is called, for messages.

    Attributes:
        world: Number of ranks.
        rank: This one's number in the group, from 0.
        who: As given.
    """

    def __init__(self, group: ProcessGroup | None, who: str) -> None:
        self._group, self.who = group, who
        self.world = 1 if group is None else dist.get_world_size(group)
        self.rank = 0 if group is None else dist.get_rank(group)
        self._known: BaseException | None = None
        self._is_broken = False

    @property
    def is_broken(self) -> bool:
        """Whether something has failed that nobody could be told of: no exchange can be counted on."""
        return self._is_broken

    @property
    def are_many(self) -> bool:
        """Whether there is more than one."""
        return self.world > 1

    def exchange(self, step: str, value: _Value) -> list[_Value]:
        """Tell all ranks something, and hear the same of them.

        Args:
            step: Where the ranks are: the same text on all of them.
            value: Anything that can be pickled.

        Returns:
            The values in the order of the ranks.

        Raises:
            Exception: Of the same kind as on the lowest rank that has failed, where one has.
            RuntimeError: If the ranks are not at the same step: they were called with different things.
        """
        if not self.are_many:
            return [value]
        messages = self._gathered(_Message(step, value))
        self._raise_if_failed(messages)
        steps = [message.step for message in messages]
        if len(set(steps)) > 1:
            told = ", ".join(f"rank {rank} at {at!r}" for rank, at in enumerate(steps))
            self._known = RuntimeError(
                f"{self.who}: all ranks must call the same function with the same settings, got {told}"
            )
            raise self._known
        return [message.value for message in messages]  # type: ignore[misc]

    def sum_(self, step: str, tensors: Iterable[Tensor]) -> None:
        """Replace tensors by their sums over the ranks, which have the same bits on every rank.

        Args:
            step: Where the ranks are.
            tensors: Written in place; of the same shapes and dtypes on all ranks.

        Raises:
            ValueError: If they are not.
        """
        if not self.are_many:
            return
        known = list(tensors)
        forms = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in known]
        self._check_alike(step, forms, self.exchange(step, forms))
        with self.in_collectives():
            self._add_up(known)

    def total(self, step: str, *numbers: float) -> list[Any]:
        """Add numbers up over the ranks, in their order.

        Args:
            step: Where the ranks are.
            *numbers: Integers, or floats, which are added in double precision.

        Returns:
            The sums.
        """
        return [sum(column) for column in zip(*self.exchange(step, numbers), strict=True)]

    def first(self, step: str, value: _Value | None) -> _Value | None:
        """Take what the lowest rank has that has something.

        Args:
            step: Where the ranks are.
            value: This rank's; None if it has nothing.

        Returns:
            The same on every rank; None if nobody has anything.
        """
        return next((found for found in self.exchange(step, value) if found is not None), None)

    def concatenated(self, step: str, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Join tensors of all ranks along their first dimension, in the order of the ranks.

        Args:
            step: Where the ranks are.
            tensors: Any number, the same on every rank.

        Returns:
            The joined tensors, on the CPU where there are many ranks.
        """
        if not self.are_many:
            return list(tensors)
        columns = zip(*self.exchange(step, [tensor.cpu() for tensor in tensors]), strict=True)
        return [torch.cat(column) for column in columns]

    def own_generator(self, generator: torch.Generator | None) -> torch.Generator | None:
        """Give every rank a stream of random numbers of its own.

        Args:
            generator: The caller's, whose next number decides all streams; None: that of the global state.

        Returns:
            A generator; of one process alone, the caller's.
        """
        if not self.are_many:
            return generator
        seed = self.shared_seed(generator)
        device = "cpu" if generator is None else generator.device
        return torch.Generator(device).manual_seed(seed + self.rank)

    def shared_generator(self, generator: torch.Generator | None) -> torch.Generator | None:
        """Give every rank the same stream of random numbers.

        Args:
            generator: The caller's, whose next number decides it on rank 0; None: that of the global state.

        Returns:
            A generator; of one process alone, the caller's.
        """
        if not self.are_many:
            return generator
        device = "cpu" if generator is None else generator.device
        return torch.Generator(device).manual_seed(self.shared_seed(generator))

    def shared_seed(self, generator: torch.Generator | None) -> int:
        """Draw a number that is the same on every rank.

        Args:
            generator: What to draw from; None: the global random state.

        Returns:
            What rank 0 has drawn; below 2^62.
        """
        device = "cpu" if generator is None else generator.device
        drawn = int(torch.randint(2**62, (), generator=generator, device=device))
        return self.exchange("seed", drawn)[0]

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let every rank raise where one does. What is inside may meet at exchanges; it ends with one.

        Yields:
            Nothing.
        """
        if not self.are_many:
            yield
            return
        try:
            yield
        except Exception as error:
            if not is_of_backend(error):
                self._announce(error)
                raise
            self._known = RuntimeError(
                f"{self.who}: all ranks must come to a collective within the group's timeout, got none from "
                "another rank, which has failed inside the model, has ended or is slow: its own message says "
                "why. End the processes, since the group cannot be used again; how long ranks wait is set by "
                f"init_process_group(timeout=...). The backend: {str(error).splitlines()[0][:200]}"
            )
            self._is_broken = True
            raise self._known from error
        self.exchange(f"end of {self.who}", None)

    @contextmanager
    def in_collectives(self) -> Iterator[None]:
        """Mark what fails inside as what nobody can be told of: the others are in a collective.

        That has failed (a rank has died, or come too late), or, of a model's own pass, goes on without this
        rank.

        Yields:
            Nothing.
        """
        try:
            yield
        except Exception as error:
            self._known, self._is_broken = error, True
            raise

    def _announce(self, error: Exception) -> None:
        # Where the others know already they have left, and nobody would answer.
        link: BaseException | None = error
        while link is not None:
            if link is self._known:
                return
            link = link.__cause__ or link.__context__
        self._known = error
        kind = next(cls.__name__ for cls in type(error).__mro__ if cls.__module__ == "builtins")
        self._gathered(_Message("", failure=(kind, str(error))))
        self._known = error

    def _raise_if_failed(self, messages: Sequence[_Message]) -> None:
        for rank, message in enumerate(messages):
            if message.failure is not None:
                name, text = message.failure
                kind = getattr(builtins, name)
                try:
                    self._known = kind(f"rank {rank}: {text}")
                except TypeError:  # such as UnicodeDecodeError, which takes more than a text
                    self._known = RuntimeError(f"rank {rank}: {name}: {text}")
                assert self._known is not None
                raise self._known

    def _check_alike(self, step: str, mine: object, all_of_them: Sequence[object]) -> None:
        for rank, theirs in enumerate(all_of_them):
            if theirs != all_of_them[0]:
                self._known = ValueError(
                    f"{self.who}: all ranks must bring the same tensors to {step!r}, got others on rank "
                    f"{rank} than on rank 0; the models or the settings differ"
                )
                raise self._known

    def _gathered(self, message: _Message) -> list[_Message]:
        found: list[Any] = [None] * self.world
        with self.in_collectives():
            dist.all_gather_object(found, message, group=self._group)
        return found

    def _add_up(self, tensors: Sequence[Tensor]) -> None:
        assert self._group is not None
        sum_in_order(tensors, self._group)


_BACKENDS = ("gloo", "Application timeout", "closed by peer", "reset by peer", "NCCL", "Broken pipe")


def is_of_backend(error: BaseException) -> bool:
    """Say whether a collective has failed, because a rank has died or come too late.

    Args:
        error: What was raised.

    Returns:
        True if it is torch's, or the backend's.
    """
    if not isinstance(error, RuntimeError):
        return False
    kind = getattr(dist, "DistError", ())
    return isinstance(error, kind) or any(mark in str(error) for mark in _BACKENDS)


ALONE = Ranks(None, "")
"""One process."""


def ranks_of(group: Group, who: str) -> Ranks:
    """Look a process group up.

    Args:
        group: What the caller passed as ``process_group``.
        who: The function that is called.

    Returns:
        Its ranks.

    Raises:
        TypeError: If it is no process group.
        ValueError: If this process is not in it.

    Example:
        >>> ranks_of(None, "example").world
        1
    """
    if isinstance(group, Ranks):
        return group
    if group is None:
        return Ranks(None, who)
    kind = getattr(dist, "ProcessGroup", ())
    if group is getattr(getattr(dist, "GroupMember", None), "NON_GROUP_MEMBER", ...):
        raise ValueError(f"{who}: process_group must hold this process, got a group that it is not in")
    given: object = group
    if not isinstance(given, kind):
        hint = "; take its group: mesh.get_group()" if type(given).__name__ == "DeviceMesh" else ""
        raise TypeError(
            f"{who}: process_group must be a torch.distributed.ProcessGroup, such as "
            f"torch.distributed.group.WORLD, got {type(given).__name__}{hint}"
        )
    return Ranks(group, who)


def on_all(ranks: Ranks, step: str, test: Callable[[], bool]) -> bool:
    """Judge something on every rank, and take it for true only where all of them say so.

    Args:
        ranks: The ranks.
        step: Where they are.
        test: What to judge.

    Returns:
        The same on every rank.
    """
    return all(ranks.exchange(step, bool(test())))
