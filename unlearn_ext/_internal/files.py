"""Files written all or nothing, and named tensors in one safetensors file."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from unlearn_ext._internal.digests import update_digest
from unlearn_ext._internal.undo import Undone

_WRITTEN: ContextVar[list[Path] | None] = ContextVar("written", default=None)


@contextmanager
def noting_files() -> Iterator[list[Path]]:
    """Note which files are written inside.

    Yields:
        Their real paths, each once.
    """
    outer = _WRITTEN.get()
    noted: list[Path] = []

    def put_back() -> None:
        _WRITTEN.set(outer)
        if outer is not None:
            outer.extend(path for path in noted if path not in outer)

    with Undone(put_back):
        _WRITTEN.set(noted)
        yield noted


@contextmanager
def replacing(path: str | os.PathLike[str], *, keep_old: bool = False) -> Iterator[Path]:
    """Write a file all or nothing: whoever reads it sees the old content or the new one.

    The new content reaches the disk before it takes the old one's place. The file keeps its permissions; a
    new one gets those that any new file gets. A symbolic link stays one.

    Args:
        path: The file; its folder is made if it is not there.
        keep_old: Leave the old content beside it, under its name with ``.old`` added, and come back only when
            the folder has reached the disk as well.

    Yields:
        The temporary file to write, in the same folder. It takes the file's place at the end of the block,
        and is removed if the block fails.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "new" / "a.bin") as draft:
        ...         _ = draft.write_bytes(b"whole")
        ...     (Path(folder) / "new" / "a.bin").read_bytes()
        b'whole'
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        draft.touch()
        permissions = (target if target.exists() else draft).stat().st_mode
        yield draft
        draft.chmod(permissions)  # some writers make their files private
        with open(draft, "rb+") as written:
            os.fsync(written.fileno())
        if keep_old and target.exists():
            os.replace(target, f"{target}.old")
        os.replace(draft, target)
        if (noted := _WRITTEN.get()) is not None and target not in noted:
            noted.append(target)
        if keep_old:
            _sync_folder(target.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def _sync_folder(folder: Path) -> None:
    # Interrupts come between a call and what is done with its result: opening also puts the descriptor down,
    # and closing takes it up.
    held: list[int] = []

    def close() -> None:
        if held:
            any(map(os.close, map(held.pop, [-1])))

    with Undone(close):
        held.extend(map(os.open, [folder], [os.O_RDONLY]))
        os.fsync(held[0])


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a text file all or nothing; see ``replacing``.

    Args:
        path: The file; its folder is made if it is not there.
        text: The content, written as UTF-8.
    """
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")


def _digest(tensors: Mapping[str, Tensor], facts: Mapping[str, str]) -> str:
    digest = hashlib.blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name}\0".encode())
        update_digest(digest, tensors[name])
    return digest.hexdigest()


def names_in(text: str, n: int) -> list[str]:
    """Read a list of names.

    Args:
        text: JSON.
        n: How many there must be.

    Returns:
        The names.

    Raises:
        ValueError: If it is something else.
    """
    names = json.loads(text)
    if not isinstance(names, list) or len(set(map(str, names))) != n or len(names) != n:
        raise ValueError(f"there must be {n} names, got {text[:100]}")
    return [str(name) for name in names]


@dataclass(frozen=True)
class FileKind:
    """A kind of file, marked as such in the file's metadata.

    Attributes:
        mark: What marks it.
        owner: The class whose ``save`` and ``load`` use it, for messages.
        contents: What is stored, for messages: "importances".
        instance: What a file of the kind holds, for messages: "saved importances".
        facts: Names of the facts of every file of the kind. With others, a file is damaged: the name of its
            digest may have become theirs.
    """

    mark: str
    owner: str
    contents: str
    instance: str
    facts: tuple[str, ...]

    def save(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, Tensor],
        facts: Mapping[str, str],
        *,
        keep_old: bool = False,
    ) -> None:
        """Write a file; a failure leaves the old file, if any, as it was.

        Args:
            path: The file.
            tensors: Any tensors, on any device.
            facts: What else to keep, by any name but ``"format"`` and ``"digest"``.
            keep_old: See ``replacing``.

        Raises:
            ImportError: If safetensors is not installed.
            OSError: If the file cannot be written.
        """
        safetensors = self._safetensors()
        # Tensors that share memory are refused by the format, and so are strided ones.
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        told = {"format": self.mark, **facts}
        told["digest"] = _digest(copies, told)
        with replacing(path, keep_old=keep_old) as draft:
            try:
                safetensors.torch.save_file(copies, draft, metadata=told)
            except safetensors.SafetensorError as error:  # its own class also for what the disk refuses
                raise OSError(f"{self.owner}.save: {os.fspath(path)} cannot be written: {error}") from error

    def load(self, path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Read what ``save`` has written.

        Args:
            path: The file.

        Returns:
            The tensors, on the CPU, and the facts.

        Raises:
            ImportError: If safetensors is not installed.
            ValueError: If the file holds something else, or is damaged: what it holds has another digest than
                when it was written (files of earlier versions have none).
        """
        safetensors = self._safetensors()
        # Read once: a file replaced meanwhile must not give the tensors of one and the facts of another.
        data = Path(path).read_bytes()
        try:
            tensors = safetensors.torch.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        except (safetensors.SafetensorError, LookupError, RuntimeError, TypeError, OverflowError) as error:
            # The format allows dtypes and shapes that torch has not, which it says in errors of its own.
            raise ValueError(f"{self.owner}.load: {os.fspath(path)} must be a safetensors file") from error
        facts = header.get("__metadata__") or {}
        if facts.get("format") != self.mark:
            raise ValueError(f"{self.owner}.load: {os.fspath(path)} must hold {self.instance}")
        digest = facts.pop("digest", None)
        is_changed = digest is not None and digest != _digest(tensors, facts)
        if is_changed or facts.keys() - {"format", *self.facts}:
            raise ValueError(
                f"{self.owner}.load: {os.fspath(path)} must be as it was written, got a damaged file; take a "
                f"copy of it, or compute the {self.contents} again"
            )
        del facts["format"]
        return tensors, facts

    @contextmanager
    def understood(self, path: str | os.PathLike[str]) -> Iterator[None]:
        """Refuse a file whose facts are not those that the owner writes.

        Args:
            path: The file.

        Yields:
            Nothing; inside, the facts are read.

        Raises:
            ValueError: If they cannot be.
        """
        try:
            yield
        except (LookupError, TypeError, AttributeError, ValueError, OverflowError, RecursionError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(
                f"{self.owner}.load: {os.fspath(path)} must hold {self.instance}: {reason}"
            ) from error

    def _safetensors(self) -> Any:  # noqa: ANN401 - an optional module
        try:
            import safetensors.torch
        except ImportError as error:
            raise ImportError(
                f"{self.contents} are stored as safetensors: pip install 'unlearn_ext[safetensors]'"
            ) from error
        return safetensors
