"""Selective dampening, and the two ops that choose its threshold."""

from collections.abc import Sequence

from torch import Tensor

from unlearn_ext.ops import sharded
from unlearn_ext.ops.library import OPS


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
    """Shrink the scalars that matter far more to the forget set than to the full set.

    DTensors that are sharded alike are dampened shard by shard, without communication.

    ``params <- params * clamp((lambda_ * full / forget)^exponent, beta_min, beta_max)``
    where ``forget > alpha * full``

    The comparison is exact: the product is not rounded. A scalar that is not selected keeps its bits, and so
    does one whose importance is NaN or Inf. The constants are rounded to the dtype of the importances.

    Args:
        params: Parameters, written in place; float32, float16, bfloat16 or float64.
        importance_full: Importances on the full set, one per parameter and of its shape; float32, or float64
            for float64 parameters.
        importance_forget: The same on the forget set.
        alpha: Selection threshold, finite and >= 0. Larger selects fewer scalars.
        lambda_: Dampening constant, finite and >= 0. Smaller dampens harder.
        exponent: Power of the dampening factor, > 0.
        beta_min: Least factor, >= 0.
        beta_max: Greatest factor, >= ``beta_min``; ``inf`` for no limit.

    Raises:
        ValueError: If counts, shapes or devices differ, a constant is out of range, or written memory
            overlaps.
        TypeError: If a dtype is not supported.

    Source:
        Foster, Schoepf & Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic
        Dampening", AAAI 2024, equations 7 and 8; the exponent and the bounds are those of the published code.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> params = [torch.tensor([1.0, 1.0, 1.0])]
        >>> full, forget = [torch.tensor([1.0, 1.0, 1.0])], [torch.tensor([2.0, 4.0, 8.0])]
        >>> ops.selective_dampen_(params, full, forget, alpha=2.0, lambda_=1.0)
        >>> params
        [tensor([1.0000, 0.2500, 0.1250])]
    """
    if sharded.has_dtensors(params, importance_full, importance_forget):
        params, importance_full, importance_forget = sharded.local_lists(
            "selective_dampen_", params, importance_full, importance_forget
        )
    OPS.selective_dampen_.default(
        params,
        importance_full,
        importance_forget,
        alpha=alpha,
        lambda_=lambda_,
        exponent=exponent,
        beta_min=beta_min,
        beta_max=beta_max,
    )


def selected_counts(
    importance_full: Sequence[Tensor], importance_forget: Sequence[Tensor], alphas: Sequence[float]
) -> Tensor:
    """Count the scalars that ``selective_dampen_`` would select, for many thresholds in one pass.

    ``counts[a, t] = #{i : importance_forget[t][i] > alphas[a] * importance_full[t][i]}``

    DTensors are counted over all ranks of their mesh, which call it together.

    Args:
        importance_full: Importances on the full set; float32 or float64.
        importance_forget: Importances on the forget set, of the same shapes and dtypes.
        alphas: Thresholds, finite and >= 0, in any order.

    Returns:
        int64 tensor ``[len(alphas), len(importance_full)]`` on the device of the importances (the CPU for
        empty lists).

    Raises:
        ValueError: If counts, shapes or devices differ, or a threshold is out of range.
        TypeError: If a dtype is not supported.

    Source:
        Foster, Schoepf & Brintrup, "Fast Machine Unlearning Without Retraining Through Selective Synaptic
        Dampening", AAAI 2024, equation 7.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> full, forget = [torch.tensor([1.0, 1.0, 1.0])], [torch.tensor([2.0, 4.0, 8.0])]
        >>> ops.selected_counts(full, forget, [1.0, 2.0, 10.0]).tolist()
        [[3], [2], [0]]
    """
    if sharded.has_dtensors(importance_full, importance_forget):
        return sharded.selected_counts(
            importance_full,
            importance_forget,
            lambda full, forget: OPS.selected_counts.default(full, forget, alphas),
        )
    counts: Tensor = OPS.selected_counts.default(importance_full, importance_forget, alphas)
    return counts


def ratio_quantile(
    importance_full: Sequence[Tensor], importance_forget: Sequence[Tensor], q: float
) -> Tensor:
    """Compute an exact quantile of ``forget / full`` over all tensors together, without a sort.

    With the finite ratios in ascending order ``r[0..n-1]`` and ``h = q * (n - 1)``:
    ``r[floor(h)] + (h - floor(h)) * (r[floor(h) + 1] - r[floor(h)])``. Ratios that are NaN or Inf (0/0, x/0)
    are left out. DTensors count over all ranks of their mesh, which call it together.

    Args:
        importance_full: Importances on the full set, the denominators; float32 or float64.
        importance_forget: Importances on the forget set, the numerators; of the same shapes and dtypes.
        q: Quantile in [0, 1]; 0.5 is the median.

    Returns:
        0-d tensor of the importances' dtype and device.

    Raises:
        ValueError: If counts, shapes or devices differ, ``q`` is out of range, or no finite ratio is left.
        TypeError: If a dtype is not supported.

    Source:
        Schoepf, Foster & Brintrup, "Parameter-tuning-free data entry error unlearning with adaptive selective
        synaptic dampening", 2024 (the threshold is a percentile of these ratios).

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> full, forget = [torch.tensor([1.0, 1.0, 0.0])], [torch.tensor([2.0, 4.0, 8.0])]
        >>> ops.ratio_quantile(full, forget, 0.5)
        tensor(3.)
    """
    if sharded.has_dtensors(importance_full, importance_forget):
        return sharded.ratio_quantile(importance_full, importance_forget, q)
    quantile: Tensor = OPS.ratio_quantile.default(importance_full, importance_forget, q)
    return quantile
