"""Layers with rules of their own: for what autograd sees as one opaque node, such as a user's own kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar, overload

from torch import Tensor, nn

from unlearn_ext._internal.undo import Undone, handles
from unlearn_ext.fisher.engine.gradients import PerSampleGradients
from unlearn_ext.fisher.engine.graph import Node
from unlearn_ext.fisher.engine.layout import MismatchError

LayerRule: TypeAlias = Callable[[Any, tuple[Any, ...], Tensor], Mapping[str, PerSampleGradients]]
_Rule = TypeVar("_Rule", bound=LayerRule)

_rules: dict[type[nn.Module], LayerRule] = {}


@overload
def register_layer(layer: type[nn.Module]) -> Callable[[_Rule], _Rule]: ...
@overload
def register_layer(layer: type[nn.Module], rule: _Rule) -> _Rule: ...
def register_layer(layer: type[nn.Module], rule: _Rule | None = None) -> _Rule | Callable[[_Rule], _Rule]:
    """Teach the per-sample importances a layer that would otherwise be computed sample by sample.

    Layers built from PyTorch's own functions need no rule: linear, convolution, lookup and norm functions and
    parameters that are added or multiplied are found wherever they are used. A rule is for a layer that runs
    a ``torch.autograd.Function`` or a foreign kernel. It is checked like everything else: where its numbers
    disagree with plain autograd, the layer's parameters fall back, and ``Importance.coverage`` says so.

    Args:
        layer: The layer's class. Subclasses count as long as they keep its ``forward``.
        rule: ``rule(layer, inputs, grad_output)`` gets the layer, the arguments of one call (positional ones,
            then those by keyword) and the gradient of its output, samples first. It returns the gradients of
            every trainable parameter of the layer by its name there: ``Product`` for a matrix that multiplies
            vectors, ``Convolution``, ``Lookup`` for a table, ``Channels`` for what is added or multiplied,
            ``Gradients`` for anything else, from ``unlearn_ext.engine``. Used as a decorator if left out.

    Returns:
        The rule, or a decorator that takes it.

    Example:
        >>> import torch
        >>> from unlearn_ext import engine, importance
        >>> class Scale(nn.Module):
        ...     def __init__(self, width):
        ...         super().__init__()
        ...         self.weight = nn.Parameter(torch.ones(width))
        ...
        ...     def forward(self, x):
        ...         return my_kernel(x, self.weight)
        >>> @importance.register_layer(Scale)
        ... def scale(layer, inputs, grad_output):
        ...     return {"weight": engine.Channels(grad_output, inputs[0])}
    """
    if rule is None:

        def decorate(rule: _Rule) -> _Rule:
            _rules[layer] = rule
            return rule

        return decorate
    _rules[layer] = rule
    return rule


@dataclass
class RecordedCall:
    """One call of a layer with a rule.

    Attributes:
        layer: The layer.
        rule: Its rule.
        inputs: The arguments.
        node: The node of the output.
        output: Which of the node's outputs it is.
    """

    layer: nn.Module
    rule: LayerRule
    inputs: tuple[Any, ...]
    node: Node
    output: int
    _versions: list[int] = field(init=False)
    _made: tuple[Tensor, Mapping[str, PerSampleGradients]] | None = None

    def __post_init__(self) -> None:
        self._versions = self._current_versions()

    def _current_versions(self) -> list[int]:
        return [value._version for value in self.inputs if isinstance(value, Tensor)]

    def gradients_of(self, parameter: Tensor, grad: Tensor) -> PerSampleGradients:
        """Apply the rule.

        Args:
            parameter: One of the layer's parameters.
            grad: Gradient of the output.

        Returns:
            The per-sample gradients of the parameter that the call implies.

        Raises:
            MismatchError: If the rule says nothing of it, or an input was changed in place meanwhile.
        """
        if self._current_versions() != self._versions:
            raise MismatchError(f"an input of {type(self.layer).__name__} was changed in place")
        if self._made is None or self._made[0] is not grad:
            inputs = tuple(v.detach() if isinstance(v, Tensor) else v for v in self.inputs)
            self._made = grad, self.rule(self.layer, inputs, grad)
        terms = self._made[1]
        for name, own in self.layer.named_parameters():
            if own is parameter and name in terms:
                return terms[name]
        raise MismatchError(f"the rule of {type(self.layer).__name__} leaves it out")


class Recording:
    """What a forward pass has shown of the layers with rules.

    Attributes:
        edges: (node, which of its inputs) for the edges of the graph that a call accounts for.
    """

    def __init__(self) -> None:
        self.edges: dict[tuple[Node, int], RecordedCall] = {}
        self.is_open = True

    def add(self, layer: nn.Module, rule: LayerRule, inputs: tuple[Any, ...], output: object) -> None:
        """Note a call.

        Args:
            layer: The layer.
            rule: Its rule.
            inputs: Its arguments.
            output: What it returned: a tensor, or a tuple that starts with one.
        """
        first = output[0] if isinstance(output, tuple) and output else output
        if not self.is_open or not isinstance(first, Tensor) or first.grad_fn is None:
            return
        call = RecordedCall(layer, rule, inputs, first.grad_fn, first.output_nr)
        own = {id(parameter) for parameter in layer.parameters()}
        seen = {value.grad_fn for value in inputs if isinstance(value, Tensor)}
        stack: list[Node] = [first.grad_fn]
        while stack:
            node = stack.pop()
            for index, (source, _) in enumerate(node.next_functions):
                if source is None or source in seen:
                    continue
                if hasattr(source, "variable"):
                    if id(source.variable) in own:
                        self.edges[node, index] = call
                    continue
                seen.add(source)
                stack.append(source)


@contextmanager
def recorded(model: nn.Module) -> Iterator[Recording]:
    """Record the calls of layers that have a rule.

    Args:
        model: The model.

    Yields:
        The recording, to be closed (``is_open``) when the forward pass is over.
    """
    recording = Recording()
    with Undone(recording.edges.clear), handles() as hooks:
        for module in model.modules() if _rules else ():
            rule = rule_of(type(module))
            if rule is not None:

                def hook(
                    layer: nn.Module,
                    args: tuple[Any, ...],
                    kwargs: dict[str, Any],
                    output: object,
                    rule: LayerRule = rule,
                ) -> None:
                    recording.add(layer, rule, (*args, *kwargs.values()), output)

                hooks.append(module.register_forward_hook(hook, with_kwargs=True))
        yield recording


def rule_of(layer: type[nn.Module]) -> LayerRule | None:
    """Find the rule for a class of layers.

    Args:
        layer: The class.

    Returns:
        Its own rule, or that of the nearest base class whose ``forward`` it has kept.
    """
    for base in layer.__mro__:
        if base in _rules:
            return _rules[base] if getattr(layer, "forward", None) is getattr(base, "forward", None) else None
    return None
