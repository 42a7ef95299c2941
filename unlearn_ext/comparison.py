"""``ux.comparison``: methods compared on one model."""

from unlearn_ext.evaluation.compare import METRICS, Asked, compare
from unlearn_ext.evaluation.comparison import Comparison
from unlearn_ext.evaluation.metrics.measures import Measure
from unlearn_ext.evaluation.rows import Row

# The name that the type of ``compare(metrics=...)``'s entries has had here.
Metric = Asked

__all__ = ["METRICS", "Comparison", "Measure", "Metric", "Row", "compare"]
