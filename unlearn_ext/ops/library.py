"""The library of ops: compiled, or else in plain PyTorch, and what is said of the one that was chosen.

The environment variable ``UNLEARN_OPS`` decides: ``auto`` (the default) takes the compiled library where it
loads, and says in one warning where it does not; ``compiled`` makes it an error; ``reference`` takes the kernels
in plain PyTorch, without a warning.
"""

import importlib
import json
import os
import platform
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from unlearn_ext._internal.version import version
from unlearn_ext.ops import fallback
from unlearn_ext.ops.fallback.schemas import SCHEMAS

_PACKAGE = Path(__file__).resolve().parents[1]
_MODULE = "unlearn_ext._C"
_CHOICES = ("auto", "compiled", "reference")


def _recorded() -> dict[str, str]:
    """Read what the build left: for what it compiled, or why it did not."""
    try:
        found = json.loads(_PACKAGE.joinpath("_build_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(name): str(value) for name, value in found.items()} if isinstance(found, dict) else {}


def _release(of: str) -> list[str]:
    return of.partition("+")[0].split(".")[:2]


def _mismatch(built: dict[str, str]) -> str:
    """Say of a library for another torch what it is for: it may load, and then crash."""
    if "torch" not in built or _release(built["torch"]) == _release(torch.__version__):
        return ""
    return (
        f"it was built for torch {built['torch']} and Python {built.get('python')} "
        f"(CUDA: {built.get('cuda')}), and this is torch {torch.__version__} and Python "
        f"{platform.python_version()}"
    )


def _why_missing(error: ImportError, built: dict[str, str]) -> str:
    if "reason" in built:
        return built["reason"]
    if isinstance(error, ModuleNotFoundError) and error.name == _MODULE:
        return (
            "this installation has no compiled library for "
            f"torch {torch.__version__} and Python {platform.python_version()}"
        )
    here = f"torch {torch.__version__} and Python {platform.python_version()}"
    why = (
        f"it was built for torch {built['torch']} and Python {built.get('python')} (CUDA: {built.get('cuda')}), "
        f"and this is {here}"
        if "torch" in built
        else f"it is not built for {here}"
    )
    return f"{_MODULE} cannot be imported ({error}): {why}"


def _mend(built: dict[str, str]) -> str:
    source = _PACKAGE.parent
    is_checkout = source.joinpath("CMakeLists.txt").is_file()
    where = f" in {source}" if is_checkout else " in the source folder"
    editable = "-e ." if is_checkout else "."
    command = f"UNLEARN_BUILD=require pip install --no-build-isolation --no-deps {editable}"
    first = f"{built['mend']}, then " if built.get("mend") else ""
    return f"{first}`{command}`{where}"


def _load() -> tuple[ModuleType | None, str]:
    """Load the compiled library.

    Returns:
        It, or None and why.
    """
    choice = os.environ.get("UNLEARN_OPS", "") or "auto"
    if choice not in _CHOICES:
        raise ValueError(f"UNLEARN_OPS must be one of {', '.join(_CHOICES)}, got {choice!r}")
    if choice == "reference":
        return None, "UNLEARN_OPS=reference"
    built = _recorded()
    why, cause = _mismatch(built), None
    if why:
        why = f"{_MODULE} is left alone: {why}"
    else:
        # torch comes first: the compiled library links against libraries that only torch's own import can find.
        try:
            return importlib.import_module(_MODULE), ""
        except ImportError as error:
            why, cause = _why_missing(error, built), error
    if choice == "compiled":
        raise ImportError(f"{why}; {_mend(built)} mends it") from cause
    warnings.warn(
        f"unlearn_ext: the ops run on plain PyTorch kernels, which are slower: {why}. {_mend(built)} mends it; "
        "UNLEARN_OPS=reference in the environment says that it is meant, and silences this.",
        stacklevel=3,
    )
    return None, why


_C, _REASON = _load()
if _C is None:
    # It defines the same ops again, which ends the process: nothing may load it from here on.
    sys.modules[_MODULE] = None  # type: ignore[assignment]

# Registrations end with it.
_LIBRARY = (
    fallback.define(SCHEMAS)
    if _C is None
    else fallback.fill_in(
        "unlearn_ext: ops on CUDA devices run on plain PyTorch kernels, which are slower: the library was built "
        f"without CUDA ({_C.build_info()['cuda_reason']}). UNLEARN_CUDA=ON with {_mend({})} mends it."
    )
)

OPS = torch.ops.unlearn_ext


def build_info() -> dict[str, Any]:
    """Say which kernels the ops have, how they were built and what they chose on this computer.

    Returns:
        A dict with ``kernels`` (``compiled``, or ``reference`` for those in plain PyTorch), ``reason`` (why not
        compiled) and ``mend`` (the command that would), both empty if compiled; ``version``, ``torch`` and
        ``python`` (versions built for), ``cuda`` (bool), ``cuda_reason`` (why CUDA is or is not in the build),
        ``cuda_architectures``, ``cpu_capability`` (chosen at run time), ``cpu_capabilities`` (compiled in),
        ``compiler`` and ``schemas`` (of every op).

    Example:
        >>> from unlearn_ext import ops
        >>> ops.build_info()["cpu_capability"] in ops.build_info()["cpu_capabilities"]
        True
    """
    if _C is not None:
        return {"kernels": "compiled", "reason": "", "mend": "", **_C.build_info()}
    return {
        "kernels": "reference",
        "reason": _REASON,
        "mend": _mend(_recorded()),
        "version": version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "compiler": "none",
        "cuda": False,
        "cuda_reason": "nothing is compiled",
        "cuda_architectures": [],
        "cpu_capability": "reference",
        "cpu_capabilities": ["reference"],
        "schemas": list(SCHEMAS),
    }
