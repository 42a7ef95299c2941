"""Backward passes that read off every sample's gradients and compute no parameter's own gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import TypeAlias

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from unlearn_ext._internal.undo import Undone, handles
from unlearn_ext.fisher.engine import checkpoints
from unlearn_ext.fisher.engine.combine import as_parameter_gradients, is_for_later, merged
from unlearn_ext.fisher.engine.coupling import Watch
from unlearn_ext.fisher.engine.gradients import PerSampleGradients
from unlearn_ext.fisher.engine.graph import Graph, Node, NodeInput, UntraceableError, kind_of
from unlearn_ext.fisher.engine.layers import RecordedCall, Recording, recorded
from unlearn_ext.fisher.engine.layout import Layout, MismatchError, NoRuleError, UnprovenError
from unlearn_ext.fisher.engine.lockstep import Lockstep, Marks, Settle
from unlearn_ext.fisher.engine.rules import Call, Reach, combines_with_data, read
from unlearn_ext.fisher.engine.sample_losses import PerSampleLoss
from unlearn_ext.tasks.batches import Batch

Signature: TypeAlias = tuple[object, ...]
Accumulate: TypeAlias = Callable[[str, PerSampleGradients], None]
Arrived: TypeAlias = Callable[[Sequence[Tensor | None]], None]


@dataclass(eq=False, slots=True)
class Read:
    """A node out of which gradients of a parameter are read.

    Attributes:
        node: The node whose output gradients are needed.
        output: Which of its outputs.
        what: The input that the parameter is, or the call of a layer with a rule.
        signature: What kind of place it is, whatever its size.
    """

    node: Node
    output: int
    what: NodeInput | RecordedCall
    signature: Signature

    def gradients(self, parameter: Tensor, grad: Tensor, layout: Layout) -> PerSampleGradients:
        """Apply the rule.

        Args:
            parameter: The parameter.
            grad: Gradient of the node's output.
            layout: Where the samples are.

        Returns:
            The gradients of what the node takes, which may be made of the parameter.
        """
        if isinstance(self.what, RecordedCall):
            return self.what.gradients_of(parameter, grad)
        return read(Call(self.what.node, self.what.index, self.what.shape, grad, layout))


class Trace:
    """A forward pass that is ready for backward passes.

    Args:
        losses: ``[n]``, with their graph.
        n: Number of samples.
        recording: What the forward pass has shown of layers with rules of their own.
        lockstep: Decides together with other ranks.
        marks: Places at which every rank comes by in the same order.
    """

    def __init__(
        self, losses: Tensor, n: int, recording: Recording, lockstep: Lockstep, marks: Marks = ()
    ) -> None:
        self.losses, self.n = losses, n
        self.lockstep, self.marks = lockstep, marks
        self._recording = recording
        self.graph = Graph(losses.grad_fn)
        self._reads: dict[tuple[int, Reach], list[Read]] = {}

    def reads(self, parameter: Tensor, reach: Reach) -> list[Read]:
        """Find the nodes that take a parameter.

        Args:
            parameter: A leaf.
            reach: How far to follow it.

        Returns:
            What to read; nothing if the losses do not depend on it.

        Raises:
            NoRuleError: If the graph does not show where it is combined with the data.
        """
        known = self._reads.get((id(parameter), reach))
        if known is not None:
            return known
        calls_at = self._recording.edges

        def takes_it(node: Node, index: int, shape: tuple[int, ...]) -> bool:
            return (node, index) in calls_at or combines_with_data(node, index, shape, reach, self.n)

        try:
            inputs = self.graph.node_inputs(parameter, takes_it)
        except UntraceableError:
            raise NoRuleError("the graph does not show where it is combined with the data") from None
        calls: dict[int, RecordedCall] = {}
        found = []
        for taken in inputs:
            call = calls_at.get((taken.node, taken.index))
            if call is None:
                found.append(Read(taken.node, 0, taken, _signature(taken)))
            else:
                calls[id(call)] = call
        found += [Read(call.node, call.output, call, (type(call.layer),)) for call in calls.values()]
        self._reads[id(parameter), reach] = found
        return found

    def backward(
        self,
        arrivals: Sequence[tuple[Node, int, Arrived]],
        weights: Tensor,
        *,
        watched: Sequence[tuple[Node, Arrived]] = (),
        retain_graph: bool = False,
    ) -> None:
        """Run the pass as far down as needed.

        Args:
            arrivals: Nodes, the output of each that matters, and what gets the gradients of the outputs.
            weights: ``[n]``, factors of the losses.
            watched: Nodes whose gradients are of interest where the pass comes by anyway.
            retain_graph: Another pass will follow.
        """
        waiting: dict[Node, list[Arrived]] = {}
        outputs: dict[Node, set[int]] = {}
        for node, output, arrived in arrivals:
            waiting.setdefault(node, []).append(arrived)
            outputs.setdefault(node, set()).add(output)
        for node, output in self.marks:  # all ranks go as far down as any, whatever they look for
            waiting.setdefault(node, [])
            outputs.setdefault(node, set()).add(output)
        above = self.graph.above(waiting)
        # Nodes own the hooks that own what is waiting.
        with Undone(waiting.clear), handles() as hooks:
            for node in above & waiting.keys():
                hooks.append(node.register_prehook(functools.partial(_come_by, waiting[node])))
            for node, arrived in watched:
                if node in above:
                    hooks.append(node.register_prehook(functools.partial(_come_by, [arrived])))
            # Nodes that have none below them do not have to run: it is enough to ask for their gradients.
            edges = [(node, output) for node in waiting if node not in above for output in outputs[node]]
            if not edges:
                return
            with ExitStack() as stack:
                for kind in {"cpu", self.losses.device.type}:
                    if torch.is_autocast_enabled(kind):
                        stack.enter_context(torch.autocast(kind, enabled=False))
                grads = torch.autograd.grad(
                    self.losses,
                    [GradientEdge(node, output) for node, output in edges],
                    weights,
                    allow_unused=True,
                    retain_graph=retain_graph,
                )
                by_output: dict[Node, dict[int, Tensor | None]] = {}
                for (node, output), grad in zip(edges, grads, strict=True):
                    by_output.setdefault(node, {})[output] = grad
                del grads
                with torch.no_grad():
                    for node in list(by_output):
                        found = by_output.pop(node)
                        every = [found.get(output) for output in range(max(found) + 1)]
                        for callback in waiting[node]:
                            callback(every)


def _come_by(arrived: Iterable[Arrived], grads: Sequence[Tensor | None]) -> None:
    # A backward pass that makes no graph has turned gradients off.
    checkpoints.reading.again = True
    try:
        for callback in arrived:
            callback(grads)
    finally:
        checkpoints.reading.again = False


def _signature(taken: NodeInput) -> Signature:
    paths = tuple(
        tuple((kind_of(step.node), step.index, step.output) for step in path) for path in taken.paths
    )
    return kind_of(taken.node), taken.index, len(taken.node._input_metadata[0].shape), paths


@contextmanager
def traced(
    loss: PerSampleLoss, batch: Batch, n: int, *, is_whole: bool = False, watch: Watch | None = None
) -> Iterator[Trace]:
    """Run a forward pass.

    Args:
        loss: The model and its loss.
        batch: A batch on the model's device.
        n: Its number of samples.
        is_whole: It is a batch as the user gave it.
        watch: Looks on; a model that cannot run while it is watched runs once more.

    Yields:
        The pass, whose graph lives as long as the context.
    """
    with recorded(loss.model) as recording:
        values: Tensor | None = None
        with loss.lockstep.marking(loss.model) as marks:
            if watch is not None:
                with watch, suppress(Exception):
                    values = loss.losses(batch, n, is_whole=is_whole)
            if values is None:
                if watch is not None:
                    watch.is_mixed = True
                    recording.edges.clear()
                values = loss.losses(batch, n, is_whole=is_whole)
        recording.is_open = False
        yield Trace(values, n, recording, loss.lockstep, marks)


@dataclass
class _Target:
    # A parameter in the pass.
    name: str
    parameter: Tensor
    missing: int = 0
    terms: list[PerSampleGradients] = field(default_factory=list)


class FisherPass:
    """The backward pass of one batch, which reads every sample's gradients as it comes by.

    The parameters' own gradients are not asked for, so autograd leaves them out.

    Args:
        trace: The forward pass.
        parameters: Parameter name to parameter.
        layouts: Parameter name to what is read, and in which layout.
        accumulate: ``accumulate(name, gradients)`` gets every parameter's gradients as soon as they are
            complete; a ``MismatchError`` refuses them.
        settle: ``settle(names that may still come, failures)`` is called at the marks and at the end, on all
            ranks at once; it adds the other ranks' failures.
    """

    def __init__(
        self,
        trace: Trace,
        parameters: Mapping[str, Tensor],
        layouts: Mapping[str, Mapping[Read, Layout]],
        accumulate: Accumulate,
        settle: Settle | None = None,
    ) -> None:
        self._settle = settle
        self._trace, self._layouts, self._accumulate = trace, layouts, accumulate
        self._targets = [_Target(name, parameters[name], len(layouts[name])) for name in layouts]
        self._failures: dict[str, Exception] = {}
        self._later: list[tuple[_Target, PerSampleGradients]] = []

    def run(self) -> dict[str, Exception]:
        """Run it; the graph is used up.

        Returns:
            Parameter name to why nothing was given to ``accumulate``, for those that failed. A parameter that
            the losses do not depend on is no failure.
        """
        arrivals: list[tuple[Node, int, Arrived]] = []
        needs_graph = False
        for target in self._targets:
            for place, layout in self._layouts[target.name].items():
                arrived = functools.partial(self._arrived, target, place, layout)
                arrivals.append((place.node, place.output, arrived))
                if isinstance(place.what, NodeInput):
                    needs_graph |= any(not step.moves for path in place.what.paths for step in path)
                    needs_graph |= len(place.what.paths) > 1
        if self._settle:  # as arrivals, which the lowest mark has too, whatever is read below it
            arrivals += [(node, output, self._come_by) for node, output in self._trace.marks]
        try:
            self._trace.backward(
                arrivals,
                torch.ones_like(self._trace.losses),
                retain_graph=needs_graph,
            )
            with torch.no_grad():
                for target, term in self._later:
                    self._finish(target, term)
            for target in self._targets:
                if target.missing:
                    error = MismatchError("its gradient did not arrive")
                    self._failures.setdefault(target.name, error)
            if self._settle:
                self._settle((), self._failures)
        finally:
            self._later.clear()
        return self._failures

    def _come_by(self, _: Sequence[Tensor | None]) -> None:
        still = {target.name for target in self._targets if target.missing}
        still |= {target.name for target, _ in self._later}
        if self._settle:
            self._settle(still - self._failures.keys(), self._failures)

    def _arrived(self, target: _Target, place: Read, layout: Layout, grads: Sequence[Tensor | None]) -> None:
        if target.name in self._failures:
            return
        try:
            complete = self._take(target, place, layout, grads[place.output])
        except Exception as error:
            self._failures[target.name] = error.with_traceback(None)
            target.terms.clear()
            return
        if complete is not None and is_for_later(complete):
            self._later.append((target, complete))
        elif complete is not None:
            self._finish(target, complete)

    def _finish(self, target: _Target, term: PerSampleGradients) -> None:
        try:
            self._accumulate(target.name, term)
        except MismatchError as error:
            self._failures[target.name] = error.with_traceback(None)

    def _take(
        self, target: _Target, place: Read, layout: Layout, grad: Tensor | None
    ) -> PerSampleGradients | None:
        if grad is not None:  # else it is zero
            term = place.gradients(target.parameter, grad, layout)
            if not layout.may_be_nonzero:
                if not term.is_zero():
                    raise UnprovenError("no sample that was checked had a gradient")
            else:
                if isinstance(place.what, NodeInput):
                    term = as_parameter_gradients(target.parameter, term, place.what)
                if term.n != self._trace.n or term.shape != tuple(target.parameter.shape):
                    raise MismatchError(f"a gradient of shape {[term.n, *term.shape]} was read")
                target.terms.append(term)
        target.missing -= 1
        if target.missing or not target.terms:
            return None
        complete = merged(target.terms)
        target.terms.clear()
        return complete
