"""``ux.metrics``: the measures of ``unlearn_ext.evaluation.metrics``; ``ux.metrics.language`` for texts."""

from unlearn_ext.evaluation.metrics import (
    CONVENTIONS,
    Attack,
    Convention,
    Interval,
    accuracy,
    activation_distance,
    anamnesis_index,
    js_divergence,
    language,
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
    "language",
    "layer_distance",
    "mia",
    "relearn_steps",
    "rf_jsd",
    "tug_of_war",
    "zrf",
]
