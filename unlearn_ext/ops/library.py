"""Loading the compiled library, and what it says of its own build."""

import json
import platform
from pathlib import Path
from typing import Any

import torch


def _describe_import_failure(error: ImportError) -> str:
    here = f"torch {torch.__version__} and Python {platform.python_version()}"
    try:
        built = json.loads(
            Path(__file__).resolve().parents[1].joinpath("_build_info.json").read_text(encoding="utf-8")
        )
    except (OSError, ValueError):
        reason = f"it is not built for {here}"
    else:
        reason = (
            f"it was built for torch {built.get('torch')} and Python {built.get('python')} "
            f"(CUDA: {built.get('cuda')}), and this is {here}"
        )
    return (
        f"unlearn_ext._C cannot be imported ({error}): {reason}; "
        "rebuild it in the source folder with `pip install --no-build-isolation .`"
    )


# torch comes first: the compiled library links against libraries that only torch's own import can find.
try:
    import unlearn_ext._C as _C
except ImportError as error:
    raise ImportError(_describe_import_failure(error)) from error

OPS = torch.ops.unlearn_ext


def build_info() -> dict[str, Any]:
    """Say how the compiled library was built and what it chose on this computer.

    Returns:
        A dict with ``version``, ``torch`` and ``python`` (versions built for), ``cuda`` (bool),
        ``cuda_reason`` (why CUDA is or is not in the build), ``cuda_architectures``, ``cpu_capability``
        (chosen at run time), ``cpu_capabilities`` (compiled in), ``compiler`` and ``schemas`` (of every op).

    Example:
        >>> from unlearn_ext import ops
        >>> ops.build_info()["cpu_capability"] in ops.build_info()["cpu_capabilities"]
        True
    """
    info: dict[str, Any] = _C.build_info()
    return info
