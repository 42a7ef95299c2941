"""The running totals, and the few vectors that wait to be added to them together."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from unlearn_ext.fisher.engine.gradients import PerSampleGradients, Product

# Rows of vectors that are worth a pass over a matrix of totals: beyond, it is arithmetic that costs.
_ROWS = 512


class Totals:
    """Adds per-sample gradients to accumulators.

    A few vectors per batch, the case of linear layers without positions, would cost a pass over the whole
    matrix of totals for every batch. They are kept, as copies, until there are enough for one pass, or half
    as many scalars as the matrix has. That is less than the gradient which a training step would hold.

    Args:
        fisher: Name to accumulator, written in place.
        power: 1 or 2.
    """

    def __init__(self, fisher: Mapping[str, Tensor], power: int) -> None:
        self._fisher, self._power = fisher, power
        self._kept: dict[str, list[Product]] = {}

    def add(self, name: str, term: PerSampleGradients) -> None:
        """Add a batch's gradients of one parameter.

        Args:
            name: The parameter.
            term: The gradients.
        """
        if not isinstance(term, Product):
            term.add_to(self._fisher[name], self._power)
            return
        kept = self._kept.get(name, [])
        if kept and not kept[0].is_like(term):
            self._flush(name)
            kept = []
        rows = (term.n + sum(product.n for product in kept)) * term.inputs.shape[1]
        if rows < _ROWS and 2 * rows * sum(term.shape) <= term.shape[0] * term.shape[1]:
            copies = Product(term.inputs.clone(), term.grads.clone())  # the user may reuse the batch's memory
            self._kept.setdefault(name, []).append(copies)
        else:
            self._flush(name, term)

    def flush(self, name: str) -> None:
        """Add what is kept of one parameter.

        Args:
            name: The parameter.
        """
        if name in self._kept:
            self._flush(name)

    def finish(self) -> None:
        """Add what is kept."""
        for name in list(self._kept):
            self._flush(name)

    def _flush(self, name: str, *last: Product) -> None:
        products = [*self._kept.pop(name, []), *last]
        whole = products[0]
        if len(products) > 1:
            inputs = torch.cat([product.inputs for product in products])
            whole = Product(inputs, torch.cat([product.grads for product in products]))
        whole.add_to(self._fisher[name], self._power)
