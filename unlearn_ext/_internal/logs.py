"""Log records of the package on the terminal, for who has not set logging up."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from unlearn_ext._internal.undo import Undone


@contextmanager
def shown(level: int = logging.INFO) -> Iterator[None]:
    """Show the package's log records on stderr; where logging is set up to show them, leave it at that.

    Args:
        level: The lowest level to show.

    Yields:
        Nothing.
    """
    package = logging.getLogger("unlearn_ext")
    if package.isEnabledFor(level) and package.hasHandlers():
        yield
        return
    before, handler = package.level, logging.StreamHandler(sys.stderr)

    def put_back() -> None:
        package.removeHandler(handler)
        package.setLevel(before)

    with Undone(put_back):
        package.addHandler(handler)
        package.setLevel(min(level, package.getEffectiveLevel()))
        yield
