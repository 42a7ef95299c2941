"""Small parts that several methods share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.hooks import RemovableHandle

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.modules import check_model
from unlearn_ext._internal.names import chosen_names, parameters_by_name
from unlearn_ext._internal.plain import callable_name
from unlearn_ext._internal.seeding import random_states_kept
from unlearn_ext._internal.undo import Undone
from unlearn_ext.distributed import ALONE, Group, MeshRanks, Ranks
from unlearn_ext.distributed.fsdp_steps import steps
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches, check_batches, device_of, read_batches
from unlearn_ext.tasks.losses import LossFn, cross_entropy, resolve


def prepared(
    who: str, model: nn.Module, task: Task | None, loss_fn: LossFn | None, ranks: Ranks = ALONE
) -> Task:
    """Look at what every method is called with, before anything is done.

    Args:
        who: The method.
        model: The model.
        task: What the user passed.
        loss_fn: What the user passed.
        ranks: Those that call it together; of a sharded model those of its mesh.

    Returns:
        The task, whose ``loss`` is the user's where one was given.
    """
    check_model(model, who, may_be_sharded=isinstance(ranks, MeshRanks))
    return resolve(task, loss_fn, who=who)


def refuse_group(who: str, process_group: Group, why: str) -> None:
    """Refuse a process group where a method cannot be run on many ranks.

    Args:
        who: The method.
        process_group: What the user passed.
        why: What stands in the way.

    Raises:
        NotImplementedError: If a group is given.
    """
    if process_group is not None:
        raise NotImplementedError(
            f"{who}: process_group must be None, {why}; call it on one rank with all data, and send the "
            "weights to the others with torch.distributed.broadcast"
        )


def required(who: str, **sets: Batches | None) -> None:
    """Refuse sets that are missing or cannot be read more than once.

    Args:
        who: The method.
        **sets: Sets by the names of their arguments.

    Raises:
        ValueError: If one is None, or a one-shot iterator.

    Example:
        >>> required("finetune", retain=None)
        Traceback (most recent call last):
        ValueError: finetune: retain must be given, got None
    """
    for name, data in sets.items():
        if data is None:
            raise ValueError(f"{who}: {name} must be given, got None")
        check_batches(data, name)


def facts_of(task: Task | None, loss_fn: LossFn | None) -> dict[str, object]:
    """Return what a record says of task and loss.

    Args:
        task: What the user passed.
        loss_fn: What the user passed.

    Returns:
        The task, where one was given, and the name of the loss, where it is not the task's.
    """
    facts: dict[str, object] = {} if task is None else {"task": repr(task)}
    if task is None or loss_fn is not None:
        facts["loss_fn"] = callable_name(cross_entropy if loss_fn is None else loss_fn)
    return facts


@contextmanager
def what_a_task_must_have(who: str, instead: str = "") -> Iterator[None]:
    """Say of what a task lacks who needs it, and what can be done.

    Args:
        who: The method.
        instead: What works for such tasks.

    Yields:
        Nothing.

    Raises:
        NotImplementedError: If the task raises it.
    """
    try:
        yield
    except NotImplementedError as error:
        raise NotImplementedError(f"{who}: {error}{'; ' if instead else ''}{instead}") from error


def trainable(
    model: nn.Module,
    method: str,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] | None = None,
) -> dict[str, nn.Parameter]:
    """Return the parameters that may change.

    Args:
        model: The model.
        method: For the message.
        include: Patterns of those that may; see ``chosen_names``.
        exclude: Patterns of those that may not.

    Returns:
        Those that require grad, by plain name, at least one.

    Raises:
        ValueError: If there is none.
    """
    parameters = {name: p for name, p in parameters_by_name(model).items() if p.requires_grad}
    if not parameters:
        raise ValueError(f"{method}: model must have a trainable parameter, got none")
    return {name: parameters[name] for name in chosen_names(parameters, include, exclude, method)}


def train_with_fixed_statistics(model: nn.Module) -> None:
    """Put the model in train mode, but every layer that keeps running statistics in eval mode.

    A batch of the forget set alone has statistics that no later batch has: what is learned under them does
    not carry over to eval mode.

    Args:
        model: The model.
    """
    model.train()
    for module in model.modules():
        if isinstance(module, _NormBase) and module.track_running_stats:
            module.eval()


def n_classes(who: str, model: nn.Module, data: Batches, task: Task, ranks: Ranks = ALONE) -> int:
    """Ask the model for the number of its classes.

    Args:
        who: The method.
        model: The model; left as it was.
        data: Its first non-empty batch is read.
        task: The task.
        ranks: Those that ask together: the lowest that has a sample tells the others.

    Returns:
        The size of the class dimension of the task's scores.
    """
    own: int | None = None
    with borrowed(model), random_states_kept(data), torch.no_grad():
        batch = _first_batch(who, model, data, task, ranks)
        if batch is not None:
            outputs = task.forward(model, batch)
            scores = task.log_scores(outputs, batch)
            task.counted(outputs, batch)  # refuses labels that are no classes
            own = scores.shape[-1]
    found = ranks.first("classes", own)
    assert found is not None
    return found


def relabelling(
    who: str, model: nn.Module, data: Batches, task: Task, instead: str = "", ranks: Ranks = ALONE
) -> Callable[[Batch], Batch]:
    """Return the function that gives a batch labels other than its own, drawn anew on every call.

    Args:
        who: The method.
        model: The model; left as it was.
        data: Its first non-empty batch is tried.
        task: The task; what it ignores stays ignored.
        instead: What works for tasks that have no other labels, for the message.
        ranks: Those that ask together; each needs it for its own batches alone.

    Returns:
        A function of a batch. It draws from the global random state of the CPU, so that a seed means the same
        labels on every device.

    Raises:
        ValueError: If the labels are no classes; the message names the task to pass.
    """
    is_sharded = isinstance(ranks, MeshRanks)
    with (
        ranks.sharded.resharded() if isinstance(ranks, MeshRanks) else nullcontext(),
        what_a_task_must_have(who, instead),
        borrowed(model),
        random_states_kept(data),
    ):
        batch = _first_batch(who, model, data, task, ranks)
        if batch is None:
            return task.relabel  # there is nothing to relabel here
        with ranks.in_collectives() if is_sharded else nullcontext():
            known = task.settled(model, batch)
        try:
            known.relabel(batch)
        except ValueError:
            if is_sharded:  # where no rank runs the model alone
                raise
            with torch.no_grad():
                task.loss(model, batch)  # says best what labels of another kind need
            raise
    return known.relabel


def _first_batch(who: str, model: nn.Module, data: Batches, task: Task, ranks: Ranks) -> Batch | None:
    # None where another rank has one; of a sharded model, which all ranks run, then one of that rank's.
    if isinstance(ranks, MeshRanks):
        sharded = ranks.begin("first batch")
        step = next(steps(sharded, data, task, sharded.device), None)
        if step is None:
            raise ValueError(f"{who}: the data must hold at least one sample on some rank, got none")
        return step.batch
    found = next((batch for batch in read_batches(data, device_of(model)) if task.count(batch)), None)
    if not any(ranks.exchange("first batch", found is not None)):
        raise ValueError(f"{who}: the data must hold at least one sample, got none")
    return found


def count_batches(data: Batches, ranks: Ranks = ALONE) -> int:
    """Count batches: by ``len`` where that is known, else in a pass that leaves the random state as it was.

    Args:
        data: Re-iterable batches.
        ranks: Those that count together.

    Returns:
        Their number; of the rank that has most.

    Example:
        >>> count_batches([(torch.zeros(4, 3),), (torch.zeros(1, 3),)])
        2
    """
    try:
        own = len(data)  # type: ignore[arg-type]
    except TypeError:  # a DataLoader of a stream has the method, and no answer
        with random_states_kept(data):
            own = sum(1 for _ in data)
    return max(ranks.exchange("batches", own))


def epochs_of(steps: int, data: Batches, ranks: Ranks = ALONE) -> int:
    """Return how many passes over the data make at least so many steps.

    Args:
        steps: One per batch.
        data: Re-iterable batches; an empty set counts as one.
        ranks: Those that make the steps together.

    Returns:
        The number of passes.

    Example:
        >>> epochs_of(5, [(torch.zeros(4, 3),), (torch.zeros(1, 3),)])
        3
    """
    return math.ceil(steps / max(1, count_batches(data, ranks)))


def check_count(who: str, name: str, value: object, least: int = 0) -> None:
    """Refuse what is no number of epochs or steps.

    Args:
        who: Whose message it is.
        name: Name of the argument.
        value: What was given.
        least: The least that makes sense.

    Raises:
        TypeError: If it is no integer.
        ValueError: If it is less than ``least``.

    Example:
        >>> check_count("finetune", "epochs", -1)
        Traceback (most recent call last):
        ValueError: finetune: epochs must be >= 0, got -1
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{who}: {name} must be an integer, got {value!r}")
    if value < least:
        raise ValueError(f"{who}: {name} must be >= {least}, got {value}")


def check_weights(who: str, **weights: float) -> None:
    """Refuse weights of a loss that would climb it, or drown the others.

    Args:
        who: Whose message it is.
        **weights: By the names of the arguments.

    Raises:
        ValueError: If one is negative, infinite or NaN.

    Example:
        >>> check_weights("rmu", retain_weight=-1.0)
        Traceback (most recent call last):
        ValueError: rmu: retain_weight must be finite and >= 0, got -1.0
    """
    for name, weight in weights.items():
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"{who}: {name} must be finite and >= 0, got {weight}")


@contextmanager
def single_values_normalised(model: nn.Module) -> Iterator[None]:
    """Let batch normalisations in train mode take batches of one sample.

    With a single value per channel there is no variance to divide by, and torch refuses. Inside, such a call
    uses the running statistics, as in eval mode, and does not move them; all other calls are as ever.

    Args:
        model: The model.

    Yields:
        Nothing.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> with single_values_normalised(model):
        ...     model(torch.ones(1, 2)).shape
        torch.Size([1, 2])
    """
    switched: list[nn.Module] = []

    def before(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        values = args[0] if args else None
        if not (module.training and isinstance(values, Tensor) and values.ndim > 1):
            return
        if values.numel() == values.shape[1]:
            if module.running_mean is None:
                raise ValueError(
                    "a batch normalisation without running statistics must get more than one value per "
                    "channel, got a batch of one sample; leave such batches out (drop_last=True)"
                )
            module.training = False
            switched.append(module)

    def after(module: nn.Module, *_: object) -> None:
        if module in switched:
            switched.remove(module)
            module.training = True

    handles: list[RemovableHandle] = []

    def put_back() -> None:
        for handle in handles:
            handle.remove()
        for module in switched:  # an interrupt skips hooks, also those that are always called
            module.training = True

    with Undone(put_back):
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(before))
                handles.append(module.register_forward_hook(after, always_call=True))
        yield


class _Nothing(tuple[()]):
    """The type of ``NOTHING``, which moving a batch between devices preserves."""

    __slots__ = ()


NOTHING: Batch = _Nothing()
"""The batch of a rank that has none of a set, of which others have."""


def is_nothing(batch: Batch) -> bool:
    """Say whether a batch is ``NOTHING``.

    Args:
        batch: A batch.

    Returns:
        True if so, also of a copy.
    """
    return isinstance(batch, _Nothing)


def values_of(batch: Batch, loss: Callable[[Batch], Tensor]) -> Tensor:
    """Compute the values of a batch, if there is one.

    Args:
        batch: A batch, or ``NOTHING``.
        loss: Computes them.

    Returns:
        One per sample.
    """
    return torch.zeros(0) if isinstance(batch, _Nothing) else loss(batch)


class Endless:
    """The batches of a set one after the other, from the first again after the last.

    Of many ranks one whose own set is empty gets ``NOTHING``.

    Args:
        who: Whose message it is.
        name: Name of the set, for messages.
        data: Re-iterable batches.
        ranks: Those that read together.
    """

    def __init__(self, who: str, name: str, data: Batches, ranks: Ranks = ALONE) -> None:
        self._who, self._name, self._data, self._ranks = who, name, data, ranks
        self._batches: Iterator[Batch] = iter(())

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches, None)
        if batch is None:
            self._batches = iter(self._data)
            batch = next(self._batches, None)
        if batch is None and self._ranks.are_many:
            return NOTHING
        if batch is None:
            raise ValueError(f"{self._who}: {self._name} must hold a batch, got none")
        return batch


class Paired:
    """Every batch of one set together with one of another; re-iterable.

    The second set goes on from one pass to the next and starts again when it ends, so that all of its samples
    are read equally often, however small the first set is.

    Args:
        who: Whose message it is.
        first: Read once per pass.
        ranks: Those that read together.
        **second: The other set, under its name for messages.

    Example:
        >>> pairs = Paired("example", [(1,), (2,)], retain=[("a",), ("b",), ("c",)])
        >>> list(pairs), list(pairs)
        ([((1,), ('a',)), ((2,), ('b',))], [((1,), ('c',)), ((2,), ('a',))])
    """

    def __init__(self, who: str, first: Batches, *, ranks: Ranks = ALONE, **second: Batches) -> None:
        ((name, data),) = second.items()
        self._who, self._name = who, "retain" if name == "forget" else "forget"
        self._first, self._ranks = first, ranks
        self._second = Endless(who, name, data, ranks)

    def __iter__(self) -> Iterator[tuple[Batch, Batch]]:
        is_empty = True
        for batch in self._first:
            is_empty = False
            yield batch, next(self._second)
        if is_empty and not self._ranks.are_many:
            raise ValueError(f"{self._who}: {self._name} must hold a batch, got none")


class Portion:
    """A share of a set's batches per pass, each pass going on where the last ended; re-iterable.

    Args:
        who: Whose message it is.
        name: Name of the set, for messages.
        data: Re-iterable batches.
        share: In (0, 1].
        ranks: Those that read together.

    Example:
        >>> part = Portion("example", "retain", [("a",), ("b",), ("c",)], 0.5)
        >>> list(part), list(part)
        ([('a',), ('b',)], [('c',), ('a',)])
    """

    def __init__(self, who: str, name: str, data: Batches, share: float, ranks: Ranks = ALONE) -> None:
        self._data, self._share, self._ranks = data, share, ranks
        self._batches = Endless(who, name, data, ranks)

    def __iter__(self) -> Iterator[Batch]:
        whole = count_batches(self._data)
        if not whole and self._ranks.are_many:
            return
        n = max(1, math.ceil(self._share * whole - 1e-9))
        for _ in range(n):
            yield next(self._batches)
