"""The methods by name, and one function that runs any of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from unlearn_ext.fisher.importance import Importance
from unlearn_ext.methods.baselines import finetune, gradient_ascent, neg_grad_plus, random_label, retrain
from unlearn_ext.methods.fisher_forgetting import fisher_forgetting
from unlearn_ext.methods.gradient_masking import gradient_masking, salun
from unlearn_ext.methods.msg import msg
from unlearn_ext.methods.newton import newton
from unlearn_ext.methods.pgu import pgu_from_sets
from unlearn_ext.methods.preference import gradient_difference, npo, simnpo
from unlearn_ext.methods.rmu import rmu
from unlearn_ext.methods.ssd import ssd
from unlearn_ext.methods.teachers import bad_teacher, scrub
from unlearn_ext.methods.unsir import unsir
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.batches import Batches

METHODS: dict[str, Callable[..., UnlearnResult]] = {
    "ssd": ssd,
    "gradient_masking": gradient_masking,
    "salun": salun,
    "pgu": pgu_from_sets,
    "unsir": unsir,
    "retrain": retrain,
    "finetune": finetune,
    "gradient_ascent": gradient_ascent,
    "neg_grad_plus": neg_grad_plus,
    "random_label": random_label,
    "bad_teacher": bad_teacher,
    "scrub": scrub,
    "fisher_forgetting": fisher_forgetting,
    "newton": newton,
    "msg": msg,
    "gradient_difference": gradient_difference,
    "npo": npo,
    "simnpo": simnpo,
    "rmu": rmu,
}


def unlearn(
    name: str,
    model: nn.Module,
    forget: Batches | Importance,
    retain: Batches | Importance | None = None,
    **settings: object,
) -> UnlearnResult:
    """Run a method by name.

    Args:
        name: A key of ``METHODS``.
        model: The model, changed in place.
        forget: The forget set.
        retain: The retain set, where the method needs one.
        **settings: The method's own keyword arguments.

    Returns:
        The record of the run.

    Raises:
        ValueError: If there is no such method.

    Example:
        >>> unlearn("magic", nn.Linear(1, 1), [])
        Traceback (most recent call last):
        ValueError: unlearn: name must be one of ..., got 'magic'
    """
    if name not in METHODS:
        raise ValueError(f"unlearn: name must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name](model, forget, retain, **settings)
