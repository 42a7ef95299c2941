"""A comparison as one HTML page: style, figures and pictures in the file, no script, nothing loaded.

``content`` makes plain data of a comparison, ``charts`` the pictures, the templates lay them out.
"""

from unlearn_ext.evaluation.page.numbers import figure
from unlearn_ext.evaluation.page.render import fragment, render
from unlearn_ext.evaluation.page.verdicts import verdicts

__all__ = ["figure", "fragment", "render", "verdicts"]
