"""The code of the README runs as it stands."""

import re
from pathlib import Path

README = Path(__file__).parents[1] / "README.md"


def test_readme_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:  # later blocks may use the names of earlier ones
        lines_before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_before + block[1], README, "exec"), namespace)
