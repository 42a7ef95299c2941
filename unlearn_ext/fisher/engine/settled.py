"""Totals that are sharded: one parameter's gradients in full, for the moment until all ranks have theirs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from unlearn_ext.fisher.engine.gradients import PerSampleGradients
from unlearn_ext.fisher.engine.layout import MismatchError
from unlearn_ext.fisher.engine.totals import Totals

Reduce: TypeAlias = Callable[[str, Tensor], None]
Agree: TypeAlias = Callable[[Tensor], Tensor]


class SettledTotals(Totals):
    """Adds powers of gradients over all ranks, each parameter as soon as every rank has computed its own.

    What a rank has computed waits, in full, until the next place at which all ranks come by in one order (the
    border of a group of parameters that are gathered together); there, and only there, ranks add up. So at
    most one group's powers wait, the size of the gradients that a training step has there.

    Args:
        fisher: Name to accumulator, this rank's share of it.
        power: 1 or 2.
        shapes: Name to the parameter, whose shape is the whole one.
        reduce: ``reduce(name, powers)`` adds the ranks' powers to the accumulator, on all ranks at once.
        least: Returns the least of the ranks' numbers, for a tensor of integers.
    """

    def __init__(
        self,
        fisher: Mapping[str, Tensor],
        power: int,
        *,
        shapes: Mapping[str, Tensor],
        reduce: Reduce,
        least: Agree,
    ) -> None:
        super().__init__(fisher, power)
        self._shapes, self._reduce, self._least = shapes, reduce, least
        self._waiting: dict[str, Tensor] = {}
        self._open: list[str] = []
        self.counts = True  # what is added counts; a batch that is run again only for company does not

    def begin(self, names: Iterable[str]) -> None:
        """Begin a pass.

        Args:
            names: The parameters that may be added, the same ones on all ranks.
        """
        chosen = set(names)
        self._open = [name for name in self._shapes if name in chosen]
        self._waiting.clear()

    def add(self, name: str, term: PerSampleGradients) -> None:
        """Add a batch's gradients of one parameter, once all ranks have theirs.

        Args:
            name: The parameter.
            term: The gradients.

        Raises:
            MismatchError: If no op takes them; nothing is added.
        """
        if not self.counts:
            return
        full = self._zeros(name)
        try:
            term.add_to(full, self._power)
        except Exception as error:
            raise MismatchError(f"{type(error).__name__}: {str(error)[:100]}") from error
        self._waiting[name] = full

    def add_power(self, name: str, grad: Tensor) -> None:
        """Add the power of one sample's gradient, once all ranks have theirs.

        Args:
            name: The parameter.
            grad: The gradient.
        """
        if not self.counts:
            return
        dense = grad.to_dense() if grad.is_sparse else grad
        wide = dense.to(self._zeros(name, empty=True).dtype)
        self._waiting[name] = self._powered(wide)

    def settle(self, coming: Collection[str], failures: dict[str, Exception]) -> None:
        """Add up, over the ranks, the parameters that every rank is done with.

        Args:
            coming: Parameters whose gradients this rank may still get in this pass.
            failures: Parameter name to why this rank adds nothing; gets the other ranks' too.
        """
        if not self._open:
            return
        flags = [(name not in coming, name not in failures, name not in self._waiting) for name in self._open]
        agreed = self._least(torch.tensor(flags, dtype=torch.int32)).tolist()
        still = []
        for name, (is_done, is_right, is_nothing) in zip(self._open, agreed, strict=True):
            if not is_done:
                still.append(name)
                continue
            full = self._waiting.pop(name, None)
            if not is_right:
                failures.setdefault(name, MismatchError("disagrees with plain autograd on another rank"))
            elif not is_nothing:
                self._reduce(name, self._zeros(name) if full is None else full)
        self._open = still

    def finish(self) -> None:
        """Nothing waits between passes."""

    def _powered(self, grad: Tensor) -> Tensor:
        return grad.square() if self._power == 2 else grad.abs()

    def _zeros(self, name: str, *, empty: bool = False) -> Tensor:
        parameter = self._shapes[name]
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        shape = (0,) if empty else parameter.shape
        return torch.zeros(shape, dtype=dtype, device=parameter.device)


class SettledSums(SettledTotals):
    """Adds the gradients themselves, of a pass over all ranks' batches; see ``SettledTotals``."""

    def _powered(self, grad: Tensor) -> Tensor:
        return grad
