"""The diagonal of models that are sharded over ranks by FSDP2, each rank with its own share of the data.

The engine is the same, and so is its proof. What differs: the parameters in autograd's graph are gathered for
a pass and freed again; no rank has room for all accumulators; and since every pass is a collective, the ranks
go through all of them together, those that have run out of data with a batch that counts for nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unlearn_ext._internal.dtensors import local_of
from unlearn_ext._internal.undo import handles
from unlearn_ext.distributed.forward import calls_once, counted_passes
from unlearn_ext.distributed.fsdp import ShardedModel, fsdp_modules
from unlearn_ext.fisher.engine.lockstep import Lockstep, Marks, Settle, Take
from unlearn_ext.fisher.engine.settled import SettledTotals
from unlearn_ext.tasks.base import Task

_Found = TypeVar("_Found")


class ShardedLockstep(Lockstep):
    """The decisions of all ranks of a model's mesh.

    Args:
        sharded: The model.
        leaves: Name to gathered parameter, for all of them.
        chosen: Names of those that importances are computed of.
        task: Whose losses are computed; None where none are.
    """

    is_alone = False

    def __init__(
        self,
        sharded: ShardedModel,
        leaves: Mapping[str, Tensor],
        chosen: Collection[str],
        task: Task | None = None,
    ) -> None:
        self._sharded = sharded
        self._can_tell = task is not None and calls_once(task)
        self._leaves, self._chosen = leaves, list(chosen)
        self._totals: SettledTotals | None = None

    def any(self, flag: bool) -> bool:  # noqa: D102 - as in the base class
        return bool(self.most(int(flag)))

    def most(self, number: int) -> int:  # noqa: D102
        return int(self._sharded.reduced(torch.tensor(number), dist.ReduceOp.MAX))

    def names(self, own: Collection[str]) -> set[str]:  # noqa: D102
        flags = torch.tensor([name in own for name in self._chosen], dtype=torch.int32)
        agreed = self._sharded.reduced(flags, dist.ReduceOp.MAX).tolist()
        return {name for name, is_in in zip(self._chosen, agreed, strict=True) if is_in}

    def reasons(self, own: Mapping[str, str]) -> dict[str, str]:  # noqa: D102
        if not self.most(len(own)):
            return {}
        joined: dict[str, str] = {}
        for each in self._sharded.exchanged(dict(own)):
            joined = {**each, **joined}  # what the first rank says
        return joined

    def totals(self, fisher: Mapping[str, Tensor], power: int) -> SettledTotals:  # noqa: D102
        self._totals = SettledTotals(
            fisher,
            power,
            shapes={name: self._leaves[name] for name in self._chosen},
            reduce=lambda name, full: self._sharded.add_reduced(fisher[name], full),
            least=self._sharded.reduced,
        )
        return self._totals

    def count(self, is_live: bool) -> None:
        """Say whether the next batch counts.

        Args:
            is_live: False where it is run only because other ranks have more.
        """
        if self._totals is not None:
            self._totals.counts = is_live

    @contextmanager
    def marking(self, model: nn.Module) -> Iterator[list[tuple[object, int]]]:  # noqa: D102
        marks: dict[object, int] = {}

        def note(module: nn.Module, args: object, output: object) -> None:
            for tensor in _differentiable(output):
                marks.setdefault(tensor.grad_fn, tensor.output_nr)

        places: list[tuple[object, int]] = []
        with handles() as hooks:
            hooks.extend(module.register_forward_hook(note) for _, module in fsdp_modules(model))
            yield places
        places += marks.items()

    def losses(self, model: nn.Module, compute: Callable[[], Tensor]) -> Tensor:  # noqa: D102
        values, (depends, is_constant) = self._agreed(
            model, compute, lambda values: [values.requires_grad, not values.requires_grad]
        )
        if depends and is_constant:
            raise RuntimeError(
                "fisher_diagonal: losses of a sharded model must depend on parameters on all ranks or none, "
                "got constant ones on a rank (samples without labels?); leave such samples out"
            )
        return values

    def together(self, model: nn.Module, compute: Callable[[], _Found]) -> _Found:
        """Compute something by one forward pass, on all ranks or none.

        Args:
            model: The model that is called.
            compute: Calls it.

        Returns:
            What it returned.

        Raises:
            Exception: What ``compute`` raised; where that was not after the pass, nobody else is told.
            RuntimeError: If it has failed on another rank, after the pass.
        """
        return self._agreed(model, compute, lambda _: [False, False])[0]

    def _agreed(
        self, model: nn.Module, compute: Callable[[], _Found], facts: Callable[[_Found], list[bool]]
    ) -> tuple[_Found, list[bool]]:
        # What was computed, and which of two facts about it hold on some rank.
        found: list[_Found] = []
        failure: Exception | None = None
        with counted_passes(model) as passes:
            try:
                found.append(compute())
            except Exception as error:
                if not (self._can_tell and passes == [1, 1]):
                    raise
                failure = error
        own = torch.tensor([failure is not None, *(facts(found[0]) if found else [False, False])])
        failed, *told = self._sharded.reduced(own.int(), dist.ReduceOp.MAX).tolist()
        if failed:
            raise failure or RuntimeError("a batch is of no use on another rank, whose message says why")
        return found[0], told

    def gradients(self, loss: Tensor, take: Take, marks: Marks, settle: Settle | None) -> None:  # noqa: D102
        coming = set(self._chosen)
        chosen = set(coming)
        failures: dict[str, Exception] = {}

        def arrived(name: str) -> Callable[[Tensor], None]:
            def hook(leaf: Tensor) -> None:
                # Taken away at once, so that FSDP finds nothing to add up over the ranks.
                grad, leaf.grad = leaf.grad, None
                if grad is not None and name in chosen and name not in coming:
                    raise NotImplementedError(
                        f"model must use {name} in one activation checkpoint at most, or in checkpoints with "
                        "use_reentrant=False, whose gradients come all at once"
                    )
                if grad is not None and name in coming:
                    coming.discard(name)
                    with torch.no_grad():
                        take(name, grad.detach())

            return hook

        def come_by(*_: object) -> None:
            if settle is not None:
                with torch.no_grad():
                    settle(coming, failures)

        with handles() as hooks:
            hooks.extend(
                leaf.register_post_accumulate_grad_hook(arrived(name))  # type: ignore[no-untyped-call]
                for name, leaf in self._leaves.items()
                if leaf.requires_grad
            )
            hooks.extend(node.register_prehook(come_by) for node, _ in marks)
            loss.backward()  # type: ignore[no-untyped-call]
        coming.clear()
        come_by()


def _differentiable(output: object) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.grad_fn is not None:
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from _differentiable(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from _differentiable(value)


@contextmanager
def unwritten_shards(sharded: ShardedModel) -> Iterator[None]:
    """Notice where a forward pass writes to a shard; what it writes to gathered parameters goes with them.

    Args:
        sharded: The model.

    Yields:
        Nothing.

    Raises:
        RuntimeError: If it has; the model is changed.
    """
    versions = {name: local_of(shard)._version for name, shard in sharded.shards.items()}
    yield
    for name, shard in sharded.shards.items():
        if local_of(shard)._version != versions[name]:
            raise RuntimeError(
                f"fisher_diagonal: the forward pass must not write to parameters, got a model that writes to "
                f"{name}; the model is changed"
            )
