"""Decisions that the ranks of a sharded model take together: every forward and backward pass is a collective.

Where parameters are gathered for every pass, all ranks must run the same passes in the same order, each on
its own batch, or they wait for one another for ever. So whatever decides about a pass is asked of a
``Lockstep``, which has the answer of all ranks. The one here is that of a single process: every answer is its
own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from torch import Tensor, nn

from unlearn_ext.fisher.engine.graph import Node
from unlearn_ext.fisher.engine.totals import Totals

Marks: TypeAlias = Sequence[tuple[Node, int]]
Take: TypeAlias = Callable[[str, Tensor], object]
Settle: TypeAlias = Callable[[Collection[str], dict[str, Exception]], None]


class Lockstep:
    """The decisions of one process.

    Attributes:
        is_alone: There are no other ranks, and passes are no collectives.
    """

    is_alone = True

    def any(self, flag: bool) -> bool:
        """Say whether something holds on some rank.

        Args:
            flag: Whether it holds here.

        Returns:
            The same on all ranks.
        """
        return flag

    def all(self, flag: bool) -> bool:
        """Say whether something holds on every rank.

        Args:
            flag: Whether it holds here.

        Returns:
            The same on all ranks.
        """
        return not self.any(not flag)

    def most(self, number: int) -> int:
        """Return the largest of the ranks' numbers.

        Args:
            number: That of this rank.

        Returns:
            The same on all ranks.
        """
        return number

    def names(self, own: Collection[str]) -> set[str]:
        """Join the ranks' parameters.

        Args:
            own: Names of some of the chosen parameters.

        Returns:
            Those that some rank has; the same on all ranks.
        """
        return set(own)

    def reasons(self, own: Mapping[str, str]) -> dict[str, str]:
        """Join the ranks' reasons.

        Args:
            own: Parameter name to why it is not computed in one pass.

        Returns:
            The same with those of the other ranks, and the same on all ranks.
        """
        return dict(own)

    def totals(self, fisher: Mapping[str, Tensor], power: int) -> Totals:
        """Make what adds gradients to accumulators.

        Args:
            fisher: Name to accumulator.
            power: 1 or 2.

        Returns:
            The totals.
        """
        return Totals(fisher, power)

    @contextmanager
    def marking(self, model: nn.Module) -> Iterator[list[tuple[Node, int]]]:
        """Note the places of a graph at which every rank comes by in the same order.

        Args:
            model: The model, whose forward pass is inside.

        Yields:
            Nodes and which of their outputs; none of a single process.
        """
        yield []

    def losses(self, model: nn.Module, compute: Callable[[], Tensor]) -> Tensor:
        """Compute a batch's losses, on all ranks or none.

        Args:
            model: The model that is called.
            compute: Calls it, and returns the losses, ``[n]``.

        Returns:
            The losses.

        Raises:
            Exception: What ``compute`` raised.
            RuntimeError: If it has failed on another rank, or if losses depend on parameters on some ranks
                only.
        """
        return compute()

    def gradients(self, loss: Tensor, take: Take, marks: Marks, settle: Settle | None) -> None:
        """Run plain autograd where parameters are gathered for the pass; ``is_alone`` has no need of it.

        Args:
            loss: A scalar.
            take: ``take(name, gradient)`` gets the gradient of every chosen parameter as soon as it is
                complete.
            marks: Places in the loss's graph, from ``marking``.
            settle: Called at the marks and at the end, with the names that may still come and the failures.

        Raises:
            NotImplementedError: In a single process.
        """
        raise NotImplementedError("one process has no need of it")
