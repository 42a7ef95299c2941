"""UNSIR: forget classes with the help of noise that the model cannot classify; no forget data is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal, cast

import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.seeding import random_states_kept
from unlearn_ext.distributed import Group, lockstep
from unlearn_ext.methods.common import (
    check_count,
    count_batches,
    facts_of,
    n_classes,
    prepared,
    refuse_group,
    required,
    single_values_normalised,
    trainable,
    what_a_task_must_have,
)
from unlearn_ext.methods.goal import ClosedLoop
from unlearn_ext.methods.loop import train
from unlearn_ext.methods.recorded import recorded
from unlearn_ext.methods.run import Run, unlearning
from unlearn_ext.methods.until import Until
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches, check_batches, device_of, is_per_sample, read_batches
from unlearn_ext.tasks.categorical import Categorical
from unlearn_ext.tasks.fields import Path, described, entry, with_entry
from unlearn_ext.tasks.losses import LossFn

# The released loop runs over the channels where it means the batch, and copies what it gets so many times.
_OFFICIAL_COPIES = 20


@lockstep
@recorded
def unsir(
    model: nn.Module,
    forget: Batches | int | Iterable[int] | None = None,
    retain: Batches | None = None,
    *,
    forget_classes: int | Iterable[int] | None = None,
    noise_batch: int = 256,
    noise_steps: int = 40,
    noise_lr: float = 0.1,
    noise_l2: float = 0.1,
    noise_share: float = 0.02,
    impair_lr: float = 0.003,
    impair_epochs: int = 1,
    repair_lr: float = 0.003,
    repair_epochs: int = 1,
    repair_steps_min: int = 50,
    noise_rows: Literal["all", "official"] = "all",
    noise_label: Literal["class", "official"] = "class",
    repair_schedule: Literal["linear", "constant"] = "linear",
    freeze_bn_during_noise: bool = True,
    until: Until = None,
    budget: float = 0.02,
    validation: Batches | None = None,
    strict: bool = False,
    task: Task | None = None,
    loss_fn: LossFn | None = None,
    generator: torch.Generator | None = None,
    progress: bool = False,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
    process_group: Group = None,
) -> UnlearnResult:
    """Forget classes without their data: learn noise, impair the model with it, repair it on the rest.

        noise    for each class c:  N_c ~ N(0, 1), then Adam on   -CE(f(N_c), c) + noise_l2 mean_b |N_c[b]|^2
        impair   one epoch of Adam on   CE(retain and some rows of every (N_c, c), shuffled together)
        repair   one epoch of Adam, started afresh, on   CE(retain)

    While noise is learned no weight gradient is computed, and the model is in eval mode, so that its buffers
    stay. Impair and repair run in train mode and move BatchNorm statistics (where one gets a single value per
    channel, as from a batch of one sample, it uses its statistics and leaves them). Adam's
    first steps change every scalar by about the learning rate, which is what impairs; networks that do not
    stand that (large or without normalisation, transformers) need smaller learning rates.

    The noise has the shape of the inputs in ``retain``, in the space in which the model gets them
    (normalised, where they are). Token ids cannot be noise and are refused.

    The order of the algorithm, the losses, the optimizers and all settings of the noise itself are the
    authors'. Ours are:

    - ``noise_share``: how much noise the impair step gets, at least one row per class. Twenty copies of all
      noise, as the authors' notebook means to use, outnumber a small retain set and leave nothing to repair;
      what it does use is about 1 %.
    - ``repair_steps_min``: one epoch over a small retain set is too short to repair.
    - The learning rates, 0.02 and 0.01 in the notebook. From there the impaired network does not always
      recover; far lower rates do not impair a small network enough to forget the class.
    - ``repair_schedule``: where the rate stays the same to the end, accuracy still jumps from one step to the
      next when repair ends.

    ``python -m bench.bench_methods`` measures what the defaults reach on scikit-learn's digits and CIFAR-10.

    Args:
        model: The model, changed in place.
        forget: The forget set, of which only the labels are read: its classes are forgotten. Not read where
            ``forget_classes`` is given. (A class, or classes, in its place are taken for ``forget_classes``.)
        retain: Batches of the other classes, better shuffled; a small part of the training set will do.
        forget_classes: The class, or the classes, as the integers that ``retain``'s labels are made of.
        noise_batch: Noise inputs learned per class.
        noise_steps: Steps of learning them.
        noise_lr: Learning rate of the noise.
        noise_l2: Weight of the penalty that keeps the noise bounded.
        noise_share: Noise rows among the rows of the impair step, in (0, 1).
        impair_lr: Learning rate of the impair step.
        impair_epochs: Passes over ``retain`` with noise.
        repair_lr: Learning rate of the repair step.
        repair_epochs: Passes over ``retain`` without.
        repair_steps_min: Repair goes on until so many optimizer steps have been made.
        noise_rows: ``"official"`` mixes in what the released code does: as many noise inputs per class as
            the input has channels, 20 times each; ``noise_share`` is not used.
        noise_label: ``"official"`` labels all noise 0 in the impair step, as the released code does.
        repair_schedule: ``"linear"`` lets ``repair_lr`` fall to 0 over the repair, ``"constant"``, as
            released, does not.
        freeze_bn_during_noise: False learns the noise in train mode, as the released code does: BatchNorm
            statistics then end up those of noise.
        until: Stop at a goal: ``"forgotten"`` (accuracy on the forget set at most 1 %), ``"unseen"`` (no
            higher than on ``validation``), an accuracy, or a function of the model that says whether it will
            do. None: go on to the end, whatever comes of it.
        budget: Retain accuracy that reaching the goal may cost, as a share.
        validation: Data that the model never saw, for ``until="unseen"``.
        strict: Raise ``UnlearningFailed`` where the goal is not reached within the budget, not warn. The
            model is as it was either way.
        task: What the model is for; None tells it from the model and the batches, or refuses.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``, instead of the task's.
        generator: Decides every random choice.
        progress: Show a progress bar, where tqdm is installed.
        include: Parameters that may change: names of them or of their modules, the last parts of such names,
            or regular expressions that match a whole name. None: all that are trainable.
        exclude: Parameters that may not change, likewise.
        process_group: Refused unless None.

    Returns:
        The record: the noise loss of every class, step by step, and the epochs of impair and repair.

    Raises:
        TypeError: If the inputs are not one floating-point tensor, or the labels no classes.
        ValueError: If neither ``forget`` nor ``forget_classes``, or no ``retain`` is given, a setting is out
            of range, a class is none of the model's or occurs in ``retain``, or the inputs are not all of one
            shape.
        FloatingPointError: If a loss is NaN or infinite. The model is then as it was.

    Source:
        Tarun, Chundawat, Mandal & Kankanhalli, "Fast Yet Effective Machine Unlearning", IEEE TNNLS 2023, and
        the authors' notebook.

    Example:
        >>> model = nn.Linear(4, 3)
        >>> retain = [(torch.randn(8, 4), torch.arange(8) % 2)]
        >>> result = unsir(model, None, retain, forget_classes=2, noise_batch=4)
        >>> sorted(result.seconds)
        ['impair', 'noise', 'repair']
    """
    refuse_group("unsir", process_group, "noise is learned on one model and mixed into one order")
    chosen = prepared("unsir", model, task, loss_fn)
    if forget_classes is None and _are_classes(forget):
        forget, forget_classes = None, cast("int | Iterable[int]", forget)
    required("unsir", retain=retain)
    assert retain is not None
    if forget_classes is None:
        if forget is None:
            raise ValueError("unsir: forget or forget_classes must be given")
        forget_classes = _classes_in(cast("Batches", forget), chosen)
    classes = _checked_classes(forget_classes)
    settings = {
        "noise_batch": noise_batch,
        "noise_steps": noise_steps,
        "noise_lr": noise_lr,
        "noise_l2": noise_l2,
        "noise_share": noise_share,
        "impair_lr": impair_lr,
        "impair_epochs": impair_epochs,
        "repair_lr": repair_lr,
        "repair_epochs": repair_epochs,
        "repair_steps_min": repair_steps_min,
    }
    _check_settings(settings)
    for name, choice, choices in (
        ("noise_rows", noise_rows, ("all", "official")),
        ("noise_label", noise_label, ("class", "official")),
        ("repair_schedule", repair_schedule, ("linear", "constant")),
    ):
        if choice not in choices:
            raise ValueError(f"unsir: {name} must be one of {', '.join(choices)}, got {choice!r}")
    check_count("unsir", "impair_epochs", impair_epochs)
    check_count("unsir", "repair_epochs", repair_epochs)
    trained = trainable(model, "unsir", include, exclude)
    hyperparameters = {
        "forget_classes": classes,
        **settings,
        "noise_rows": noise_rows,
        "noise_label": noise_label,
        "repair_schedule": repair_schedule,
        "freeze_bn_during_noise": freeze_bn_during_noise,
        **facts_of(task, loss_fn),
    }
    goal = ClosedLoop(
        "unsir", model, cast("Batches | None", forget), retain, until, budget, validation, strict, chosen
    )
    hyperparameters |= goal.facts
    with unlearning(
        model, "unsir", hyperparameters, generator=generator, goal=goal, data=(retain,), changes=trained
    ) as run:
        model.train(not freeze_bn_during_noise)
        reader = _Reader(chosen)
        samples = _noise_samples(run, classes, retain, noise_batch, reader)
        with single_values_normalised(model):
            noise = [
                _learn_noise(run, label, samples, reader, noise_steps, noise_lr, noise_l2, progress)
                for label in classes
            ]
        labels = classes if noise_label == "class" else [0] * len(classes)
        official = noise_rows == "official"
        mixed = _Mixed(run, retain, classes, labels, noise, noise_share, reader, official=official)

        model.train()
        impair = torch.optim.Adam(trained.values(), lr=impair_lr)
        train(
            run,
            "impair",
            mixed,
            chosen.sample_losses,
            impair,
            parameters=trained.values(),
            epochs=impair_epochs,
            progress=progress,
        )
        repair = torch.optim.Adam(trained.values(), lr=repair_lr)
        if repair_schedule == "linear":
            n_steps = max(repair_epochs * mixed.n_batches(), repair_steps_min, 1)
            schedule = torch.optim.lr_scheduler.LinearLR(repair, 1.0, 0.0, total_iters=n_steps)
            repair.register_step_post_hook(lambda *_: schedule.step())
        train(
            run,
            "repair",
            retain,
            chosen.sample_losses,
            repair,
            parameters=trained.values(),
            epochs=repair_epochs,
            steps_min=repair_steps_min,
            progress=progress,
        )
    return goal.result(run)


def _learn_noise(
    run: Run,
    label: int,
    samples: Batch,
    reader: _Reader,
    steps: int,
    lr: float,
    l2: float,
    progress: bool,
) -> Tensor:
    # Error-maximising noise: inputs on which the model is as wrong as it can be about their label.
    inputs = reader.inputs(samples)
    samples = reader.with_label(samples, label)
    noise = torch.randn_like(inputs, dtype=torch.promote_types(inputs.dtype, torch.float32)).requires_grad_()
    optimizer = torch.optim.Adam([noise], lr=lr)
    trace = []
    with run.phase("noise"), _differentiable(run.model):
        for batch in read_batches(
            [samples] * steps, inputs.device, description=f"unsir: noise for class {label}", progress=progress
        ):
            errors = reader.task.sample_losses(run.model, reader.with_inputs(batch, noise.to(inputs.dtype)))
            loss = -errors.mean() + l2 * noise.square().flatten(1).sum(1).mean()
            (noise.grad,) = torch.autograd.grad(loss, [noise])
            optimizer.step()
            trace.append(loss.detach())
        trace = torch.stack(trace).tolist() if trace else []
    for step, value in enumerate(trace):
        if not math.isfinite(value):
            raise FloatingPointError(
                f"unsir: the loss must be finite, got {value} in phase 'noise', class {label}, step {step}"
            )
    run.record("noise", label=label, steps=steps, loss=trace)
    return noise.detach().to(inputs.dtype)


class _Mixed:
    """The retain batches with noise rows put among them; re-iterable."""

    def __init__(
        self,
        run: Run,
        retain: Batches,
        classes: Sequence[int],
        labels: Sequence[int],
        noise: Sequence[Tensor],
        share: float,
        reader: _Reader,
        *,
        official: bool,
    ) -> None:
        self._reader = reader
        self._device = device_of(run.model)
        self._retain = retain
        self._classes = torch.tensor(classes, device=self._device)
        self._labels = torch.tensor(labels, device=self._device)
        self._noise = noise
        self._n_batches: int | None = None
        self._ratio = share / (1 - share)  # noise rows per retain row
        if official:
            rows = min(noise[0].shape[1], len(noise[0])) if noise[0].ndim > 1 else 1
            self._noise = [part[:rows].repeat_interleave(_OFFICIAL_COPIES, 0) for part in noise]
            n_rows = sum(len(part) for part in self._noise)
            self._ratio = n_rows / sum(reader.task.count(batch) for batch in retain)

    def __iter__(self) -> Iterator[Batch]:
        # Rows take turns over the classes; within a class the order is drawn anew for every epoch.
        order = [torch.randperm(len(part)).tolist() for part in self._noise]
        n_classes = len(self._noise)
        seen = given = n_batches = 0
        for batch in read_batches(self._retain, self._device):
            self._check(batch)
            seen += self._reader.task.count(batch)
            due = max(math.ceil(seen * self._ratio - 1e-6), n_classes)
            turns = [divmod(row, n_classes) for row in range(given, due)]
            given = due
            if turns:
                rows = torch.stack([self._noise[c][order[c][turn % len(order[c])]] for turn, c in turns])
                batch = self._reader.with_rows(batch, rows, self._labels[[c for _, c in turns]])
            n_batches += 1
            yield batch
        self._n_batches = n_batches

    def n_batches(self) -> int:
        """Tell how many batches there are, from the last pass if there has been one.

        Returns:
            Their number.
        """
        if self._n_batches is None:
            self._n_batches = count_batches(self._retain)
        return self._n_batches

    def _check(self, batch: Batch) -> None:
        labels = self._reader.task.classes_of(batch)
        if labels is not None and bool(torch.isin(labels, self._classes).any()):
            raise ValueError(
                f"unsir: retain must not hold samples of the classes to forget, {self._classes.tolist()}; "
                "UNSIR forgets whole classes only"
            )
        shape, first = self._reader.inputs(batch).shape[1:], self._noise[0].shape[1:]
        if shape != first:
            raise ValueError(f"unsir: inputs must all have the shape {list(first)}, got {list(shape)}")


def _noise_samples(run: Run, classes: Sequence[int], retain: Batches, rows: int, reader: _Reader) -> Batch:
    # A batch of the user's form with as many rows as the noise; all but inputs and labels is borrowed from
    # retain samples.
    batch = next(read_batches(retain, device_of(run.model)), None)
    if batch is None:
        raise ValueError("unsir: retain must hold a batch, got none")
    reader.inputs(batch)
    reader.check_has_classes(run.model, batch)
    with what_a_task_must_have("unsir", "finetune works for tasks without classes"):
        known = n_classes("unsir", run.model, [batch], reader.task)
    for label in classes:
        if label >= known:
            raise ValueError(f"unsir: forget_classes must lie in [0, {known}), got {label}")
    return reader.task.select(batch, [row % reader.task.count(batch) for row in range(rows)])


class _Reader:
    """Finds the inputs of a batch, which noise takes the place of, and its labels.

    Args:
        task: The task.
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def inputs(self, batch: Batch) -> Tensor:
        return cast("Tensor", entry(batch, self._path(batch)))

    def with_inputs(self, batch: Batch, inputs: Tensor) -> Batch:
        return cast("Batch", with_entry(batch, self._path(batch), inputs))

    def with_label(self, batch: Batch, label: int) -> Batch:
        return self.task.with_labels(batch, torch.full_like(self._labels(batch), label))

    def with_rows(self, batch: Batch, inputs: Tensor, labels: Tensor) -> Batch:
        # Further entries of the new rows are those of the batch's own first samples.
        n = self.task.count(batch)
        longer = self.task.select(batch, [*range(n), *(row % n for row in range(len(inputs)))])
        given = self._labels(batch)
        spread = labels.to(given.dtype).view(-1, *[1] * (given.ndim - 1)).expand(-1, *given.shape[1:])
        longer = self.task.with_labels(longer, torch.cat([given, spread]))
        return self.with_inputs(longer, torch.cat([self.inputs(batch), inputs]))

    def check_has_classes(self, model: nn.Module, batch: Batch) -> None:
        if self.task.classes_of(batch) is None:
            with borrowed(model):
                known = self.task.settled(model, batch)
            if not isinstance(known, Categorical):
                raise TypeError(
                    f"unsir: the samples of retain must be of one class each, got the task {known!r}; it "
                    "forgets whole classes, finetune works for tasks without them"
                )

    def _labels(self, batch: Batch) -> Tensor:
        labels = self.task.labels(batch)
        if labels.is_floating_point() and self.task.classes_of(batch) is None:
            raise TypeError(
                f"unsir: the labels of retain must be classes, integers, got {labels.dtype}; it forgets "
                "whole classes, finetune works for tasks without them"
            )
        return labels

    def _path(self, batch: Batch) -> Path:
        self._labels(batch)
        named = self.task.fields.inputs
        n = self.task.count(batch)
        paths: list[Path] = []
        if isinstance(named, tuple):
            paths = [path for path in named if _is_noise(entry(batch, path), n)]
            fits = len(paths) == 1
        elif callable(named):
            fits = False
        elif isinstance(batch, Mapping):
            held_back = self.task.fields.labels_path(batch)
            paths = [key for key, value in batch.items() if key != held_back and _is_noise(value, n)]
            fits = len(paths) == 1 and "input_ids" not in batch
        else:
            paths = [0]
            fits = _is_noise(batch[0], n)
        if not fits:
            raise TypeError(
                f"unsir: the inputs of retain must be one floating-point tensor, got {described(batch)}; "
                "noise cannot take the place of token ids or of several inputs"
            )
        return paths[0]


def _is_noise(value: object, n: int) -> bool:
    return isinstance(value, Tensor) and is_per_sample(value, n) and value.is_floating_point()


def _differentiable(model: nn.Module) -> AbstractContextManager[None]:
    # cuDNN's recurrent layers have a backward pass in train mode only; torch's own have one in both.
    if not any(isinstance(module, nn.RNNBase) for module in model.modules()):
        return nullcontext()
    cudnn = torch.backends.cudnn
    return cast(
        "AbstractContextManager[None]",
        cudnn.flags(
            enabled=False,
            benchmark=cudnn.benchmark,
            deterministic=cudnn.deterministic,
            allow_tf32=cudnn.allow_tf32,
        ),
    )


def _are_classes(given: object) -> bool:
    # The older form had the classes where the forget set is now.
    if given is None or (hasattr(given, "__index__") and not isinstance(given, Tensor)):
        return given is not None
    if isinstance(given, (Tensor, range, set, frozenset)) or type(given).__module__ == "numpy":
        return True
    if isinstance(given, (list, tuple)):
        return all(hasattr(entry, "__index__") and not isinstance(entry, (list, tuple)) for entry in given)
    return False


def _classes_in(forget: Batches, task: Task) -> list[int]:
    found: set[int] = set()
    with random_states_kept(forget):  # a shuffling loader draws
        for batch in check_batches(forget, "forget"):
            classes = task.classes_of(batch)
            labels = task.labels(batch) if classes is None else classes
            if labels.is_floating_point():
                raise TypeError(f"unsir: the labels of forget must be classes, integers, got {labels.dtype}")
            found.update(labels.flatten().tolist())
    return sorted(label for label in found if label >= 0 and label != getattr(task, "ignore_index", None))


def _checked_classes(forget_classes: int | Iterable[int]) -> list[int]:
    given = forget_classes.tolist() if hasattr(forget_classes, "tolist") else forget_classes
    classes = list(given) if isinstance(given, Iterable) else [given]
    for label in classes:
        if isinstance(label, bool) or not hasattr(label, "__index__") or label < 0:
            raise ValueError(f"unsir: forget_classes must be integers >= 0, got {label!r}")
    if not classes or len(set(classes)) < len(classes):
        raise ValueError(f"unsir: forget_classes must be distinct and at least one, got {classes}")
    return [int(label) for label in classes]


def _check_settings(settings: Mapping[str, float]) -> None:
    for name, value in settings.items():
        least = 1 if name == "noise_batch" else 0
        if not (math.isfinite(value) and value >= least):
            raise ValueError(f"unsir: {name} must be finite and >= {least}, got {value}")
    if not 0 < settings["noise_share"] < 1:
        raise ValueError(f"unsir: noise_share must lie in (0, 1), got {settings['noise_share']}")
