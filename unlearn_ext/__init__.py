"""Fast machine unlearning for PyTorch.

Importing the package loads its compiled operators, so that ``torch.ops.unlearn_ext`` is there from then on.
"""

from unlearn_ext import data, importance, losses, methods, metrics, ops, optim, report
from unlearn_ext.importance import Importance, fisher_diagonal
from unlearn_ext.methods import METHODS, plan_ssd, ssd, unlearn
from unlearn_ext.report import UnlearnResult

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "Importance",
    "UnlearnResult",
    "__version__",
    "data",
    "fisher_diagonal",
    "importance",
    "losses",
    "methods",
    "metrics",
    "ops",
    "optim",
    "plan_ssd",
    "report",
    "ssd",
    "unlearn",
]
