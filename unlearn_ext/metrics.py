"""``ux.metrics``: the measures of ``unlearn_ext.evaluation.metrics``."""

from unlearn_ext.evaluation.metrics import (
    CONVENTIONS,
    Attack,
    Convention,
    Interval,
    accuracy,
    activation_distance,
    anamnesis_index,
    js_divergence,
    layer_distance,
    mia,
    relearn_steps,
    rf_jsd,
    tug_of_war,
    zrf,
)

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
