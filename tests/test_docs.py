"""The code of the pages in docs/ runs as it stands."""

import re
import warnings
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
NEEDS = {"language_models.md": ("transformers", "peft", "accelerate")}


@pytest.mark.parametrize("page", NEEDS)
def test_code_of_a_page_runs(page, tmp_path, monkeypatch):
    for package in NEEDS[page]:
        pytest.importorskip(package)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    text = (DOCS / page).read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
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
