"""Clipping by the norm of the gradients that count: those of the scalars that masks leave free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from unlearn_ext import ops
from unlearn_ext._internal.dtensors import is_dtensor, layout_of, local_of, part_of, refusal
from unlearn_ext._internal.names import plain_name, with_plain_names
from unlearn_ext.optim.constrained import packed_size

_EPS = 1e-6  # as in torch.nn.utils.clip_grad_norm_

_HALVES = (torch.float16, torch.bfloat16)


@torch.no_grad()
def clip_grad_norm_(
    params: Iterable[tuple[str, Tensor]],
    max_norm: float,
    masks: Mapping[str, Tensor],
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
) -> Tensor:
    """Clip gradients by the norm of all free scalars together; the others are scaled along and do not count.

    What ``torch.nn.utils.clip_grad_norm_`` does to one vector that holds the gradients of the free scalars
    alone. Clipped over all scalars, those of a mask that frees few would be shrunk for the sake of gradients
    that are never used.

    Args:
        params: ``model.named_parameters()``, or some of its pairs. Those without a gradient are left out.
        max_norm: The largest norm, >= 0.
        masks: What may change, by parameter name: bool tensors of the parameter's shape, or packed ones as
            ``select_mask`` returns them. Of a sharded parameter (DTensor): bool, whole on every rank. Further
            names are ignored.
        norm_type: p of the p-norm, > 0; may be ``inf``.
        error_if_nonfinite: Refuse a norm that is NaN or infinite, instead of scaling by it.

    Returns:
        The norm before clipping, 0-d; float32, float64 if a gradient is.

    Raises:
        ValueError: If ``max_norm`` or ``norm_type`` is out of range, parameters come without names, a mask
            is missing or has another shape, or a gradient is sparse. No gradient is changed then.
        TypeError: If a mask is neither bool nor uint8.
        NotImplementedError: If a parameter is a DTensor whose values are still to be added up.
        RuntimeError: If the norm is not finite and ``error_if_nonfinite`` is set.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(3))
        >>> weight.grad = torch.tensor([3.0, 4.0, 100.0])
        >>> masks = {"weight": torch.tensor([True, True, False])}
        >>> clip_grad_norm_([("weight", weight)], 1.0, masks)
        tensor(5.)
        >>> weight.grad[:2]
        tensor([0.6000, 0.8000])
    """
    if not max_norm >= 0:
        raise ValueError(f"clip_grad_norm_: max_norm must be >= 0, got {max_norm}")
    if not norm_type > 0:
        raise ValueError(f"clip_grad_norm_: norm_type must be > 0, got {norm_type}")
    by_name = with_plain_names(masks)
    rows: list[tuple[Tensor, Tensor]] = []
    for pair in params:
        if isinstance(pair, Tensor):
            raise ValueError(
                "clip_grad_norm_: params must be named_parameters(), got a parameter without name"
            )
        name, param = pair
        if param.grad is None:
            continue
        if param.grad.layout != torch.strided:
            raise ValueError(
                f"clip_grad_norm_: the gradient of {name} must be dense (an embedding's: sparse=False), got "
                f"{param.grad.layout}"
            )
        mask = by_name.get(name, by_name.get(plain_name(name)))
        if mask is None:
            raise ValueError(f"clip_grad_norm_: masks[{name!r}] must be given, got no mask")
        rows.append((param.grad, _checked(mask, param, name)))
    total = free_norm(rows, norm_type)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(
            f"clip_grad_norm_: the norm of the free gradients must be finite, got {float(total)}"
        )
    clip_by([grad for grad, _ in rows], total, max_norm)
    return total


def free_norm(rows: Sequence[tuple[Tensor, Tensor]], norm_type: float = 2.0) -> Tensor:
    """Compute the norm of what masks leave free of some gradients.

    Args:
        rows: Gradients and their masks: bool of the same shape, or packed, row-major; of a sharded gradient,
            of this rank's part.
        norm_type: p of the p-norm.

    Returns:
        0-d, on the first gradient's device; 0 for no gradients.
    """
    norms: list[Tensor] = []
    for grad, mask in rows:
        own = local_of(grad)
        free = mask if mask.dtype == torch.bool else ops.unpack_mask(mask, list(own.shape))
        dtype = torch.float32 if grad.dtype in _HALVES else grad.dtype
        # Not a product: a gradient that does not count may be NaN.
        values = torch.where(free, own, 0)
        if values.numel():
            norm = torch.linalg.vector_norm(values, norm_type, dtype=dtype)
        else:  # the shard of a rank for which nothing is left
            norm = own.new_zeros((), dtype=dtype)
        norms.append(_over_ranks(norm, grad, norm_type))
    if not norms:
        return torch.zeros(())
    wide = torch.float64 if any(norm.dtype == torch.float64 for norm in norms) else torch.float32
    gathered = torch.stack([norm.to(norms[0].device, wide) for norm in norms])
    total: Tensor = torch.linalg.vector_norm(gathered, norm_type)
    return total


def clip_by(grads: Sequence[Tensor], total: Tensor, max_norm: float) -> None:
    """Scale gradients down so that a norm is at most what is allowed.

    Args:
        grads: Written in place.
        total: The norm, 0-d.
        max_norm: What is allowed.
    """
    if not grads or math.isinf(max_norm):
        return
    factor = (max_norm / (total + _EPS)).clamp(max=1.0)  # no value is read: nothing waits for a GPU
    for grad in grads:
        local_of(grad).mul_(factor.to(grad.device))


def _over_ranks(norm: Tensor, grad: Tensor, norm_type: float) -> Tensor:
    # The norm of a whole gradient, from those of its parts; every rank of the mesh gets it.
    layout = layout_of(grad)
    if layout is None:
        return norm
    from torch.distributed.tensor import DTensor, Partial, Replicate

    mesh, places = layout
    is_largest = math.isinf(norm_type)
    part = norm if is_largest else norm**norm_type
    reduced = [Partial("max" if is_largest else "sum") if p.is_shard() else Replicate() for p in places]
    whole: Tensor = DTensor.from_local(part, mesh, reduced, run_check=False).full_tensor()
    return whole if is_largest else whole ** (1 / norm_type)


def _checked(mask: Tensor, param: Tensor, name: str) -> Tensor:
    if is_dtensor(param):
        if why := refusal(param):
            raise NotImplementedError(f"clip_grad_norm_: {name} must be sharded or replicated, got {why}")
        if mask.dtype != torch.bool or mask.shape != param.shape or is_dtensor(mask):
            raise ValueError(
                f"clip_grad_norm_: masks[{name!r}] must be bool {list(param.shape)}, whole on every rank, "
                f"got {mask.dtype} {list(mask.shape)}"
            )
        return mask[part_of(param)].to(local_of(param).device)
    got = f"{mask.dtype} {list(mask.shape)}"
    condition = f"be bool {list(param.shape)} or packed uint8 [{packed_size(param)}]"
    if mask.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"clip_grad_norm_: masks[{name!r}] must {condition}, got {got}")
    shape = param.shape if mask.dtype == torch.bool else torch.Size([packed_size(param)])
    if mask.shape != shape:
        raise ValueError(f"clip_grad_norm_: masks[{name!r}] must {condition}, got {got}")
    return mask.to(param.device)
