"""What joins the search for a dampening to the data: when not to begin, and how a round measures anew."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.names import parameters_by_name
from unlearn_ext.distributed.fsdp import fsdp_modules
from unlearn_ext.methods.sharded import first_uses, still_known
from unlearn_ext.methods.ssd_importances import Measure
from unlearn_ext.methods.ssd_search import Importances, Outcome, scopes_of, search
from unlearn_ext.methods.until import Until, Watch
from unlearn_ext.methods.use_order import order_of_use
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches, device_of, read_batches

_LABELS_NAMED = 10


def settled(watch: Watch, goal: Until) -> Outcome | None:
    """Say whether the search need not, or must not, begin.

    Args:
        watch: Has measured the model as it is.
        goal: The goal.

    Returns:
        The outcome then; None where there is something to do.

    Raises:
        NotImplementedError: If the task knows no right and wrong answers, or no answer counts, so that there
            is nothing to watch.
    """
    known = watch.before("forget")
    watched = [known, watch.before("retain")] if watch.has_retain else [known]
    if any(math.isnan(found.accuracy) for found in watched):
        raise NotImplementedError(
            "plan_ssd: alpha='auto' must have an accuracy to watch, and the task counts no answer as right "
            "or wrong; give a task that does, or alpha='adaptive'"
        )
    shared = watch.shared_classes
    if shared and not callable(goal):
        named = ", ".join(map(str, shared[:_LABELS_NAMED])) + (", ..." if len(shared) > _LABELS_NAMED else "")
        return Outcome(
            reason=f"samples to retain carry classes of the forget set ({named}); dampening forgets whole "
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
    named = parameters_by_name(model)
    parameters = {name: named[name] for name in importances[0]}
    task = measure.judge
    ranks = measure.ranks
    is_sharded = bool(fsdp_modules(model))
    if is_sharded:
        order, read = first_uses(model, parameters, forget, task)
    else:
        # One pass for the order of use, on whichever rank has a sample.
        first = next((batch for batch in read_batches(forget, device_of(model)) if task.count(batch)), None)
        shown = None
        if first is not None:
            shown = task.count(first), order_of_use(model, parameters, first, task.loss)
        read, order = ranks.first("order of use", shown) or (0, list(parameters))
    watch.count(read)
    scopes = scopes_of(parameters, order)

    def again() -> Importances | None:
        if is_sharded:
            left, is_any_left = still_known(model, forget, task)
        else:
            left = _still_known(model, forget, task)
            is_any_left = bool(left)
        watch.count(watch.before("forget").samples)
        if not any(ranks.exchange("still known", is_any_left)) or retain is None:
            return None
        return measure.both({"forget": left, "retain": retain})

    return search(model, importances, watch, scopes, factors, again)


def _still_known(model: nn.Module, forget: Batches, task: Task) -> list[Batch]:
    # The samples that the model still answers with one of their labels.
    left: list[Batch] = []
    with borrowed(model), torch.no_grad():
        for batch in read_batches(forget, device_of(model)):
            if task.count(batch):
                right, _ = task.correct(task.forward(model, batch), batch)
                known = right.nonzero().flatten().tolist()
                if known:
                    left.append(task.select(batch, known))
    return left
