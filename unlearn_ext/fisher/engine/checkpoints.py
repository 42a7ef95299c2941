"""Gradient checkpointing inside a pass: both kinds of it, made fit for reading what nodes have saved."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from unlearn_ext._internal.undo import Undone

# ``reading.again`` is True while somebody reads what a node has saved that is still going to run, since a
# checkpoint gives a recomputed tensor out only once, and the node itself will want it too. It is set for each
# node, and in a small network entering a context would cost as much as what is done inside.
reading = threading.local()


@contextmanager
def patched() -> Iterator[None]:
    """Let checkpoints give tensors out twice, and let the reentrant kind be the other one.

    Reentrant checkpoints refuse ``torch.autograd.grad`` altogether and hide from the graph what they compute.

    Yields:
        Nothing.
    """
    checkpoint: Any = sys.modules.get("torch.utils.checkpoint")
    hook = getattr(checkpoint, "_checkpoint_hook", None)
    function = getattr(checkpoint, "CheckpointFunction", None)
    if hook is None or function is None:
        yield
        return

    twice, not_reentrant = _readable_kinds(checkpoint, hook)

    def put_back() -> None:
        checkpoint._checkpoint_hook, checkpoint.CheckpointFunction = hook, function
        reading.again = False  # whatever an interrupted pass was doing

    with Undone(put_back):
        checkpoint._checkpoint_hook, checkpoint.CheckpointFunction = twice, not_reentrant
        yield


@functools.cache
def _readable_kinds(checkpoint: Any, hook: Any) -> tuple[type, type]:  # noqa: ANN401 - torch's module and class
    # Made once: a pass over a small batch takes little longer than making classes.
    class Twice(hook):  # type: ignore[misc]
        def __init__(self, frame: object) -> None:
            super().__init__(frame)
            unpack_once = self.unpack_hook
            kept: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

            def unpack(holder: object) -> object:
                value = kept.pop(holder, None)
                if value is None:
                    value = unpack_once(holder)
                if getattr(reading, "again", False):
                    kept[holder] = value
                return value

            self.unpack_hook: Callable[[object], object] = unpack

    class NotReentrant:
        @staticmethod
        def apply(run: object, preserve_rng_state: bool, *args: object) -> object:
            return checkpoint.checkpoint(
                run, *args, use_reentrant=False, preserve_rng_state=preserve_rng_state
            )

    return Twice, NotReentrant
