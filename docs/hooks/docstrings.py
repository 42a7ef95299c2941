"""What the parser of Google's docstrings does not know of ours."""

from __future__ import annotations

import re
from typing import Any

import griffe


class Sections(griffe.Extension):
    """Reads ``Example:``, as Google's guide has it, like ``Examples:``, and ``::`` before code like ``:``."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:  # noqa: ANN401 - griffe's loader and more
        """Rewrite the docstring of a module, class or function before it is parsed."""
        if obj.docstring is not None:
            text = re.sub(r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = re.sub(r"::\n\n(?= +\S)", ":\n\n", text)
