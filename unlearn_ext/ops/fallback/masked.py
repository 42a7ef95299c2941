"""Ops on masks, and masked optimizer steps, in plain PyTorch."""

# ruff: noqa: D103 (what the kernels do stands in the modules that call them)

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn_ext.ops import reference
from unlearn_ext.ops.fallback import checks
from unlearn_ext.ops.fallback.checks import TensorList, require, require_lists, require_non_negative
from unlearn_ext.ops.fallback.running import as_given, copies, needs_cpu


def _require_flags(name: str, mask: Tensor) -> None:
    op = "pack_mask"
    checks.require_dtype(
        mask.dtype == torch.bool, f"{op}: {name} must be bool, got {checks.dtype_name(mask.dtype)}"
    )
    checks.require_strided(op, name, mask)


def pack_mask(mask: Tensor) -> Tensor:
    _require_flags("mask", mask)
    packed: Tensor = reference.pack_mask(mask)
    return packed


def pack_mask_list(masks: Sequence[Tensor]) -> list[Tensor]:
    for index, mask in enumerate(masks):
        _require_flags(f"masks[{index}]", mask)
    return [reference.pack_mask(mask) for mask in masks]


def _require_bits(name: str, packed: Tensor, shape_name: str, shape: Sequence[int]) -> list[int]:
    op = "unpack_mask"
    checks.require_dtype(
        packed.dtype == torch.uint8, f"{op}: {name} must be uint8, got {checks.dtype_name(packed.dtype)}"
    )
    checks.require_strided(op, name, packed)
    shape = [int(extent) for extent in shape]
    numel = 1
    for extent in shape:
        require(extent >= 0, f"{op}: {shape_name} must be non-negative, got {shape}")
        numel *= extent
        require(numel < 2**63, f"{op}: {shape_name} must be addressable, got {shape}")
    n_bytes = (numel + 7) // 8
    require(
        packed.dim() == 1 and packed.numel() == n_bytes,
        f"{op}: {name} must have shape [{n_bytes}] for {numel} scalars, got {checks.sizes(packed)}",
    )
    if not numel:  # of a view without elements torch does not ask whether its strides can be counted
        torch.empty(shape, dtype=torch.bool, device="meta")
    return shape


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    mask: Tensor = reference.unpack_mask(packed, _require_bits("packed", packed, "shape", shape))
    return mask


def unpack_mask_list(packed: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    require(
        len(shapes) == len(packed),
        f"unpack_mask: shapes must have {len(packed)} entries like packed, got {len(shapes)}",
    )
    wanted = [
        _require_bits(f"packed[{index}]", bits, f"shapes[{index}]", shape)
        for index, (bits, shape) in enumerate(zip(packed, shapes, strict=True))
    ]
    return [reference.unpack_mask(bits, shape) for bits, shape in zip(packed, wanted, strict=True)]


def topk_mask(scores: Sequence[Tensor], k: int, *, largest: bool = True) -> list[Tensor]:
    op = "topk_mask"
    for index, score in enumerate(scores):
        name, first = f"scores[{index}]", scores[0]
        checks.require_strided(op, name, score)
        checks.require_float(op, name, score)
        checks.require_dtype(
            score.dtype == first.dtype,
            f"{op}: {name} must be {checks.dtype_name(first.dtype)} like scores[0], got "
            f"{checks.dtype_name(score.dtype)}",
        )
        require(
            score.device == first.device,
            f"{op}: {name} must be on {first.device} like scores[0], got {score.device}",
        )
    total = sum(score.numel() for score in scores)
    require(0 <= k <= total, f"{op}: k must be between 0 and the {total} scores, got {k}")
    with as_given():
        for index, score in enumerate(scores):
            # On other devices a NaN ranks last, as in the kernels that would have to wait to find it.
            require(
                score.device.type != "cpu" or not score.isnan().any(),
                f"{op}: scores[{index}] must not be NaN, got a NaN in it",
            )
        seen = copies(scores)[0] if needs_cpu(scores) else scores
        return [mask.to(score.device) for mask, score in zip(_topk(seen, k, largest), scores, strict=True)]


def _topk(scores: Sequence[Tensor], k: int, largest: bool) -> list[Tensor]:
    # What lies beyond the k-th score, and of those equal to it the first ones.
    if k == 0 or not scores:
        return [reference.pack_mask(torch.zeros_like(score, dtype=torch.bool)) for score in scores]
    joined = torch.cat([score.flatten() for score in scores])
    if joined.dtype in (torch.float16, torch.bfloat16):
        joined = joined.float()
    if largest:
        joined = -joined
    is_nan = joined.isnan()
    n_numbers = joined.numel() - int(is_nan.sum())
    if k > n_numbers:
        chosen, equal = ~is_nan, is_nan
    else:
        last = joined.masked_fill(is_nan, math.inf).kthvalue(k).values
        chosen, equal = joined < last, joined == last
    chosen |= equal & (equal.cumsum(0) <= k - chosen.sum())
    return [reference.pack_mask(part) for part in torch.split(chosen, [score.numel() for score in scores])]


def apply_mask_(grads: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    require_lists(
        "apply_mask_",
        TensorList("grads", grads, "parameters", written=True),
        TensorList("masks", masks, "bits"),
    )
    with as_given(grads):
        reference.apply_mask_(grads, masks)


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
    op = "masked_sgd_"
    require_non_negative(op, lr=lr, momentum=momentum)
    checks.require_finite(op, "dampening", dampening)
    require_non_negative(op, weight_decay=weight_decay)
    require(
        not nesterov or (momentum > 0 and dampening == 0),
        f"{op}: nesterov must come with a momentum and no dampening, got momentum {checks.number(momentum)} "
        f"and dampening {checks.number(dampening)}",
    )
    buffers = [TensorList("momentum_buffers", momentum_buffers, "accumulators", written=True)]
    require_lists(
        op,
        TensorList("params", params, "parameters", written=True),
        *(buffers if momentum != 0 else ()),
        TensorList("grads", grads, "like"),
        TensorList("masks", masks, "bits"),
    )
    with as_given([*params, *momentum_buffers]):
        reference.masked_sgd_(
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


def _require_step(op: str, step: int | Tensor) -> None:
    told = checks.number(float(step)) if isinstance(step, Tensor) else str(step)
    require(float(step) >= 1, f"{op}: step must be at least 1, got {told}")


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
    op = "masked_adamw_"
    if isinstance(step, Tensor):
        require(step.dim() == 0, f"{op}: step must be 0-dimensional, got shape {checks.sizes(step)}")
        checks.require_dtype(
            step.dtype in (torch.float32, torch.float64),
            f"{op}: step must be float32 or float64, got {checks.dtype_name(step.dtype)}",
        )
    is_elsewhere = isinstance(step, Tensor) and step.device.type != "cpu"
    if not is_elsewhere:
        _require_step(op, step)
    require_non_negative(op, lr=lr)
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        require(0 <= beta < 1, f"{op}: {name} must be in [0, 1), got {checks.number(beta)}")
    require_non_negative(op, eps=eps, weight_decay=weight_decay)
    require_lists(
        op,
        TensorList("params", params, "parameters", written=True),
        TensorList("exp_avgs", exp_avgs, "accumulators", written=True),
        TensorList("exp_avg_sqs", exp_avg_sqs, "accumulators", written=True),
        TensorList("grads", grads, "like"),
        TensorList("masks", masks, "bits"),
    )
    if isinstance(step, Tensor) and is_elsewhere:
        for param in params:
            require(
                param.device == step.device,
                f"{op}: step must be on {param.device} like its parameters or on the cpu, got {step.device}",
            )
        _require_step(op, step)
    with as_given([*params, *exp_avgs, *exp_avg_sqs]):
        reference.masked_adamw_(
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
