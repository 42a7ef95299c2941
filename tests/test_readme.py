"""The code of the README runs as it stands, and what contributors are told to add to is there."""

import re
from pathlib import Path

import unlearn_ext as ux

README = Path(__file__).parents[1] / "README.md"
CONTRIBUTING = README.with_name("CONTRIBUTING.md")


def test_readme_code_runs_and_forgets(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = README.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert blocks
    namespace: dict[str, object] = {"__name__": "readme"}
    for block in blocks:  # later blocks may use the names of earlier ones
        lines_before = text.count("\n", 0, block.start(1))
        exec(compile("\n" * lines_before + block[1], README, "exec"), namespace)
    # What the comments say is printed, and the model it is printed of: one that knew the class.
    lines = capsys.readouterr().out.splitlines()
    measured = [line for line in lines if re.fullmatch(r"[\d.]+ [\d.]+", line)]
    assert measured == re.findall(r"^print\(.*ux\.metrics\.accuracy.*# ([\d.]+ [\d.]+)$", text, re.MULTILINE)
    assert len(measured) == 2
    namespace["plan"].revert()
    assert ux.metrics.accuracy(namespace["model"], namespace["forget"]) >= 0.9


def test_what_can_be_added_is_named_where_contributors_are_told():
    section = CONTRIBUTING.read_text(encoding="utf-8").partition("## Adding to it")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("| ")][1:]
    assert [row[0] for row in rows] == ["method", "metric", "task", "layer rule", "op"]
    for kind, _, place, named in rows:
        folder = README.parent / re.search(r"`([\w/.]+)`", place)[1]
        assert folder.exists(), f"{kind}: {folder}"
        registry, path = re.search(r"`(\w+)`, `([\w/.]+)`", named).groups()
        text = (README.parent / path).read_text(encoding="utf-8")
        assert re.search(rf"\b{registry}\b.*=", text), f"{kind}: no {registry} in {path}"


def test_links_of_the_pages_for_contributors_lead_somewhere():
    for page in (README, CONTRIBUTING, README.with_name("SECURITY.md")):
        links = re.findall(r'\]\(([^)\s#:]+)(?:#[^)]*)?\)|src="([^"]+)"', page.read_text(encoding="utf-8"))
        assert links
        for link in map("".join, links):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
