"""A table that is looked up at one end of a model and multiplies at the other: a tied embedding and head."""

from __future__ import annotations

import torch
from torch import Tensor

from unlearn_ext.fisher.engine.gradients import CHUNK, Lookup, PerSampleGradients, Product, wide


class Tied(PerSampleGradients):
    """A table ``[V, D]`` that is looked up and is the weight of a linear layer.

    With P_n the gradient of sample n through the layer and E_n that through its lookups, an op adds
    ``sum_n |P_n|^power``. Only the few rows that sample n looks up still need ``|P_n + E_n|^power -
    |P_n|^power``.

    Args:
        product: The gradients as a weight.
        lookup: The gradients as a table.
    """

    def __init__(self, product: Product, lookup: Lookup) -> None:
        self.product, self.lookup = product, lookup
        super().__init__(product.n, product.shape)

    def gradients(self, start: int, stop: int) -> Tensor:  # noqa: D102 - as in the base class
        return self.product.gradients(start, stop) + self.lookup.gradients(start, stop)

    def digest(self) -> Tensor:  # noqa: D102
        return torch.cat([self.product.digest(), self.lookup.digest()], 1)

    def is_zero(self) -> bool:  # noqa: D102
        return self.product.is_zero() and self.lookup.is_zero()

    def add_to(self, fisher: Tensor, power: int) -> None:  # noqa: D102
        self.product.add_to(fisher, power)
        n_lookups, positions = self.lookup.indices.shape[1], self.product.inputs.shape[1]
        per_sample = n_lookups * max(n_lookups, positions, self.shape[1])
        step = max(1, CHUNK // max(1, per_sample))
        for start in range(0, self.n, step):
            rows, change = self._changes(slice(start, min(start + step, self.n)), power)
            _add_rows(fisher, rows, change.to(fisher.dtype))
        fisher.clamp_(min=0)  # where P and E cancel, rounding may leave less than nothing

    def _changes(self, samples: slice, power: int) -> tuple[Tensor, Tensor]:
        indices = self.lookup.indices[samples].long()
        looked_up, inputs, grads = wide(
            self.lookup.grads[samples], self.product.inputs[samples], self.product.grads[samples]
        )
        if self.lookup.padding_idx >= 0:
            looked_up = looked_up * (indices != self.lookup.padding_idx)[..., None]
        same = indices[:, :, None] == indices[:, None, :]
        through_lookups = same.to(looked_up.dtype) @ looked_up
        columns = grads.gather(2, indices[:, None, :].expand(-1, grads.shape[1], -1))
        through_layer = columns.mT @ inputs
        if power == 2:
            change = through_lookups * (2 * through_layer + through_lookups)
        else:
            change = (through_layer + through_lookups).abs() - through_layer.abs()
        is_first = ~same.tril(-1).any(-1)  # a row that a sample looks up several times changes once
        return indices.flatten(), (change * is_first[..., None]).flatten(0, 1)


def _add_rows(table: Tensor, rows: Tensor, values: Tensor) -> None:
    # Each of the two adds in a fixed order on one kind of device only.
    if table.is_cuda:
        table.index_put_((rows,), values, accumulate=True)
    else:
        table.index_add_(0, rows, values)
