"""Named tensors in one safetensors file: written all or nothing, read in one go."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class FileKind:
    """A kind of file, marked as such in the file's metadata.

    Attributes:
        mark: What marks it.
        owner: The class whose ``save`` and ``load`` use it, for messages.
        contents: What is stored, for messages: "importances".
        instance: What a file of the kind holds, for messages: "saved importances".
    """

    mark: str
    owner: str
    contents: str
    instance: str

    def save(
        self, path: str | os.PathLike[str], tensors: Mapping[str, Tensor], facts: Mapping[str, str]
    ) -> None:
        """Write a file; a failure leaves the old file, if any, as it was.

        Args:
            path: The file.
            tensors: Any tensors, on any device.
            facts: What else to keep, by any name but ``"format"``.

        Raises:
            ImportError: If safetensors is not installed.
        """
        safetensors = self._safetensors()
        path = Path(path)
        # Tensors that share memory are refused by the format, and so are strided ones.
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            temporary.touch()
            permissions = temporary.stat().st_mode  # safetensors makes its files private
            safetensors.torch.save_file(copies, temporary, metadata={"format": self.mark, **facts})
            temporary.chmod(permissions)
            with open(temporary, "rb") as written:
                os.fsync(written.fileno())
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise

    def load(self, path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Read what ``save`` has written.

        Args:
            path: The file.

        Returns:
            The tensors, on the CPU, and the facts.

        Raises:
            ImportError: If safetensors is not installed.
            ValueError: If the file holds something else.
        """
        safetensors = self._safetensors()
        # Read once: a file replaced meanwhile must not give the tensors of one and the facts of another.
        data = Path(path).read_bytes()
        try:
            tensors = safetensors.torch.load(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        except safetensors.SafetensorError as error:
            raise ValueError(f"{self.owner}.load: {os.fspath(path)} must be a safetensors file") from error
        facts = header.get("__metadata__", {})
        if facts.pop("format", None) != self.mark:
            raise ValueError(f"{self.owner}.load: {os.fspath(path)} must hold {self.instance}")
        return tensors, facts

    def _safetensors(self) -> Any:  # noqa: ANN401 - an optional module
        try:
            import safetensors.torch
        except ImportError as error:
            raise ImportError(
                f"{self.contents} are stored as safetensors: pip install 'unlearn_ext[safetensors]'"
            ) from error
        return safetensors
