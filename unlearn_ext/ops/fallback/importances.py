"""Ops on importances, in plain PyTorch."""

# ruff: noqa: D103 (what the kernels do stands in the modules that call them)

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from unlearn_ext.ops import reference
from unlearn_ext.ops.fallback import checks
from unlearn_ext.ops.fallback.checks import TensorList, require, require_lists, require_non_negative
from unlearn_ext.ops.fallback.running import as_given, copies, needs_cpu


def fisher_accumulate_(
    fisher: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    weight: float = 1.0,
    decay: float = 1.0,
    power: int = 2,
) -> None:
    op = "fisher_accumulate_"
    checks.require_finite(op, "weight", weight)
    require_non_negative(op, decay=decay)
    checks.require_power(op, power)
    require_lists(
        op,
        TensorList("fisher", fisher, "accumulators", written=True),
        TensorList("grads", grads, "parameters"),
    )
    with as_given(fisher):
        reference.fisher_accumulate_(fisher, grads, weight=weight, decay=decay, power=power)


def selective_dampen_(
    params: Sequence[Tensor],
    importance_full: Sequence[Tensor],
    importance_forget: Sequence[Tensor],
    *,
    alpha: float,
    lambda_: float,
    exponent: float = 1.0,
    beta_min: float = 0.0,
    beta_max: float = 1.0,
) -> None:
    op = "selective_dampen_"
    require_non_negative(op, alpha=alpha, lambda_=lambda_)
    require(
        checks.is_float(exponent) and exponent > 0,
        f"{op}: exponent must be finite and positive, got {checks.number(exponent)}",
    )
    require_non_negative(op, beta_min=beta_min)
    require(
        beta_max >= beta_min,
        f"{op}: beta_max must be at least beta_min = {checks.number(beta_min)}, got "
        f"{checks.number(beta_max)}",
    )
    require_lists(
        op,
        TensorList("params", params, "parameters", written=True),
        TensorList("importance_full", importance_full, "accumulators"),
        TensorList("importance_forget", importance_forget, "accumulators"),
    )
    away = needs_cpu(params)
    with as_given(params):
        lists = copies(params, importance_full, importance_forget) if away else None
        reference.selective_dampen_(
            *(lists or (params, importance_full, importance_forget)),
            alpha=alpha,
            lambda_=lambda_,
            exponent=exponent,
            beta_min=beta_min,
            beta_max=beta_max,
        )
        for param, copy in zip(params, lists[0] if lists else (), strict=False):
            param.copy_(copy)


def _require_importances(op: str, full: Sequence[Tensor], forget: Sequence[Tensor]) -> None:
    require_lists(
        op,
        TensorList("importance_full", full, "importances"),
        TensorList("importance_forget", forget, "importances"),
    )


def selected_counts(
    importance_full: Sequence[Tensor], importance_forget: Sequence[Tensor], alphas: Sequence[float]
) -> Tensor:
    op = "selected_counts"
    for alpha in alphas:
        require_non_negative(op, alphas=alpha)
    _require_importances(op, importance_full, importance_forget)
    for one in importance_full:
        device = importance_full[0].device
        require(
            one.device == device,
            f"{op}: importance_full must be on one device, got {device} and {one.device}",
        )
    with as_given():
        if needs_cpu(importance_full):
            full, forget = copies(importance_full, importance_forget)
            return _counts(full, forget, alphas).to(importance_full[0].device)
        return _counts(importance_full, importance_forget, alphas)


def _counts(full: Sequence[Tensor], forget: Sequence[Tensor], alphas: Sequence[float]) -> Tensor:
    device = full[0].device if full else torch.device("cpu")
    counts = torch.zeros((len(alphas), len(full)), dtype=torch.int64, device=device)
    for t, (below, above) in enumerate(zip(full, forget, strict=True)):
        if below.dtype == torch.float64:
            counts[:, t] = reference.selected_counts([below], [above], alphas)[:, 0]
            continue
        # As the reference, which converts for every threshold.
        finite = below.isfinite() & above.isfinite()
        wide_below, wide_above = below[finite].double(), above[finite].double()
        for a, alpha in enumerate(alphas):
            rounded = float(torch.tensor(alpha, dtype=torch.float32, device="cpu"))
            counts[a, t] = (wide_above > rounded * wide_below).sum()
    return counts


def ratio_quantile(
    importance_full: Sequence[Tensor], importance_forget: Sequence[Tensor], q: float
) -> Tensor:
    op = "ratio_quantile"
    require(0 <= q <= 1, f"{op}: q must be in [0, 1], got {checks.number(q)}")
    _require_importances(op, importance_full, importance_forget)
    require(
        len({(full.device, full.dtype) for full in importance_full}) <= 1,
        f"{op}: importance_full must be on one device and of one dtype, got a mixed list",
    )
    with as_given():
        if needs_cpu(importance_full):
            full, forget = copies(importance_full, importance_forget)
            return _quantile(full, forget, q).to(importance_full[0].device)
        return _quantile(importance_full, importance_forget, q)


def _quantile(full: Sequence[Tensor], forget: Sequence[Tensor], q: float) -> Tensor:
    ratios = [(above / below).flatten() for above, below in zip(forget, full, strict=True)]
    finite = torch.cat([ratio[ratio.isfinite()] for ratio in ratios]) if ratios else torch.empty(0)
    if finite.numel() == 0:
        return reference.ratio_quantile(full, forget, q)  # which says so
    # As the reference, which sorts.
    position = q * (finite.numel() - 1)
    lower = math.floor(position)
    upper = min(lower + 1, finite.numel() - 1)
    low, high = (finite.kthvalue(k + 1).values.double() for k in (lower, upper))
    return torch.lerp(low, high, position - lower).to(finite.dtype)
