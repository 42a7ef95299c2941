"""What a model is for: the one object that calls it and reads its answers."""

# ruff: noqa: DOC202 - what a subclass returns is documented here

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from typing import Any, Literal, NoReturn, TypeAlias

import torch
from torch import Tensor, nn
from typing_extensions import Self

from unlearn_ext.tasks.batches import Batch, count_samples, take
from unlearn_ext.tasks.fields import Fields, Inputs, Labels, described
from unlearn_ext.tasks.mistaken import logits_of

Outputs: TypeAlias = Any
"""What a task's ``forward`` returns, for the task's other methods."""

Yardstick: TypeAlias = Literal["accuracy", "loss"]
"""What tells a sample that is known from one that is not."""


class Task:
    """What a model is for; subclass it for a task of your own.

    A task calls the model, and turns what it answers into losses, log-odds, right answers and probabilities;
    nothing else in the package calls a model or reads labels. A subclass needs ``losses``; what it lacks
    beside that raises ``NotImplementedError`` where a method or metric needs it. Batches whose samples do not
    lie along the leading dimension of every tensor (lists of images, graphs, offsets) need ``select`` and
    ``count`` too.

    Args:
        inputs: Which entries of a batch the model is called with; see ``Fields``.
        labels: Which entry holds the labels; see ``Fields``.

    Example:
        >>> class Pairs(Task):
        ...     def losses(self, outputs, batch):
        ...         return (outputs - batch["distance"]).square()
        >>> task = Pairs(inputs="left right", labels="distance")
    """

    loss_fn: Callable[[nn.Module, Batch], Tensor] | None = None

    def __init__(self, *, inputs: Inputs = None, labels: Labels = None) -> None:
        self.fields = Fields(inputs, labels)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"

    def settings(self) -> dict[str, object]:
        """Return what tells the task from others of its class.

        Returns:
            Its arguments that differ from None, by name.
        """
        given = {"inputs": self.fields.inputs, "labels": self.fields.labels}
        return {name: value for name, value in given.items() if value is not None}

    def forward(self, model: nn.Module, batch: Batch) -> Any:  # noqa: ANN401 - for the task's own methods
        """Call the model: the only place that does.

        Args:
            model: The model.
            batch: A batch on the model's device.

        Returns:
            What the other methods take as ``outputs``; here the logits, at least float32.
        """
        return logits_of(self.fields, model, batch)

    def losses(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return one loss per sample, differentiable.

        Args:
            outputs: What ``forward`` returned.
            batch: The batch.

        Returns:
            ``[N]``.
        """
        self._lacks("losses")

    def log_odds(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return log p/(1-p) of the truth, one value per sample, differentiable.

        Args:
            outputs: What ``forward`` returned.
            batch: The batch.

        Returns:
            ``[N]``; the mean over a sample's positions where it has several.
        """
        self._lacks("log_odds")

    def correct(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        """Count right answers.

        Args:
            outputs: What ``forward`` returned.
            batch: The batch.

        Returns:
            ``[N]`` right and ``[N]`` counted answers: accuracy is sum / sum.
        """
        self._lacks("correct")

    def scores(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Return the probabilities that the model gives to the classes, for divergences and attacks.

        Args:
            outputs: What ``forward`` returned.
            batch: The batch, with labels or without.

        Returns:
            ``[N, ..., C]``, classes last.
        """
        return self.log_scores(outputs, batch).exp()

    def log_scores(self, outputs: Outputs, batch: Batch, *, temperature: float = 1.0) -> Tensor:
        """Return the logarithms of ``scores``.

        Args:
            outputs: What ``forward`` returned.
            batch: The batch, with labels or without.
            temperature: Divides the logits.

        Returns:
            ``[N, ..., C]``, classes last.
        """
        self._lacks("log_scores")

    def counted(self, outputs: Outputs, batch: Batch) -> Tensor:
        """Say which positions of ``scores`` count: not what is padding, void or unlabelled.

        Args:
            outputs: What ``forward`` returned.
            batch: The batch; without labels every position counts.

        Returns:
            bool ``[N, ...]``, of the shape of ``scores`` without its last dimension.
        """
        scores = self.log_scores(outputs, batch)
        return torch.ones(scores.shape[:-1], dtype=torch.bool, device=scores.device)

    def relabel(self, batch: Batch, generator: torch.Generator | None = None) -> Batch:
        """Return the batch with labels other than the true ones; what is ignored stays ignored.

        Args:
            batch: A batch with labels.
            generator: Draws them, on the CPU: a seed means the same on every device.

        Returns:
            A batch of the same form.
        """
        self._lacks("relabel")

    def sampled(
        self,
        outputs: Outputs,
        batch: Batch,
        generator: torch.Generator | None = None,
        *,
        temperature: float = 1.0,
    ) -> Batch:
        """Return the batch with labels drawn from the model's own distribution, for the true Fisher.

        Args:
            outputs: What ``forward`` returned.
            batch: A batch with labels; what is ignored stays ignored.
            generator: Draws them.
            temperature: Divides the logits.

        Returns:
            A batch of the same form.
        """
        self._lacks("sampled")

    def select(self, batch: Batch, samples: Sequence[int]) -> Batch:
        """Return the batch of some samples; one may come several times.

        Args:
            batch: A batch.
            samples: Which ones.

        Returns:
            A batch of the same form. Every tensor whose leading dimension is the number of samples holds one
            entry per sample; all others are shared and stay whole.
        """
        return take(batch, self.count(batch), samples)

    def count(self, batch: Batch) -> int:
        """Return the number of samples of a batch.

        Args:
            batch: A batch.

        Returns:
            The leading dimension of its labels, or of its first tensor where it has none.

        Raises:
            ValueError: If the labels have no dimension: a sample that is in no batch.
        """
        try:
            labels = self.labels(batch)
        except ValueError:
            return count_samples(batch)
        if not labels.ndim:
            raise ValueError(
                f"labels must have a leading sample dimension, got {described(batch)}: a sample in no "
                "batch; give the DataLoader a batch_size"
            )
        return labels.shape[0]

    def labels(self, batch: Batch) -> Tensor:
        """Return the labels of a batch.

        Args:
            batch: A batch.

        Returns:
            The labels, as they are.
        """
        return self.fields.labels_of(batch)

    def with_labels(self, batch: Batch, labels: Tensor) -> Batch:
        """Return the batch with other labels; the batch itself is left alone.

        Args:
            batch: A batch with labels.
            labels: What to put in their place.

        Returns:
            A batch of the same form.
        """
        return self.fields.with_labels(batch, labels)

    def classes_of(self, batch: Batch) -> Tensor | None:
        """Return the class of each sample, for requests to forget classes.

        Args:
            batch: A batch.

        Returns:
            Integers ``[N]``, or None where samples have no single class.
        """
        try:
            labels = self.labels(batch)
        except ValueError:
            return None
        single = labels.ndim == 1 and not labels.is_floating_point() and not labels.is_complex()
        return labels if single else None

    def yardstick(self, model: nn.Module) -> Yardstick:
        """Say what tells samples that a model knows from those it does not.

        Args:
            model: The model.

        Returns:
            ``"accuracy"``; ``"loss"`` for language models, most of whose answers are right for any text.
        """
        return "accuracy"

    @property
    def loss(self) -> Callable[[nn.Module, Batch], Tensor]:
        """The loss of a model on a batch: ``loss(model, batch)`` is ``[N]``, one loss per sample."""
        return self._loss if self.loss_fn is None else self.loss_fn

    def _loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.losses(self.forward(model, batch), batch)

    def sample_losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Call the model and return the losses of a batch, if that is what they are: one per sample.

        Args:
            model: The model.
            batch: A batch on the model's device.

        Returns:
            ``[N]``.

        Raises:
            ValueError: If the loss is something else.
        """
        return one_per_sample(self.loss(model, batch))

    def with_loss(self, loss_fn: Callable[[nn.Module, Batch], Tensor]) -> Self:
        """Return the task with a loss of the user's own; everything else is the task's.

        Args:
            loss_fn: ``loss_fn(model, batch) -> Tensor[N]``.

        Returns:
            A copy whose ``loss`` is that very function, so that it is recognised from call to call.
        """
        made = copy(self)
        made.loss_fn = loss_fn
        return made

    def odds_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Call the model and return minus the log-odds of every sample: a loss that no sample saturates.

        Args:
            model: The model.
            batch: A batch on the model's device.

        Returns:
            ``[N]``.
        """
        return -self.log_odds(self.forward(model, batch), batch)

    @property
    def has_own_select(self) -> bool:
        """Whether samples are taken from batches by a rule of the task's own."""
        return type(self).select is not Task.select

    def settled(self, model: nn.Module, batch: Batch) -> Task:
        """Return the task with what only the model and a batch can tell, such as the number of classes.

        Args:
            model: The model, borrowed.
            batch: A batch on its device.

        Returns:
            A task that ``relabel`` works on.
        """
        return self

    def _lacks(self, what: str) -> NoReturn:
        raise NotImplementedError(f"the task {type(self).__name__} has no {what}")


def one_per_sample(losses: object) -> Tensor:
    """Refuse what is not one loss per sample.

    Args:
        losses: What a task or a user's loss has returned.

    Returns:
        The same, ``[N]``.

    Raises:
        ValueError: If it is something else: a sum would be taken for a mean, and what is done sample by
            sample (caps, weights, means over processes) could not be done.

    Example:
        >>> one_per_sample(torch.zeros(3))
        tensor([0., 0., 0.])
    """
    if isinstance(losses, Tensor) and losses.ndim == 1:
        return losses
    got = f"a tensor {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
    raise ValueError(
        f"the loss must be one value per sample, a tensor [N] (reduction='none'), got {got}; a loss that "
        "only a batch as a whole has, such as a contrastive one, is given to each of its N samples: "
        "loss.expand(N)"
    )


def check_shape(task: Task, what: str, found: Tensor, wanted: Sequence[int], outputs: Tensor) -> None:
    """Refuse labels that do not have the shape that goes with the outputs.

    Args:
        task: For the message.
        what: The labels' name.
        found: The labels.
        wanted: The shape.
        outputs: The model's outputs, for the message.

    Raises:
        ValueError: If the shapes differ.
    """
    if list(found.shape) != list(wanted):
        raise ValueError(
            f"{type(task).__name__}: {what} must have the shape {list(wanted)} for outputs "
            f"{list(outputs.shape)}, got {described(found)}"
        )
