"""Fast machine unlearning for PyTorch.

Importing the package loads its compiled operators, so that ``torch.ops.unlearn_ext`` is there from then on.
"""

from unlearn_ext import (
    comparison,
    data,
    hf,
    importance,
    integrations,
    losses,
    methods,
    metrics,
    ops,
    optim,
    report,
    subspace,
    tasks,
)
from unlearn_ext._internal.version import version
from unlearn_ext.evaluation.compare import compare
from unlearn_ext.evaluation.comparison import Comparison
from unlearn_ext.fisher.diagonal import fisher_diagonal
from unlearn_ext.fisher.importance import Importance
from unlearn_ext.fisher.kfac import KroneckerFactors
from unlearn_ext.fisher.kfac_pass import kfac_factors
from unlearn_ext.masks.saliency import Scores, saliency
from unlearn_ext.masks.selection import select_mask
from unlearn_ext.methods import (
    METHODS,
    gradient_masking,
    newton,
    pgu,
    plan_ssd,
    prune_neurons,
    salun,
    ssd,
    unlearn,
    unsir,
)
from unlearn_ext.results import UnlearnResult
from unlearn_ext.subspace.gram import ActivationGram, activation_gram

__version__ = version()

__all__ = [
    "METHODS",
    "ActivationGram",
    "Comparison",
    "Importance",
    "KroneckerFactors",
    "Scores",
    "UnlearnResult",
    "__version__",
    "activation_gram",
    "compare",
    "comparison",
    "data",
    "fisher_diagonal",
    "gradient_masking",
    "hf",
    "importance",
    "integrations",
    "kfac_factors",
    "losses",
    "methods",
    "metrics",
    "newton",
    "ops",
    "optim",
    "pgu",
    "plan_ssd",
    "prune_neurons",
    "report",
    "saliency",
    "salun",
    "select_mask",
    "ssd",
    "subspace",
    "tasks",
    "unlearn",
    "unsir",
]
