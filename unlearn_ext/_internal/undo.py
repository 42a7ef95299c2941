"""Taking back what a block has changed, also where an interrupt comes while that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol


class Undone:
    """A context that calls ``undo`` on the way out, and once more if an interrupt cuts the first call short.

    Args:
        undo: Puts everything back; may be called again, whatever part of it has been done.

    Example:
        >>> state = {"on": False}
        >>> with Undone(lambda: state.update(on=False)):
        ...     state["on"] = True
        >>> state
        {'on': False}
    """

    def __init__(self, undo: Callable[[], object]) -> None:
        self._undo = undo

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        try:
            self._undo()
        except BaseException:
            self._undo()
            raise


class Handle(Protocol):
    """What torch gives out for a hook; ``remove`` may be called again."""

    def remove(self) -> None:
        """Take the hook off."""


@contextmanager
def handles() -> Iterator[list[Handle]]:
    """Take hooks off on the way out, whatever happens.

    Yields:
        Where to put the handles of the hooks.

    Example:
        >>> import torch
        >>> layer = torch.nn.Identity()
        >>> with handles() as hooks:
        ...     hooks.append(layer.register_forward_hook(print))
        >>> len(layer._forward_hooks)
        0
    """
    found: list[Handle] = []

    def remove() -> None:
        for handle in found:
            handle.remove()

    with Undone(remove):
        yield found
