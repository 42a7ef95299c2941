"""Judging a model that has unlearned: metrics, comparisons beside retraining, and records."""

from unlearn_ext.evaluation.audit import Audit, audit
from unlearn_ext.evaluation.compare import compare
from unlearn_ext.evaluation.comparison import Comparison
from unlearn_ext.evaluation.evidence import Evidence, evidence

__all__ = ["Audit", "Comparison", "Evidence", "audit", "compare", "evidence"]
