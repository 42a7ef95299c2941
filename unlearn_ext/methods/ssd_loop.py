"""What joins the search for a dampening to the data: when not to begin, and how a round measures anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext.methods.ssd_importances import Measure
from unlearn_ext.methods.ssd_search import Importances, Outcome, scopes_of, search
from unlearn_ext.methods.until import Until, Watch
from unlearn_ext.methods.use_order import order_of_use
from unlearn_ext.tasks.batches import (
    Batch,
    Batches,
    count_samples,
    device_of,
    is_per_sample,
    map_tensors,
    read_batches,
)
from unlearn_ext.tasks.outputs import scores_and_labels

_LABELS_NAMED = 10


def settled(watch: Watch, goal: Until) -> Outcome | None:
    """Say whether the search need not, or must not, begin.

    Args:
        watch: Has measured the model as it is.
        goal: The goal.

    Returns:
        The outcome then; None where there is something to do.

    Raises:
        ValueError: If no label of the forget set counts, so that nothing can be watched.
    """
    known = watch.before("forget")
    if math.isnan(known.accuracy):
        raise ValueError("plan_ssd: forget must hold at least one label that counts, got none")
    shared = watch.shared_labels
    if shared and not callable(goal):
        named = ", ".join(map(str, shared[:_LABELS_NAMED])) + (", ..." if len(shared) > _LABELS_NAMED else "")
        return Outcome(
            reason=f"samples to retain carry labels of the forget set ({named}); dampening forgets whole "
            "classes, and among samples that resemble what stays it breaks single ones, which is not "
            "forgetting. Use a method for samples; alpha='adaptive' dampens all the same"
        )
    if watch.reached(known):
        return Outcome(reached=True, reason=f"the goal is met already ({watch.goal})")
    return None


def closed_loop(
    measure: Measure,
    forget: Batches,
    retain: Batches | None,
    importances: Importances,
    watch: Watch,
    factors: Mapping[str, float],
) -> Outcome:
    """Search for a dampening of a model that reaches the goal. The model is left as it was.

    Args:
        measure: Measures importances.
        forget: The forget set.
        retain: The retain set, where there are data.
        importances: On the forget set and on the full set.
        watch: Measures and judges.
        factors: Settings of ``selective_dampen_`` other than the threshold.

    Returns:
        What was tried, and what to apply.
    """
    model = measure.model
    named = dict(model.named_parameters())
    parameters = {name: named[name] for name in importances[0]}
    first = next(batch for batch in read_batches(forget, device_of(model)) if count_samples(batch))
    watch.count(count_samples(first))
    scopes = scopes_of(parameters, order_of_use(model, parameters, first, measure.loss_fn))

    def again() -> Importances | None:
        left = _still_known(model, forget)
        watch.count(watch.before("forget").samples)
        if not left or retain is None:
            return None
        return measure.both({"forget": left, "retain": retain})

    return search(model, importances, watch, scopes, factors, again)


def _still_known(model: nn.Module, forget: Batches) -> list[Batch]:
    # The samples that the model still answers with one of their labels.
    left: list[Batch] = []
    with borrowed(model), torch.no_grad():
        for batch in read_batches(forget, device_of(model)):
            n = count_samples(batch)
            scores, labels = scores_and_labels(model, batch)
            known = ((scores.argmax(-1) == labels) & (labels >= 0)).reshape(n, -1).any(1)
            if bool(known.any()):
                left.append(map_tensors(partial(_rows, n=n, known=known), batch))
    return left


def _rows(tensor: Tensor, n: int, known: Tensor) -> Tensor:
    return tensor[known] if is_per_sample(tensor, n) else tensor
