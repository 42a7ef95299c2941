"""Adds up the gradients that several nodes imply for one parameter, before their power is taken."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import GradientEdge

from unlearn_ext.fisher.engine.gradients import (
    Channels,
    Convolution,
    Gradients,
    Lookup,
    PerSampleGradients,
    Product,
    wide,
)
from unlearn_ext.fisher.engine.graph import CASTS, NodeInput, PathNode, kind_of
from unlearn_ext.fisher.engine.rules import looked_up, padding_of
from unlearn_ext.fisher.engine.tied import Tied

_RESHAPES = {"Alias", "Clone", "ReshapeAlias", "Squeeze", "UnsafeView", "Unsqueeze", "View"}
_TRANSPOSITIONS = {"Permute", "T", "Transpose"}


class Moved(PerSampleGradients):
    """Gradients of entries of a parameter, none of them twice, that lie in another place or order.

    Args:
        term: The gradients at the node.
        path: The nodes from the parameter to that one.
        parameter: The parameter.
    """

    def __init__(self, term: PerSampleGradients, path: Sequence[PathNode], parameter: Tensor) -> None:
        self.term, self.path, self.parameter = term, tuple(path), parameter
        super().__init__(term.n, parameter.shape)

    def pull(self, values: Tensor) -> Tensor:
        """Put values where their entries are in the parameter.

        Args:
            values: Of the shape of what the node takes.

        Returns:
            Of the parameter's shape.
        """
        for step in reversed(self.path):
            values = step.pull(values)
        return values

    def gradients(self, start: int, stop: int) -> Tensor:  # noqa: D102 - as in the base class
        return torch.stack([self.pull(grad) for grad in self.term.gradients(start, stop)])

    def add_to(self, fisher: Tensor, power: int) -> None:  # noqa: D102
        total = fisher.new_zeros(self.term.shape)
        self.term.add_to(total, power)
        fisher += self.pull(total)

    def digest(self) -> Tensor:  # noqa: D102
        return self.term.digest()

    def is_zero(self) -> bool:  # noqa: D102
        return self.term.is_zero()


class Derived(PerSampleGradients):
    """Gradients of a function of parameters, differentiated by autograd, one sample after the other.

    Args:
        term: The gradients of the function's value.
        edge: The function's value in the graph.
        parameter: The parameter.
    """

    def __init__(self, term: PerSampleGradients, edge: GradientEdge, parameter: Tensor) -> None:
        self.term, self.edge, self.parameter = term, edge, parameter
        super().__init__(term.n, parameter.shape)

    def gradients(self, start: int, stop: int) -> Tensor:  # noqa: D102
        grads = self.term.gradients(start, stop)
        dtype = self.edge.node._input_metadata[self.edge.output_nr].dtype
        with torch.enable_grad():
            pulled = [
                torch.autograd.grad([self.edge], [self.parameter], [grad.to(dtype)], retain_graph=True)[0]
                for grad in grads
            ]
        return wide(torch.stack(pulled))[0]

    def digest(self) -> Tensor:  # noqa: D102
        return self.term.digest()

    def is_zero(self) -> bool:  # noqa: D102
        return self.term.is_zero()


class Sum(PerSampleGradients):
    """Gradients of one tensor at several nodes: a sample's add up before the power is taken.

    Args:
        terms: At least one.
    """

    def __init__(self, terms: Sequence[PerSampleGradients]) -> None:
        self.terms = tuple(terms)
        super().__init__(terms[0].n, terms[0].shape)

    def gradients(self, start: int, stop: int) -> Tensor:  # noqa: D102
        total = self.terms[0].gradients(start, stop)
        for term in self.terms[1:]:
            total = total + term.gradients(start, stop)
        return total

    def digest(self) -> Tensor:  # noqa: D102
        return torch.cat([term.digest() for term in self.terms], 1)

    def is_zero(self) -> bool:  # noqa: D102
        return all(term.is_zero() for term in self.terms)


class Parts(Sum):
    """Gradients of parts of a parameter, which may or may not overlap.

    Args:
        terms: At least one.
    """

    def __init__(self, terms: Sequence[Moved]) -> None:
        super().__init__(terms)
        self._parts = tuple(terms)

    def add_to(self, fisher: Tensor, power: int) -> None:  # noqa: D102
        taken = torch.zeros_like(fisher)
        for term in self._parts:
            taken += term.pull(taken.new_ones(term.term.shape))
        if bool((taken > 1).any()):
            super().add_to(fisher, power)
            return
        for term in self._parts:
            term.add_to(fisher, power)


def as_parameter_gradients(
    parameter: Tensor, term: PerSampleGradients, found: NodeInput
) -> PerSampleGradients:
    """Express gradients of something made of a parameter as gradients of the parameter.

    Args:
        parameter: The parameter.
        term: The gradients at the node.
        found: The node.

    Returns:
        The gradients of the parameter, as plain as possible.
    """
    path = found.paths[0]
    if not path and len(found.paths) == 1:
        return term
    rest = [step for step in path if kind_of(step.node) not in CASTS]
    if len(found.paths) > 1:
        return Derived(term, found.edge, parameter)
    at_node = term
    while rest and isinstance(term, Product) and kind_of(rest[-1].node) in _TRANSPOSITIONS:
        term = term.transposed
        rest.pop()
    if not rest:
        return term
    reshaped = all(kind_of(step.node) in _RESHAPES for step in rest[1:])
    indices = looked_up(rest[0].node, parameter.shape) if reshaped else None
    if indices is not None and isinstance(term, (Channels, Gradients)):
        # Every sample looks up the same rows: positions, say.
        grads = term.gradients(0, term.n).reshape(term.n, indices.numel(), -1)
        return Lookup(
            indices.reshape(1, -1).expand(term.n, -1),
            grads,
            rows=parameter.shape[0],
            padding_idx=padding_of(rest[0].node),
            shape=parameter.shape,
        )
    if all(step.moves for step in rest):
        return Moved(term, rest, parameter)
    return Derived(at_node, found.edge, parameter)


def is_for_later(term: PerSampleGradients) -> bool:
    """Say whether gradients can be worked out only when the backward pass is over.

    Args:
        term: The gradients.

    Returns:
        True if autograd has to run for it.
    """
    if isinstance(term, Sum):
        return any(is_for_later(part) for part in term.terms)
    return isinstance(term, (Moved, Derived))


def needs_graph(term: PerSampleGradients) -> bool:
    """Say whether gradients are worked out by autograd, from a graph that is kept for it.

    Args:
        term: The gradients.

    Returns:
        True for functions of parameters.
    """
    if isinstance(term, Sum):
        return any(needs_graph(part) for part in term.terms)
    return isinstance(term, Derived)


def merged(terms: Sequence[PerSampleGradients]) -> PerSampleGradients:
    """Add up the gradients of a tensor in a pass, without making them where that is possible.

    Args:
        terms: At least one; a sample's gradients add up over them.

    Returns:
        Their sum.
    """
    first = terms[0]
    if len(terms) == 1:
        return first
    of_one_kind = all(type(term) is type(first) for term in terms)
    if of_one_kind and isinstance(first, Product):
        products = [term for term in terms if isinstance(term, Product)]
        return Product(
            torch.cat([term.inputs for term in products], 1), torch.cat([term.grads for term in products], 1)
        )
    if of_one_kind and isinstance(first, Lookup):
        lookups = [term for term in terms if isinstance(term, Lookup)]
        if len({term.padding_idx for term in lookups}) == 1:
            return Lookup(
                torch.cat([term.indices for term in lookups], 1),
                torch.cat([term.grads for term in lookups], 1),
                rows=first.shape[0],
                padding_idx=first.padding_idx,
                shape=first.shape,
            )
    if of_one_kind and isinstance(first, Convolution):
        convolutions = [term.with_images() for term in terms if isinstance(term, Convolution)]
        if len({term.geometry for term in convolutions}) == 1:
            # A smaller image is padded with zeros, and so are its output's gradients: they add nothing.
            inputs = _stacked([term.inputs for term in convolutions])
            return convolutions[0].like(inputs, _stacked([term.grads for term in convolutions]))
    if all(isinstance(term, (Channels, Gradients)) for term in terms):
        return Gradients(Sum(terms).gradients(0, first.n))
    if all(isinstance(term, (Product, Lookup)) for term in terms):
        product = merged([term for term in terms if isinstance(term, Product)])
        lookup = merged([term for term in terms if isinstance(term, Lookup)])
        if isinstance(product, Product) and isinstance(lookup, Lookup):
            return Tied(product, lookup)
    if of_one_kind and isinstance(first, Derived):
        derived = [term for term in terms if isinstance(term, Derived)]
        if len({term.edge for term in derived}) == 1:
            return Derived(merged([term.term for term in derived]), first.edge, first.parameter)
    if of_one_kind and isinstance(first, Moved):
        moved = [term for term in terms if isinstance(term, Moved)]
        if len({term.path for term in moved}) == 1:
            return Moved(merged([term.term for term in moved]), first.path, first.parameter)
        return Parts(moved)
    return Sum(terms)


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    # [n, C, images, *size] of several sizes along the images.
    largest = [max(sizes) for sizes in zip(*(tensor.shape[3:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [more - size for more, size in zip(largest, tensor.shape[3:], strict=True)]
        padded.append(F.pad(tensor, [*itertools.chain(*((0, count) for count in reversed(missing)))]))
    return torch.cat(padded, 2)
