"""From the uses of one parameter in a pass to one use: its gradients add up before their power is taken."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from unlearn_ext.fisher.engine.graph import CASTS, Encounter, Link, kind_of
from unlearn_ext.fisher.engine.rules import padding_of
from unlearn_ext.fisher.engine.tied import Tied
from unlearn_ext.fisher.engine.uses import Channels, Convolution, Gradients, Lookup, Product, Use, wide

_RESHAPES = {"Alias", "Clone", "ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View"}
_TRANSPOSITIONS = {"Permute", "T", "Transpose"}


class Moved(Use):
    """A use of entries of a parameter, none of them twice, in another place or order.

    Args:
        use: The use.
        links: The nodes from the parameter to what is used.
        parameter: The parameter.
    """

    def __init__(self, use: Use, links: Sequence[Link], parameter: Tensor) -> None:
        self.use, self.links, self.parameter = use, tuple(links), parameter
        super().__init__(use.n, parameter.shape)

    def pull(self, values: Tensor) -> Tensor:
        """Put values where their entries are in the parameter.

        Args:
            values: Of the shape of what is used.

        Returns:
            Of the parameter's shape.
        """
        for link in reversed(self.links):
            values = link.pull(values)
        return values

    def gradients(self, start: int, stop: int) -> Tensor:  # noqa: D102 - as in the base class
        return torch.stack([self.pull(grad) for grad in self.use.gradients(start, stop)])

    def add_to(self, fisher: Tensor, power: int) -> None:  # noqa: D102
        total = fisher.new_zeros(self.use.shape)
        self.use.add_to(total, power)
        fisher += self.pull(total)

    def is_zero(self) -> bool:  # noqa: D102
        return self.use.is_zero()


class Derived(Use):
    """A use of a function of parameters, differentiated by autograd, one sample's gradient after the other.

    Args:
        use: The use.
        edge: The function's value in the graph.
        parameter: The parameter.
    """

    def __init__(self, use: Use, edge: GradientEdge, parameter: Tensor) -> None:
        self.use, self.edge, self.parameter = use, edge, parameter
        super().__init__(use.n, parameter.shape)

    def gradients(self, start: int, stop: int) -> Tensor:  # noqa: D102
        grads = self.use.gradients(start, stop)
        dtype = self.edge.node._input_metadata[self.edge.output_nr].dtype
        with torch.enable_grad():
            pulled = [
                torch.autograd.grad([self.edge], [self.parameter], [grad.to(dtype)], retain_graph=True)[0]
                for grad in grads
            ]
        return wide(torch.stack(pulled))[0]

    def is_zero(self) -> bool:  # noqa: D102
        return self.use.is_zero()


class Sum(Use):
    """Several uses of one tensor: a sample's gradients add up before the power is taken.

    Args:
        uses: At least one.
    """

    def __init__(self, uses: Sequence[Use]) -> None:
        self.uses = tuple(uses)
        super().__init__(uses[0].n, uses[0].shape)

    def gradients(self, start: int, stop: int) -> Tensor:  # noqa: D102
        total = self.uses[0].gradients(start, stop)
        for use in self.uses[1:]:
            total = total + use.gradients(start, stop)
        return total

    def is_zero(self) -> bool:  # noqa: D102
        return all(use.is_zero() for use in self.uses)


class Parts(Sum):
    """Uses of parts of a parameter, which may or may not overlap.

    Args:
        uses: At least one.
    """

    def __init__(self, uses: Sequence[Moved]) -> None:
        super().__init__(uses)
        self._parts = tuple(uses)

    def add_to(self, fisher: Tensor, power: int) -> None:  # noqa: D102
        taken = torch.zeros_like(fisher)
        for use in self._parts:
            taken += use.pull(taken.new_ones(use.use.shape))
        if bool((taken > 1).any()):
            super().add_to(fisher, power)
            return
        for use in self._parts:
            use.add_to(fisher, power)


def seen_from(parameter: Tensor, use: Use, found: Encounter) -> Use:
    """Express a use of something made of a parameter as a use of the parameter.

    Args:
        parameter: The parameter.
        use: The use.
        found: Where it was used.

    Returns:
        The use of the parameter, as plain as possible.
    """
    links = found.paths[0]
    rest = [link for link in links if kind_of(link.node) not in CASTS]
    if len(found.paths) > 1:
        return Derived(use, found.edge, parameter)
    while rest and isinstance(use, Product) and kind_of(rest[-1].node) in _TRANSPOSITIONS:
        use = use.transposed
        rest.pop()
    if not rest:
        return use
    reshaped = all(kind_of(link.node) in _RESHAPES for link in rest[1:])
    if reshaped and kind_of(rest[0].node) == "Embedding" and isinstance(use, (Channels, Gradients)):
        # Every sample looks up the same rows: positions, say.
        indices = rest[0].node._saved_indices.reshape(1, -1)
        grads = use.gradients(0, use.n).reshape(use.n, indices.shape[1], parameter.shape[1])
        padding_idx = padding_of(rest[0].node)
        return Lookup(indices.expand(use.n, -1), grads, rows=parameter.shape[0], padding_idx=padding_idx)
    if all(link.moves for link in rest):
        return Moved(use, rest, parameter)
    return Derived(use, found.edge, parameter)


def is_for_later(use: Use) -> bool:
    """Say whether a use can be worked out only when the backward pass is over.

    Args:
        use: The use.

    Returns:
        True if autograd has to run for it.
    """
    if isinstance(use, Sum):
        return any(is_for_later(part) for part in use.uses)
    return isinstance(use, (Moved, Derived))


def merged(uses: Sequence[Use]) -> Use:
    """Merge all uses of a tensor in a pass into one, without making gradients where that is possible.

    Args:
        uses: At least one; a sample's gradients add up over them.

    Returns:
        Their sum.
    """
    first = uses[0]
    if len(uses) == 1:
        return first
    of_one_kind = all(type(use) is type(first) for use in uses)
    if of_one_kind and isinstance(first, Product):
        products = [use for use in uses if isinstance(use, Product)]
        return Product(
            torch.cat([use.inputs for use in products], 1), torch.cat([use.grads for use in products], 1)
        )
    if of_one_kind and isinstance(first, Lookup):
        lookups = [use for use in uses if isinstance(use, Lookup)]
        if len({use.padding_idx for use in lookups}) == 1:
            return Lookup(
                torch.cat([use.indices for use in lookups], 1),
                torch.cat([use.grads for use in lookups], 1),
                rows=first.shape[0],
                padding_idx=first.padding_idx,
            )
    if of_one_kind and isinstance(first, Convolution):
        convolutions = [use.with_images() for use in uses if isinstance(use, Convolution)]
        if len({use.geometry for use in convolutions}) == 1:
            # A smaller image is padded with zeros, and so are its output's gradients: they add nothing.
            inputs = _stacked([use.inputs for use in convolutions])
            return convolutions[0].like(inputs, _stacked([use.grads for use in convolutions]))
    if all(isinstance(use, (Channels, Gradients)) for use in uses):
        return Gradients(Sum(uses).gradients(0, first.n))
    if all(isinstance(use, (Product, Lookup)) for use in uses):
        product = merged([use for use in uses if isinstance(use, Product)])
        lookup = merged([use for use in uses if isinstance(use, Lookup)])
        if isinstance(product, Product) and isinstance(lookup, Lookup):
            return Tied(product, lookup)
    if of_one_kind and isinstance(first, Derived):
        derived = [use for use in uses if isinstance(use, Derived)]
        if len({use.edge for use in derived}) == 1:
            return Derived(merged([use.use for use in derived]), first.edge, first.parameter)
    if of_one_kind and isinstance(first, Moved):
        moved = [use for use in uses if isinstance(use, Moved)]
        if len({use.links for use in moved}) == 1:
            return Moved(merged([use.use for use in moved]), first.links, first.parameter)
        return Parts(moved)
    return Sum(uses)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    # [n, C, images, *size] of several sizes along the images.
    largest = [max(sizes) for sizes in zip(*(tensor.shape[3:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [more - size for more, size in zip(largest, tensor.shape[3:], strict=True)]
        padded.append(F.pad(tensor, [*itertools.chain(*((0, count) for count in reversed(missing)))]))
    return torch.cat(padded, 2)
