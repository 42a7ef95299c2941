"""Nodes that move entries of a tensor in a way that may depend on data, and may be another in every batch.

What the rows of a node mean is decided by the nodes between it and the losses. Most of them do the same in
every batch: elementwise functions, products with a weight, reductions, views. Those here need not: an index,
a sort, a slice whose bounds were counted in the data, a product with a matrix of zeros and ones. A node below
one of them is proven anew in every batch, unless the samples are seen to lie along an axis of its output that
it leaves alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from torch import Tensor

from unlearn_ext.fisher.engine.graph import MOVES, Graph, Node, kind_of

Key: TypeAlias = tuple[object, ...]

# Kinds that work along the dimension (or dimensions) they have saved.
_ALONG = {
    *("Cat", "Gather", "IndexAdd", "IndexCopy", "IndexReduce", "IndexSelect", "NarrowCopy", "Roll"),
    *("Scatter", "ScatterAdd", "ScatterReduce", "Slice", "SliceScatter", "Sort", "Split", "SplitWithSizes"),
    *("Stack", "Topk", "UnsafeSplit", "UnsafeSplitWithSizes"),
}
# Kinds that take a dimension away: an axis that is still there has not been moved along.
_WITHOUT = {"AsStrided", "Kthvalue", "Max", "Median", "Min", "Mode", "Nanmedian", "Select", "Unbind"}
# Kinds that may move anything anywhere.
_ANYWHERE = {
    *("CopySlices", "Embedding", "EmbeddingBag", "GroupedMm", "IndexPut", "IndexPutImpl"),
    *("MaskedScatter", "MaskedSelect", "PackPaddedSequence", "Put", "SegmentReduce", "SparseAddmm"),
    *("SparseMm", "SparseSampledAddmm", "Take", "UnsafeIndex", "UnsafeIndexPut", "UnsafeMaskedIndex"),
}
# Kinds whose operands may be broadcast: along an axis that an operand lacks, the other one says what becomes
# of it.
_BROADCASTING = {"Add", "Div", "Expand", "Mul", "Repeat", "Sub", "Where"}
_LEAVES = MOVES | {"ToCopy", "Expand"}
# What FSDP2 puts around a module to gather and to free its parameters hands everything on as it is.
_TRANSPARENT = {"RegisterPostBackwardFunctionBackward", "RegisterPreBackwardFunctionBackward"}


@dataclass(frozen=True, eq=False)
class Selection:
    """A node that may move entries as the data say.

    Attributes:
        node: The node.
        index: The input on whose side entries may be moved; None for all.
        dims: The dimensions of the output along which it moves; None if any.
    """

    node: Node
    index: int | None
    dims: tuple[int, ...] | None

    @property
    def key(self) -> Key:
        """What it has in common with others of its kind."""
        return kind_of(self.node), self.index, self.dims, len(self.node._input_metadata[0].shape)

    @property
    def edges(self) -> Iterator[tuple[Node, int]]:
        """The inputs on whose side entries may be moved.

        Yields:
            The node, and the number of one of its inputs.
        """
        every = range(len(self.node.next_functions))
        for index in every if self.index is None else (self.index,):
            yield self.node, index

    def keeps(self, axis: int) -> bool:
        """Say whether what lies along an axis of the output stays where it is.

        Args:
            axis: 0 or 1.

        Returns:
            True if the node moves nothing along it.
        """
        return self.dims is not None and axis not in self.dims


def selections(graph: Graph) -> Iterator[Selection]:
    """Find such nodes.

    Args:
        graph: The graph below some losses.

    Yields:
        Every one.
    """
    for node in graph.consumers:
        kind = kind_of(node)
        if kind in _ALONG:
            yield Selection(node, None, _dims(node))
        elif kind in _WITHOUT:
            yield Selection(node, None, ())
        elif kind == "Index":
            yield Selection(node, None, _indexed(node))
        elif kind in _ANYWHERE or _is_unknown(kind):
            yield Selection(node, None, None)
        elif kind in ("Mm", "Addmm"):
            # From the left, whatever its entries say adds up rows of the matrix on the right.
            index = 1 if kind == "Mm" else 2
            if not _is_weight(node.next_functions[index][0]):
                yield Selection(node, index, None)
        elif kind == "Bmm" or kind.startswith("ScaledDotProduct"):
            yield Selection(node, None, (1, 2))
        elif kind in _BROADCASTING:
            yield from _broadcast(node)


def _is_unknown(kind: str) -> bool:
    # A torch.autograd.Function, whose node's name has no number at its end.
    return kind.endswith("Backward") and kind not in _TRANSPARENT


def _dims(node: Node) -> tuple[int, ...] | None:
    saved = (
        getattr(node, "_saved_dims", None) if kind_of(node) == "Roll" else getattr(node, "_saved_dim", None)
    )
    if saved is None:
        return None
    count = len(node._input_metadata[0].shape)
    dims = []
    for dim in (saved,) if isinstance(saved, int) else tuple(saved):
        signed = dim - 2**64 if dim >= 2**63 else dim
        dims.append(signed + count if signed < 0 else signed)
    return tuple(dims)


def _indexed(node: Node) -> tuple[int, ...] | None:
    indices: Sequence[Tensor | None] = node._saved_indices
    first = next((d for d, index in enumerate(indices) if index is not None), len(indices))
    # What stands before the first index stays in place, if those that are indexed are neighbours.
    where = [d for d, index in enumerate(indices) if index is not None]
    if where != list(range(first, first + len(where))) or not first:
        return None
    return tuple(range(first, len(node._input_metadata[0].shape)))


def _is_weight(node: Node) -> bool:
    # Made of one parameter, and of nothing else.
    while node is not None and kind_of(node) in _LEAVES and len(node.next_functions) == 1:
        node = node.next_functions[0][0]
    return node is None or kind_of(node) == "AccumulateGrad"


def _broadcast(node: Node) -> Iterator[Selection]:
    size = tuple(node._input_metadata[0].shape)
    for index, (source, output) in enumerate(node.next_functions):
        if source is None or kind_of(source) == "AccumulateGrad":
            continue
        own = tuple(source._input_metadata[output].shape)
        if own == size or _is_weight(source):
            continue
        aligned = (1,) * (len(size) - len(own)) + own
        dims = tuple(d for d, (a, b) in enumerate(zip(aligned, size, strict=True)) if a != b)
        yield Selection(node, index, dims)


def below(graph: Graph, found: Iterable[Selection]) -> set[Node]:
    """Collect the nodes whose rows such nodes may move.

    Args:
        graph: The graph.
        found: Some of its nodes.

    Returns:
        Everything below them.
    """
    return graph.below(edge for selection in found for edge in selection.edges)
