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
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from unlearn_ext._internal.names import modules_by_name
from unlearn_ext.evaluation.metrics.accuracy import accuracy
from unlearn_ext.methods.common import epochs_of, train_with_fixed_statistics
from unlearn_ext.methods.loop import train
from unlearn_ext.methods.run import Run, unlearning
from unlearn_ext.optim.projected import ProjectedSGD
from unlearn_ext.results import UnlearnResult
from unlearn_ext.subspace.basis import Criterion, Protected, protected
from unlearn_ext.subspace.gram import ActivationGram, activation_gram
from unlearn_ext.subspace.layers import Layer, layer_of
from unlearn_ext.tasks.batches import Batch, Batches, check_batches
from unlearn_ext.tasks.outputs import scores_and_labels

Stop: TypeAlias = Literal["auto", "gap"] | None

# The forget set stands apart where a layer's free directions hold this many times as much of it, as a share,
# as of the retain set. Whole classes exceed that; random samples of the full set stay near 1.
_APART = 1.3

# What a class takes, and more passes over a small set than over a large one.
_STEPS, _MOST_EPOCHS = 500, 100

# Negative eigenvalues beyond this share say that the two Gram matrices were not measured alike.
_CLAMPED_TOO_MUCH = 0.01


def pgu(
    model: nn.Module,
    forget: Batches,
    *,
    gram: ActivationGram,
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
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> UnlearnResult:
    """Minimise a bounded forgetting loss where the retain set's activations are not.

    The retain set is not read: ``gram`` was summed over the full set at training time, and the forget set's
    part is taken out of it here. Weights of the layers in ``gram`` are updated, except where every direction
    is protected or a weight has another use that ``gram`` does not cover. Biases, norms, position embeddings,
    recurrent layers and buffers keep their bits; norms use their running statistics. Dropout is active.

    What the protected directions leave out adds up over many steps. With D the change of a weight W so far,
    tr(D M_r D^T) is the squared change of all that the layer answers to the retain set, and needs no sample
    of it. Where it exceeds the share ``leak`` of tr(W M_r W^T) after an epoch, D is scaled back to that.

    The defaults are for a class, or other data of a kind of its own, which the free directions hold more of
    than of the retain set. Random samples of the full set use the same directions as the others, and a
    step there reaches all that is like them. Where no layer sets the forget set apart, the run ends as soon
    as a layer is scaled back, with little forgotten, and a warning says so. Give ``validation`` then, so that
    samples are forgotten only as far as the model does not know others of their kind. Wrong labels call for
    ``entropy_weight=0``: the right answer to those inputs is not to know nothing.

    A weight that is also used outside its module, as in ``F.linear(x, embedding.weight)``, is protected for
    the module's inputs only.

    This is approximate unlearning. A network that answers as if it had not seen the data can still hold
    traces of it.

    Args:
        model: The model, changed in place.
        forget: The forget set, re-iterable batches with integer labels: one per sample, or one per position,
            of which negative ones do not count.
        gram: ``activation_gram(model, full)`` of the full set, forget set included, with the present weights
            and without random augmentation. Afterwards, ``gram - activation_gram(model, forget)`` is that of
            what is left, for the next request; compute the part before unlearning and pass it in.
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
            share of their squares; > 0. None: no bound.
        validation: Held-out data of the forget set's kind, for the stopping rule.
        stop: ``"gap"`` ends the run once the accuracy on the forget set is below that on the validation set
            and keeps that one of the last two models where they are closer; None ends it after ``epochs``;
            ``"auto"`` is ``"gap"`` if there are validation data.
        shift: As in ``losses.cross_entropy``: whether position t predicts the label of position t + 1.
        generator: Decides the order of shuffled data and dropout.
        progress: Show a progress bar on a terminal, where tqdm is installed.

    Returns:
        The record. Its history tells for every layer how many directions were protected and left free and
        how far they set the forget set apart, then every epoch with its leak, then why the run ended early,
        if it did.

    Raises:
        ValueError: If a set is empty or a one-shot iterator, a setting is out of range, ``gram`` does not fit
            the model, or no layer has a free direction.
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
    forget = check_batches(forget, "forget")
    if epochs is None:
        epochs = min(_MOST_EPOCHS, epochs_of(_STEPS, forget))
    if validation is not None:
        validation = check_batches(validation, "validation")
    rule = ("gap" if validation is not None else None) if stop == "auto" else stop
    _check_settings(epochs, lr, lr_end, offset, leak, rule, validation)
    layers = _layers(model, gram)
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
    }

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return forgetting_loss(model, batch, offset, entropy_weight, shift=shift)

    with unlearning(model, "pgu", hyperparameters, generator=generator) as run:
        with run.phase("subspace"):
            if gram_forget is None:
                gram_forget = activation_gram(model, forget, modules=gram, progress=progress)
            free, apart = _free_weights(run, layers, gram - gram_forget, gram_forget, energy, criterion)
        if apart < _APART and rule is None:
            warnings.warn(
                "pgu: no layer sets the forget set apart from the retain set (its free directions hold at "
                f"most {apart:.2g} times as much of it): what forgets it reaches the others. Give validation "
                "data, which tell how far to forget",
                stacklevel=2,
            )
        gap = None
        if rule == "gap" and validation is not None:
            gap = _GapRule(run, [part.weight for part in free], forget, validation, shift)
        bound = None if leak is None else _Bound(run, free, leak)

        def after_epoch(epoch: int) -> bool:
            held_back = bound is not None and bound(epoch)
            if held_back and gap is None and apart < _APART:
                run.record("stop", reason="a layer reached the bound, and none sets the forget set apart")
                return True
            return gap is not None and gap(epoch)

        if gap is None or not gap.holds:
            for parameter in model.parameters():
                parameter.requires_grad_(any(parameter is part.weight for part in free))
            train_with_fixed_statistics(model)
            train(
                run,
                "forget",
                forget,
                loss,
                _optimizer(free, lr, momentum),
                epochs=epochs,
                schedule=lambda epoch: lr * (lr_end / lr) ** (epoch / max(1, epochs - 1)),
                after_epoch=after_epoch,
                progress=progress,
            )
        if gap is not None:
            gap.conclude()
    return run.result()


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
    """Run ``pgu`` for callers that have the retain set instead of stored Gram matrices.

    Args:
        model: The model, changed in place.
        forget: The forget set.
        retain: The retain set; not read if ``gram`` is given.
        gram: Of the full set.
        gram_forget: Of the forget set.
        progress: Show progress bars.
        **settings: Other arguments of ``pgu``.

    Returns:
        The record of the run.

    Raises:
        ValueError: As ``pgu``; and if there is neither ``retain`` nor ``gram``.
    """
    if gram is None:
        if retain is None:
            raise ValueError("pgu: retain or gram must be given")
        gram_forget = activation_gram(model, check_batches(forget, "forget"), progress=progress)
        gram = gram_forget + activation_gram(model, check_batches(retain, "retain"), progress=progress)
    return pgu(model, forget, gram=gram, gram_forget=gram_forget, progress=progress, **settings)


def forgetting_loss(
    model: nn.Module,
    batch: Batch,
    offset: float = 0.05,
    entropy_weight: float = 0.2,
    *,
    shift: bool | None = None,
) -> Tensor:
    """Compute -log(1 - p + offset) - entropy_weight * H of every sample.

    p is the probability of the label and H the entropy of all of them, in nats. Where a sample has a label
    per position, the mean over those that are not negative; 0 if there is none.

    Args:
        model: Returns logits ``[N, C]``, ``[N, T, C]`` or ``[N, C, ...]``.
        batch: A batch with integer labels.
        offset: > 0; the loss never exceeds -log(offset).
        entropy_weight: Positive values reward entropy.
        shift: As in ``losses.cross_entropy``.

    Returns:
        ``[N]``; exact also for p next to 0 and 1.

    Example:
        >>> sure = (torch.tensor([[100.0, 0.0], [0.0, 0.0]]), torch.tensor([0, 0]))
        >>> forgetting_loss(nn.Identity(), sure, offset=0.5, entropy_weight=1.0)
        tensor([ 0.6931, -0.6931])
    """
    scores, labels = scores_and_labels(model, batch, shift=shift)
    # A class that is ruled out by a score of -inf contributes nothing, not 0 * inf.
    log_p = scores.log_softmax(-1).clamp(min=torch.finfo(scores.dtype).min)
    counted = labels >= 0
    log_p_label = log_p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    known = -(offset - torch.expm1(log_p_label)).log()
    entropy = -(log_p.exp() * log_p).sum(-1)
    values = torch.where(counted, known - entropy_weight * entropy, 0.0).reshape(len(labels), -1)
    return values.sum(1) / counted.reshape(len(labels), -1).sum(1).clamp(min=1)


@dataclass(frozen=True, slots=True)
class _FreeWeight:
    """A weight with free directions, as the optimizer is to see it: rows that the basis meets on the right.

    ``take`` gives these rows of a tensor of the weight's shape, ``put`` writes them back into one; without
    them the weight itself will do. ``moment`` is the retain set's second moment, ``[d, d]`` or ``[groups, d,
    d]``, of the inputs that meet ``all_rows``; None where only rows change that it does not use.
    """

    name: str
    weight: nn.Parameter
    basis: Tensor
    moment: Tensor | None
    take: Callable[[Tensor], Tensor] | None = None
    put: Callable[[Tensor, Tensor], object] | None = None
    all_rows: Callable[[Tensor], Tensor] = torch.Tensor.detach

    def answers(self, weight: Tensor) -> float:
        """Sum the squares of what a weight makes of the retain set's inputs.

        Args:
            weight: Of the parameter's shape.

        Returns:
            The sum.
        """
        if self.moment is None:
            return 0.0
        d = self.moment.shape[-1]
        moments = self.moment.reshape(-1, d, d)
        rows = self.all_rows(weight).to(moments).reshape(len(moments), -1, d)
        return float((rows @ moments * rows).sum())


def _layers(model: nn.Module, gram: ActivationGram) -> dict[str, tuple[nn.Module, Layer]]:
    modules = modules_by_name(model)
    layers: dict[str, tuple[nn.Module, Layer]] = {}
    for name, total in gram.items():
        layer = layer_of(modules[name]) if name in modules else None
        if layer is None:
            raise ValueError(f"pgu: gram must be keyed by layers of the model, got {name!r}")
        if tuple(total.shape) != layer.gram:
            raise ValueError(
                f"pgu: gram of {name!r} must have shape {list(layer.gram)}, got {list(total.shape)}"
            )
        layers[name] = (modules[name], layer)
    return layers


def _free_weights(
    run: Run,
    layers: Mapping[str, tuple[nn.Module, Layer]],
    remaining: ActivationGram,
    gram_forget: ActivationGram,
    energy: float,
    criterion: Criterion,
) -> tuple[list[_FreeWeight], float]:
    # What the retain set leaves of every weight, and how far the best layer sets the forget set apart there.
    free: list[_FreeWeight] = []
    most_apart = 0.0
    for name, weight in run.model.named_parameters():
        users = [
            (module_name, attribute)
            for module_name, module in modules_by_name(run.model).items()
            for attribute, parameter in module._parameters.items()
            if parameter is weight
        ]
        covered = [
            user for user, attribute in users if user in layers and attribute == layers[user][1].weight
        ]
        if not covered:
            continue
        if len(covered) < len(users) or not weight.requires_grad:
            why = "it has a use that gram lacks" if weight.requires_grad else "it is not trainable"
            run.record("subspace", parameter=name, frozen=why)
            continue
        # Uses from one side add up to one space.
        totals: dict[str, Tensor] = {}
        forget_totals: dict[str, Tensor] = {}
        for user in covered:
            side: str = layers[user][1].side
            total, part = (moments[user].to(weight.device) for moments in (remaining, gram_forget))
            if side in totals and totals[side].shape != total.shape:
                side = f"{side} {list(total.shape)}"
            totals[side] = totals[side] + total if side in totals else total
            forget_totals[side] = forget_totals[side] + part if side in forget_totals else part
        spaces = {side: protected(total, energy, criterion) for side, total in totals.items()}
        for side, space in spaces.items():
            apart = _outside(forget_totals[side], space) / max(_outside(totals[side], space), 1e-6)
            if space.k < space.d:
                most_apart = max(most_apart, apart)
            run.record(
                "subspace",
                parameter=name,
                side=side,
                directions=space.d,
                protected=space.k,
                free=space.d - space.k,
                kept=space.kept,
                apart=apart,
                clamped=space.clamped,
            )
        worst = max(space.clamped for space in spaces.values())
        if worst > _CLAMPED_TOO_MUCH:
            warnings.warn(
                f"pgu: {worst:.1%} of the second moment at {name} would be negative after the subtraction: "
                "gram was not measured on the same inputs and weights as the forget set's part",
                stacklevel=3,
            )
        if all(space.k < space.d for space in spaces.values()):
            free_weight = _free_weight(name, weight, spaces, totals)
            if free_weight is None:
                run.record("subspace", parameter=name, frozen=f"used from {' and '.join(spaces)}")
            else:
                free.append(free_weight)
    if not free:
        raise ValueError(f"pgu: energy must leave a free direction in some layer of gram, got {energy}")
    return free, most_apart


def _outside(moment: Tensor, space: Protected) -> float:
    # The share of a set's second moment that the free directions hold.
    if space.basis.dtype == torch.bool:
        inside, total = moment[space.basis].sum(), moment.sum()
    else:
        rows = space.basis.mT.to(moment)
        inside, total = ((rows @ moment) * rows).sum(), moment.diagonal(dim1=-2, dim2=-1).sum()
    return max(0.0, 1 - float(inside) / float(total)) if float(total) > 0 else 0.0


def _free_weight(
    name: str, weight: nn.Parameter, spaces: Mapping[str, Protected], moments: Mapping[str, Tensor]
) -> _FreeWeight | None:
    sides = set(spaces)
    if sides == {"right"}:
        return _FreeWeight(name, weight, spaces["right"].basis, moments["right"])
    if sides == {"left"}:
        basis = spaces["left"].basis
        groups, d = (1, *basis.shape)[-3], basis.shape[-2]

        def put_transposed(weight: Tensor, rows: Tensor) -> None:
            weight.copy_(rows.reshape(groups, -1, d).mT.reshape(weight.shape))

        def transposed(tensor: Tensor) -> Tensor:
            return tensor.reshape(groups, d, -1).mT.reshape(-1, d)

        return _FreeWeight(
            name, weight, basis, moments["left"], take=transposed, put=put_transposed, all_rows=transposed
        )
    if sides <= {"rows", "right"}:
        # An embedding, or one that is tied to a linear head: the two projections commute.
        absent = (~spaces["rows"].basis).nonzero().flatten()
        nothing = torch.zeros(weight.shape[1], 0, device=weight.device)
        return _FreeWeight(
            name,
            weight,
            spaces["right"].basis if "right" in spaces else nothing,
            moments.get("right"),
            take=lambda tensor: tensor[absent],
            put=lambda weight, rows: weight.index_copy_(0, absent, rows),
        )
    return None


def _optimizer(free: Iterable[_FreeWeight], lr: float, momentum: float) -> ProjectedSGD:
    parts = list(free)
    variables = [
        part.weight if part.take is None else nn.Parameter(part.take(part.weight.detach()).clone())
        for part in parts
    ]
    optimizer = ProjectedSGD(
        [(part.name, variable) for part, variable in zip(parts, variables, strict=True)],
        lr=lr,
        momentum=momentum,
        bases={part.name: part.basis for part in parts},
    )
    stand_ins = [
        (part.weight, variable, part.take, part.put)
        for part, variable in zip(parts, variables, strict=True)
        if part.take is not None and part.put is not None
    ]

    def before(*_args: object) -> None:
        for weight, variable, take, _put in stand_ins:
            grad, weight.grad = weight.grad, None
            variable.grad = None if grad is None else take(grad.to_dense() if grad.is_sparse else grad)
            with torch.no_grad():
                variable.copy_(take(weight))  # which may have been held back since the last step

    def after(*_args: object) -> None:
        with torch.no_grad():
            for weight, variable, _take, put in stand_ins:
                put(weight, variable)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


class _Bound:
    """Holds the change of what each layer answers to the retain set within a share; called after epochs."""

    def __init__(self, run: Run, free: list[_FreeWeight], leak: float) -> None:
        self._run, self._free, self._leak = run, free, leak
        self._squares = {part.name: part.answers(part.weight.detach()) for part in free}

    @torch.no_grad()
    def __call__(self, epoch: int) -> bool:
        leaks: dict[str, float] = {}
        for part in self._free:
            if self._squares[part.name] == 0:
                continue
            original = self._run.original(part.name)
            leak = part.answers(part.weight - original) / self._squares[part.name]
            leaks[part.name] = min(leak, self._leak)
            if leak > self._leak:  # which is quadratic in the change
                part.weight.copy_(torch.lerp(original, part.weight, math.sqrt(self._leak / leak)))
        worst = max(leaks, key=leaks.__getitem__, default=None)
        if worst is None:
            return False
        held_back = sum(leak == self._leak for leak in leaks.values())
        self._run.record("leak", epoch=epoch, parameter=worst, leak=leaks[worst], held_back=held_back)
        return held_back > 0


class _GapRule:
    """Stop once the forget set is known less well than held-out data; called after every epoch."""

    def __init__(
        self,
        run: Run,
        weights: list[nn.Parameter],
        forget: Batches,
        validation: Batches,
        shift: bool | None,
    ) -> None:
        self._run, self._weights = run, weights
        self._sets = {"forget": forget, "validation": validation}
        self._shift = shift
        self._gap = self._measure(-1)
        self._before = self._weights_now()
        self._reason = "the rule held before the first epoch: nothing was changed" if self.holds else ""

    @property
    def holds(self) -> bool:
        return self._gap > 0

    def __call__(self, epoch: int) -> bool:
        previous, self._gap = self._gap, self._measure(epoch)
        if self.holds:
            self._reason = f"the rule held after epoch {epoch}"
            if abs(previous) < abs(self._gap):
                with torch.no_grad():
                    for weight, value in zip(self._weights, self._before, strict=True):
                        weight.copy_(value)
                self._reason += "; the model before it was closer and was kept"
        self._before = self._weights_now()
        return self.holds

    def conclude(self) -> None:
        if not self._reason:
            self._reason = "the rule never held; the last model was kept"
        if not self.holds:
            warnings.warn(f"pgu: {self._reason}", stacklevel=3)
        self._run.record("stop", reason=self._reason)

    def _measure(self, epoch: int) -> float:
        values = {
            name: accuracy(self._run.model, data, shift=self._shift) for name, data in self._sets.items()
        }
        self._run.record("gap", epoch=epoch, **{f"accuracy_{name}": value for name, value in values.items()})
        return values["validation"] - values["forget"]

    def _weights_now(self) -> list[Tensor]:
        return [weight.detach().clone() for weight in self._weights]


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
