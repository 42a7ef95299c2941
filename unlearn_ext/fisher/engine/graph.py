"""The autograd graph of a pass, read from a parameter upwards: which nodes take it, through which others.

Autograd's graph is the one account of what became of a parameter that cannot be incomplete: a module's hook
sees what the module saw, not what its weight did elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from torch import Tensor
from torch.autograd.graph import GradientEdge

Node: TypeAlias = Any  # a torch.autograd.graph.Node; what it has saved depends on its kind
CombinesWithData: TypeAlias = Callable[[Node, int, tuple[int, ...]], bool]

# What only moves, drops or pads the entries of a tensor; every gradient it hands back is 0 or one of those it
# was given, in one place. So powers of gradients can go through the node's own backward.
MOVES = {
    *("Alias", "Cat", "Clone", "ConstantPadNd", "Flip", "NarrowCopy", "Permute", "ReshapeAlias", "Roll"),
    *("Select", "Slice", "Split", "SplitWithSizes", "Squeeze", "Stack", "T", "Transpose", "Unbind"),
    *("UnsafeSplit", "UnsafeSplitWithSizes", "UnsafeView", "Unsqueeze", "View"),
}
CASTS = {"ToCopy"}

# Bounds on how far a parameter is followed: beyond, whatever the model does to it is no simple function.
_LONGEST_CHAIN, _MOST_STEPS = 24, 20_000

_kinds: dict[type, str] = {}


def kind_of(node: Node) -> str:
    """Name what a node computes: ``"Addmm"`` for an ``AddmmBackward0``.

    Args:
        node: A node.

    Returns:
        Its class's name without the ending; the whole name for a ``torch.autograd.Function``.
    """
    kind = _kinds.get(type(node))
    if kind is None:
        name = type(node).__name__
        stem, backward, number = name.rpartition("Backward")
        kind = _kinds[type(node)] = stem if backward and number.isdigit() else name
    return kind


@dataclass(frozen=True)
class PathNode:
    """A node between a parameter and the one where it is combined with data.

    Attributes:
        node: The node.
        index: Which of its inputs lies on the way.
        output: Which of its outputs does.
        moves: It hands gradients back as they are, to wherever their entries came from.
    """

    node: Node
    index: int
    output: int
    moves: bool

    def pull(self, values: Tensor) -> Tensor:
        """Turn values for the output into values for the input, by the node's own backward.

        Only outside of backward passes: inside, nodes compute what the pass has been asked for.

        Args:
            values: Of the output's shape.

        Returns:
            Values of the input's shape.

        Raises:
            TypeError: If the node gives none.
        """
        outputs = range(len(self.node._input_metadata))
        pulled = self.node(*(values if output == self.output else None for output in outputs))
        found: Tensor | None = pulled[self.index] if isinstance(pulled, tuple) else pulled
        if found is None:
            raise TypeError(f"{type(self.node).__name__} gave no gradient")
        return found


@dataclass(eq=False, slots=True)
class NodeInput:
    """A node that takes a parameter, or something made of parameters, together with data.

    Attributes:
        node: The node.
        index: Which of its inputs it is.
        shape: Shape of what the node takes.
        paths: The ways from the parameter to it: the nodes in between.
    """

    node: Node
    index: int
    shape: tuple[int, ...]
    paths: list[tuple[PathNode, ...]]

    @property
    def edge(self) -> GradientEdge:
        """What the node takes, as autograd names it."""
        return GradientEdge(*self.node.next_functions[self.index])


def is_identity(node: Node, index: int, shape: tuple[int, ...]) -> bool:
    """Say whether a node hands the gradient of one input back unchanged.

    Args:
        node: A node.
        index: Which of its inputs.
        shape: That input's shape.

    Returns:
        True for a sum that does not broadcast the input, and where an expansion adds dimensions of one entry.
    """
    kind = kind_of(node)
    out: tuple[int, ...] = tuple(node._input_metadata[0].shape)
    if kind == "Expand":
        return math.prod(out) == math.prod(shape)
    if out != shape:
        return False
    return (kind == "Add" and (index == 0 or node._saved_alpha == 1)) or (kind == "Sub" and index == 0)


class UntraceableError(Exception):
    """What becomes of a parameter is no simple function of it, and nothing that is broadcast either."""


class Graph:
    """The graph below some losses.

    Args:
        root: Their ``grad_fn``.
    """

    def __init__(self, root: Node) -> None:
        # Node -> (consumer, which input of it, which output of the node)
        self.consumers: dict[Node, list[tuple[Node, int, int]]] = {root: []}
        # Which kinds of nodes take what from which others.
        self.edges: set[tuple[str, int, str]] = set()
        self._leaves: dict[int, Node] = {}
        stack = [root]
        while stack:
            node = stack.pop()
            kind = kind_of(node)
            for index, (source, output) in enumerate(node.next_functions):
                if source is None:
                    continue
                known = self.consumers.get(source)
                source_kind = kind_of(source)
                self.edges.add((kind, index, source_kind))
                if known is None:
                    known = self.consumers[source] = []
                    if source_kind == "AccumulateGrad":
                        self._leaves[id(source.variable)] = source
                    else:
                        stack.append(source)
                known.append((node, index, output))

    def has_leaf(self, parameter: Tensor) -> bool:
        """Say whether the losses depend on a parameter.

        Args:
            parameter: A leaf.

        Returns:
            True if some node takes it.
        """
        return id(parameter) in self._leaves

    def below(self, edges: Iterable[tuple[Node, int]]) -> set[Node]:
        """Collect the nodes below some inputs of nodes.

        Args:
            edges: Pairs of a node and the number of one of its inputs.

        Returns:
            The node that this input comes from, what that comes from, and so on.
        """
        found: set[Node] = set()
        stack = [node.next_functions[index][0] for node, index in edges]
        while stack:
            node = stack.pop()
            if node is not None and node not in found:
                found.add(node)
                stack.extend(source for source, _ in node.next_functions)
        return found

    def node_inputs(self, parameter: Tensor, combines_with_data: CombinesWithData) -> list[NodeInput]:
        """Follow a parameter to the nodes that combine it with data.

        Args:
            parameter: A parameter that requires a gradient.
            combines_with_data: ``combines_with_data(node, index, shape)`` says whether a node that takes a
                tensor of that shape as input ``index`` combines it with data.

        Returns:
            Every such node; none if the losses do not depend on the parameter.

        Raises:
            UntraceableError: If it gets to the losses without one, or takes too many steps.
        """
        found: dict[tuple[Node, int], NodeInput] = {}
        steps = 0
        waiting: list[tuple[Node, tuple[PathNode, ...], tuple[int, ...]]] = []
        if id(parameter) in self._leaves:
            waiting.append((self._leaves[id(parameter)], (), tuple(parameter.shape)))
        while waiting:
            node, path, shape = waiting.pop()
            for consumer, index, output in self.consumers.get(node, ()):
                steps += 1
                if path:
                    path = (*path[:-1], replace(path[-1], output=output))
                    shape = tuple(node._input_metadata[output].shape)
                if combines_with_data(consumer, index, shape):
                    known = found.get((consumer, index))
                    if known is None:
                        found[consumer, index] = NodeInput(consumer, index, shape, [path])
                    else:
                        known.paths.append(path)
                    continue
                is_root = not self.consumers[consumer]
                if is_root or len(path) == _LONGEST_CHAIN or steps > _MOST_STEPS:
                    raise UntraceableError
                moves = kind_of(consumer) in MOVES or is_identity(consumer, index, shape)
                waiting.append((consumer, (*path, PathNode(consumer, index, 0, moves)), ()))
        return list(found.values())

    def above(self, nodes: Iterable[Node]) -> set[Node]:
        """Collect the nodes between some nodes and the losses.

        Args:
            nodes: Where to start.

        Returns:
            Every consumer, consumer's consumer and so on.
        """
        found: set[Node] = set()
        stack = list(nodes)
        while stack:
            for consumer, _, _ in self.consumers.get(stack.pop(), ()):
                if consumer not in found:
                    found.add(consumer)
                    stack.append(consumer)
        return found
