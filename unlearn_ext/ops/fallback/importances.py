"""Ops on importances, in plain PyTorch."""

# ruff: noqa: D103 (what the kernels do stands in the modules that call them)

from collections.abc import Sequence

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
        op, TensorList("fisher", fisher, "accumulators", written=True), TensorList("grads", grads, "parameters")
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
        f"{op}: beta_max must be at least beta_min = {checks.number(beta_min)}, got {checks.number(beta_max)}",
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
    for full in importance_full:
        device = importance_full[0].device
        require(
            full.device == device,
            f"{op}: importance_full must be on one device, got {device} and {full.device}",
        )
    with as_given():
        if needs_cpu(importance_full):
            lists = copies(importance_full, importance_forget)
            return reference.selected_counts(*lists, alphas).to(importance_full[0].device)
        return reference.selected_counts(importance_full, importance_forget, alphas)


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
            lists = copies(importance_full, importance_forget)
            return reference.ratio_quantile(*lists, q).to(importance_full[0].device)
        return reference.ratio_quantile(importance_full, importance_forget, q)
