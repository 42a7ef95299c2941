"""Measures of what a model still knows, and of how close it is to one that never saw the forget set.

Every measure runs the model in eval mode and leaves it as it was. None of them proves that data have been
forgotten: they compare, and most of them mean something only beside a retrained model.
"""

from unlearn_ext.evaluation.metrics.accuracy import accuracy
from unlearn_ext.evaluation.metrics.attacks import CONVENTIONS, Attack, Convention, Interval, mia
from unlearn_ext.evaluation.metrics.distances import layer_distance
from unlearn_ext.evaluation.metrics.divergences import activation_distance, js_divergence, zrf
from unlearn_ext.evaluation.metrics.proxies import rf_jsd, tug_of_war
from unlearn_ext.evaluation.metrics.relearning import anamnesis_index, relearn_steps

__all__ = [
    "CONVENTIONS",
    "Attack",
    "Convention",
    "Interval",
    "accuracy",
    "activation_distance",
    "anamnesis_index",
    "js_divergence",
    "layer_distance",
    "mia",
    "relearn_steps",
    "rf_jsd",
    "tug_of_war",
    "zrf",
]
