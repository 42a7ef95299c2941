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
from unlearn_ext.fisher.engine.combine import is_for_later, merged, seen_from
from unlearn_ext.fisher.engine.graph import Encounter, Graph, Node, UnmetError, kind_of
from unlearn_ext.fisher.engine.layers import RecordedCall, Recording
from unlearn_ext.fisher.engine.layout import Axis, Layout, MismatchError, NoRuleError
from unlearn_ext.fisher.engine.rules import Call, Reach, is_met, read
from unlearn_ext.fisher.engine.uses import Use

Signature: TypeAlias = tuple[object, ...]
Sink: TypeAlias = Callable[[str, Use, frozenset[Signature]], None]


class Hypothesis(NamedTuple):
    """How a parameter is taken to be used."""

    reach: Reach
    axis: Axis


HYPOTHESES = [Hypothesis(reach, axis) for reach in Reach for axis in Axis]


@dataclass
class _Target:
    # A parameter in the pass.
    name: str
    parameter: Tensor
    hypothesis: Hypothesis
    missing: int = 0
    uses: list[Use] = field(default_factory=list)
    signatures: set[Signature] = field(default_factory=set)


class _Stop(NamedTuple):
    # A node whose gradient some parameters wait for.
    node: Node
    outputs: set[int]
    waiting: list[tuple[_Target, Encounter | RecordedCall]]


class FisherPass:
    """The backward pass of one batch.

    Every node that takes a parameter gets a hook, which reads the use of the parameter as the pass comes by.
    The parameters' own gradients are not asked for, so autograd leaves them out.

    Args:
        n: Number of samples.
        parameters: Parameter name to parameter.
        hypotheses: Parameter name to how it is taken to be used.
        sink: ``sink(name, use, signatures)`` gets every parameter's use as soon as it is complete; a
            ``MismatchError`` refuses it. Signatures say where the use was found, not of which size it was.
        recording: What the forward pass has shown of layers with rules of their own.
    """

    def __init__(
        self,
        n: int,
        parameters: Mapping[str, Tensor],
        hypotheses: Mapping[str, Hypothesis],
        sink: Sink,
        recording: Recording,
    ) -> None:
        self._n = n
        self._targets = [_Target(name, parameters[name], how) for name, how in hypotheses.items()]
        self._sink = sink
        self._recording = recording
        self._failures: dict[str, Exception] = {}
        # Parameter name to the nodes whose gradients it needs.
        self.places: dict[str, set[object]] = {}
        # Emptied at the end: nodes own the hooks that own this object.
        self._stops: dict[Node, _Stop] = {}
        self._later: list[tuple[_Target, Use]] = []

    def run(self, losses: Tensor, weights: Tensor | None = None) -> dict[str, Exception]:
        """Run it.

        Args:
            losses: ``[n]``, with their graph, which is used up.
            weights: ``[n]``, factors of the losses; 1 by default.

        Returns:
            Parameter name to why nothing was given to the sink, for those that failed. A parameter that the
            losses do not depend on has no use and is no failure.
        """
        handles = []
        try:
            graph = Graph(losses.grad_fn)
            for target in self._targets:
                self._find_stops(graph, target)
            above = graph.above(self._stops)
            for node in above & self._stops.keys():
                handles.append(node.register_prehook(functools.partial(self._arrived, self._stops[node])))
            weights = torch.ones_like(losses) if weights is None else weights
            self._backward(losses, weights, [stop for stop in self._stops.values() if stop.node not in above])
            with torch.no_grad():
                for target, use in self._later:
                    self._finish(target, use)
            for target in self._targets:
                if target.missing:
                    error = MismatchError("its gradient did not arrive")
                    self._failures.setdefault(target.name, error)
        finally:
            for handle in handles:
                handle.remove()
            self._stops.clear()
            self._later.clear()
        return self._failures

    def _find_stops(self, graph: Graph, target: _Target) -> None:
        reach, claims = target.hypothesis.reach, self._recording.claims

        def is_stop(node: Node, index: int, shape: tuple[int, ...]) -> bool:
            return (node, index) in claims or is_met(node, index, shape, reach, self._n)

        try:
            encounters = graph.encounters(target.parameter, is_stop)
        except UnmetError:
            self._failures[target.name] = NoRuleError("the graph does not show where it meets the data")
            return
        calls: dict[int, RecordedCall] = {}
        for found in encounters:
            call = claims.get((found.node, found.index))
            if call is None:
                self._wait(found.node, 0, target, found)
            else:
                calls[id(call)] = call
        for call in calls.values():
            self._wait(call.node, call.output, target, call)

    def _wait(self, node: Node, output: int, target: _Target, what: Encounter | RecordedCall) -> None:
        stop = self._stops.setdefault(node, _Stop(node, set(), []))
        stop.outputs.add(output)
        stop.waiting.append((target, what))
        target.missing += 1
        self.places.setdefault(target.name, set()).add(node)

    def _backward(self, losses: Tensor, weights: Tensor, lowest: list[_Stop]) -> None:
        # Nodes that have none below them do not have to run: it is enough to ask for their gradients.
        edges = [(stop, output) for stop in lowest for output in sorted(stop.outputs)]
        if not edges:
            return
        with ExitStack() as stack:
            for kind in {"cpu", losses.device.type}:
                if torch.is_autocast_enabled(kind):
                    stack.enter_context(torch.autocast(kind, enabled=False))
            grads = torch.autograd.grad(
                losses,
                [GradientEdge(stop.node, output) for stop, output in edges],
                weights,
                allow_unused=True,
            )
            by_output: dict[Node, dict[int, Tensor | None]] = {}
            for (stop, output), grad in zip(edges, grads, strict=True):
                by_output.setdefault(stop.node, {})[output] = grad
            del grads
            for stop in lowest:
                found = by_output.pop(stop.node)
                self._arrived(stop, [found.get(output) for output in range(max(found) + 1)], again=False)

    def _arrived(self, stop: _Stop, grads: Sequence[Tensor | None], *, again: bool = True) -> None:
        with torch.no_grad(), checkpoints.reading(again=again):
            for target, what in stop.waiting:
                if target.name not in self._failures:
                    try:
                        use = self._take(target, what, grads)
                    except Exception as error:
                        self._failures[target.name] = error.with_traceback(None)
                        target.uses.clear()
                        continue
                    if use is not None and is_for_later(use):
                        self._later.append((target, use))
                    elif use is not None:
                        self._finish(target, use)

    def _finish(self, target: _Target, use: Use) -> None:
        try:
            self._sink(target.name, use, frozenset(target.signatures))
        except MismatchError as error:
            self._failures[target.name] = error.with_traceback(None)

    def _take(
        self, target: _Target, what: Encounter | RecordedCall, grads: Sequence[Tensor | None]
    ) -> Use | None:
        grad = grads[what.output] if isinstance(what, RecordedCall) else grads[0]
        if grad is not None:  # else it is zero
            if isinstance(what, RecordedCall):
                use = what.use_of(target.parameter, grad)
                target.signatures.add((type(what.layer),))
            else:
                layout = Layout(self._n, target.hypothesis.axis)
                use = read(Call(what.node, what.index, what.shape, grad, layout))
                use = seen_from(target.parameter, use, what)
                paths = tuple(
                    tuple((kind_of(link.node), link.index, link.output) for link in path)
                    for path in what.paths
                )
                where = (kind_of(what.node), what.index, grad.ndim, layout.is_spread)
                target.signatures.add((*where, paths))
            if use.n != self._n or use.shape != tuple(target.parameter.shape):
                raise MismatchError(f"a use of shape {[use.n, *use.shape]} was read")
            target.uses.append(use)
        target.missing -= 1
        if target.missing or not target.uses:
            return None
        complete = merged(target.uses)
        target.uses.clear()
        return complete
