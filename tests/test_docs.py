"""Code of the pages in docs/ runs as it stands, tutorials too, and the reference has every public name."""

import importlib
import importlib.util
import inspect
import re
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
NEEDS = {"language_models.md": ("transformers", "peft", "accelerate")}
# Pages whose code takes names that the reader has: a model, loaders, ranks.
NOT_RUN = {"processes.md", "sharded.md", "texts.md"}
PAGES = sorted({path.name for path in DOCS.glob("*.md")} - NOT_RUN)
TUTORIALS = sorted(path.stem for path in (DOCS / "tutorials").glob("*.py"))


def hook(name):
    spec = importlib.util.spec_from_file_location(name, DOCS / "hooks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    for package in NEEDS.get(page, ()):
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks or page not in NEEDS
    namespace: dict[str, object] = {"__name__": "page"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for block in blocks:  # later blocks may use the names of earlier ones
            lines_before = text.count("\n", 0, block.start(1))
            exec(compile("\n" * lines_before + block[1], page, "exec"), namespace)


def test_the_page_on_texts_shows_what_the_example_does():
    text = (DOCS / "texts.md").read_text(encoding="utf-8")
    example = (DOCS.parent / "examples" / "forget_user_sequences.py").read_text(encoding="utf-8")
    does = {line.strip() for line in example.splitlines()}
    block = text[text.index("```python\n") :].split("```")[1].removeprefix("python\n")
    assert "ux.newton" in block
    assert [line for line in block.splitlines() if line and line not in does] == []


def test_pages_are_in_the_navigation_and_hold_together():
    written = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": ([\w/.-]+\.md)$", written, re.MULTILINE))
    assert {path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")} <= listed
    assert {f"tutorials/{name}.md" for name in TUTORIALS} <= listed


@pytest.mark.parametrize("name", TUTORIALS)
def test_a_tutorial_runs_and_shows_what_it_promises(name):
    for package in ("nbclient", "ipykernel", "sklearn"):
        pytest.importorskip(package)
    if name == "forget_texts":
        pytest.importorskip("transformers")
    tutorials = hook("tutorials")
    notebook = tutorials.executed(DOCS / "tutorials" / f"{name}.py")  # a cell that raises is an error here
    page = tutorials.page(notebook, f"{name}.ipynb")
    assert page.startswith("# ")
    assert "## What is not promised" in page
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert outputs
    assert not [output for output in outputs if output.get("name") == "stderr"]
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert len(re.findall(r"^assert ", code, re.MULTILINE)) >= 3  # what it says, it holds itself to


def test_cells_of_the_percent_format():
    text = '# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\nx = 1  # %% of something\n\n\n# %%\n"x"\n'
    expected = [("markdown", "# Title\n\nText."), ("code", "x = 1  # %% of something"), ("code", '"x"')]
    assert list(hook("tutorials").cells(text)) == expected


def test_outputs_of_cells_become_markdown():
    tutorials = hook("tutorials")
    made = [
        {"output_type": "stream", "name": "stdout", "text": "one\ntwo\n"},
        {"output_type": "execute_result", "data": {"text/plain": "3", "text/html": "<b>\n\n3</b>"}},
        {"output_type": "display_data", "data": {"text/plain": "<Figure>", "image/png": "aGk=\n"}},
        {"output_type": "execute_result", "data": {"text/plain": "{'a': 1}"}},
    ]
    cells = [
        {"cell_type": "markdown", "source": "# Title"},
        {"cell_type": "code", "source": "x", "outputs": made},
    ]
    page = tutorials.page({"cells": cells}, "name.ipynb")
    assert page.startswith("# Title\n\nThis page was run when it was built; [the notebook](name.ipynb)")
    for part in (
        "```python\nx\n```",
        "```text\none\ntwo\n```",
        "<div><b>\n3</b></div>",
        'src="data:image/png;base64,aGk="',
        "```text\n{'a': 1}\n```",
    ):
        assert part in page
    assert "<Figure>" not in page


def test_links_out_of_the_folder_become_links_of_the_site():
    pytest.importorskip("mkdocs")
    repository = hook("repository")
    text = (
        "[a](../bench/RESULTS.md#x) [b](tasks.md) [c](../examples/layouts.py) [d](https://a.org/b.md) "
        '[e](../README.md) <img src="../examples/report.png"> [f](tutorials/forget_class.py) [g](gone.md)'
    )
    assert repository.linked("docs/audit.md", text) == (
        "[a](repository/bench/RESULTS.md#x) [b](tasks.md) [c](repository/examples/layouts.py.md) "
        '[d](https://a.org/b.md) [e](index.md) <img src="repository/examples/report.png"> '
        "[f](tutorials/forget_class.md) [g](gone.md)"
    )
    inner = repository.linked("unlearn_ext/fisher/engine/README.md", "[a](../../../docs/fisher.md)")
    assert inner == "[a](../../../../fisher.md)"
    for path in ("README.md", "docs/tasks.md", "bench/RESULTS.md", "examples/layouts.py"):
        assert repository.repository_path(repository.site_path(path)) == path


ROOMS = ("ops", "methods", "metrics", "optim", "tasks", "data", "hf", "report", "evaluation")


@pytest.mark.parametrize("room", ["", *ROOMS])
def test_every_public_name_is_in_the_reference(room):
    module = importlib.import_module(f"unlearn_ext.{room}" if room else "unlearn_ext")
    text = (DOCS / "reference" / f"{room or 'unlearn_ext'}.md").read_text(encoding="utf-8")
    shown = re.findall(r"^::: (unlearn_ext(?:\.\w+)*)\.(\w+)$", text, re.MULTILINE)
    for home, name in shown:
        assert getattr(importlib.import_module(home), name) is getattr(module, name)
    public = {name for name in module.__all__ if not name.startswith("__")}
    assert {name for _, name in shown} == {
        name for name in public if not inspect.ismodule(getattr(module, name))
    }
