"""What a model is for, what a batch is, and losses with one value per sample.

A ``Task`` says it once and is accepted everywhere as ``task=``: how the model is called, what its answers and
labels mean, which label is ignored. Without one the task is inferred from the model and each batch, and what
these leave open is refused, naming the task to pass.
"""

from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.classification import Classification
from unlearn_ext.tasks.decisions import Binary, MultiLabel
from unlearn_ext.tasks.dense import Segmentation
from unlearn_ext.tasks.infer import infer
from unlearn_ext.tasks.language import CausalLM, MaskedLM, Sequence2Sequence, TokenClassification
from unlearn_ext.tasks.losses import resolve
from unlearn_ext.tasks.regression import Regression

__all__ = [
    "Binary",
    "CausalLM",
    "Classification",
    "MaskedLM",
    "MultiLabel",
    "Regression",
    "Segmentation",
    "Sequence2Sequence",
    "Task",
    "TokenClassification",
    "infer",
    "resolve",
]
