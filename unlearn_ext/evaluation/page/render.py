"""The page, laid out by its templates."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from unlearn_ext.evaluation.page import content

if TYPE_CHECKING:
    import jinja2
    import markupsafe


def render(document: Mapping[str, Any], *, title: str = "Unlearning compared") -> str:
    """Draw a comparison as a page.

    Args:
        document: What ``Comparison.to_dict()`` returns.
        title: Title of the page.

    Returns:
        An HTML document.
    """
    template = _environment().get_template("page.html")
    return template.render(
        title=title,
        style=_style(),
        lead=content.lead(document),
        notice=document["notice"],
        sections=content.sections(document),
    )


def fragment(document: Mapping[str, Any]) -> str:
    """Draw the table of a comparison alone, with its style, for a place inside another page.

    Args:
        document: What ``Comparison.to_dict()`` returns.

    Returns:
        An HTML fragment that changes nothing outside it.
    """
    template = _environment().get_template("fragment.html")
    return template.render(content=content.results(document), notice=document["notice"])


@functools.lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    # Here, so that importing the package does not take the time.
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("unlearn_ext.evaluation.page"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    return environment


def _breakable(text: str) -> markupsafe.Markup:
    # A long name may be broken where it has an underscore.
    import markupsafe

    return markupsafe.Markup("_<wbr>").join(text.split("_"))


@functools.lru_cache(maxsize=1)
def _style() -> markupsafe.Markup:
    import markupsafe

    # The package's own file, with no part of a document in it.
    return markupsafe.Markup(files(__package__).joinpath("page.css").read_text(encoding="utf-8"))
