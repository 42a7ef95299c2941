"""A pass over data: which batches are done, when what they came to is written, how it is gone on with."""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from unlearn_ext._internal.fingerprint import weights_fingerprint
from unlearn_ext._internal.seeding import generators_of
from unlearn_ext.distributed import Ranks
from unlearn_ext.resume.interrupts import waiting
from unlearn_ext.resume.random import set_states, states
from unlearn_ext.resume.store import Store
from unlearn_ext.tasks.batches import Batch, Batches, read_batches, tensors_in

State: TypeAlias = tuple[Mapping[str, Tensor], Mapping[str, Any]]
"""What a pass has come to: tensors, and facts that JSON can hold."""


# Note [The same bits as without an interruption]
# Sums of floating-point numbers depend on their grouping, and what an engine has found out about a model may
# decide how it adds up. So at every checkpoint, in every run, interrupted or not, everything that waits is
# added and everything found out is dropped: what follows depends on nothing but the totals, the random states
# and the batches to come, and these are what the file holds. (A checkpoint that a signal asks for lies
# between two of those: there the grouping differs, and with it the rounding.)
class Progress:
    """The progress of one pass, kept in a file where there is one.

    Args:
        who: The function that makes the pass.
        checkpoint: The file; None keeps nothing. Of many ranks each has its own, with its number in the name.
        every: Batches from one checkpoint to the next.
        model: The model.
        settings: What the totals depend on beside model and data, as JSON can hold it.
        ranks: The ranks of the pass.

    Attributes:
        found: What an earlier run came to; None where there is nothing to go on with.

    Raises:
        TypeError: If ``every`` is no integer.
        ValueError: If it is less than 1; if the file is damaged, or another function's, or of other weights,
            settings or ranks.
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
        self._who, self._every = who, every
        self._store: Store | None = None
        self._facts: dict[str, Any] = {}
        self._stored: dict[str, Any] = {}
        self._tensors: dict[str, Tensor] = {}
        self.found: State | None = None
        if checkpoint is None:
            return
        path = Path(checkpoint)
        if ranks.are_many:
            path = path.with_name(f"{path.name}.rank{ranks.rank}of{ranks.world}")
        self._store = Store(path, who)
        self._facts = {
            "who": who,
            "settings": {**settings, "checkpoint_every": every},
            "weights": weights_fingerprint(model),
            "ranks": [ranks.rank, ranks.world],
        }
        read = self._store.read()
        if read is not None:
            self._take_up(*read)

    def _take_up(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self._tensors, self._stored = tensors, facts
        self._check()
        totals = {
            name.removeprefix("total/"): tensor
            for name, tensor in self._tensors.items()
            if name.startswith("total/")
        }
        self.found = totals, self._stored["counts"]

    @property
    def is_kept(self) -> bool:
        """Whether there is a file."""
        return self._store is not None

    def read(
        self,
        data: Batches,
        device: torch.device,
        *,
        save: Callable[[], State],
        generator: torch.Generator | None = None,
        description: str = "",
        progress: bool = False,
    ) -> Iterator[tuple[int, Batch]]:
        """Yield the batches that are not done yet, with their numbers, and write what they come to.

        Args:
            data: Re-iterable batches.
            device: Where their tensors go.
            save: Tells what all batches so far have come to; called at every checkpoint.
            generator: What the pass draws from beside the global random states.
            description: Text in front of the progress bar.
            progress: Show a progress bar, where tqdm is installed.

        Yields:
            Number and batch. When the next one is asked for, the one before is done.

        Raises:
            ValueError: If the data are not those of the interrupted run.
        """
        if self._store is None:
            yield from enumerate(read_batches(data, device, description=description, progress=progress))
            return
        raw, done = self._begin(data, generator)
        if self._stored.get("is_finished"):
            return

        def write(index: int, *, is_finished: bool) -> None:
            self._write(raw, save(), {"batches": index, "is_finished": is_finished})

        index = done
        with waiting() as interrupt:
            for index, batch in enumerate(
                read_batches(raw, device, description=description, progress=progress), done
            ):
                yield index, batch
                if (index + 1) % self._every == 0 or interrupt.is_due:
                    write(index + 1, is_finished=False)
                if interrupt.is_due:
                    interrupt.deliver()
            write(raw.n_read, is_finished=True)

    def _begin(self, data: Batches, generator: torch.Generator | None) -> tuple[Raw, int]:
        # The data and all random generators as at the beginning, or where they were; how many are done.
        self._own = [*generators_of(data), *([] if generator is None else [generator])]
        self._begun = {f"begun/{name}": state for name, state in states(self._own).items()}
        if self.found is not None:
            self._begun = {name: self._tensors[name] for name in self._tensors if name.startswith("begun/")}
            set_states({name.removeprefix("begun/"): state for name, state in self._begun.items()}, self._own)
        raw = Raw(data)
        return raw, self._go_on(raw, self._own)

    def _write(self, raw: Raw, state: State, facts: Mapping[str, Any]) -> None:
        assert self._store is not None
        totals, counts = state
        tensors = {f"total/{name}": tensor for name, tensor in totals.items()}
        tensors |= {f"now/{name}": state for name, state in states(self._own).items()} | self._begun
        tensors |= {} if facts["is_finished"] else raw.position()
        self._store.write(tensors, {**self._facts, **facts, "chain": raw.chain, "counts": counts})

    def _go_on(self, raw: Raw, generators: Sequence[torch.Generator]) -> int:
        # Brings data and random states to where the interrupted run was; how many batches are done.
        if self.found is None:
            return 0
        done: int = self._stored["batches"]
        is_placed = raw.place(self._tensors, done, self._stored["chain"])
        if not is_placed:
            for _ in range(done):
                if raw.skip() is _END:
                    raise ValueError(
                        f"{self._who}: data must be those of the checkpoint, got {raw.n_read} batches for "
                        f"{done} that are done; delete the file to start anew"
                    )
            if raw.chain != self._stored["chain"]:
                raise ValueError(
                    f"{self._who}: data must be those of the checkpoint, got others among the first {done} "
                    "batches; delete the file to start anew"
                )
            if self._stored["is_finished"] and raw.skip() is not _END:
                raise ValueError(
                    f"{self._who}: data must be those of the checkpoint, got more than its {done} batches; "
                    "delete the file to start anew"
                )
        now = {name: tensor for name, tensor in self._tensors.items() if name.startswith("now/")}
        set_states({name.removeprefix("now/"): state for name, state in now.items()}, generators)
        return done

    def _check(self) -> None:
        for name, wanted in self._facts.items():
            if self._stored.get(name) == wanted:
                continue
            got = self._stored.get(name)
            if name == "settings" and isinstance(got, dict):
                differing = [key for key in {**wanted, **got} if wanted.get(key) != got.get(key)]
                name = ", ".join(differing)
                got, wanted = ([each.get(key) for key in differing] for each in (got, wanted))
            raise ValueError(
                f"{self._who}: checkpoint must be of this call, got {name} {got} in the file for {wanted}; "
                "delete it, or give another path"
            )


def check_every(who: str, every: object) -> None:
    """Refuse what is no number of batches.

    Args:
        who: The function that makes the pass.
        every: What was given.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is less than 1.
    """
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(f"{who}: checkpoint_every must be an integer, got {every!r}")
    if every < 1:
        raise ValueError(f"{who}: checkpoint_every must be >= 1, got {every}")


_END = object()


class Raw:
    """The batches as the loader gives them, and a checksum of all that have been read.

    Args:
        data: Re-iterable batches.

    Attributes:
        chain: The checksum.
        n_read: How many.
    """

    def __init__(self, data: Batches) -> None:
        self._data = data
        self._reader: Iterator[object] | None = None
        self.chain = 0
        self.n_read = 0

    def __iter__(self) -> Iterator[Any]:
        while (batch := self.skip()) is not _END:
            yield batch

    def skip(self) -> object:
        """Read one batch.

        Returns:
            The batch; ``_END`` after the last.
        """
        if self._reader is None:
            self._reader = iter(self._data)
        batch = next(self._reader, _END)
        if batch is _END:
            return batch
        self.n_read += 1
        for tensor in tensors_in(batch):
            plain = tensor.detach().cpu().contiguous().reshape(-1)
            form = f"{tensor.dtype}{list(tensor.shape)}".encode()
            self.chain = zlib.crc32(form, self.chain)
            if plain.numel():
                self.chain = zlib.crc32(plain.view(torch.uint8).numpy().data, self.chain)
        return batch

    def position(self) -> dict[str, Tensor]:
        """Tell where the loader is.

        Returns:
            Its state in a tensor; nothing of a loader that does not know it.
        """
        if not (hasattr(self._data, "state_dict") and hasattr(self._data, "load_state_dict")):
            return {}
        file = io.BytesIO()
        torch.save(self._data.state_dict(), file)
        return {"loader": torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8)}

    def place(self, tensors: Mapping[str, Tensor], done: int, chain: int) -> bool:
        """Let a loader that can go on after the batches that are done.

        Args:
            tensors: Of the file.
            done: How many are done.
            chain: Their checksum.

        Returns:
            Whether it could; else they have to be read again.
        """
        if "loader" not in tensors or not hasattr(self._data, "load_state_dict"):
            return False
        file = io.BytesIO(tensors["loader"].numpy().tobytes())
        try:
            state = torch.load(file, weights_only=True)
        except Exception:  # it holds what only running its code could read
            return False
        self._data.load_state_dict(state)
        self.n_read, self.chain = done, chain
        return True
