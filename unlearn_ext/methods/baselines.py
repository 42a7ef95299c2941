"""What unlearning methods are compared with: retraining, fine-tuning, gradient ascent, random labels.

All have the form ``method(model, forget, retain, **settings)`` and change the model in place. Where a loss is
driven up it is capped: the published versions, which are not, end in NaN or with a model that knows nothing.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from unlearn_ext._internal.plain import callable_name
from unlearn_ext.methods import loop
from unlearn_ext.methods.common import Paired, epochs_of, n_classes, train_with_fixed_statistics, trainable
from unlearn_ext.methods.run import unlearning
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks import losses
from unlearn_ext.tasks.batches import Batch, Batches, check_batches, device_of
from unlearn_ext.tasks.losses import LossFn
from unlearn_ext.tasks.outputs import targets, with_targets

# Of gradient ascent: it spoils the more the longer it goes on, whatever the size of the forget set.
_STEPS, _MOST_EPOCHS = 100, 30


def retrain(
    model: nn.Module,
    forget: Batches | None,
    retain: Batches,
    *,
    make_model: Callable[[], nn.Module],
    train: Callable[[nn.Module, Batches], nn.Module | None],
    generator: torch.Generator | None = None,
) -> UnlearnResult:
    """Train a new model on the retain set alone and put its weights into this one: the reference.

        theta <- train(make_model(), retain)

    Args:
        model: The model; gets the new parameters and buffers, in place.
        forget: Not read.
        retain: The retain set.
        make_model: Makes an untrained model of the same architecture, all of it initialised afresh.
        train: ``train(new_model, retain)``: the recipe of the original model. Trains in place, or returns the
            trained model.
        generator: Decides the global random state in which both are called.

    Returns:
        The record of the run.

    Raises:
        ValueError: If the new model has other parameters or buffers, or shares them with the model.
        FloatingPointError: If a new weight is NaN or infinite.

    Source:
        The definition of exact unlearning. Some published code starts from the trained weights in all but the
        last layer; a warning tells if ``make_model`` does.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> result = retrain(
        ...     model, None, [], make_model=lambda: nn.Linear(2, 2), train=lambda new, retain: new
        ... )
        >>> result.changed
        1.0
    """
    check_batches(retain, "retain")
    settings = {"make_model": callable_name(make_model), "train": callable_name(train)}
    with unlearning(model, "retrain", settings, generator=generator) as run, run.phase("train"):
        new = make_model().to(device_of(model))
        _check_new(model, new)
        new.train()
        _take_over(model, train(new, retain) or new)
    return run.result()


def finetune(
    model: nn.Module,
    forget: Batches | None,
    retain: Batches,
    *,
    epochs: int = 5,
    lr: float = 0.2,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    loss_fn: LossFn = losses.cross_entropy,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> UnlearnResult:
    """Go on training on the retain set alone, with SGD and a learning rate that falls to 0.

        min   CE(retain)

    Nothing here acts against the forget set: it is forgotten only as far as the weights drift. The published,
    constant learning rate of 0.02 leaves a small network close to where it was. The default is ten times as
    high, enough for it to drift away from a class, and falls with every epoch, so that the rest recovers.

    Args:
        model: The model, changed in place; in train mode, so BatchNorm statistics move.
        forget: Not read.
        retain: The retain set.
        epochs: Passes over it.
        lr: Learning rate of the first epoch.
        momentum: Momentum.
        weight_decay: Weight decay.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``.
        generator: Decides every random choice.
        progress: Show a progress bar on a terminal, where tqdm is installed.

    Returns:
        The record of the run.

    Source:
        Epochs, momentum and weight decay of the code published with SSD (Foster, Schoepf & Brintrup, AAAI
        2024).

    Example:
        >>> model = nn.Linear(2, 2)
        >>> retain = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> len(finetune(model, None, retain, epochs=2).history)
        2
    """
    check_batches(retain, "retain")
    settings = {
        "epochs": epochs,
        "lr": lr,
        "momentum": momentum,
        "weight_decay": weight_decay,
        "loss_fn": callable_name(loss_fn),
    }
    with unlearning(model, "finetune", settings, generator=generator) as run:
        model.train()
        optimizer = torch.optim.SGD(
            trainable(model, "finetune"), lr=lr, momentum=momentum, weight_decay=weight_decay
        )
        loop.train(
            run,
            "finetune",
            retain,
            loss_fn,
            optimizer,
            epochs=epochs,
            schedule=lambda epoch: lr * (1 - epoch / epochs),
            progress=progress,
        )
    return run.result()


def gradient_ascent(
    model: nn.Module,
    forget: Batches,
    retain: Batches | None = None,
    *,
    epochs: int | None = None,
    lr: float = 1e-3,
    cap: float | None = None,
    loss_fn: LossFn = losses.cross_entropy,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> UnlearnResult:
    """Climb the loss of the forget set with SGD, up to a cap.

        max   mean_n min(CE_n(forget), cap)

    Nothing here holds on to what is to be kept, so the price differs from class to class and grows with the
    number of steps: ``python -m bench.bench_methods`` shows it for classes of scikit-learn's digits and of
    CIFAR-10. A higher cap costs more, a lower one forgets less.

    Args:
        model: The model, changed in place; BatchNorm statistics stay.
        forget: The forget set.
        retain: Not read.
        epochs: Passes over the forget set; fewer if every sample reaches the cap. None: as many as 100 steps
            take, but at most 30.
        lr: Learning rate.
        cap: Samples with a higher loss do not count. By default half of log(number of classes), and at least
            1: the label has lost to others then, mostly, with 37 % or less.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``.
        generator: Decides every random choice.
        progress: Show a progress bar on a terminal, where tqdm is installed.

    Returns:
        The record of the run.

    Source:
        NegGrad of Golatkar, Achille & Soatto, "Eternal Sunshine of the Spotless Net", CVPR 2020, without a
        cap.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> gradient_ascent(model, forget).method
        'gradient_ascent'
    """
    check_batches(forget, "forget")
    if epochs is None:
        epochs = min(_MOST_EPOCHS, epochs_of(_STEPS, forget))
    limit = max(1.0, math.log(n_classes(model, forget)) / 2) if cap is None else cap
    settings = {"epochs": epochs, "lr": lr, "cap": limit, "loss_fn": callable_name(loss_fn)}
    with unlearning(model, "gradient_ascent", settings, generator=generator) as run:
        train_with_fixed_statistics(model)
        # No momentum: it would carry on after the cap has been reached.
        optimizer = torch.optim.SGD(trainable(model, "gradient_ascent"), lr=lr)
        loop.train(
            run,
            "ascent",
            forget,
            lambda model, batch: -loss_fn(model, batch).clamp(max=limit),
            optimizer,
            epochs=epochs,
            after_epoch=lambda _: cast("float", run.history[-1]["loss"]) <= -limit * (1 - 1e-6),
            progress=progress,
        )
    return run.result()


def neg_grad_plus(
    model: nn.Module,
    forget: Batches,
    retain: Batches,
    *,
    retain_weight: float = 0.95,
    epochs: int = 10,
    lr: float = 0.01,
    momentum: float = 0.9,
    cap: float | None = None,
    loss_fn: LossFn = losses.cross_entropy,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> UnlearnResult:
    """Descend on the retain set while climbing on the forget set, batch beside batch, with SGD.

        min   a CE(retain) - (1 - a) mean_n min(CE_n(forget), cap)      a = retain_weight

    Args:
        model: The model, changed in place; BatchNorm statistics stay.
        forget: The forget set; started again whenever it ends. Batches of the retain set's size weigh its
            samples as published.
        retain: The retain set.
        retain_weight: Weight of the retain set, in [0, 1].
        epochs: Passes over the retain set.
        lr: Learning rate.
        momentum: Momentum.
        cap: Forget samples with a higher loss do not count. By default log(number of classes): a label less
            likely than a guess is certain not to be predicted.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``.
        generator: Decides every random choice.
        progress: Show a progress bar on a terminal, where tqdm is installed.

    Returns:
        The record of the run.

    Raises:
        ValueError: If ``retain_weight`` is out of range or a set is empty.

    Source:
        NegGrad+ of Kurmanji, Triantafillou, Hayes & Triantafillou, "Towards Unbounded Machine Unlearning",
        NeurIPS 2023, without a cap.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(4, 2), torch.ones(4, dtype=torch.long))]
        >>> neg_grad_plus(model, forget, retain).method
        'neg_grad_plus'
    """
    check_batches(forget, "forget")
    check_batches(retain, "retain")
    if not 0 <= retain_weight <= 1:
        raise ValueError(f"neg_grad_plus: retain_weight must lie in [0, 1], got {retain_weight}")
    limit = math.log(n_classes(model, forget)) if cap is None else cap

    def objective(model: nn.Module, pair: Batch) -> Tensor:
        kept, forgotten = cast("tuple[Batch, Batch]", pair)
        climbed = loss_fn(model, forgotten).clamp(max=limit).mean()
        return retain_weight * loss_fn(model, kept).mean() - (1 - retain_weight) * climbed

    settings = {
        "retain_weight": retain_weight,
        "epochs": epochs,
        "lr": lr,
        "momentum": momentum,
        "cap": limit,
        "loss_fn": callable_name(loss_fn),
    }
    with unlearning(model, "neg_grad_plus", settings, generator=generator) as run:
        train_with_fixed_statistics(model)
        optimizer = torch.optim.SGD(trainable(model, "neg_grad_plus"), lr=lr, momentum=momentum)
        loop.train(
            run, "both", Paired(retain, forget), objective, optimizer, epochs=epochs, progress=progress
        )
    return run.result()


def random_label(
    model: nn.Module,
    forget: Batches,
    retain: Batches,
    *,
    epochs: int = 3,
    lr: float = 1e-3,
    loss_fn: LossFn = losses.cross_entropy,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> UnlearnResult:
    """Learn wrong labels for the forget set beside the right ones for the retain set, with Adam.

        min   CE(retain) + CE(forget, y')      y' != y drawn uniformly, anew for every batch

    Args:
        model: The model, changed in place; BatchNorm statistics stay.
        forget: The forget set, with integer labels; started again whenever it ends.
        retain: The retain set.
        epochs: Passes over the retain set.
        lr: Learning rate.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``.
        generator: Decides every random choice.
        progress: Show a progress bar on a terminal, where tqdm is installed.

    Returns:
        The record of the run.

    Raises:
        ValueError: If the model has one class only.

    Source:
        Random labels of Graves, Nagisetty & Ganesh, "Amnesiac Machine Learning", AAAI 2021, in the form
        of Chundawat, Tarun, Mandal & Kankanhalli (AAAI 2023), who draw the labels once, shuffle both sets
        together and use Adam at 1e-4.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> forget = [(torch.randn(4, 2), torch.zeros(4, dtype=torch.long))]
        >>> retain = [(torch.randn(4, 2), torch.ones(4, dtype=torch.long))]
        >>> random_label(model, forget, retain).method
        'random_label'
    """
    check_batches(forget, "forget")
    check_batches(retain, "retain")
    classes = n_classes(model, forget)
    if classes < 2:
        raise ValueError(f"random_label: model must have at least 2 classes, got {classes}")

    def objective(model: nn.Module, pair: Batch) -> Tensor:
        kept, forgotten = cast("tuple[Batch, Batch]", pair)
        labels = targets(forgotten)
        other = (labels + torch.randint_like(labels, 1, classes)) % classes
        wrong = with_targets(forgotten, torch.where(labels < 0, labels, other))
        return loss_fn(model, kept).mean() + loss_fn(model, wrong).mean()

    settings = {"epochs": epochs, "lr": lr, "loss_fn": callable_name(loss_fn)}
    with unlearning(model, "random_label", settings, generator=generator) as run:
        train_with_fixed_statistics(model)
        optimizer = torch.optim.Adam(trainable(model, "random_label"), lr=lr)
        loop.train(
            run, "relabel", Paired(retain, forget), objective, optimizer, epochs=epochs, progress=progress
        )
    return run.result()


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _check_new(model: nn.Module, new: nn.Module) -> None:
    old, fresh = _state(model), _state(new)
    if any(old[name] is tensor for name, tensor in fresh.items() if name in old):
        raise ValueError(
            "retrain: make_model must make a new model, got one that shares tensors with the old"
        )
    for name, p in model.named_parameters():
        # Biases and scales start from constants, which a trained model may still have.
        same = name in fresh and p.ndim > 1 and p.requires_grad and torch.equal(p, fresh[name])
        if same and p.numel() > 1 and bool((p != p.flatten()[0]).any()):
            warnings.warn(
                f"retrain: make_model must initialise all weights afresh, got {name} as it is in the model",
                stacklevel=3,
            )
            return


@torch.no_grad()
def _take_over(model: nn.Module, new: nn.Module) -> None:
    old, fresh = _state(model), _state(new)
    for name in {**old, **fresh}:
        have, want = ([*state[name].shape] if name in state else None for state in (fresh, old))
        if have != want:
            raise ValueError(
                f"retrain: make_model must make a model of the same form, got {have} for {name} of {want}"
            )
    for name, tensor in fresh.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise FloatingPointError(f"retrain: the new {name} must be finite, got NaN or infinity")
        old[name].copy_(tensor)
