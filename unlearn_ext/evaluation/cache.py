"""The folder where a comparison keeps its rows and its retrained models."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from unlearn_ext._internal.files import replacing
from unlearn_ext.evaluation.keys import key

_log = logging.getLogger(__name__)


class Cache:
    """A folder of files named by the keys of what they depend on.

    Args:
        folder: The folder, made if it is not there; None for no cache.
        code: Stands for the code of the caller's functions in all keys; None to look at the code.

    Raises:
        OSError: If the folder cannot be made.
    """

    def __init__(self, folder: Path | None, code: str | None) -> None:
        self._folder = folder
        self._code = code
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def is_on(self) -> bool:
        """Whether there is a folder."""
        return self._folder is not None

    def path(self, stem: str, suffix: str, **facts: object) -> Path | None:
        """Return the file of something.

        Args:
            stem: Start of the name.
            suffix: Its end.
            **facts: All that decides the content.

        Returns:
            The path, or None where there is no cache.

        Raises:
            NoKeyError: If there is no telling what a fact holds. The message says what stands in the way.
        """
        if self._folder is None:
            return None
        return self._folder / f"{stem}-{key(code=self._code, **facts)[:32]}{suffix}"


@contextmanager
def keeping(path: Path) -> Iterator[Path]:
    """Write a file of the cache; what cannot be written is told, and the comparison goes on.

    Args:
        path: The file.

    Yields:
        The temporary file to write.
    """
    try:
        with replacing(path) as draft:
            yield draft
    except (OSError, RuntimeError) as error:  # torch.save raises the latter where a disk is full
        # A full disk must not cost the results that are in memory.
        _log.warning("%s is not kept: %s", path, error)
