"""The version of the package, which stands in pyproject.toml alone."""

import functools
import importlib.metadata
import re
from pathlib import Path


@functools.cache
def version() -> str:
    """Say which version this is.

    Returns:
        That of the checkout the package lies in, else that of the installed distribution, else ``0+unknown``.
    """
    try:
        text = Path(__file__).resolve().parents[2].joinpath("pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        text = ""
    # tomllib is not in Python 3.10.
    project = text.partition("[project]")[2].partition("\n[")[0]
    named = dict(re.findall(r'^(name|version) = "([^"]+)"', project, re.MULTILINE))
    if named.get("name") == "unlearn_ext" and "version" in named:
        return named["version"]
    try:
        return importlib.metadata.version("unlearn_ext")
    except importlib.metadata.PackageNotFoundError:
        return "0+unknown"
