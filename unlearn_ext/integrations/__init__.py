"""Thin bridges to other packages, each of them optional and imported only when it is used.

``huggingface`` and ``lightning`` for models that are trained with these; ``supreme`` and ``open_unlearning``
put the methods of this package into two benchmarks.
"""

from unlearn_ext.integrations import huggingface, lightning

__all__ = ["huggingface", "lightning"]
