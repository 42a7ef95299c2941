"""Which task a model is for: told from the model and the form of a batch, or refused."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from unlearn_ext.tasks.base import Outputs, Task, Yardstick
from unlearn_ext.tasks.batches import Batch, tensors_in
from unlearn_ext.tasks.classification import Classification
from unlearn_ext.tasks.decisions import Binary, MultiLabel
from unlearn_ext.tasks.dense import Segmentation
from unlearn_ext.tasks.fields import Fields, described, is_encoder_decoder
from unlearn_ext.tasks.language import (
    CausalLM,
    MaskedLM,
    Sequence2Sequence,
    TokenClassification,
    says_nothing,
)
from unlearn_ext.tasks.regression import Regression

# Names of Hugging Face's classes, and what they predict.
_BY_NAME: tuple[tuple[str, Callable[[], Task]], ...] = (
    ("ForTokenClassification", TokenClassification),
    ("ForMaskedLM", MaskedLM),
    ("ForSemanticSegmentation", Segmentation),
    ("ForCausalLM", CausalLM),
    ("LMHeadModel", CausalLM),
)
_BY_PROBLEM: Mapping[str, Callable[[], Task]] = {
    "regression": Regression,
    "single_label_classification": Classification,
    "multi_label_classification": MultiLabel,
}
_UNKNOWN = ("ForQuestionAnswering", "ForPreTraining", "ForNextSentencePrediction", "ForObjectDetection")


def infer(model: nn.Module, batch: Batch) -> Task:
    """Tell the task from the model and a batch, without running the model.

    A Hugging Face model tells by its class or ``config``; any other by the form of the labels. What they
    leave open is refused with the task to pass. The task checks its outputs and labels on every batch.

    Args:
        model: The model, perhaps compiled or wrapped.
        batch: A batch.

    Returns:
        The task.

    Raises:
        ValueError: If model and batch do not tell; the message names the tasks to choose from.

    Example:
        >>> infer(nn.Linear(2, 3), (torch.zeros(4, 2), torch.zeros(4, dtype=torch.long)))
        Classification(ignore_index=-100)
    """
    inner = unwrapped(model)
    named = _by_name(inner)
    if named is not None:
        return _canonical(named)
    if not isinstance(batch, (tuple, list, Mapping)):
        raise ValueError(
            f"task must say how a batch of type {type(batch).__name__} is read; pass a subclass of "
            "ux.tasks.Task with forward, losses, select and count"
        )
    fields = _fields(inner, batch)
    labels = _labels(fields, batch)
    if labels is not None:
        _check_form(inner, batch, labels)
    return _canonical(Classification(inputs=fields.inputs, labels=fields.labels))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside compilation, data parallelism and adapters.

    Args:
        model: Any model.

    Returns:
        The innermost one that the wrappers name.
    """
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and type(model).__name__ in ("DistributedDataParallel", "DataParallel"):
            inner = model.module
        if inner is None and hasattr(model, "get_base_model"):
            inner = cast("Any", model).get_base_model()
        if not isinstance(inner, nn.Module) or inner is model:
            return model
        model = inner


def _by_name(model: nn.Module) -> Task | None:
    name, config = type(model).__name__, getattr(model, "config", None)
    # A subclass of the user's own is told by its base.
    names = [base.__name__ for base in type(model).__mro__ if issubclass(base, nn.Module)]
    for known in names:
        for unknown in _UNKNOWN:
            if known.endswith(unknown):
                raise ValueError(
                    f"task must say what {name} predicts; pass a subclass of ux.tasks.Task with losses"
                )
        for ending, task in _BY_NAME:
            if known.endswith(ending):
                return task()
    if is_encoder_decoder(model):
        return Sequence2Sequence()
    if any(known.endswith("ForConditionalGeneration") for known in names):
        return CausalLM()
    if any(known.endswith(("ForSequenceClassification", "ForImageClassification")) for known in names):
        problem = getattr(config, "problem_type", None)
        if problem is None and getattr(config, "num_labels", None) == 1:
            problem = "regression"  # as these models do
        made = _BY_PROBLEM.get(str(problem))
        return None if made is None else made()
    return None


def _fields(model: nn.Module, batch: Sequence[Any] | Mapping[str, Any]) -> Fields:
    if isinstance(batch, Mapping):
        return Fields()
    tensors = [part for part in batch if isinstance(part, (Tensor, tuple, list, Mapping))]
    if len(tensors) > 2:
        raise ValueError(
            f"task must say which of the entries {described(batch)} are inputs and which are labels; pass "
            "task=ux.tasks.Classification(inputs=(0, 1), labels=2), or whichever they are"
        )
    first: object = batch[0] if len(batch) else None
    if isinstance(first, (tuple, list)) and len(first) > 1:
        wanted = _n_required(model)
        if wanted == len(first):
            return Fields(inputs=[(0, place) for place in range(len(first))], labels=1)
        if wanted != 1:
            raise ValueError(
                f"task must say how the model takes the inputs {described(first)}; pass "
                "task=ux.tasks.Classification(inputs=((0, 0), (0, 1)), labels=1), or inputs=0 for one"
            )
    return Fields()


def _n_required(model: nn.Module) -> int | None:
    try:
        parameters = inspect.signature(model.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    if any(parameter.kind is inspect.Parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    return sum(p.kind in positional and p.default is inspect.Parameter.empty for p in parameters)


def _labels(fields: Fields, batch: Sequence[Any] | Mapping[str, Any]) -> Tensor | None:
    try:
        return fields.labels_of(batch)
    except ValueError:
        second: object = None if isinstance(batch, Mapping) or len(batch) < 2 else batch[1]
        if isinstance(second, (tuple, list, Mapping)):
            raise ValueError(
                f"task must say how the targets {described(second)} are read; pass a subclass of "
                "ux.tasks.Task with losses, select and count"
            ) from None
        return None


def _check_form(model: nn.Module, batch: Sequence[Any] | Mapping[str, Any], labels: Tensor) -> None:
    if labels.ndim == 0:  # a shape that goes with no outputs
        return
    whole = not (labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex())
    if isinstance(batch, Mapping) and labels.ndim == 2 and whole:
        raise ValueError(says_nothing(model))
    n = labels.shape[0]
    if isinstance(batch, Mapping):
        return
    for tensor in tensors_in(batch[0]):
        if tensor.ndim and tensor.shape[0] != n:
            raise ValueError(
                f"task must say how samples are taken from inputs {described(batch[0])} with labels "
                f"{described(labels)}: an input's leading dimension is not the number of samples, {n}. Pass "
                "a subclass of ux.tasks.Task with select and count, or, if all samples share that input, "
                "task=ux.tasks.Classification()"
            )


class _Inferred(Task):
    """The task that each batch is for, told anew for every batch, so that it holds no state of any model."""

    def __init__(self) -> None:
        super().__init__()

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        task = infer(model, batch)
        return task, task.forward(model, batch)

    def losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        return cast("Tensor", outputs[0].losses(outputs[1], batch))

    def log_odds(self, outputs: Outputs, batch: Batch) -> Tensor:
        return cast("Tensor", outputs[0].log_odds(outputs[1], batch))

    def correct(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        return cast("tuple[Tensor, Tensor]", outputs[0].correct(outputs[1], batch))

    def log_scores(self, outputs: Outputs, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        return cast("Tensor", outputs[0].log_scores(outputs[1], batch, temperature=temperature))

    def counted(self, outputs: Outputs, batch: Batch) -> Tensor:
        return cast("Tensor", outputs[0].counted(outputs[1], batch))

    def yardstick(self, model: nn.Module) -> Yardstick:
        # What is not told by the model's class is told by labels, and texts are not.
        named = _by_name(unwrapped(model))
        return "accuracy" if named is None else named.yardstick(model)

    def sampled(
        self,
        outputs: Outputs,
        batch: Batch,
        generator: torch.Generator | None = None,
        *,
        temperature: float = 1.0,
    ) -> Batch:
        return cast("Batch", outputs[0].sampled(outputs[1], batch, generator, temperature=temperature))

    def relabel(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        raise ValueError("the task must be settled on a model before labels can be redrawn")

    def settled(self, model: nn.Module, batch: Batch) -> Task:
        found = infer(model, batch).settled(model, batch)
        return found if self.loss_fn is None else found.with_loss(self.loss_fn)


INFERRED: Task = _Inferred()
"""What ``task=None`` means."""


def _canonical(task: Task) -> Task:
    # One object per setting, so that what is known about a model and its loss is found again.
    try:
        return _kept(cast("Any", type(task)), tuple(sorted(task.settings().items())))
    except TypeError:  # a setting that cannot be hashed or sorted
        return task


@functools.lru_cache(maxsize=256)
def _kept(kind: type[Task], settings: tuple[tuple[str, Any], ...]) -> Task:
    return kind(**dict(settings))


def interned(task: Task) -> Task:
    """Return the one object that stands for a task of ours with the same settings.

    Args:
        task: Any task.

    Returns:
        That object; a user's own task as it is.
    """
    ours = type(task) in (
        Binary,
        CausalLM,
        Classification,
        MaskedLM,
        MultiLabel,
        Regression,
        Segmentation,
        Sequence2Sequence,
        TokenClassification,
    )
    return _canonical(task) if ours and task.loss_fn is None else task
