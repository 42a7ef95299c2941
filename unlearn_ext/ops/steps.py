"""Optimizer steps that leave masked-out scalars, and their state, bitwise alone."""

from collections.abc import Sequence

from torch import Tensor

from unlearn_ext.ops import sharded
from unlearn_ext.ops.library import OPS


def masked_sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> None:
    """Take one SGD step on the free scalars and leave all others, with their momentum, bitwise as they are.

    Where the mask is 1, with ``g = grads`` (``-grads`` for ``maximize``)::

        g      <- g + weight_decay * params
        buffer <- momentum * buffer + (1 - dampening) * g
        params <- params - lr * (g + momentum * buffer if nesterov else buffer)

    Computed in float32 (float64 for float64 parameters) and rounded once. For the first step as
    ``torch.optim.SGD`` takes it, pass buffers of zeros and ``dampening=0``.

    Args:
        params: Parameters, written in place; float32, float16, bfloat16 or float64.
        grads: Gradients, one per parameter and of its shape and dtype; strides may differ.
        momentum_buffers: Momentum, written in place; float32, or float64 for float64 parameters. An empty
            list means no momentum.
        masks: Packed masks, uint8 ``[ceil(numel / 8)]``, one per parameter (see ``pack_mask``); their bits
            are row-major whatever the strides of the parameter. Of DTensors, those of this rank's shards.
        lr: Learning rate, finite and >= 0.
        momentum: Momentum factor, >= 0; must be 0 if there are no buffers.
        dampening: Share of the gradient that is kept out of the momentum.
        weight_decay: L2 penalty, >= 0.
        nesterov: Look ahead along the momentum; needs ``momentum > 0`` and ``dampening == 0``.
        maximize: Ascend instead of descend.

    Raises:
        ValueError: If counts, shapes or devices differ, a constant is out of range, or written memory
            overlaps.
        TypeError: If a dtype is not supported.

    Source:
        Sutskever, Martens, Dahl & Hinton, "On the importance of initialization and momentum in deep
        learning", ICML 2013, in the form of ``torch.optim.SGD``.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> params, grads = [torch.tensor([1.0, 1.0])], [torch.tensor([2.0, 2.0])]
        >>> ops.masked_sgd_(params, grads, [], [ops.pack_mask(torch.tensor([True, False]))], lr=0.25)
        >>> params
        [tensor([0.5000, 1.0000])]
    """
    if sharded.has_dtensors(params, grads, momentum_buffers):
        params, grads, momentum_buffers = sharded.local_lists("masked_sgd_", params, grads, momentum_buffers)
    sharded.refuse_dtensors("masked_sgd_", *masks)
    OPS.masked_sgd_.default(
        params,
        grads,
        momentum_buffers,
        masks,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=weight_decay,
        nesterov=nesterov,
        maximize=maximize,
    )


def masked_adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masks: Sequence[Tensor],
    *,
    step: int | Tensor,
    lr: float,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    maximize: bool = False,
) -> None:
    """Take one AdamW step on the free scalars and leave all others, with their averages, bitwise as they are.

    Where the mask is 1, with ``g = grads`` (``-grads`` for ``maximize``)::

        params     <- params * (1 - lr * weight_decay)
        exp_avg    <- beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq <- beta2 * exp_avg_sq + (1 - beta2) * g^2
        params     <- params - lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq / (1 - beta2^step)) + eps)

    Computed in float32 (float64 for float64 parameters) and rounded once.

    Args:
        params: Parameters, written in place; float32, float16, bfloat16 or float64.
        grads: Gradients, one per parameter and of its shape and dtype; strides may differ.
        exp_avgs: Running means of the gradients, written in place; float32, or float64 for float64
            parameters.
        exp_avg_sqs: Running means of their squares, written in place; dtype as ``exp_avgs``.
        masks: Packed masks, uint8 ``[ceil(numel / 8)]``, one per parameter (see ``pack_mask``); their bits
            are row-major whatever the strides of the parameter. Of DTensors, those of this rank's shards.
        step: Number of this step, 1 on the first call: an int or a 0-d tensor, float32 or float64. A tensor
            on the parameters' device is read when the kernel runs, so that a captured graph can count its
            steps.
        lr: Learning rate, finite and >= 0.
        beta1: Decay of the mean, in [0, 1).
        beta2: Decay of the mean square, in [0, 1).
        eps: Term added to the denominator, >= 0.
        weight_decay: Decoupled weight decay, >= 0.
        maximize: Ascend instead of descend.

    Raises:
        ValueError: If counts, shapes or devices differ, a constant is out of range, or written memory
            overlaps.
        TypeError: If a dtype is not supported.

    Source:
        Loshchilov & Hutter, "Decoupled Weight Decay Regularization", ICLR 2019, algorithm 2, in the form of
        ``torch.optim.AdamW``.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> params, grads = [torch.tensor([1.0, 1.0])], [torch.tensor([2.0, 2.0])]
        >>> means, squares = [torch.zeros(2)], [torch.zeros(2)]
        >>> masks = [ops.pack_mask(torch.tensor([True, False]))]
        >>> ops.masked_adamw_(params, grads, means, squares, masks, step=1, lr=0.25, weight_decay=0.0)
        >>> params
        [tensor([0.7500, 1.0000])]
    """
    if sharded.has_dtensors(params, grads, exp_avgs, exp_avg_sqs):
        params, grads, exp_avgs, exp_avg_sqs = sharded.local_lists(
            "masked_adamw_", params, grads, exp_avgs, exp_avg_sqs
        )
    sharded.refuse_dtensors("masked_adamw_", *masks)
    op = OPS.masked_adamw_.tensor_step if isinstance(step, Tensor) else OPS.masked_adamw_.default
    op(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        masks,
        step=step,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        eps=eps,
        weight_decay=weight_decay,
        maximize=maximize,
    )
