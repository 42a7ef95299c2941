"""``ux.importance``: importances, their estimators, and rules for layers of one's own."""

from unlearn_ext.fisher.diagonal import fisher_diagonal
from unlearn_ext.fisher.engine import register_layer
from unlearn_ext.fisher.importance import ESTIMATORS, Estimator, Importance
from unlearn_ext.tasks.losses import LossFn

__all__ = ["ESTIMATORS", "Estimator", "Importance", "LossFn", "fisher_diagonal", "register_layer"]
