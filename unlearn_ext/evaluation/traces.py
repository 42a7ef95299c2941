"""What a run leaves behind of its data: which files it has written, and how to destroy what it has made."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from unlearn_ext._internal.files import noting_files


@contextmanager
def files_written() -> Iterator[list[Path]]:
    """List the files that the package writes inside.

    Those of this thread: importances, Gram matrices, factors, checkpoints of passes, caches, records and
    pages. What a model, a loader or a method of the user writes is not among them.

    Yields:
        The list, complete at the end: real paths in the order of their first writing, each once. A file may
        be gone again.

    Example:
        >>> import tempfile
        >>> from unlearn_ext._internal.files import write_text
        >>> with tempfile.TemporaryDirectory() as folder, files_written() as written:
        ...     write_text(Path(folder) / "a.json", "{}")
        >>> [path.name for path in written]
        ['a.json']
    """
    with noting_files() as written:
        yield written


def purge(*derived: object) -> None:
    """Destroy what derives from forgotten data.

    Tensors are overwritten with zeros, files deleted (with the earlier version of a checkpoint beside them),
    objects with a ``purge()`` of their own told so; in mappings (importances, Gram matrices, factors) and
    sequences everything is. A file system or a device may keep older copies of the same bits; this does not
    reach them.

    Args:
        *derived: Tensors, ``Path`` objects, things with ``purge()``, mappings and sequences of them.

    Raises:
        TypeError: If one is something else; nothing is destroyed then.
        OSError: If a file cannot be deleted; what comes before it is destroyed then.

    Example:
        >>> importances = {"weight": torch.ones(2)}
        >>> purge(importances)
        >>> importances["weight"]
        tensor([0., 0.])
    """
    for number, value in enumerate(derived):
        check_destroyable(f"purge: derived[{number}]", value)
    for value in derived:
        destroy(value)


def check_destroyable(what: str, value: object) -> None:
    """Refuse what ``destroy`` does not know.

    Args:
        what: What it is called in the message.
        value: The value.

    Raises:
        TypeError: If it is something else.
    """
    if hasattr(value, "purge") or isinstance(value, (Tensor, Path)):
        return
    if isinstance(value, (Mapping, list, tuple)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            check_destroyable(what, entry)
        return
    raise TypeError(
        f"{what} must be a tensor, a Path, something with purge(), or a mapping or sequence of them, got "
        f"{type(value).__name__}"
    )


def destroy(value: object) -> None:
    """Destroy one thing; see ``purge``.

    Args:
        value: What ``check_destroyable`` has let pass.
    """
    own = getattr(value, "purge", None)
    if own is not None:
        own()
    elif isinstance(value, Tensor):
        _overwrite(value)
    elif isinstance(value, Path):
        # Files are written through symbolic links: what is to go lies where the link leads.
        for path in (Path(os.path.realpath(value)), value):
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.old").unlink(missing_ok=True)
    elif isinstance(value, (Mapping, list, tuple)):
        for entry in value.values() if isinstance(value, Mapping) else value:
            destroy(entry)


def _overwrite(tensor: Tensor) -> None:
    # Tensors that were made in inference mode can be written to nowhere else.
    with torch.inference_mode(tensor.is_inference()), torch.no_grad():
        if tensor.layout is torch.sparse_coo:
            tensor._values().zero_()  # zeroing the tensor would let go of its values as they are
        elif tensor.layout in (torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc):
            tensor.values().zero_()
        else:
            tensor.zero_()
