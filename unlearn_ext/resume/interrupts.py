"""A signal to end the process, which waits until what is done so far has been written."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from unlearn_ext._internal.undo import Undone


class Interrupt:
    """Whether the process has been told to end. Made by ``waiting``."""

    def __init__(self) -> None:
        self.is_due = False
        self._before: object = signal.SIG_DFL
        self._frame: FrameType | None = None

    def note(self, _: int, frame: FrameType | None) -> None:
        """Take the signal.

        Args:
            frame: What was running.
        """
        self.is_due, self._frame = True, frame

    def deliver(self) -> None:
        """Do what the signal would have done."""
        self.is_due = False
        if callable(self._before):
            self._before(signal.SIGTERM, self._frame)
            return
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def waiting() -> Iterator[Interrupt]:
    """Hold SIGTERM back; what is inside delivers it where it suits.

    In the main thread alone, which is the only one that may. Where the signal is ignored, or handled by
    something that is not Python, nothing is done. A signal that is still held back at the end is delivered
    then; the handler of before is put back.

    Yields:
        Whether there was one.
    """
    interrupt = Interrupt()
    before = signal.getsignal(signal.SIGTERM)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or before is signal.SIG_IGN or before is None:
        yield interrupt
        return
    interrupt._before = before
    try:
        with Undone(lambda: signal.signal(signal.SIGTERM, before)):
            signal.signal(signal.SIGTERM, interrupt.note)
            yield interrupt
    finally:
        if interrupt.is_due:
            interrupt.deliver()
