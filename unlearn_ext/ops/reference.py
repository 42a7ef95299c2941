"""The ops in plain PyTorch: the readable specification, and the oracle of the tests.

Every function has the signature of its namesake in ``unlearn_ext.ops`` and does the same thing, slowly and
with temporaries. Arithmetic is done in the widest dtype among the tensors of an op and at least in float32,
so that written tensors cast to float64 give results that are exact for the purposes of a test, while
decisions (which scalar is selected) stay those of the dtype that the importances or scores came in.

Arguments are assumed valid; only conditions that depend on values raise an error. ``unlearn_ext.ops``
documents arguments, results and sources.
"""

# ruff: noqa: DOC201 (what is returned stands in unlearn_ext.ops)

import functools
import itertools
import math
from collections.abc import Sequence
from typing import cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "apply_mask_",
    "fisher_accumulate_",
    "fisher_affine_",
    "fisher_bias_",
    "fisher_conv_",
    "fisher_embedding_",
    "fisher_linear_",
    "gram_accumulate_",
    "gram_conv_accumulate_",
    "masked_adamw_",
    "masked_sgd_",
    "pack_mask",
    "project_onto",
    "project_onto_",
    "project_out",
    "project_out_",
    "ratio_quantile",
    "selected_counts",
    "selective_dampen_",
    "topk_mask",
    "unpack_mask",
]


@torch.no_grad()
def fisher_accumulate_(
    fisher: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    weight: float = 1.0,
    decay: float = 1.0,
    power: int = 2,
) -> None:
    """Compute ``fisher <- decay * fisher + weight * |grads|^power``."""
    for total, grad in zip(fisher, grads, strict=True):
        total.copy_(decay * total + weight * grad.to(total.dtype).abs() ** power)


@torch.no_grad()
def fisher_linear_(
    fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, *, weight: float = 1.0, power: int = 2
) -> None:
    """Add the powers of ``g_n^T a_n``, the weight gradient of sample n."""
    dtype = _compute_dtype(fisher, inputs)
    rows, grads = _channels_last(inputs.to(dtype), -1), _channels_last(grad_outputs.to(dtype), -1)
    _add_powers(fisher, torch.einsum("nto,nti->noi", grads, rows), weight, power)


@torch.no_grad()
def fisher_conv_(
    fisher: Tensor,
    inputs: Tensor,
    grad_outputs: Tensor,
    *,
    stride: int | Sequence[int],
    padding: int | Sequence[int | tuple[int, int]],
    dilation: int | Sequence[int],
    groups: int = 1,
    weight: float = 1.0,
    power: int = 2,
) -> None:
    """Add the powers of ``g_n^T x_n``, per group of channels, with the patches of sample n as rows of x_n."""
    dtype, n = _compute_dtype(fisher, inputs), inputs.shape[0]
    patches = _patches(inputs.to(dtype), fisher.shape[2:], stride, padding, dilation, groups)
    grads = _channels_last(grad_outputs.to(dtype), 1)
    grads = grads.reshape(n, grads.shape[1], groups, fisher.shape[0] // groups)
    gradients = torch.einsum("ntgo,ntgi->ngoi", grads, patches)
    _add_powers(fisher, gradients.reshape(n, *fisher.shape), weight, power)


@torch.no_grad()
def fisher_bias_(
    fisher: Tensor, grad_outputs: Tensor, *, channel_dim: int = -1, weight: float = 1.0, power: int = 2
) -> None:
    """Add the powers of every sample's sum over positions."""
    grads = _channels_last(grad_outputs.to(_compute_dtype(fisher, grad_outputs)), channel_dim)
    _add_powers(fisher, grads.sum(1), weight, power)


@torch.no_grad()
def fisher_affine_(
    fisher: Tensor,
    normalized: Tensor,
    grad_outputs: Tensor,
    *,
    channel_dim: int = -1,
    weight: float = 1.0,
    power: int = 2,
) -> None:
    """Add the powers of every sample's sum of products over positions."""
    dtype = _compute_dtype(fisher, normalized)
    products = grad_outputs.to(dtype) * normalized.to(dtype)
    _add_powers(fisher, _channels_last(products, channel_dim).sum(1), weight, power)


@torch.no_grad()
def fisher_embedding_(
    fisher: Tensor,
    indices: Tensor,
    grad_outputs: Tensor,
    *,
    padding_idx: int = -1,
    weight: float = 1.0,
    power: int = 2,
) -> None:
    """Add the powers of every sample's sums of equal rows.

    Raises:
        ValueError: If an index on the CPU is out of range.
    """
    n, n_rows = indices.shape[0], fisher.shape[0]
    within = (indices >= 0) & (indices < n_rows)
    if indices.device.type == "cpu" and not within.all():
        first = int(indices[~within][0])
        raise ValueError(f"fisher_embedding_: indices must lie in [0, {n_rows}), got {first}")
    # One table per sample.
    samples = torch.arange(n, device=indices.device).view(n, *[1] * (indices.dim() - 1))
    looked_up = within & (indices != padding_idx)
    grads = grad_outputs.to(_compute_dtype(fisher, grad_outputs))
    gradients = grads.new_zeros(n, *fisher.shape)
    gradients.index_put_(
        (samples.expand_as(indices)[looked_up], indices[looked_up].long()), grads[looked_up], accumulate=True
    )
    _add_powers(fisher, gradients, weight, power)


@torch.no_grad()
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
    """Multiply selected scalars by ``clamp((lambda_ * full / forget)^exponent, beta_min, beta_max)``."""
    for param, full, forget in zip(params, importance_full, importance_forget, strict=True):
        dtype = _compute_dtype(param, full)
        ratio = _rounded(lambda_, full.dtype) * full.to(dtype) / forget.to(dtype)
        factor = (ratio ** _rounded(exponent, full.dtype)).clamp(
            _rounded(beta_min, full.dtype), _rounded(beta_max, full.dtype)
        )
        dampened = (param.to(dtype) * factor).to(param.dtype)
        param.copy_(torch.where(_selected(full, forget, alpha), dampened, param))


def selected_counts(
    importance_full: Sequence[Tensor], importance_forget: Sequence[Tensor], alphas: Sequence[float]
) -> Tensor:
    """Count the selected scalars per threshold and tensor."""
    device = importance_full[0].device if importance_full else torch.device("cpu")
    counts = torch.zeros((len(alphas), len(importance_full)), dtype=torch.int64, device=device)
    for a, alpha in enumerate(alphas):
        for t, (full, forget) in enumerate(zip(importance_full, importance_forget, strict=True)):
            counts[a, t] = _selected(full, forget, alpha).sum()
    return counts


def ratio_quantile(
    importance_full: Sequence[Tensor], importance_forget: Sequence[Tensor], q: float
) -> Tensor:
    """Interpolate the quantile of the finite ratios, sorted.

    Raises:
        ValueError: If no ratio is finite.
    """
    ratios = [
        (forget / full).flatten() for full, forget in zip(importance_full, importance_forget, strict=True)
    ]
    finite = torch.cat([ratio[ratio.isfinite()] for ratio in ratios]) if ratios else torch.empty(0)
    if finite.numel() == 0:
        raise ValueError(
            "ratio_quantile: importance_full and importance_forget must have a finite ratio somewhere, "
            "got none"
        )
    ordered = finite.double().sort().values
    position = q * (ordered.numel() - 1)
    lower = math.floor(position)
    upper = min(lower + 1, ordered.numel() - 1)
    return torch.lerp(ordered[lower], ordered[upper], position - lower).to(finite.dtype)


@overload
def pack_mask(mask: Tensor) -> Tensor: ...
@overload
def pack_mask(mask: Sequence[Tensor]) -> list[Tensor]: ...
def pack_mask(mask: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Sum the bits of each byte, lowest first."""
    if not isinstance(mask, Tensor):
        return [pack_mask(one) for one in mask]
    bits = F.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=mask.device)).sum(1, dtype=torch.uint8)


@overload
def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor: ...
@overload
def unpack_mask(packed: Sequence[Tensor], shape: Sequence[Sequence[int]]) -> list[Tensor]: ...
def unpack_mask(
    packed: Tensor | Sequence[Tensor], shape: Sequence[int] | Sequence[Sequence[int]]
) -> Tensor | list[Tensor]:
    """Read the bits of each byte, lowest first."""
    if not isinstance(packed, Tensor):
        shapes = cast("Sequence[Sequence[int]]", shape)
        return [unpack_mask(one, extents) for one, extents in zip(packed, shapes, strict=True)]
    extents = cast("Sequence[int]", shape)
    bits = (packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    return bits.flatten()[: math.prod(extents)].bool().view(tuple(extents))


def topk_mask(scores: Sequence[Tensor], k: int, *, largest: bool = True) -> list[Tensor]:
    """Mark the first k of all scores after a stable sort.

    Raises:
        ValueError: If a score on the CPU is NaN.
    """
    if not scores:
        return []
    # + 0.0 turns -0 into +0, so that a sort by bits ranks the two equal as well.
    joined = torch.cat([score.flatten() for score in scores]).double() + 0.0
    is_nan = joined.isnan()
    if joined.device.type == "cpu" and is_nan.any():
        raise ValueError("topk_mask: scores must not be NaN, got NaN")
    ranked = torch.where(is_nan, -math.inf if largest else math.inf, joined)
    order = ranked.argsort(stable=True, descending=largest)
    order = order[is_nan[order].to(torch.uint8).argsort(stable=True)]
    chosen = torch.zeros_like(is_nan)
    chosen[order[:k]] = True
    return [pack_mask(part) for part in torch.split(chosen, [score.numel() for score in scores])]


@torch.no_grad()
def apply_mask_(grads: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Write +0 where the mask is 0."""
    for grad, mask in zip(grads, masks, strict=True):
        grad.masked_fill_(~unpack_mask(mask, grad.shape), 0.0)


@torch.no_grad()
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
    """Take the step of ``torch.optim.SGD`` where the mask is 1; momentum 0 leaves the buffers alone."""
    for t, (param, grad, mask) in enumerate(zip(params, grads, masks, strict=True)):
        free = unpack_mask(mask, param.shape)
        dtype = _compute_dtype(param)
        value = param.to(dtype)
        update = -grad.to(dtype) if maximize else grad.to(dtype)
        if weight_decay != 0:
            update = update + weight_decay * value
        if momentum != 0:
            buffer = momentum_buffers[t]
            average = momentum * buffer.to(dtype) + (1 - dampening) * update
            update = update + momentum * average if nesterov else average
            _write_where(free, buffer, average)
        _write_where(free, param, value - lr * update)


@torch.no_grad()
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
    """Take the step of ``torch.optim.AdamW`` where the mask is 1."""
    correction1, correction2 = 1 - beta1 ** float(step), 1 - beta2 ** float(step)
    for param, grad, exp_avg, exp_avg_sq, mask in zip(
        params, grads, exp_avgs, exp_avg_sqs, masks, strict=True
    ):
        free = unpack_mask(mask, param.shape)
        dtype = _compute_dtype(param)
        update = -grad.to(dtype) if maximize else grad.to(dtype)
        mean = exp_avg.to(dtype).lerp(update, 1 - beta1)
        square = beta2 * exp_avg_sq.to(dtype) + (1 - beta2) * update**2
        decayed = param.to(dtype) * (1 - lr * weight_decay)
        denominator = square.sqrt() / math.sqrt(correction2) + eps
        _write_where(free, exp_avg, mean)
        _write_where(free, exp_avg_sq, square)
        _write_where(free, param, decayed - lr / correction1 * mean / denominator)


@torch.no_grad()
def gram_accumulate_(gram: Tensor, inputs: Tensor) -> None:
    """Add ``X^T X`` of the rows of the inputs."""
    _add_gram(gram, inputs.reshape(math.prod(inputs.shape[:-1]), inputs.shape[-1]))


@torch.no_grad()
def gram_conv_accumulate_(
    gram: Tensor,
    inputs: Tensor,
    *,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int | tuple[int, int]],
    dilation: int | Sequence[int],
    groups: int = 1,
) -> None:
    """Add ``X^T X`` of the patches, per group of channels."""
    patches = _patches(inputs, kernel_size, stride, padding, dilation, groups)
    for group in range(groups):
        _add_gram(gram[group] if groups > 1 else gram, patches[:, :, group].flatten(0, 1))


def project_out(grad: Tensor, basis: Tensor) -> Tensor:
    """Compute ``G - (G U) U^T``."""
    dtype = _compute_dtype(grad, basis)
    return (grad.to(dtype) - project_onto(grad.to(dtype), basis)).to(grad.dtype)


@torch.no_grad()
def project_out_(grad: Tensor | Sequence[Tensor], basis: Tensor | Sequence[Tensor]) -> None:
    """Write ``project_out`` of every gradient into it."""
    for one, columns in _pairs(grad, basis):
        one.copy_(project_out(one, columns))


def project_onto(grad: Tensor, basis: Tensor) -> Tensor:
    """Compute ``(G V) V^T``."""
    dtype = _compute_dtype(grad, basis)
    n_groups, size = (basis.shape[0] if basis.dim() == 3 else 1), basis.shape[-2]
    rows = grad.to(dtype).reshape(n_groups, grad.shape[0] // n_groups, size)
    columns = basis.to(dtype).reshape(n_groups, size, basis.shape[-1])
    return (rows @ columns @ columns.mT).reshape(grad.shape).to(grad.dtype)


@torch.no_grad()
def project_onto_(grad: Tensor | Sequence[Tensor], basis: Tensor | Sequence[Tensor]) -> None:
    """Write ``project_onto`` of every gradient into it."""
    for one, columns in _pairs(grad, basis):
        one.copy_(project_onto(one, columns))


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)


def _rounded(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=dtype))


def _selected(full: Tensor, forget: Tensor, alpha: float) -> Tensor:
    """Decide ``forget > alpha * full`` for the rounded alpha; False where an importance is not finite."""
    threshold = _rounded(alpha, full.dtype)
    if math.isinf(threshold):
        return torch.zeros_like(full, dtype=torch.bool)
    return full.isfinite() & forget.isfinite() & _exceeds_product(forget, threshold, full)


def _exceeds_product(left: Tensor, factor: float, right: Tensor) -> Tensor:
    """Decide ``left > factor * right`` exactly.

    A product of two float32 numbers is exact in float64; one of two float64 numbers is not. So the
    significands (0, or of magnitude in [1/2, 1)) are multiplied into a sum of two numbers that is exact
    (Dekker, 1971), and compared with the significand of ``left`` moved by the difference of the exponents,
    which decides alone beyond three places.
    """
    if right.dtype == torch.float32:
        return left.double() > factor * right.double()
    left_significand, left_exponent = torch.frexp(left.double())
    right_significand, right_exponent = torch.frexp(right.double())
    factor_significand, factor_exponent = math.frexp(factor)
    shift = (left_exponent - right_exponent - factor_exponent).clamp(-3, 3)
    product = factor_significand * right_significand
    residual = _product_residual(factor_significand, right_significand, product)
    # The difference is exact where it decides: numbers within a factor of two of each other subtract exactly.
    return torch.ldexp(left_significand, shift) - product > residual


def _product_residual(a: float, b: Tensor, product: Tensor) -> Tensor:
    split = 2.0**27 + 1
    a_high = split * a - (split * a - a)
    b_high = split * b - (split * b - b)
    a_low, b_low = a - a_high, b - b_high
    return ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low


def _write_where(free: Tensor, target: Tensor, value: Tensor) -> None:
    # Chosen in the storage dtype: a round trip through another one could change the bits of a NaN.
    target.copy_(torch.where(free, value.to(target.dtype), target))


def _add_gram(gram: Tensor, rows: Tensor) -> None:
    wide = rows.to(torch.promote_types(gram.dtype, rows.dtype))
    product = wide.mT @ wide
    # A product of matrices need not be symmetric to the bit, a Gram matrix is.
    gram += (product.triu() + product.triu(1).mT).to(gram.dtype)


def _channels_last(tensor: Tensor, channel_dim: int) -> Tensor:
    """View ``[n, *, channels at channel_dim, *]`` as ``[n, positions, channels]``."""
    moved = tensor.movedim(channel_dim, -1)
    return moved.reshape(moved.shape[0], math.prod(moved.shape[1:-1]), moved.shape[-1])


def _add_powers(fisher: Tensor, gradients: Tensor, weight: float, power: int) -> None:
    """Add the powers of the samples' gradients ``[n, *fisher.shape]``."""
    fisher += (weight * (gradients.abs() ** power).sum(0)).to(fisher.dtype)


def _patches(
    inputs: Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int],
    padding: int | Sequence[int | tuple[int, int]],
    dilation: int | Sequence[int],
    groups: int,
) -> Tensor:
    """Unfold ``[n, channels, *spatial]`` into ``[n, positions, groups, channels / groups * kernel]``."""
    n_dims = inputs.dim() - 2
    kernel = _per_dimension(kernel_size, n_dims)
    strides = _per_dimension(stride, n_dims)
    dilations = _per_dimension(dilation, n_dims)
    # F.pad counts from the last dimension backwards.
    patches = F.pad(inputs, list(itertools.chain(*reversed(_padding_pairs(padding, n_dims)))))
    for dim in range(n_dims):
        extent = dilations[dim] * (kernel[dim] - 1) + 1
        patches = patches.unfold(2 + dim, extent, strides[dim])[..., :: dilations[dim]]
    # Now [n, channels, *out, *kernel].
    n, channels, positions = patches.shape[0], patches.shape[1], math.prod(patches.shape[2 : 2 + n_dims])
    columns = patches.reshape(n, channels, positions, math.prod(kernel)).transpose(1, 2)
    return columns.reshape(n, positions, groups, channels // groups * math.prod(kernel))


def _per_dimension(value: int | Sequence[int], n_dims: int) -> list[int]:
    return [value] * n_dims if isinstance(value, int) else list(value)


def _padding_pairs(padding: int | Sequence[int | tuple[int, int]], n_dims: int) -> list[tuple[int, int]]:
    entries = [padding] * n_dims if isinstance(padding, int) else list(padding)
    if len(entries) == 2 * n_dims:
        numbers = [entry for entry in entries if isinstance(entry, int)]
        return list(zip(numbers[::2], numbers[1::2], strict=True))
    return [(entry, entry) if isinstance(entry, int) else entry for entry in entries]


def _pairs(grad: Tensor | Sequence[Tensor], basis: Tensor | Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
    grads = [grad] if isinstance(grad, Tensor) else grad
    bases = [basis] if isinstance(basis, Tensor) else basis
    return list(zip(grads, bases, strict=True))
