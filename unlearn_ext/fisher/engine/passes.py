"""One backward pass that reads off every sample's gradients and computes no parameter's own gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from unlearn_ext.fisher.engine import checkpoints
from unlearn_ext.fisher.engine.combine import as_parameter_gradients, is_for_later, merged
from unlearn_ext.fisher.engine.gradients import PerSampleGradients
from unlearn_ext.fisher.engine.graph import Graph, Node, NodeInput, UntraceableError, kind_of
from unlearn_ext.fisher.engine.layers import RecordedCall, Recording
from unlearn_ext.fisher.engine.layout import Axis, Layout, MismatchError, NoRuleError
from unlearn_ext.fisher.engine.rules import Call, Reach, combines_with_data, read

Signature: TypeAlias = tuple[object, ...]
Accumulate: TypeAlias = Callable[[str, PerSampleGradients, frozenset[Signature]], None]


class LayoutCandidate(NamedTuple):
    """How far a parameter is followed, and where the samples are taken to lie there."""

    reach: Reach
    axis: Axis


CANDIDATES = [LayoutCandidate(reach, axis) for reach in Reach for axis in Axis]


@dataclass
class _Target:
    # A parameter in the pass.
    name: str
    parameter: Tensor
    candidate: LayoutCandidate
    missing: int = 0
    terms: list[PerSampleGradients] = field(default_factory=list)
    signatures: set[Signature] = field(default_factory=set)


class _HookedNode(NamedTuple):
    # A node whose gradient some parameters wait for.
    node: Node
    outputs: set[int]
    waiting: list[tuple[_Target, NodeInput | RecordedCall]]


class FisherPass:
    """The backward pass of one batch.

    Every node that takes a parameter gets a hook, which reads the per-sample gradients as the pass comes by.
    The parameters' own gradients are not asked for, so autograd leaves them out.

    Args:
        n: Number of samples.
        parameters: Parameter name to parameter.
        candidates: Parameter name to the layout that is assumed.
        accumulate: ``accumulate(name, gradients, signatures)`` gets every parameter's gradients as soon as
            they are complete; a ``MismatchError`` refuses them. Signatures say at which nodes they were,
            not of which size.
        recording: What the forward pass has shown of layers with rules of their own.
    """

    def __init__(
        self,
        n: int,
        parameters: Mapping[str, Tensor],
        candidates: Mapping[str, LayoutCandidate],
        accumulate: Accumulate,
        recording: Recording,
    ) -> None:
        self._n = n
        self._targets = [_Target(name, parameters[name], how) for name, how in candidates.items()]
        self._accumulate = accumulate
        self._recording = recording
        self._failures: dict[str, Exception] = {}
        # Parameter name to the nodes whose gradients it needs.
        self.places: dict[str, set[object]] = {}
        # Emptied at the end: nodes own the hooks that own this object.
        self._hooked: dict[Node, _HookedNode] = {}
        self._later: list[tuple[_Target, PerSampleGradients]] = []

    def run(self, losses: Tensor, weights: Tensor | None = None) -> dict[str, Exception]:
        """Run it.

        Args:
            losses: ``[n]``, with their graph, which is used up.
            weights: ``[n]``, factors of the losses; 1 by default.

        Returns:
            Parameter name to why nothing was given to ``accumulate``, for those that failed. A parameter that
            the losses do not depend on is no failure.
        """
        handles = []
        try:
            graph = Graph(losses.grad_fn)
            for target in self._targets:
                self._find_nodes(graph, target)
            above = graph.above(self._hooked)
            for node in above & self._hooked.keys():
                handles.append(node.register_prehook(functools.partial(self._arrived, self._hooked[node])))
            weights = torch.ones_like(losses) if weights is None else weights
            self._backward(
                losses, weights, [hooked for hooked in self._hooked.values() if hooked.node not in above]
            )
            with torch.no_grad():
                for target, term in self._later:
                    self._finish(target, term)
            for target in self._targets:
                if target.missing:
                    error = MismatchError("its gradient did not arrive")
                    self._failures.setdefault(target.name, error)
        finally:
            for handle in handles:
                handle.remove()
            self._hooked.clear()
            self._later.clear()
        return self._failures

    def _find_nodes(self, graph: Graph, target: _Target) -> None:
        reach, edges = target.candidate.reach, self._recording.edges

        def takes_it(node: Node, index: int, shape: tuple[int, ...]) -> bool:
            return (node, index) in edges or combines_with_data(node, index, shape, reach, self._n)

        try:
            node_inputs = graph.node_inputs(target.parameter, takes_it)
        except UntraceableError:
            self._failures[target.name] = NoRuleError(
                "the graph does not show where it is combined with the data"
            )
            return
        calls: dict[int, RecordedCall] = {}
        for found in node_inputs:
            call = edges.get((found.node, found.index))
            if call is None:
                self._wait(found.node, 0, target, found)
            else:
                calls[id(call)] = call
        for call in calls.values():
            self._wait(call.node, call.output, target, call)

    def _wait(self, node: Node, output: int, target: _Target, what: NodeInput | RecordedCall) -> None:
        hooked = self._hooked.setdefault(node, _HookedNode(node, set(), []))
        hooked.outputs.add(output)
        hooked.waiting.append((target, what))
        target.missing += 1
        self.places.setdefault(target.name, set()).add(node)

    def _backward(self, losses: Tensor, weights: Tensor, lowest: list[_HookedNode]) -> None:
        # Nodes that have none below them do not have to run: it is enough to ask for their gradients.
        edges = [(hooked, output) for hooked in lowest for output in sorted(hooked.outputs)]
        if not edges:
            return
        with ExitStack() as stack:
            for kind in {"cpu", losses.device.type}:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            grads = torch.autograd.grad(
                losses,
                [GradientEdge(hooked.node, output) for hooked, output in edges],
                weights,
                allow_unused=True,
            )
            by_output: dict[Node, dict[int, Tensor | None]] = {}
            for (hooked, output), grad in zip(edges, grads, strict=True):
                by_output.setdefault(hooked.node, {})[output] = grad
            del grads
            for hooked in lowest:
                found = by_output.pop(hooked.node)
                self._arrived(hooked, [found.get(output) for output in range(max(found) + 1)], again=False)

    def _arrived(self, hooked: _HookedNode, grads: Sequence[Tensor | None], *, again: bool = True) -> None:
        with torch.no_grad(), checkpoints.reading(again=again):
            for target, what in hooked.waiting:
                if target.name not in self._failures:
                    try:
                        term = self._take(target, what, grads)
                    except Exception as error:
                        self._failures[target.name] = error.with_traceback(None)
                        target.terms.clear()
                        continue
                    if term is not None and is_for_later(term):
                        self._later.append((target, term))
                    elif term is not None:
                        self._finish(target, term)

    def _finish(self, target: _Target, term: PerSampleGradients) -> None:
        try:
            self._accumulate(target.name, term, frozenset(target.signatures))
        except MismatchError as error:
            self._failures[target.name] = error.with_traceback(None)

    def _take(
        self, target: _Target, what: NodeInput | RecordedCall, grads: Sequence[Tensor | None]
    ) -> PerSampleGradients | None:
        grad = grads[what.output] if isinstance(what, RecordedCall) else grads[0]
        if grad is not None:  # else it is zero
            if isinstance(what, RecordedCall):
                term = what.gradients_of(target.parameter, grad)
                target.signatures.add((type(what.layer),))
            else:
                layout = Layout(self._n, target.candidate.axis)
                term = read(Call(what.node, what.index, what.shape, grad, layout))
                term = as_parameter_gradients(target.parameter, term, what)
                paths = tuple(
                    tuple((kind_of(step.node), step.index, step.output) for step in path)
                    for path in what.paths
                )
                where = (kind_of(what.node), what.index, grad.ndim, layout.is_spread)
                target.signatures.add((*where, paths))
            if term.n != self._n or term.shape != tuple(target.parameter.shape):
                raise MismatchError(f"a gradient of shape {[term.n, *term.shape]} was read")
            target.terms.append(term)
        target.missing -= 1
        if target.missing or not target.terms:
            return None
        complete = merged(target.terms)
        target.terms.clear()
        return complete
