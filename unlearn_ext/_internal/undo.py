"""Taking back what a block has changed, also where an interrupt comes while that is done."""

from __future__ import annotations

from collections.abc import Callable


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
