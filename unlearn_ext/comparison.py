"""``ux.comparison``: methods compared on one model."""

from unlearn_ext.evaluation.compare import METRICS, Comparison, Metric, compare
from unlearn_ext.evaluation.rows import Measure, Row

__all__ = ["METRICS", "Comparison", "Measure", "Metric", "Row", "compare"]
