"""Which scalars make up a neuron, and what multiplies its output.

``module_groups`` tells by what the modules are, ``neuron_groups`` by running the model as well.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.modules import eager, is_hf_conv1d
from unlearn_ext._internal.names import modules_by_name, parameters_by_name
from unlearn_ext.distributed import ALONE, Ranks
from unlearn_ext.fisher.engine.graph import Node, kind_of
from unlearn_ext.tasks.base import Task, one_per_sample
from unlearn_ext.tasks.batches import Batch, Batches, device_of, read_batches
from unlearn_ext.tasks.losses import LossFn, resolve

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


class Part(NamedTuple):
    """Where the neurons of a layer lie in one parameter.

    Attributes:
        name: Name of the parameter.
        view: Its shape, split so that the neurons have dimensions of their own.
        dims: The dimensions of ``view`` that count the neurons, in ascending order.
    """

    name: str
    view: tuple[int, ...]
    dims: tuple[int, ...] = (0,)

    @property
    def size(self) -> int:
        """Number of neurons."""
        return math.prod(self.view[d] for d in self.dims)

    def rows(self, tensor: Tensor) -> Tensor:
        """Sort the scalars of the parameter, or of a tensor like it, by neuron.

        Args:
            tensor: Of the parameter's shape.

        Returns:
            ``[neurons, scalars]``, a view where strides allow.
        """
        front = tensor.reshape(self.view).movedim(self.dims, tuple(range(len(self.dims))))
        return front.reshape(self.size, -1)

    def spread(self, flags: Tensor) -> Tensor:
        """Give every scalar of the parameter what its neuron has.

        Args:
            flags: ``[neurons]``.

        Returns:
            The same per scalar, in the shape ``view``; read-only.
        """
        shape = [size if d in self.dims else 1 for d, size in enumerate(self.view)]
        return flags.reshape(shape).expand(self.view)


@dataclass(frozen=True)
class NeuronGroup:
    """Parameters whose scalars make up the neurons of one layer.

    Attributes:
        name: The layer.
        parts: Weight rows, biases, scale and shift of the normalisation that follows.
        consumers: What multiplies these neurons' outputs and nothing else: columns of the layers that follow,
            as far as the flow of data could be verified.
        is_layer: A linear or convolutional layer with a weight row per neuron.
        is_output: Its outputs are the model's: dropping one would drop a class.
    """

    name: str
    parts: tuple[Part, ...]
    consumers: tuple[Part, ...] = ()
    is_layer: bool = False
    is_output: bool = False

    @property
    def size(self) -> int:
        """Number of neurons."""
        return self.parts[0].size


# Note [Where neurons end]
# A neuron is a row of a layer's weight, its bias, and its channel of the normalisation that follows. The
# first two stand in the layer; the third, and whose columns take the neuron's output, is a matter of how data
# flows. So the model is run on a few samples: hooks note the autograd node of every layer's output and of
# every layer's input, and an input is led back to an output through nodes that treat every channel by itself.
# Views can mix channels up all the same, so the gradients between the two ends are looked at too.

_MOVES = {
    *("Alias", "Clone", "Permute", "ReshapeAlias", "Squeeze", "T", "Transpose", "UnsafeView", "Unsqueeze"),
    "View",
}

_BY_CHANNEL = {
    *_MOVES,
    *("Celu", "Elu", "Gelu", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "LogSigmoid", "Mish"),
    *("Relu", "Sigmoid", "Silu", "Softplus", "Tanh", "Threshold"),
    *("AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "AvgPool2D", "AvgPool3D", "MaxPool2DWithIndices", "Mean"),
    *("MaxPool3DWithIndices", "Expand", "SqueezeDim", "CudnnBatchNorm", "NativeBatchNorm", "NativeGroupNorm"),
}

_LONGEST_CHAIN = 32


class _End(NamedTuple):
    """One end of a flow: a layer's input or output."""

    edge: GradientEdge
    shape: tuple[int, ...]
    channel: int  # the dimension that counts channels


@dataclass
class _Layer:
    name: str
    module: nn.Module
    group: NeuronGroup | None
    is_norm: bool
    calls: int = 0
    input: _End | None = None
    output: _End | None = None


def neuron_groups(
    model: nn.Module,
    data: Batches,
    *,
    task: Task | None = None,
    loss_fn: LossFn | None = None,
    names: Collection[str] | None = None,
    ranks: Ranks = ALONE,
) -> tuple[NeuronGroup, ...]:
    """Find out which scalars make up the neurons of every layer.

    Args:
        model: The model; run in eval mode on a few samples, left as it was.
        data: Re-iterable batches, of which the first is looked at.
        task: What the model is for.
        loss_fn: ``loss_fn(model, batch) -> Tensor[N]``, instead of the task's.
        names: The parameters to look at; None: all that are trainable.
        ranks: Who else looks at its own data: the lowest rank that has any decides.

    Returns:
        The layers; every parameter looked at is part of exactly one.
    """
    chosen = task if task is not None and loss_fn is None else resolve(task, loss_fn, who="neuron_groups")
    scored = {
        name: tuple(p.shape)
        for name, p in parameters_by_name(model).items()
        if (p.requires_grad if names is None else name in names)
    }
    groups = {group.name: group for group in module_groups(model, scored)}
    layers = [
        _Layer(name, module, groups.get(name), is_norm)
        for name, module in modules_by_name(model).items()
        if (is_norm := _is_norm(module)) or _channels_out(module)
    ]
    first = next(iter(read_batches(data, device_of(model))), None)
    has_samples = first is not None and chosen.count(first) > 0
    if first is not None and has_samples:
        batch = chosen.select(first, range(min(4, chosen.count(first))))
        _connect(model, batch, chosen.loss, layers, groups)
    own = tuple(groups.values())
    return ranks.first("neurons", own if has_samples else None) or own


def _connect(
    model: nn.Module, batch: Batch, loss_fn: LossFn, layers: list[_Layer], groups: dict[str, NeuronGroup]
) -> None:
    """Add to the groups what running the model shows."""
    with borrowed(model), eager():
        for parameter in model.parameters():
            if parameter.is_floating_point() and not parameter.requires_grad:
                parameter.requires_grad_(True)
        with ExitStack() as hooks:
            for layer in layers:
                after, before = layer.module.register_forward_hook, layer.module.register_forward_pre_hook
                hooks.callback(after(_noting(layer), with_kwargs=True).remove)
                hooks.callback(before(_noting_input(layer), with_kwargs=True).remove)
            loss = one_per_sample(loss_fn(model, batch)).sum()
        by_output = {
            layer.output.edge.node: layer
            for layer in layers
            if layer.calls == 1
            and layer.output is not None
            and not layer.is_norm
            and _channels_out(layer.module)
        }
        for layer in layers:
            if layer.calls != 1 or layer.input is None:
                continue
            source = _source(layer.input.edge.node, by_output, _MOVES if layer.is_norm else _BY_CHANNEL)
            if source is None or source is layer or source.group is None or source.output is None:
                continue
            n = _channels_out(source.module)
            if not _keeps_channels(layer.input, source.output, n):
                continue
            group = groups[source.name]
            if layer.is_norm and layer.group is not None and layer.input.shape[layer.input.channel] == n:
                groups[source.name] = replace(group, parts=group.parts + layer.group.parts)
                groups.pop(layer.name, None)
            elif not layer.is_norm and (column := _columns(layer, n)) is not None:
                groups[source.name] = replace(group, consumers=(*group.consumers, column))
        for name in _outputs(loss.grad_fn, by_output):
            if name in groups:
                groups[name] = replace(groups[name], is_output=True)


def _noting_input(layer: _Layer) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        value = args[0] if args else next(iter(kwargs.values()), None)
        layer.input = _end(module, value)

    return hook


def _noting(layer: _Layer) -> Callable[..., None]:
    def hook(module: nn.Module, args: object, kwargs: object, output: object) -> None:
        layer.calls += 1
        layer.output = _end(module, output)

    return hook


def _end(module: nn.Module, value: object) -> _End | None:
    if not isinstance(value, Tensor) or value.grad_fn is None or value.ndim < 2:
        return None
    is_last = isinstance(module, nn.Linear) or is_hf_conv1d(module) or _normalises_last(module)
    return _End(get_gradient_edge(value), tuple(value.shape), value.ndim - 1 if is_last else 1)


def _source(node: Node, by_output: Mapping[Node, _Layer], kinds: set[str]) -> _Layer | None:
    for _ in range(_LONGEST_CHAIN):
        if node in by_output:
            return by_output[node]
        if node is None or kind_of(node) not in kinds or not node.next_functions:
            return None
        first, *others = [source for source, _ in node.next_functions]
        if any(other is not None and kind_of(other) != "AccumulateGrad" for other in others):
            return None
        node = first
    return None


def _keeps_channels(end: _End, start: _End, n: int) -> bool:
    # Whether channel c of `end`, or its c-th block of channels, depends on channel c of `start` alone.
    width = end.shape[end.channel]
    if width % n or start.shape[start.channel] != n:
        return False
    device = start.edge.node._input_metadata[start.edge.output_nr].device
    owner = torch.arange(width, device=device) // (width // n)
    others = [d for d in range(len(start.shape)) if d != start.channel]
    shape = [width if d == end.channel else 1 for d in range(len(end.shape))]
    # Two channels differ in some binary digit: looking at one value of one digit at a time tells them apart.
    for digit in range(max(1, (n - 1).bit_length())):
        for value in (0, 1):
            chosen = (owner >> digit) & 1 == value
            meta = end.edge.node._input_metadata[end.edge.output_nr]
            cotangent = chosen.view(shape).expand(end.shape).to(meta.device, meta.dtype)
            found = torch.autograd.grad(
                [end.edge], [start.edge], [cotangent], retain_graph=True, allow_unused=True
            )
            grad = cast("Tensor | None", found[0])
            if grad is None:
                return False
            stray = (torch.arange(n, device=grad.device) >> digit) & 1 != value
            if bool(grad.abs().sum(others)[stray].any()):
                return False
    return True


def _outputs(root: Node, by_output: Mapping[Node, _Layer]) -> set[str]:
    # The layers whose outputs reach the loss without passing another layer.
    found: set[str] = set()
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        if node in by_output:
            found.add(by_output[node].name)
            continue
        for source, _ in node.next_functions:
            if source is not None and source not in seen:
                seen.add(source)
                stack.append(source)
    return found


def _columns(layer: _Layer, n: int) -> Part | None:
    # Where a layer's weight multiplies the channels of its input, given n neurons before it.
    module, group = layer.module, layer.group
    if group is None or getattr(module, "groups", 1) != 1:
        return None
    weight = next((part for part in group.parts if part.name.rpartition(".")[2] == "weight"), None)
    if weight is None:
        return None
    if isinstance(module, nn.Linear):
        return Part(weight.name, (module.out_features, n, module.in_features // n), (1,))
    if isinstance(module, _CONVS) and module.in_channels == n:
        return Part(weight.name, tuple(module.weight.shape), (1,))
    if isinstance(module, _TRANSPOSED) and module.in_channels == n:
        return Part(weight.name, tuple(module.weight.shape), (0,))
    if is_hf_conv1d(module):
        return Part(weight.name, (n, weight.view[0] // n, weight.view[1]), (0,))
    return None


def _normalises_last(module: nn.Module) -> bool:
    return _is_norm(module) and not isinstance(
        module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    )


def _is_norm(module: nn.Module) -> bool:
    # Not by attribute: a parametrization computes its weight, and may move its own buffers doing so.
    if "norm" not in type(module).__name__.lower():
        return False
    weight = module._parameters.get("weight", module._buffers.get("weight"))
    return isinstance(weight, Tensor) and weight.ndim == 1


def _channels_out(module: nn.Module) -> int:
    # The number of neurons of a linear or convolutional layer, 0 for other modules.
    if isinstance(module, nn.Linear):
        return module.out_features
    if isinstance(module, (*_CONVS, *_TRANSPOSED)):
        return module.out_channels
    return int(module.nf) if is_hf_conv1d(module) else 0  # type: ignore[arg-type]


def module_groups(
    model: nn.Module, scored: Mapping[str, tuple[int, ...]] | None = None
) -> Iterator[NeuronGroup]:
    """Group parameters into layers by what the modules are, without running the model.

    Args:
        model: The model.
        scored: Parameter name to shape; None: all parameters.

    Yields:
        The layers, without what follows them: every parameter is part of exactly one.
    """
    if scored is None:
        scored = {name: tuple(p.shape) for name, p in parameters_by_name(model).items()}
    names = {parameter: name for name, parameter in parameters_by_name(model).items() if name in scored}
    done: set[str] = set()
    for prefix, module in modules_by_name(model).items():
        own = {
            name: local
            for local, parameter in module.named_parameters(recurse=False)
            if (name := names.get(parameter)) is not None and name not in done
        }
        done |= own.keys()
        if isinstance(module, nn.RNNBase):
            yield from _groups_of_rnn(prefix, module, {local: name for name, local in own.items()})
            continue
        shapes = {name: scored[name] for name in own}
        if isinstance(module, _TRANSPOSED) or is_hf_conv1d(module):
            parts = tuple(_transposed_part(module, name, shape) for name, shape in shapes.items())
            if parts:
                yield NeuronGroup(prefix, parts, is_layer=any(len(part.view) > 1 for part in parts))
            continue
        groups = list(groups_by_prefix(shapes))
        if _channels_out(module) and len(groups) == 1:
            is_layer = any(len(part.view) > 1 for part in groups[0].parts)
            yield replace(groups[0], name=prefix, is_layer=is_layer)
        elif len(groups) == 1:
            yield replace(groups[0], name=prefix)
        else:
            yield from groups


def _transposed_part(module: nn.Module, name: str, shape: tuple[int, ...]) -> Part:
    if len(shape) == 1:
        return Part(name, shape)
    if is_hf_conv1d(module):
        return Part(name, shape, (1,))
    q = int(module.groups)  # type: ignore[arg-type]
    return Part(name, (q, shape[0] // q, *shape[1:]), (0, 2))


def _groups_of_rnn(prefix: str, module: nn.RNNBase, names: Mapping[str, str]) -> Iterator[NeuronGroup]:
    # weight_ih_l0, weight_hh_l0_reverse, ...: a hidden unit is one row of every gate.
    suffixes = dict.fromkeys(local.split("_", 2)[2] for local in names)
    gates = {"LSTM": 4, "GRU": 3}.get(module.mode, 1)
    for suffix in suffixes:
        parts, projections = [], []
        for local, name in names.items():
            _, which, rest = local.split("_", 2)
            if rest != suffix:
                continue
            shape = tuple(getattr(module, local).shape)
            if which == "hr":
                projections.append(Part(name, shape))
            else:
                parts.append(Part(name, (gates, module.hidden_size, *shape[1:]), (1,)))
        label = f"{prefix}.{suffix}".lstrip(".")
        if parts:
            yield NeuronGroup(label, tuple(parts))
        if projections:
            yield NeuronGroup(f"{label}.projection", tuple(projections))


def groups_by_prefix(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[NeuronGroup]:
    """Group parameters into layers by their names and shapes alone.

    Args:
        shapes: Parameter name to shape.

    Yields:
        A layer for the parameters of one module with one leading dimension, whose index counts the neurons; a
        dimension of length 1 counts none, so that its parameter is a layer of its own.
    """
    families: dict[tuple[str, int | str], list[Part]] = defaultdict(list)
    for name, shape in shapes.items():
        prefix = (
            name.partition(".parametrizations.")[0]
            if ".parametrizations." in name
            else name.rpartition(".")[0]
        )
        view = shape or (1,)
        families[prefix, view[0] if view[0] > 1 else name].append(Part(name, view))
    for (prefix, key), parts in families.items():
        several = sum(other == prefix for other, _ in families) > 1
        yield NeuronGroup(f"{prefix}[{key}]" if several else prefix, tuple(parts))
