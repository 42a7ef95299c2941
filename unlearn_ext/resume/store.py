"""The file of an interrupted pass: written all or nothing, the one before kept, verified when it is read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from unlearn_ext._internal.files import FileKind

_FILE = FileKind(
    "unlearn_ext.progress.1",
    owner="checkpoint",
    contents="checkpoints",
    instance="an interrupted pass",
    facts=("facts",),
)


class Store:
    """Where the progress of a pass is kept.

    Args:
        path: The file.
        who: The function that makes the pass, for messages.
    """

    def __init__(self, path: Path, who: str) -> None:
        self.path, self._who = path, who
        self._is_whole = True

    def write(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
        """Write the file; the one before stays beside it, as ``.old``, unless it is damaged.

        Args:
            tensors: Totals and states.
            facts: What JSON can hold.
        """
        told = {"facts": json.dumps(facts)}
        if not self._is_whole:
            self.path.unlink(missing_ok=True)
            self._is_whole = True
        _FILE.save(self.path, tensors, told, keep_old=True)

    def read(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Read the file, or the one before where it is damaged.

        Returns:
            Tensors and facts; None where there is no file.

        Raises:
            ValueError: If there are files, and none of them is whole.
        """
        return next(self.whole(), None)

    def whole(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Any]]]:
        """Read what is whole of the file and the one before.

        Yields:
            Tensors and facts, the file's first; nothing where there is no file.

        Raises:
            ValueError: If there are files, and none of them is whole.
        """
        problems: list[str] = []
        n_whole = 0
        for path in (self.path, self.path.with_name(f"{self.path.name}.old")):
            if not path.exists():
                continue
            try:
                tensors, told = _FILE.load(path)
                facts = json.loads(told["facts"])
            except (ValueError, KeyError, RuntimeError, OverflowError) as error:
                problems.append(f"{path}: {type(error).__name__}: {error}")
                self._is_whole = self._is_whole and path != self.path
                continue
            n_whole += 1
            yield tensors, facts
        if problems and not n_whole:
            raise ValueError(
                f"{self._who}: checkpoint must be whole, got damaged files ({'; '.join(problems)}); delete "
                "them to start anew"
            )
