"""How much each scalar parameter matters to a data set: the Fisher diagonal and its kin."""

from unlearn_ext.fisher.diagonal import fisher_diagonal
from unlearn_ext.fisher.importance import Importance

__all__ = ["Importance", "fisher_diagonal"]
