"""All or nothing: a model is changed in one run, which keeps a record and can put everything back."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from unlearn_ext._internal.borrow import Buffers, Tables, restored
from unlearn_ext._internal.dtensors import local_of, totals
from unlearn_ext._internal.modules import check_model
from unlearn_ext._internal.names import parameters_by_name, plain_name
from unlearn_ext._internal.seeding import random_states_kept, seeded
from unlearn_ext._internal.undo import Undone
from unlearn_ext.distributed import ALONE, MeshRanks, Ranks
from unlearn_ext.distributed.agree import check_same_weights
from unlearn_ext.distributed.fsdp import reshard
from unlearn_ext.results import UnlearnResult
from unlearn_ext.tasks.batches import device_of

if TYPE_CHECKING:
    from unlearn_ext.methods.goal import ClosedLoop

_AT_END: ContextVar[Callable[[Run], object] | None] = ContextVar("at_end", default=None)


@contextmanager
def at_the_end(call: Callable[[Run], object]) -> Iterator[None]:
    """Have something done at the end of the run inside, when the model has changed and can still be put back.

    Args:
        call: What to do with the run; if it raises, the run has failed.

    Yields:
        Nothing.
    """
    before = _AT_END.get()
    with Undone(lambda: _AT_END.set(before)):
        _AT_END.set(call)
        yield


class Run:
    """One unlearning run in progress: the model as it was, and the record so far. Made by ``unlearning``.

    Attributes:
        ranks: Those that run together.
        seed: Of many ranks, what their random streams come from.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str,
        hyperparameters: Mapping[str, object],
        *,
        changes: Iterable[str] | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.model, self.ranks, self.seed = model, ranks, 0
        self.method = method
        self.hyperparameters = dict(hyperparameters)
        self.history: list[dict[str, object]] = []
        self.seconds: dict[str, float] = {}
        self.coverage: dict[str, str] = {}
        self.goal: ClosedLoop | None = None
        self._before: dict[str, Tensor] = {}
        self._buffers = Buffers(model)
        self._n_shared_draws = 0
        self._counts: dict[str, tuple[int, int]] | None = None
        self.keep(parameters_by_name(model) if changes is None else changes)

    def keep(self, names: Iterable[str]) -> None:
        """Announce parameters that are to change, and keep their values; no other may.

        Args:
            names: Their names; those that are kept already are left at that.
        """
        parameters = self._parameters()
        for name in map(plain_name, names):
            if name not in self._before:
                self._before[name] = parameters[name].detach().clone()

    @contextmanager
    def shared_draws(self) -> Iterator[None]:
        """Draw the same random numbers on all ranks; of one process alone, those that come next.

        Yields:
            Nothing.
        """
        if not self.ranks.are_many:
            yield
            return
        self._n_shared_draws += 1
        with seeded(self.seed - self._n_shared_draws):
            yield

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside; phases of one name add up.

        Args:
            name: The phase, as it appears in ``seconds``.

        Yields:
            Nothing.
        """
        start = time.perf_counter()
        try:
            yield
        finally:
            if device_of(self.model).type == "cuda":
                torch.cuda.synchronize(device_of(self.model))
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def record(self, phase: str, **facts: object) -> None:
        """Add an entry to the history.

        Args:
            phase: The phase it belongs to.
            **facts: What happened: plain numbers and strings.
        """
        self.history.append({"phase": phase, **facts})

    def original(self, name: str) -> Tensor:
        """Return a parameter's value from before the run.

        Args:
            name: Its name in ``model.named_parameters()``.

        Returns:
            The value; not to be written.
        """
        name = name if name in self._before else plain_name(name)
        if name in self._before:
            return self._before[name]
        return self._parameters()[name].detach()  # which is not to change

    def changing(self) -> set[int]:
        """Return which parameters may change.

        Returns:
            ``id`` of each.
        """
        parameters = self._parameters()
        return {id(parameters[name]) for name in self._before}

    def put_back(self) -> None:
        """Give every parameter and buffer the value it had before the run."""
        parameters = self._parameters()
        with torch.no_grad():
            for name, value in self._before.items():
                local_of(parameters[name]).copy_(local_of(value))
        self._buffers.put_back()

    def has_other_buffers(self) -> bool:
        """Say whether a buffer has another value, or is another tensor, than before the run.

        Returns:
            True if so, on some rank.
        """
        return any(self.ranks.exchange("buffers", self._buffers.differ()))

    def result(self) -> UnlearnResult:
        """Compare the model with what it was.

        Returns:
            The record; a scalar counts as changed if its value differs.
        """
        counts = self._counts or self._counted()[0]
        total = sum(size for _, size in counts.values())
        return UnlearnResult(
            method=self.method,
            hyperparameters=self.hyperparameters,
            seconds=dict(self.seconds),
            changed=sum(changed for changed, _ in counts.values()) / max(1, total),
            changed_per_parameter={name: changed / max(1, size) for name, (changed, size) in counts.items()},
            history=tuple(self.history),
            coverage=dict(self.coverage),
        )

    def settle(self) -> None:
        """Count what has changed, which needs memory, while the model can still be put back.

        Raises:
            FloatingPointError: If a scalar of a parameter or running statistic that was finite is NaN or
                infinite now: no answer of such a model is right, and the forget set would pass for forgotten.
                Raised on every rank.
        """
        counts, broken = self._counted()
        for name, count in broken.items():
            if count:
                raise FloatingPointError(
                    f"{self.method}: {name} must stay finite, got NaN or infinity in {count} of its "
                    f"{counts[name][1]} scalars; the model is as it was, a smaller step may do"
                )
        for names in self.ranks.exchange("statistics", self._buffers.finite_no_more()):
            if names:
                raise FloatingPointError(
                    f"{self.method}: {names[0]} must stay finite, got NaN or infinity; the model is as it "
                    "was, smaller inputs or steps may do"
                )
        self._counts = counts

    def _counted(self) -> tuple[dict[str, tuple[int, int]], dict[str, int]]:
        # By parameter: how many scalars have changed, of how many, and how many are finite no more.
        parameters = self._parameters()
        own = [self._compared(name, parameter) for name, parameter in parameters.items()]
        columns = [n for n, _ in own] + [n for _, n in own]
        found = list(map(int, totals(columns, 2 * list(parameters.values()))))
        changed, broken = found[: len(own)], found[len(own) :]
        sizes = [parameter.numel() for parameter in parameters.values()]
        counts = zip(parameters, zip(changed, sizes, strict=True), strict=True)
        return dict(counts), dict(zip(parameters, broken, strict=True))

    def _compared(self, name: str, parameter: nn.Parameter) -> tuple[float, float]:
        if name not in self._before:
            return 0.0, 0.0
        now, before = local_of(parameter).detach(), local_of(self._before[name])
        changed = float((now != before).sum())
        if not changed or bool(torch.isfinite(now).all()):
            return changed, 0.0
        return changed, float((torch.isfinite(before) & ~torch.isfinite(now)).sum())

    def _parameters(self) -> dict[str, nn.Parameter]:
        reshard(self.model)  # gathered parameters are no place to keep or to write anything
        return parameters_by_name(self.model)


@contextmanager
def unlearning(
    model: nn.Module,
    method: str,
    hyperparameters: Mapping[str, object],
    *,
    generator: torch.Generator | None = None,
    data: Iterable[object] = (),
    changes: Iterable[str] | None = None,
    ranks: Ranks = ALONE,
    goal: ClosedLoop | None = None,
) -> Iterator[Run]:
    """Change a model all or nothing.

    If the body raises, or is interrupted, every parameter and buffer gets back its value; likewise if what
    ``at_the_end`` announced for the end does. In any case training flags, ``requires_grad``, ``.grad`` and
    the random states (of torch, NumPy and Python, and of the loaders in ``data``) are as before afterwards;
    parameters keep their storage throughout.

    Args:
        model: The user's model.
        method: Name for the record.
        hyperparameters: What the method was called with, for the record.
        generator: Decides every random choice inside: those of data loaders, also of such with a generator of
            their own, of augmentation that draws from NumPy or Python, and of dropout. Without one the random
            states as they are do.
        data: The sets that are read inside.
        changes: Plain names of the parameters that may change, whose values are kept; None: all. What is
            found out only inside, ``keep`` of the run announces.
        ranks: Those that run together. Each has a random stream of its own; in the end their weights are
            compared, and where they differ, or a rank has failed, every rank puts its model back.
        goal: What is to be reached, where that is asked; judged at the end of the body.

    Yields:
        The run; call ``result()`` on it inside the body, or after it.

    Example:
        >>> model = nn.Linear(2, 2)
        >>> with unlearning(model, "zero", {}) as run, torch.no_grad():
        ...     _ = model.weight.zero_()
        >>> run.result().changed_per_parameter
        {'weight': 1.0, 'bias': 0.0}
    """
    reshard(model)
    check_model(model, method, may_be_sharded=isinstance(ranks, MeshRanks))
    run = Run(model, method, hyperparameters, changes=changes, ranks=ranks)
    tables = Tables(model)
    if goal is not None:
        goal.begin(run)
        run.goal = goal
    try:
        with restored(model), ExitStack() as stack:
            if ranks.are_many:
                run.seed = ranks.shared_seed(generator)
                stack.enter_context(seeded(run.seed + ranks.rank, *data))
            elif generator is None:
                stack.enter_context(random_states_kept(*data))
            else:
                seed = int(torch.randint(2**62, (), generator=generator, device=generator.device))
                stack.enter_context(seeded(seed, *data))
            yield run
            if goal is not None:
                goal.conclude()
        tables.put_back(run.changing())
        check_same_weights(ranks, model, "after the run")
        if (call := _AT_END.get()) is not None:
            call(run)
        run.settle()
    except BaseException:
        run.put_back()
        tables.put_back()
        raise
