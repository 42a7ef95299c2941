"""Projected-gradient unlearning: forget along the directions that the retain set does not use.

Of every layer the second moment M of its inputs is known for the full set. With M_f that of the forget set:

    M_r = M - M_f;  U = leading eigenvectors of M_r, as many as hold the share ``energy`` of its eigenvalues
    W <- W - lr * G (I - U U^T)        G: gradient of the forgetting loss on the forget set

so that what the layer computes for inputs within the span of U, most of what the retain set sends it, stays.

Source:
    Hoang, Rana, Gupta & Venkatesh, "Learn to Unlearn for Deep Neural Networks: Minimizing Unlearning
    Interference with Gradient Projection", WACV 2024.
"""

from __future__ import annotations

import math
import warnings
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unlearn_ext._internal.chosen import Params, Patterns, choice, restricted
from unlearn_ext._internal.modules import check_model
from unlearn_ext.distributed import Group, Ranks, lockstep, ranks_of
from unlearn_ext.methods.common import epochs_of, train_with_fixed_statistics, trainable
from unlearn_ext.methods.goal import GoalRule
from unlearn_ext.methods.loop import train
from unlearn_ext.methods.pgu_rules import Bound, GapRule
from unlearn_ext.methods.pgu_uses import unlike_their_kind
from unlearn_ext.methods.pgu_weights import FreeWeight, free_weights, layers_of, optimizer_of
from unlearn_ext.methods.recorded import Record
from unlearn_ext.methods.run import Run, at_the_end, unlearning
from unlearn_ext.methods.until import UnlearningFailed, Until, Watch, check_goal, figures
from unlearn_ext.methods.use_order import order_of_use
from unlearn_ext.results import UnlearnResult
from unlearn_ext.subspace.basis import Criterion
from unlearn_ext.subspace.gram import ActivationGram, activation_gram
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches, check_batches, device_of, read_batches
from unlearn_ext.tasks.categorical import Categorical
from unlearn_ext.tasks.classification import Classification
from unlearn_ext.tasks.infer import infer
from unlearn_ext.tasks.language import CausalLM
from unlearn_ext.tasks.losses import resolve, task_of
from unlearn_ext.tasks.positions import mean_over_positions

Stop: TypeAlias = Literal["auto", "gap"] | None

# The forget set stands apart where a layer's free directions hold this many times as much of it, as a share,
# as of the retain set. Whole classes exceed that; random samples of the full set stay near 1.
_APART = 1.3

# How many times smaller the steps of the last attempt are; and more layers than this are many.
_SMALLER, _DEEP = 8.0, 5

# What a class takes, and more passes over a small set than over a large one.
_STEPS, _MOST_EPOCHS = 500, 100


@lockstep
def pgu(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    task: Task | None = None,
    gram: ActivationGram | None = None,
    until: Until | Literal["auto"] = "auto",
    budget: float = 0.02,
    strict: bool = False,
    gram_forget: ActivationGram | None = None,
    energy: float = 0.95,
    criterion: Criterion = "energy",
    epochs: int | None = None,
    lr: float = 0.05,
    lr_end: float = 0.01,
    momentum: float = 0.0,
    offset: float = 0.05,
    entropy_weight: float = 0.2,
    leak: float | None = 0.004,
    validation: Batches | None = None,
    stop: Stop = "auto",
    shift: bool | None = None,
    params: Params = None,
    include: Patterns = None,
    exclude: Patterns = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    process_group: Group = None,
) -> UnlearnResult:
    """Minimise a bounded forgetting loss where the retain set's activations are not.

    With ``gram``, summed over the full set at training time, the retain set need not be read: the forget
    set's part is taken out of it here. Weights of the layers in ``gram`` are updated, except where every
    direction is protected or a weight has another use that ``gram`` does not cover. Biases, norms, position
    embeddings, recurrent layers and buffers keep their bits; norms use their running statistics. Dropout is
    active.

    What the protected directions leave out adds up over many steps, and a network with many layers, or with
    norms, makes more of it. With D the change of a weight W so far, tr(D M_r D^T) is the squared change of
    all that the layer answers to the retain set, and needs no sample of it. Where it exceeds the share
    ``leak`` of tr(W M_r W^T) after an epoch, D is scaled back to that. With a goal (``until``) the run ends
    with the epoch that reaches it; if retain data are given and more than ``budget`` of their accuracy is
    lost, the weights go back towards what they were until either holds. Where nothing in between holds both,
    the run is made again with the weights that the second half of the forward pass uses, then with smaller
    steps; with more than five layers these weights are tried first. If nothing does, the model is left as it
    was, ``result.reached`` is False and a warning says so.

    The defaults are for a class, or other data of a kind of its own, which the free directions hold more of
    than of the retain set. Random samples of the full set use the same directions as the others, and a
    step there reaches all that is like them. Where no layer sets the forget set apart, the run ends as soon
    as a layer is scaled back, with little forgotten, and a warning says so. Give ``validation`` then, so that
    samples are forgotten only as far as the model does not know others of their kind. Wrong labels call for
    ``entropy_weight=0``: the right answer to those inputs is not to know nothing.

    A weight that is also used outside its module, as in ``F.linear(x, embedding.weight)``, or whose module
    does something else than its kind (standardises the weight, say), keeps its bits too, and the history says
    so: what a change of it does to the retain set, ``gram`` cannot tell. It is found out on a few samples.

    This is approximate unlearning. A network that answers as if it had not seen the data can still hold
    traces of it.

    Args:
        model: The model, changed in place.
        forget: The forget set, re-iterable batches.
        retain: The retain set: what the budget is measured on, and what ``gram`` is measured on if it is not
            given.
        task: What the model is for; None infers it. See ``ux.tasks``.
        gram: ``activation_gram(model, full)`` of the full set, forget set included, with the present weights
            and without random augmentation. Afterwards, ``gram - activation_gram(model, forget)`` is that of
            what is left, for the next request; compute the part before unlearning and pass it in.
        until: ``"forgotten"`` (accuracy on the forget set at most 1 %), ``"unseen"`` (no higher than on
            ``validation``), a number (the highest accuracy on the forget set), a callable that is given the
            model, or None: all epochs. ``"auto"`` is ``"forgotten"`` where retain data are given that share
            no class with the forget set, and no ``validation``; else None.
        budget: Retain accuracy that may be lost, as a share; needs ``until`` and retain data.
        strict: Raise ``UnlearningFailed`` where the goal is not reached within the budget, not warn.
        gram_forget: The forget set's part, where it is known already.
        energy: Share of the retain set's second moment to protect in every layer, in (0, 1]. Higher protects
            more and leaves less room to forget.
        criterion: Sum up to ``energy`` the eigenvalues (``"energy"``), or as the published code does their
            square roots (``"singular"``), which keeps far more directions.
        epochs: Passes over the forget set, >= 1. None: as many as 500 steps take, but at most 100.
        lr: Learning rate of the first epoch, > 0.
        lr_end: That of the last, > 0; in between it falls or rises exponentially.
        momentum: Momentum, >= 0; the update stays in the free space.
        offset: epsilon of the loss -log(1 - p + epsilon), > 0: bounds its slope by 1 / epsilon.
        entropy_weight: Weight of the entropy of the outputs, which is to rise.
        leak: Bound on the squared change of any layer's answers to the retain set, biases left out, as a
            share of their squares; > 0. Of n > 5 layers each has 5 / n of it: what leaks adds up. None: no
            bound.
        validation: Held-out data of the forget set's kind, for the stopping rule.
        stop: ``"gap"`` ends the run once the accuracy on the forget set is below that on the validation set
            and keeps that one of the last two models where they are closer; None ends it after ``epochs``;
            ``"auto"`` is ``"gap"`` if there are validation data.
        shift: The older form of ``task``: True for a causal language model, False for labels at their own
            positions.
        params: Names of trainable parameters; ``"adapters"``, those of PEFT's active adapters and of the
            modules that are trained and saved beside them; or ``"base"``, the weights underneath, frozen or
            not, with the adapters in effect. None: all that are trainable.
        include: Parameters that may change: names of them or of their modules, the last parts of such names,
            or regular expressions that match a whole name. None: all of these.
        exclude: Parameters that may not change, likewise.
        generator: Decides the order of shuffled data and dropout.
        progress: Show a progress bar, where tqdm is installed.
        process_group: Ranks that call this together, each with its own share of every set, perhaps none. A
            step is that of the batches of all ranks together; every rank ends with the same weights, which is
            verified. Random choices are each rank's own. See ``docs/processes.md``.

    Returns:
        The record. Its history tells for every layer how many directions were protected and left free and
        how far they set the forget set apart, then every epoch with its leak, then why the run ended early,
        if it did.

    Raises:
        ValueError: If a set is empty or a one-shot iterator, a setting is out of range, ``gram`` does not fit
            the model, or no layer has a free direction or a trainable parameter; if there is neither
            ``retain`` nor ``gram``.
        UnlearningFailed: See ``strict``. The model is as it was then.
        FloatingPointError: If a loss is NaN or infinite. The model is as it was then.

    Source:
        Hoang, Rana, Gupta & Venkatesh, WACV 2024: the method, its loss and its schedule; the released code
        counts singular values, unfolds convolutions with stride 1 and lets rounding turn negative eigenvalues
        positive. Ours: the energy criterion as default, the bound, the layers' own strides, clamping, what is
        done to transposed convolutions, embeddings and tied weights, and momentum.

    Example:
        >>> model = nn.Linear(3, 2, bias=False)
        >>> forget = [(torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([0]))]
        >>> retain = [(torch.tensor([[0.0, 1.0, 0.0]]), torch.tensor([1]))]
        >>> before = model.weight.detach().clone()
        >>> gram = activation_gram(model, forget) + activation_gram(model, retain)
        >>> result = pgu(model, forget, gram=gram, epochs=3)
        >>> (model.weight == before).all(0).tolist(), result.history[0]["free"]
        ([False, True, True], 2)
    """
    check_model(model, "pgu")
    ranks = ranks_of(process_group, "pgu")
    forget = check_batches(forget, "forget")
    if epochs is None:
        epochs = min(_MOST_EPOCHS, epochs_of(_STEPS, forget, ranks))
    if validation is not None:
        validation = check_batches(validation, "validation")
    if retain is not None:
        retain = check_batches(retain, "retain")
    automatic = isinstance(until, str) and until == "auto"
    rule = ("gap" if validation is not None and automatic else None) if stop == "auto" else stop
    _check_settings(epochs, lr, lr_end, offset, leak, rule, validation)
    judge = _judge(task, shift)
    if gram is None:
        if retain is None:
            raise ValueError("pgu: retain or gram must be given")
        if gram_forget is None:
            gram_forget = activation_gram(model, forget, progress=progress, process_group=ranks)
        gram = gram_forget + activation_gram(model, retain, progress=progress, process_group=ranks)
    layers = layers_of(model, gram)
    watch, goal = _watch(model, forget, retain, until, budget, rule, validation, judge, ranks)
    record = Record(model, forget, retain, judge, ranks) if watch is None else None
    choices = choice(params, include, exclude)
    hyperparameters = {
        "energy": energy,
        "criterion": criterion,
        "epochs": epochs,
        "lr": lr,
        "lr_end": lr_end,
        "momentum": momentum,
        "offset": offset,
        "entropy_weight": entropy_weight,
        "leak": leak,
        "stop": rule,
        "shift": shift,
        "until": goal,
        "budget": budget,
        **choices,
    }

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return forgetting_loss(model, batch, offset, entropy_weight, task=task, shift=shift)

    with (
        restricted(model, "pgu", **choices),
        nullcontext() if record is None else at_the_end(record.measure_again),
        unlearning(
            model,
            "pgu",
            hyperparameters,
            generator=generator,
            data=(forget, retain),
            changes=(),
            ranks=ranks,
        ) as run,
    ):
        trainable(model, "pgu")  # not before: params="base" thaws what is frozen
        with run.phase("subspace"):
            if gram_forget is None:
                gram_forget = activation_gram(
                    model, forget, modules=gram, progress=progress, process_group=ranks
                )
            unlike = unlike_their_kind(model, layers, forget, judge, ranks)
            free, apart = free_weights(
                run, layers, unlike, gram - gram_forget, gram_forget, energy, criterion
            )
            run.keep(part.name for part in free)
        if apart < _APART and rule is None and watch is None:
            warnings.warn(
                "pgu: no layer sets the forget set apart from the retain set (its free directions hold at "
                f"most {apart:.2g} times as much of it): what forgets it reaches the others. Give validation "
                "data, which tell how far to forget",
                stacklevel=3,
            )
        gap = None
        if rule == "gap" and validation is not None:
            gap = GapRule(run, [part.weight for part in free], forget, validation, judge)
        reach = None if watch is None else GoalRule(run, [(part.name, part.weight) for part in free], watch)
        bound = None if leak is None else Bound(run, free, leak)

        def after_epoch(epoch: int) -> bool:
            held_back = bound is not None and bound(epoch)
            if held_back and gap is None and reach is None and apart < _APART:
                run.record("stop", reason="a layer reached the bound, and none sets the forget set apart")
                return True
            return (gap is not None and gap(epoch)) or (reach is not None and reach(epoch))

        if not (gap is not None and gap.holds) and not (reach is not None and reach.reached):
            train_with_fixed_statistics(model)
            for parts, smaller in [(free, 1.0)] if reach is None else _attempts(run, forget, free, judge):
                changing = {part.weight for part in parts}
                for parameter in () if ranks.are_many else model.parameters():
                    parameter.requires_grad_(parameter in changing)
                first, last = lr / smaller, lr_end / smaller
                train(
                    run,
                    "forget",
                    forget,
                    loss,
                    optimizer_of(parts, first, momentum),
                    # A wrapper of the model may have hooks on its parameters: their marks stay then.
                    parameters=[part.weight for part in parts] if ranks.are_many else None,
                    epochs=epochs,
                    schedule=lambda epoch, first=first, last=last: (  # type: ignore[misc]
                        first * (last / first) ** (epoch / max(1, epochs - 1))
                    ),
                    after_epoch=after_epoch,
                    progress=progress,
                )
                if reach is None:
                    break
                reach.conclude()
                if reach.reached or (reach.is_short and parts is free):
                    break
        if gap is not None:
            gap.conclude()
    result = run.result()
    if record is not None:
        try:
            return record.added_to(result)
        except BaseException:
            record.take_back()
            raise
    if watch is None or reach is None:
        return result
    before = {name: watch.before(name) for name in reach.after}
    result = replace(
        result,
        reached=reach.reached,
        before=figures(before),
        after=figures(reach.after),
        passes=watch.passes,
    )
    if not reach.reached:
        message = f"pgu: the model is as it was: {reach.reason}"
        if strict:
            raise UnlearningFailed(message, result)
        warnings.warn(message, stacklevel=3)
    return result


def pgu_from_sets(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    gram: ActivationGram | None = None,
    gram_forget: ActivationGram | None = None,
    progress: bool = False,
    **settings: Any,  # noqa: ANN401 - those of pgu
) -> UnlearnResult:
    """Run ``pgu``; the older name of its form with a retain set.

    Args:
        model: The model, changed in place.
        forget: The forget set.
        retain: The retain set.
        gram: Of the full set.
        gram_forget: Of the forget set.
        progress: Show progress bars.
        **settings: Other arguments of ``pgu``.

    Returns:
        The record of the run.
    """
    return pgu(model, forget, retain, gram=gram, gram_forget=gram_forget, progress=progress, **settings)


def forgetting_loss(
    model: nn.Module,
    batch: Batch,
    offset: float = 0.05,
    entropy_weight: float = 0.2,
    *,
    task: Task | None = None,
    shift: bool | None = None,
) -> Tensor:
    """Compute -log(1 - p + offset) - entropy_weight * H of every sample.

    p is the probability of the label and H the entropy of all of them, in nats. Where a sample has a label
    per position, the mean over those that count; 0 if there is none.

    Args:
        model: The model.
        batch: A batch with labels.
        offset: > 0; the loss never exceeds -log(offset).
        entropy_weight: Positive values reward entropy.
        task: What the model is for; None infers it. Without classes to choose from (several labels, one
            logit) p is told by the mean log-odds.
        shift: The older form of ``task``.

    Returns:
        ``[N]``; exact also for p next to 0 and 1.

    Example:
        >>> sure = (torch.tensor([[100.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0]))
        >>> forgetting_loss(nn.Identity(), sure, offset=0.5, entropy_weight=1.0)
        tensor([ 0.6931, -0.6931])
    """
    judge = task
    if judge is None:
        judge = infer(model, batch) if shift is None else task_of(model, batch, shift)
    outputs = judge.forward(model, batch)
    counted = judge.counted(outputs, batch)
    if isinstance(judge, Categorical):
        logits, labels = judge.aligned(outputs, batch)
        # A class that is ruled out by a score of -inf contributes nothing, not 0 * inf.
        log_p = logits.log_softmax(-1).clamp(min=torch.finfo(logits.dtype).min)
        log_p_label = log_p.gather(-1, labels.where(counted, 0).unsqueeze(-1)).squeeze(-1)
        values = -(offset - torch.expm1(log_p_label)).log()
        values = values + entropy_weight * (log_p.exp() * log_p).sum(-1)
        return mean_over_positions(values, counted)
    log_p = judge.log_scores(outputs, batch)
    negative_entropy = mean_over_positions((log_p.exp() * log_p).sum(-1), counted)
    known = -(offset - torch.expm1(F.logsigmoid(judge.log_odds(outputs, batch)))).log()
    return known + entropy_weight * negative_entropy


def _attempts(
    run: Run, forget: Batches, free: list[FreeWeight], task: Task
) -> list[tuple[list[FreeWeight], float]]:
    # Which weights to change, and how many times smaller the steps are. Those that are used in the second
    # half tell classes apart; what changes before them is carried on by every layer behind, so that in a deep
    # network they come first, and all of them only where these are not enough.
    device = device_of(run.model)
    first = next((batch for batch in read_batches(forget, device) if task.count(batch)), None)
    shown = None
    if first is not None and len(free) > 1:
        with torch.enable_grad():
            shown = order_of_use(run.model, {part.name: part.weight for part in free}, first, task.loss)
    order = run.ranks.first("order of use", shown)
    if order is None:
        return [(free, 1.0), (free, _SMALLER)]
    late = [part for part in free if part.name in order[len(order) // 2 :]]
    attempts = [(free, 1.0), (late, 1.0), (late, _SMALLER)]
    return attempts if len(free) <= _DEEP else [attempts[1], attempts[0], attempts[2]]


def _judge(task: Task | None, shift: bool | None) -> Task:
    if task is None and shift is not None:
        return CausalLM() if shift else Classification()
    return resolve(task, who="pgu")


def _watch(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None,
    until: Until | Literal["auto"],
    budget: float,
    rule: str | None,
    validation: Batches | None,
    task: Task,
    ranks: Ranks,
) -> tuple[Watch | None, Until]:
    # What is to be reached, and who measures it; None and None for all epochs.
    automatic = isinstance(until, str) and until == "auto"
    goal: Until = None if isinstance(until, str) and until == "auto" else until
    check_goal("pgu", goal, budget, validation)
    if rule is not None and goal is not None:
        raise ValueError(f"pgu: until must be None where stop is {rule!r}, got {goal!r}")
    if automatic and rule is None and validation is None and retain is not None:
        goal = "forgotten"
    if goal is None:
        return None, None
    watch = Watch(
        "pgu",
        model,
        forget,
        retain,
        until=goal,
        budget=budget,
        validation=validation,
        task=task,
        ranks=ranks,
    )
    if math.isnan(watch.before("forget").accuracy) or (automatic and watch.shared_classes):
        if automatic:
            return None, None
        raise NotImplementedError(
            "pgu: until must be None for a task that counts no answer as right or wrong"
        )
    return watch, goal


def _check_settings(
    epochs: int,
    lr: float,
    lr_end: float,
    offset: float,
    leak: float | None,
    rule: str | None,
    validation: Batches | None,
) -> None:
    if epochs < 1:
        raise ValueError(f"pgu: epochs must be at least 1, got {epochs}")
    for name, value in (("lr", lr), ("lr_end", lr_end), ("offset", offset)):
        if not 0 < value < math.inf:
            raise ValueError(f"pgu: {name} must be positive and finite, got {value}")
    if leak is not None and not leak > 0:
        raise ValueError(f"pgu: leak must be positive or None, got {leak}")
    if rule not in ("gap", None):
        raise ValueError(f"pgu: stop must be 'auto', 'gap' or None, got {rule!r}")
    if rule == "gap" and validation is None:
        raise ValueError("pgu: validation must be given for stop='gap'")
