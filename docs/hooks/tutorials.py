"""Tutorials: Python files in percent format, run as notebooks, shown with what they printed.

In the repository a tutorial is a file with ``# %%`` before each cell, which editors open as a notebook and
diffs can be read of. Here it becomes a notebook, is run from the first cell to the last, and is shown as a
page; the notebook lies beside it. A cell that raises ends the build.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import nbformat
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "tutorials"
TIMEOUT_S = 300


def cells(text: str) -> Iterator[tuple[str, str]]:
    """Split a file in percent format.

    Args:
        text: The file.

    Yields:
        ``"markdown"`` or ``"code"``, and the source of the cell.
    """
    for part in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = part.partition("\n")
        if head.strip() == "[markdown]":
            yield "markdown", re.sub(r"^# ?", "", body, flags=re.MULTILINE).strip()
        else:
            yield "code", body.strip()


def executed(path: Path) -> nbformat.NotebookNode:
    """Run a tutorial.

    Args:
        path: File in percent format.

    Returns:
        The notebook with its outputs.
    """
    import nbclient
    import nbformat.v4
    from traitlets.config import Config

    kinds = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    notebook = nbformat.v4.new_notebook()
    notebook.cells = [kinds[kind](source) for kind, source in cells(path.read_text(encoding="utf-8"))]
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell{number}"  # random ones would change from build to build
    # One thread: the networks are too small to share out, and the sums come out the same on any computer.
    given = dict(os.environ, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false")
    client = nbclient.NotebookClient(
        notebook, timeout=TIMEOUT_S, kernel_name="python3", config=Config(KernelManager={"transport": "ipc"})
    )
    return client.execute(env=given)


def page(notebook: Mapping[str, Any], name: str) -> str:
    """Write an executed notebook as Markdown.

    Args:
        notebook: With outputs.
        name: Its file, to be offered below the title.

    Returns:
        Markdown; tables and pictures as HTML.
    """
    parts = []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            parts.append(cell["source"])
            continue
        parts.append(f"```python\n{cell['source']}\n```")
        parts += filter(None, map(_output, cell["outputs"]))
    title, *rest = parts
    title += f"\n\nThis page was run when it was built; [the notebook]({name}) is the same with its outputs."
    return "\n\n".join([title, *rest]) + "\n"


def _output(output: Mapping[str, Any]) -> str:
    if output["output_type"] == "stream":
        return f"```text\n{output['text'].rstrip()}\n```"
    data = output["data"]
    if "text/html" in data:
        # Markdown ends a block of HTML at an empty line.
        return "<div>" + re.sub(r"\n\s*", "\n", data["text/html"]).strip() + "</div>"
    if "image/png" in data:
        return f'<img alt="" src="data:image/png;base64,{data["image/png"].strip()}">'
    return f"```text\n{data['text/plain']}\n```"


def _kept(path: Path) -> dict[str, Any]:
    """Return an executed tutorial, from the last build if neither it nor the package has changed."""
    import torch

    digest = hashlib.sha256(torch.__version__.encode())
    for source in [path, Path(__file__), *sorted((ROOT / "unlearn_ext").rglob("*.py"))]:
        digest.update(source.read_bytes())
    kept = ROOT / "build" / "tutorials" / f"{path.stem}-{digest.hexdigest()[:16]}.ipynb"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        for older in kept.parent.glob(f"{path.stem}-*"):
            older.unlink()
        kept.write_text(json.dumps(executed(path), indent=1) + "\n", encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page and a notebook for every tutorial."""
    from mkdocs.structure.files import File

    for path in sorted(FOLDER.glob("*.py")):
        notebook = _kept(path)
        name = f"{path.stem}.ipynb"
        text = json.dumps(notebook, indent=1) + "\n"
        files.append(File.generated(config, f"tutorials/{path.stem}.md", content=page(notebook, name)))
        files.append(File.generated(config, f"tutorials/{name}", content=text))
    return files
