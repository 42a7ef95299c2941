"""The progress of a pass that ranks make in step: a file of each rank's own, all of them of the same step."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unlearn_ext._internal.fingerprint import weights_fingerprint
from unlearn_ext.distributed import Ranks
from unlearn_ext.resume.interrupts import Interrupt, waiting
from unlearn_ext.resume.progress import Progress, Raw, State, check_every
from unlearn_ext.resume.store import Store
from unlearn_ext.tasks.batches import Batches


# Note [Files of one step]
# A rank writes a step only when all have written the one before, and keeps that one as ``.old``. Wherever the
# ranks are killed, their files are then at most one step apart, and the older of the two is on every rank.
class SharedProgress(Progress):
    """The progress of one pass of a sharded model; see ``Progress``.

    Args:
        who: The function that makes the pass.
        checkpoint: The file, to whose name every rank adds its number; None keeps nothing.
        every: Steps from one checkpoint to the next.
        model: The model, of which all ranks have their shards in place.
        settings: What the totals depend on beside model and data, as JSON can hold it.
        ranks: The ranks, which all are at this place.

    Attributes:
        steps: Steps that are done.
        is_finished: Whether the pass is over.

    Raises:
        TypeError: If ``every`` is no integer.
        ValueError: If it is less than 1; if files are damaged, of another number of ranks, or of other
            weights or settings.
    """

    def __init__(
        self,
        who: str,
        checkpoint: str | os.PathLike[str] | None,
        every: int,
        *,
        model: nn.Module,
        settings: Mapping[str, Any],
        ranks: Ranks,
    ) -> None:
        check_every(who, every)
        super().__init__(who, None, every, model=model, settings=settings, ranks=ranks)
        self._ranks, self.steps, self.is_finished = ranks, 0, False
        if checkpoint is None:
            return
        path = Path(checkpoint)
        self._refuse_other_worlds(path)
        self._store = Store(path.with_name(f"{path.name}.rank{ranks.rank}of{ranks.world}"), who)
        self._facts = {
            "who": who,
            "settings": {**settings, "checkpoint_every": every},
            "weights": weights_fingerprint(model),
            "ranks": [ranks.rank, ranks.world],
        }
        kept = {
            (facts["steps"], facts["is_finished"]): (tensors, facts) for tensors, facts in self._store.whole()
        }
        told = ranks.exchange("checkpoints", sorted(kept))
        if not any(told):
            return
        common = set(told[0]).intersection(*told[1:])
        if not common:
            raise ValueError(
                f"{who}: checkpoint must have been written by all ranks up to one step, got steps "
                f"{[[step for step, _ in each] for each in told]} in the ranks' files; delete them to start "
                "anew"
            )
        self._take_up(*kept[max(common)])
        self.steps, self.is_finished = max(common)

    def begin(self, data: Batches, generator: torch.Generator | None) -> Batches:
        """Go to where the interrupted pass was.

        Args:
            data: This rank's batches.
            generator: What the pass draws from beside the global random states.

        Returns:
            The batches that are not done, to be read once.

        Raises:
            ValueError: If the data are not those of the interrupted run.
        """
        if self._store is None:
            return data
        self._raw, _ = self._begin(data, generator)
        return [] if self.is_finished else self._raw

    @contextmanager
    def holding_signals(self) -> Iterator[Interrupt]:
        """Hold SIGTERM back where there is a file to be written first; see ``waiting``.

        Yields:
            Whether this rank has been told to end. Once any has, all are to write; then it is delivered.
        """
        with waiting() if self._store is not None else nullcontext(Interrupt()) as interrupt:
            yield interrupt

    def is_due(self, *, is_asked: bool = False) -> bool:
        """Count a step.

        Args:
            is_asked: Some rank has been told to end; the same on all ranks.

        Returns:
            Whether ``write`` is to be called.
        """
        self.steps += 1
        return self._store is not None and (is_asked or self.steps % self._every == 0)

    def write(self, state: State, *, is_finished: bool = False) -> None:
        """Write this rank's file, with all others.

        Args:
            state: What the pass has come to on this rank.
            is_finished: The pass is over.
        """
        if self._store is None or self.is_finished:
            return
        raw: Raw = self._raw
        facts = {"batches": raw.n_read, "steps": self.steps, "is_finished": is_finished}
        self._write(raw, state, facts)
        self._ranks.exchange("checkpoint", None)

    def _refuse_other_worlds(self, path: Path) -> None:
        pattern = re.compile(re.escape(path.name) + r"\.rank\d+of(\d+)")
        names = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        own = {int(match[1]) for name in names if (match := pattern.fullmatch(name))}
        worlds = set().union(*self._ranks.exchange("files", own)) - {self._ranks.world}
        if worlds:
            raise ValueError(
                f"{self._who}: checkpoint must be of {self._ranks.world} ranks, got files of {max(worlds)}, "
                "whose shards are others; go on with that number of ranks, or delete the files to start anew"
            )
