"""Whether layers use their weights as their Gram matrices have it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from unlearn_ext._internal.borrow import borrowed
from unlearn_ext._internal.names import parameters_by_name
from unlearn_ext._internal.seeding import random_states_kept
from unlearn_ext.distributed import Ranks
from unlearn_ext.fisher.kfac_layers import Factored
from unlearn_ext.fisher.kfac_pass import close_to, readable
from unlearn_ext.subspace.layers import Layer
from unlearn_ext.tasks.base import Task
from unlearn_ext.tasks.batches import Batch, Batches, device_of, read_batches

WHY = "its layer does not multiply by it as its kind does, or it is used outside of its layer"
_SAMPLES = 8
_HALVES = (torch.float16, torch.bfloat16)


def unlike_their_kind(
    model: nn.Module,
    layers: Mapping[str, tuple[nn.Module, Layer]],
    data: Batches,
    task: Task,
    ranks: Ranks,
) -> dict[str, str]:
    """Find weights of which Gram matrices of their layers' inputs do not tell what a change does.

    A subclass may standardise or normalise its weight, or do something to its inputs, before it multiplies;
    a model may multiply by a layer's weight without calling the layer. None of it can be read off a module.
    It is seen on a few samples: the gradient of the weight is not made up of the layer's inputs and the
    gradients of its outputs.

    Args:
        model: The model; left as it was.
        layers: Name to module and how its kind uses its weight.
        data: Batches, of which a few samples of the first are looked at.
        task: What the model is for.
        ranks: Those that look together: what one has found holds on all.

    Returns:
        Parameter name to why. A constant factor between the two, as of an equalised learning rate, is fine.
    """
    found: dict[str, str] = {}
    with borrowed(model), random_states_kept(data):
        batch = next((each for each in read_batches(data, device_of(model)) if task.count(each)), None)
        if batch is not None:
            few = task.select(batch, range(min(_SAMPLES, task.count(batch))))
            found = _unlike(model, layers, few, task)
    return {name: why for each in ranks.exchange("uses of weights", found) for name, why in each.items()}


def _unlike(
    model: nn.Module, layers: Mapping[str, tuple[nn.Module, Layer]], batch: Batch, task: Task
) -> dict[str, str]:
    hidden = {
        child
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in (module, *module.children())
    }
    watched = [
        module
        for module, layer in layers.values()
        if module not in hidden and isinstance(module._parameters.get(layer.weight), nn.Parameter)
    ]
    weights = {name: p for name, p in parameters_by_name(model).items() if p.requires_grad}
    own = {id(module._parameters["weight"]) for module in watched}
    weights = {name: p for name, p in weights.items() if id(p) in own}
    if not weights:
        return {}
    uses: list[tuple[nn.Module, Tensor, GradientEdge]] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: object) -> None:
        inputs = args[0] if args else kwargs.get("input", kwargs.get("x"))
        if isinstance(inputs, Tensor) and isinstance(output, Tensor) and output.requires_grad:
            uses.append((module, inputs.detach(), get_gradient_edge(output)))

    with readable(), ExitStack() as stack:
        for module in watched:
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        outputs = task.forward(model, batch)
    if isinstance(outputs, Tensor):  # whatever is known by heart: losses may have no gradients left
        drawn = torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))
        objective = (outputs * drawn.to(outputs)).sum()
    else:
        objective = task.losses(outputs, batch).sum()
    if not objective.requires_grad:
        return {}
    ends: Any = [*weights.values(), *(edge for _, _, edge in uses)]
    grads = torch.autograd.grad(objective, ends, allow_unused=True)
    made: dict[int, Tensor] = {}
    for (module, inputs, _), grad in zip(uses, grads[len(weights) :], strict=True):
        if grad is not None:
            weight = module._parameters["weight"]
            made[id(weight)] = _plus(made.get(id(weight)), _made_up(module, inputs, grad))
    is_coarse = any(grad is not None and grad.dtype in _HALVES for grad in grads)
    return {
        name: WHY
        for (name, weight), true in zip(weights.items(), grads, strict=False)
        if not _is_alike(true, made.get(id(weight)), is_coarse=is_coarse)
    }


def _made_up(module: nn.Module, inputs: Tensor, grad: Tensor) -> Tensor:
    # The gradient that the weight has if the layer does what its kind does; NaN where that fails.
    weight = module._parameters["weight"]
    assert weight is not None
    is_autocast = grad.dtype in _HALVES and grad.dtype != weight.dtype
    try:
        with torch.autocast(grad.device.type, grad.dtype, is_autocast, cache_enabled=False):
            output = Factored(module).plain_call(inputs)
        (found,) = torch.autograd.grad(output, [weight], grad)
    except (RuntimeError, ValueError, TypeError):  # another kind of input, or another shape of output
        return torch.full_like(weight, torch.nan)
    return found.to_dense()


def _plus(a: Tensor | None, b: Tensor) -> Tensor:
    return b if a is None else a + b


def _is_alike(true: Tensor | None, made: Tensor | None, *, is_coarse: bool) -> bool:
    if true is None or made is None:
        return true is None or not bool(true.to_dense().any())
    true, made = true.to_dense(), made.to(true.dtype)
    size = float(made.double().square().sum())
    factor = float((true.double() * made).sum()) / size if size > 0 else 1.0
    return close_to(true, factor * made, is_coarse)
