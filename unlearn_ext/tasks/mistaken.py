"""What is easily taken for logits: probabilities, and features that a model returns beside them."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from unlearn_ext.tasks.batches import Batch
from unlearn_ext.tasks.fields import Fields, described, logits_in
from unlearn_ext.tasks.positions import is_transformed

# Rows that are looked at, and how far the sums of few and of many of them may lie from 1. Two rows of logits
# are so near by chance once in millions of batches; probabilities of half precision are not nearer.
_ROWS, _MANY = 64, 8
_NEAR, _NEAR_OF_MANY = 1e-4, 1e-2

_seen: WeakSet[nn.Module] = WeakSet()


def refuse_probabilities(logits: Tensor) -> None:
    """Refuse probabilities in the place of logits: a softmax of them says little of what the model knows.

    Logarithms of probabilities are logits, and pass.

    Args:
        logits: ``[..., C]``, classes last.

    Raises:
        ValueError: If every row looked at is non-negative and adds up to 1. One row alone, or rows of zeros
            and ones, tell nothing.

    Example:
        >>> refuse_probabilities(torch.zeros(2, 3).log_softmax(-1))
    """
    if is_transformed() or not logits.numel() or logits.shape[-1] < 2:
        return
    rows = logits.detach().reshape(-1, logits.shape[-1])[:_ROWS]
    if len(rows) < 2 or bool(rows[0].amin() < 0):
        return
    near = _NEAR_OF_MANY if len(rows) >= _MANY else _NEAR
    are_sums_one = ((rows.sum(-1) - 1).abs() <= near).all()
    if bool((rows.amin() >= 0) & are_sums_one & ((rows > 0) & (rows < 1)).any()):
        raise ValueError(
            f"the model must return logits, got {described(logits)} with rows of probabilities, non-negative "
            "and of sum 1, of which a softmax would be taken again; leave the softmax out, or return their "
            "logarithm (log_softmax)"
        )


def logits_of(fields: Fields, model: nn.Module, batch: Batch) -> Tensor:
    """Call a model and find the logits in what it returns.

    Args:
        fields: How it is called.
        model: The model.
        batch: A batch on its device.

    Returns:
        The logits, at least float32.

    Raises:
        ValueError: If what stands in their place is made into another output by layers with parameters:
            features.
    """
    output = fields.call(model, batch)
    if isinstance(output, tuple) and not hasattr(output, "logits"):
        _refuse_features(fields, model, batch, output)
    return logits_in(output)


def _refuse_features(fields: Fields, model: nn.Module, batch: Batch, output: tuple[Any, ...]) -> None:
    if model in _seen or is_transformed() or not any(_is_like(output[0], part) for part in output[1:]):
        return
    if output[0].grad_fn is None:
        # Only a graph tells; of a model in training, or whose parts are elsewhere, another pass is not free.
        is_whole = all(type(p).__name__ != "DTensor" for p in model.parameters())
        if torch.is_grad_enabled() or model.training or not is_whole or torch.is_inference(output[0]):
            return
        with torch.enable_grad(), torch.random.fork_rng([]):
            output = fields.call(model, batch)
        if output[0].grad_fn is None:
            return
    for part in output[1:]:
        if _is_like(output[0], part) and _is_made_of(part, output[0]):
            raise ValueError(
                f"the model returns {described(output)}, of which the first should be the logits, but layers "
                f"with parameters make {described(part)} of it: it is features. Let the model return the "
                "logits first or alone, or pass a task whose forward does"
            )
    _seen.add(model)


def _is_like(first: object, other: object) -> bool:
    if not (isinstance(first, Tensor) and isinstance(other, Tensor)):
        return False
    return first.ndim >= 2 and other.ndim == first.ndim and other.shape[0] == first.shape[0]


def _is_made_of(tensor: Tensor, source: Tensor) -> bool:
    # Whether `source` goes into `tensor`, with parameters on the way: nothing but a softmax makes chances.
    seen: set[object] = set()
    stack, is_met, has_parameters = [tensor.grad_fn], False, False
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node is source.grad_fn:
            is_met = True
            continue
        has_parameters |= node.name().endswith("AccumulateGrad")
        stack.extend(each for each, _ in node.next_functions)
    return is_met and has_parameters
