"""Files of the repository that pages link to become pages of the site, and links to them hold.

A page says ``[texts](../bench/results/methods/texts.md)`` as the repository has it, so that it can be read
there as well. The site has no folder beside docs/: what is linked is put below ``repository/``, source files
as pages of code, and README.md is the home page.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
IMAGES = {".png", ".svg"}
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".cu": "cpp", ".cuh": "cpp", ".sh": "sh"}
# Markdown's links and images, and the images of HTML that README has for their width.
LINK = re.compile(r'(?P<before>\]\(|src=")(?P<target>[^)\s"#:]+)(?P<anchor>#[^)\s"]*)?(?P<after>[)"])')


def site_path(path: str) -> str:
    """Return where a file of the repository is on the site, before rendering.

    Args:
        path: Its path from the root of the repository.

    Returns:
        A path from the root of the site's sources.
    """
    if path == "README.md":
        return "index.md"
    name = path.removeprefix("docs/") if path.startswith("docs/") else f"repository/{path}"
    if Path(path).suffix in IMAGES or name.endswith(".md"):
        return name
    return f"{name.removesuffix('.py')}.md" if name.startswith("tutorials/") else f"{name}.md"


def repository_path(path: str) -> str:
    """Return the file of the repository that a page of the site is made of; undoes ``site_path``."""
    if path == "index.md":
        return "README.md"
    if not path.startswith("repository/"):
        return f"docs/{path}"
    path = path.removeprefix("repository/")
    return path if (ROOT / path).is_file() else path.removesuffix(".md")


def targets(path: str, text: str) -> Iterator[str]:
    """Yield the files of the repository that a text links to, by their paths from its root."""
    for link in LINK.finditer(text):
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link["target"]))
        if (ROOT / target).is_file():
            yield target


def linked(path: str, text: str) -> str:
    """Return a text with its links to files of the repository made links of the site."""
    here = posixpath.dirname(site_path(path))

    def moved(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link["target"]))
        if not (ROOT / target).is_file():
            return link[0]
        there = posixpath.relpath(site_path(target), here)
        return f"{link['before']}{there}{link['anchor'] or ''}{link['after']}"

    return LINK.sub(moved, text)


def _page_text(path: str) -> str:
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return text
    return f"# {path}\n\n``````{LANGUAGES.get(Path(path).suffix, '')}\n{text}``````\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md, what the navigation has below ``repository/``, and what they and the pages link to."""
    wanted = ["README.md", *map(repository_path, re.findall(r"repository/[\w./-]+\.md", str(config.nav)))]
    for file in files.documentation_pages():
        wanted += targets(repository_path(file.src_uri), file.content_string)
    done: set[str] = set()
    while wanted:
        path = wanted.pop()
        if path in done or path.startswith("docs/"):
            continue
        done.add(path)
        if Path(path).suffix in IMAGES:
            files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
            continue
        text = _page_text(path)
        files.append(File.generated(config, site_path(path), content=text))
        if path.endswith(".md"):
            wanted += targets(path, text)
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point the links of a page to where the site has their targets."""
    path = repository_path(page.file.src_uri)
    return linked(path, markdown) if path.endswith(".md") else markdown
