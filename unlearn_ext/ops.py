"""The functional ops: typed, documented doors to ``torch.ops.unlearn_ext``.

Importing this module loads the compiled library and registers the ops with PyTorch. Every op takes tensors of
any strides, works on the CPU and on CUDA devices, and gives the same bits from run to run and for any number
of threads. An op whose name ends in ``_`` writes in place, returns nothing and ignores autograd: parameters
that require a gradient are written without ``torch.no_grad()``. ``unlearn_ext.reference`` holds the same ops
in plain PyTorch.

Tensors are checked in C++, behind both ``torch.ops.unlearn_ext`` and ``unlearn_ext._C``; the functions below
only bring their arguments into the form of the schema.
"""

import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = [
    "apply_mask_",
    "build_info",
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


def _describe_import_failure(error: ImportError) -> str:
    here = f"torch {torch.__version__} and Python {platform.python_version()}"
    try:
        built = json.loads(Path(__file__).with_name("_build_info.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        reason = f"it is not built for {here}"
    else:
        reason = (
            f"it was built for torch {built.get('torch')} and Python {built.get('python')} "
            f"(CUDA: {built.get('cuda')}), and this is {here}"
        )
    return (
        f"unlearn_ext._C cannot be imported ({error}): {reason}; "
        "rebuild it in the source folder with `pip install --no-build-isolation .`"
    )


# torch comes first: the compiled library links against libraries that only torch's own import can find.
try:
    import unlearn_ext._C as _C
except ImportError as error:
    raise ImportError(_describe_import_failure(error)) from error

_ops = torch.ops.unlearn_ext


def build_info() -> dict[str, Any]:
    """Say how the compiled library was built and what it chose on this computer.

    Returns:
        A dict with ``version``, ``torch`` and ``python`` (versions built for), ``cuda`` (bool),
        ``cuda_reason`` (why CUDA is or is not in the build), ``cuda_architectures``, ``cpu_capability``
        (chosen at run time), ``cpu_capabilities`` (compiled in), ``compiler`` and ``schemas`` (of every op).

    Example:
        >>> from unlearn_ext import ops
        >>> ops.build_info()["cpu_capability"] in ops.build_info()["cpu_capabilities"]
        True
    """
    info: dict[str, Any] = _C.build_info()
    return info


def fisher_accumulate_(
    fisher: Sequence[Tensor],
    grads: Sequence[Tensor],
    *,
    weight: float = 1.0,
    decay: float = 1.0,
    power: int = 2,
) -> None:
    """Add a power of gradients to running importances, one pass over all tensors.

    ``fisher <- decay * fisher + weight * |grads|^power``

    Gradients are squared after conversion to the accumulator's dtype, so float16 gradients do not underflow.

    Args:
        fisher: Accumulators, written in place; float32, or float64 for float64 gradients.
        grads: Gradients, one per accumulator and of its shape; float32, float16, bfloat16 or float64.
        weight: Factor of the new term, finite; for example the share of a batch in the data set.
        decay: Factor of the old value, finite and >= 0; 1 gives a sum, ``1 - weight`` a running mean.
        power: 2 for squares (Fisher diagonal), 1 for absolute values (loss-free importances).

    Raises:
        ValueError: If counts, shapes or devices differ, a constant is out of range, or written memory
            overlaps.
        TypeError: If a dtype is not supported.

    Source:
        Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017 (power 2);
        Foster, Schoepf & Brintrup, "Loss-Free Machine Unlearning", ICLR Tiny Papers 2024 (power 1).

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> fisher = [torch.tensor([1.0, 2.0])]
        >>> ops.fisher_accumulate_(fisher, [torch.tensor([3.0, -4.0])], weight=0.5)
        >>> fisher
        [tensor([ 5.5000, 10.0000])]
    """
    _ops.fisher_accumulate_.default(fisher, grads, weight=weight, decay=decay, power=power)


def fisher_linear_(
    fisher: Tensor, inputs: Tensor, grad_outputs: Tensor, *, weight: float = 1.0, power: int = 2
) -> None:
    """Add the per-sample Fisher diagonal of a linear layer's weight to a running total.

    ``fisher[o, i] <- fisher[o, i] + weight * sum_n |sum_t grad_outputs[n, t, o] * inputs[n, t, i]|^power``

    The inner sum is the weight gradient of sample n. It is never stored: the memory needed does not grow with
    the number of samples. Products and sums of float16 and bfloat16 tensors are those of float32.

    A weight that is used several times in a pass has the sum of its uses as gradient: join them along a
    position axis.

    Args:
        fisher: Total ``[O, I]``, written in place; float32, or float64 for float64 inputs.
        inputs: Inputs of the layer ``[N, *, I]``, one sample per entry of the first axis and any number of
            positions, also none; float32, float16, bfloat16 or float64.
        grad_outputs: Gradients of every sample's own loss by the layer's outputs ``[N, *, O]``; dtype of
            ``inputs``.
        weight: Factor of the new term, finite; for example 1 / number of samples in the data set.
        power: 2 for squares (Fisher diagonal), 1 for absolute values.

    Raises:
        ValueError: If shapes or devices do not fit, a constant is out of range, or written memory overlaps.
        TypeError: If a dtype is not supported.

    Source:
        Goodfellow, "Efficient Per-Example Gradient Computations", 2015, for layers without positions; Dangel,
        Kunstner & Hennig, "BackPACK: Packing more into Backprop", ICLR 2020 (second moments of gradients).

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> fisher = torch.zeros(1, 2)
        >>> inputs = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]])
        >>> ops.fisher_linear_(fisher, inputs, torch.tensor([[[1.0], [-1.0]]]), weight=0.5)
        >>> fisher
        tensor([[2., 2.]])
    """
    _ops.fisher_linear_.default(fisher, inputs, grad_outputs, weight=weight, power=power)


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
    """Add the per-sample Fisher diagonal of a convolution's kernel to a running total.

    ``fisher <- fisher + weight * sum_n |gradient of sample n|^power``. Neither the gradients of the samples
    nor the patches of the batch are ever stored as a whole.

    The kernel ``[I, O / groups, *kernel]`` of a transposed convolution is covered with the roles swapped:
    ``inputs`` are then the gradients by the layer's outputs and ``grad_outputs`` its inputs, with the layer's
    own stride, dilation and groups; its padding on each side is ``(padding, padding - output_padding)``.

    Args:
        fisher: Total of the kernel's shape ``[O, C / groups, *kernel]``, written in place; float32, or
            float64 for float64 inputs.
        inputs: Inputs of the layer ``[N, C, *spatial]`` with 1 to 3 spatial dimensions; float32, float16,
            bfloat16 or float64.
        grad_outputs: Gradients of every sample's own loss by the layer's outputs ``[N, O, *out]``; dtype of
            ``inputs``. The size must be the one that the constants give.
        stride: Step of the kernel, one int for all dimensions or one per dimension.
        padding: Zeros around the input: one int, or per dimension an int or a (before, after) pair. All pairs
            may also be given flat, as ``before0, after0, before1, ...``.
        dilation: Spacing of the kernel's elements, one int or one per dimension.
        groups: Number of groups the channels are split into.
        weight: Factor of the new term, finite; for example 1 / number of samples in the data set.
        power: 2 for squares (Fisher diagonal), 1 for absolute values.

    Raises:
        ValueError: If shapes or devices do not fit, a constant is out of range, or written memory overlaps.
        TypeError: If a dtype is not supported.

    Source:
        Rochette, Manoel & Tramel, "Efficient Per-Example Gradient Computations in Convolutional Neural
        Networks", 2019; Dangel, Kunstner & Hennig, "BackPACK: Packing more into Backprop", ICLR 2020.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> fisher, signal = torch.zeros(1, 1, 2), torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> grads = torch.tensor([[[1.0, 1.0, 1.0]]])
        >>> ops.fisher_conv_(fisher, signal, grads, stride=1, padding=[(1, 0)], dilation=1)
        >>> fisher
        tensor([[[ 9., 36.]]])
    """
    n_dims = inputs.dim() - 2
    _ops.fisher_conv_.default(
        fisher,
        inputs,
        grad_outputs,
        stride=_per_dimension(stride, n_dims),
        padding=_flat_padding(padding, n_dims),
        dilation=_per_dimension(dilation, n_dims),
        groups=groups,
        weight=weight,
        power=power,
    )


def fisher_bias_(
    fisher: Tensor, grad_outputs: Tensor, *, channel_dim: int = -1, weight: float = 1.0, power: int = 2
) -> None:
    """Add the per-sample Fisher diagonal of a bias to a running total.

    ``fisher[o] <- fisher[o] + weight * sum_n |sum_t grad_outputs[n, t, o]|^power``, with t over all axes but
    those of samples and channels. Sums are those of float32, of float64 for float64 gradients.

    Args:
        fisher: Total ``[O]``, written in place; float32, or float64 for float64 gradients.
        grad_outputs: Gradients of every sample's own loss by the layer's outputs, at least two axes, the
            first of them samples; float32, float16, bfloat16 or float64.
        channel_dim: Axis of the channels: -1 for linear and norm layers, 1 for convolutions; not the first.
        weight: Factor of the new term, finite; for example 1 / number of samples in the data set.
        power: 2 for squares (Fisher diagonal), 1 for absolute values.

    Raises:
        ValueError: If shapes or devices do not fit, a constant is out of range, or written memory overlaps.
        TypeError: If a dtype is not supported.

    Source:
        As ``fisher_linear_``, for inputs that are 1.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> fisher = torch.zeros(2)
        >>> ops.fisher_bias_(fisher, torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]))
        >>> fisher
        tensor([16., 36.])
    """
    _ops.fisher_bias_.default(fisher, grad_outputs, channel_dim=channel_dim, weight=weight, power=power)


def fisher_affine_(
    fisher: Tensor,
    normalized: Tensor,
    grad_outputs: Tensor,
    *,
    channel_dim: int = -1,
    weight: float = 1.0,
    power: int = 2,
) -> None:
    """Add the per-sample Fisher diagonal of a norm layer's scale to a running total.

    ``fisher[c] <- fisher[c] + weight * sum_n |sum_t grad_outputs[n, t, c] * normalized[n, t, c]|^power``,
    with t over all axes but those of samples and channels.

    Args:
        fisher: Total ``[C]``, written in place; float32, or float64 for float64 inputs.
        normalized: What the layer multiplies by its scale, at least two axes, the first of them samples;
            float32, float16, bfloat16 or float64.
        grad_outputs: Gradients of every sample's own loss by the layer's outputs; shape and dtype of
            ``normalized``.
        channel_dim: Axis of the channels: -1 for layer norms, 1 for batch and group norms; not the first.
        weight: Factor of the new term, finite; for example 1 / number of samples in the data set.
        power: 2 for squares (Fisher diagonal), 1 for absolute values.

    Raises:
        ValueError: If shapes or devices do not fit, a constant is out of range, or written memory overlaps.
        TypeError: If a dtype is not supported.

    Source:
        As ``fisher_linear_``, for a diagonal weight.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> fisher, normalized = torch.zeros(2), torch.tensor([[[1.0, -1.0], [-1.0, 1.0]]])
        >>> ops.fisher_affine_(fisher, normalized, torch.tensor([[[1.0, 2.0], [3.0, 5.0]]]))
        >>> fisher
        tensor([4., 9.])
    """
    _ops.fisher_affine_.default(
        fisher, normalized, grad_outputs, channel_dim=channel_dim, weight=weight, power=power
    )


def fisher_embedding_(
    fisher: Tensor,
    indices: Tensor,
    grad_outputs: Tensor,
    *,
    padding_idx: int = -1,
    weight: float = 1.0,
    power: int = 2,
) -> None:
    """Add the per-sample Fisher diagonal of an embedding table to a running total.

    ``fisher[v] <- fisher[v] + weight * sum_n |sum_t grad_outputs[n, t]|^power``, with t over the positions of
    sample n that looked up row v. Only rows that were looked up are touched.

    Args:
        fisher: Total ``[V, D]``, written in place; float32, or float64 for float64 gradients.
        indices: Rows looked up ``[N, *]``, in ``[0, V)``; int64 or int32. On a CUDA device an index out of
            range is skipped.
        grad_outputs: Gradients of every sample's own loss by the rows ``[N, *, D]``; float32, float16,
            bfloat16 or float64.
        padding_idx: Row that gets no gradient; -1 for none.
        weight: Factor of the new term, finite; for example 1 / number of samples in the data set.
        power: 2 for squares (Fisher diagonal), 1 for absolute values.

    Raises:
        ValueError: If shapes or devices do not fit, a constant or an index on the CPU is out of range, or
            written memory overlaps.
        TypeError: If a dtype is not supported.

    Source:
        As ``fisher_linear_``, for inputs that are rows of the identity.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> fisher, grads = torch.zeros(3, 1), torch.tensor([[[1.0], [5.0], [2.0]]])
        >>> ops.fisher_embedding_(fisher, torch.tensor([[0, 2, 0]]), grads)
        >>> fisher
        tensor([[ 9.],
                [ 0.],
                [25.]])
    """
    _ops.fisher_embedding_.default(
        fisher, indices, grad_outputs, padding_idx=padding_idx, weight=weight, power=power
    )


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
    _ops.selective_dampen_.default(
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
    counts: Tensor = _ops.selected_counts.default(importance_full, importance_forget, alphas)
    return counts


def ratio_quantile(
    importance_full: Sequence[Tensor], importance_forget: Sequence[Tensor], q: float
) -> Tensor:
    """Compute an exact quantile of ``forget / full`` over all tensors together, without a sort.

    With the finite ratios in ascending order ``r[0..n-1]`` and ``h = q * (n - 1)``:
    ``r[floor(h)] + (h - floor(h)) * (r[floor(h) + 1] - r[floor(h)])``. Ratios that are NaN or Inf (0/0, x/0)
    are left out.

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
    quantile: Tensor = _ops.ratio_quantile.default(importance_full, importance_forget, q)
    return quantile


def pack_mask(mask: Tensor) -> Tensor:
    """Pack a boolean mask into bits: one bit per scalar, row-major, lowest bit first.

    ``packed[i // 8] = sum_i mask.flatten()[i] << (i % 8)``; unused bits of the last byte are 0.

    Args:
        mask: Bool tensor of any shape; True may change.

    Returns:
        uint8 tensor ``[ceil(mask.numel() / 8)]``, as ``numpy.packbits(mask, axis=None, bitorder="little")``.

    Raises:
        TypeError: If ``mask`` is not bool.

    Source:
        The bit order of ``numpy.packbits(bitorder="little")``.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> ops.pack_mask(torch.tensor([True, False, True, True]))
        tensor([13], dtype=torch.uint8)
    """
    packed: Tensor = _ops.pack_mask.default(mask)
    return packed


def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    """Unpack the bits of a mask: the inverse of ``pack_mask``.

    ``mask.flatten()[i] = (packed[i // 8] >> (i % 8)) & 1``; unused bits of the last byte are ignored.

    Args:
        packed: uint8 tensor ``[ceil(n / 8)]`` with n the product of ``shape``.
        shape: Shape of the mask.

    Returns:
        Bool tensor of that shape.

    Raises:
        ValueError: If the number of bytes does not fit the shape.
        TypeError: If ``packed`` is not uint8.

    Source:
        The bit order of ``numpy.unpackbits(bitorder="little")``.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> ops.unpack_mask(torch.tensor([13], dtype=torch.uint8), (2, 2))
        tensor([[ True, False],
                [ True,  True]])
    """
    mask: Tensor = _ops.unpack_mask.default(packed, shape)
    return mask


def topk_mask(scores: Sequence[Tensor], k: int, *, largest: bool = True) -> list[Tensor]:
    """Mark the k largest (or smallest) scores of all tensors together.

    Exactly k bits are set. Equal scores, -0 and +0 among them, are taken by lowest flat index, counted
    through the list from the first tensor to the last. The scores are neither sorted nor concatenated.

    Args:
        scores: Scores, all of one dtype (float32, float16, bfloat16 or float64) and on one device. On the CPU
            a NaN is an error; on a CUDA device it ranks last, as finding it would need a synchronisation.
        k: Number of scalars to mark, from 0 to their total number.
        largest: Mark the largest if True, the smallest if False.

    Returns:
        One packed mask per tensor, uint8 ``[ceil(numel / 8)]`` (see ``pack_mask``).

    Raises:
        ValueError: If ``k`` is out of range, devices differ, or a score on the CPU is NaN.
        TypeError: If a dtype is not supported or differs.

    Source:
        Selection by digits of the floating-point bits: Alabi, Blanchard, Gordon & Steinbach, "Fast
        k-selection algorithms for graphics processing units", ACM JEA 2012. Used as in Fan et al., "SalUn",
        ICLR 2024.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> first, second = ops.topk_mask([torch.tensor([1.0, 5.0]), torch.tensor([5.0, 3.0])], 2)
        >>> ops.unpack_mask(first, (2,)), ops.unpack_mask(second, (2,))
        (tensor([False,  True]), tensor([ True, False]))
    """
    masks: list[Tensor] = _ops.topk_mask.default(scores, k, largest=largest)
    return masks


def apply_mask_(grads: Sequence[Tensor], masks: Sequence[Tensor]) -> None:
    """Set the masked-out entries of gradients to zero.

    ``grads <- grads where mask, else +0``. A selection, not a product: NaN and Inf outside the mask become 0
    too.

    Args:
        grads: Gradients, written in place; float32, float16, bfloat16 or float64.
        masks: Packed masks, uint8 ``[ceil(numel / 8)]``, one per gradient (see ``pack_mask``).

    Raises:
        ValueError: If counts, sizes or devices differ, or written memory overlaps.
        TypeError: If a dtype is not supported.

    Source:
        Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image
        Classification and Generation", ICLR 2024, equation 5.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> grads = [torch.tensor([1.0, 2.0, float("nan")])]
        >>> ops.apply_mask_(grads, [ops.pack_mask(torch.tensor([True, False, False]))])
        >>> grads
        [tensor([1., 0., 0.])]
    """
    _ops.apply_mask_.default(grads, masks)


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
            are row-major whatever the strides of the parameter.
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
    _ops.masked_sgd_.default(
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
            are row-major whatever the strides of the parameter.
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
    op = _ops.masked_adamw_.tensor_step if isinstance(step, Tensor) else _ops.masked_adamw_.default
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


def gram_accumulate_(gram: Tensor, inputs: Tensor) -> None:
    """Add the second moment of a layer's inputs to a running total.

    ``gram <- gram + X^T X`` with ``X = inputs`` as rows ``[*, d]``

    Only one triangle is computed and then mirrored. With a float64 total the products are those of the
    inputs' dtype (float32 for float16 and bfloat16) and long streams lose nothing to rounding of the total.

    Args:
        gram: Symmetric total ``[d, d]``, written in place; float32 or float64.
        inputs: Rows ``[*, d]``; float32, float16, bfloat16 or float64.

    Raises:
        ValueError: If shapes or devices do not fit, or written memory overlaps.
        TypeError: If a dtype is not supported.

    Source:
        Saha, Garg & Roy, "Gradient Projection Memory for Continual Learning", ICLR 2021; Hoang, Rana, Gupta &
        Venkatesh, "Learn to Unlearn for Deep Neural Networks", WACV 2024 (as a sum of X^T X).

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> gram = torch.zeros(2, 2)
        >>> ops.gram_accumulate_(gram, torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
        >>> gram
        tensor([[10., 14.],
                [14., 20.]])
    """
    _ops.gram_accumulate_.default(gram, inputs)


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
    """Add the second moment of a convolution's input patches to a running total.

    ``gram <- gram + X^T X`` with one row of X per sample and output position: the patch that the kernel sees
    there, columns ordered (channel, kernel position) as in ``weight.view(out_channels, -1)``. The patches are
    never stored as a whole.

    Args:
        gram: Symmetric total ``[d, d]`` with ``d = channels / groups * prod(kernel_size)``, or ``[groups, d,
            d]`` for more than one group; written in place; float32 or float64.
        inputs: Input of the convolution ``[n, channels, *spatial]`` with 1 to 3 spatial dimensions; float32,
            float16, bfloat16 or float64.
        kernel_size: Size of the kernel, one int for all dimensions or one per dimension.
        stride: Step of the kernel, likewise.
        padding: Zeros around the input: one int, or per dimension an int or a (before, after) pair. All pairs
            may also be given flat, as ``before0, after0, before1, ...``.
        dilation: Spacing of the kernel's elements, one int or one per dimension.
        groups: Number of groups the channels are split into.

    Raises:
        ValueError: If shapes or devices do not fit, a constant is out of range, or written memory overlaps.
        TypeError: If a dtype is not supported.

    Source:
        As ``gram_accumulate_``; the rows are those of the layer's own stride, padding and dilation, where the
        published code assumes stride 1.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> gram, signal = torch.zeros(2, 2), torch.tensor([[[1.0, 2.0, 3.0]]])
        >>> ops.gram_conv_accumulate_(gram, signal, kernel_size=2, stride=1, padding=[(1, 0)], dilation=1)
        >>> gram
        tensor([[ 5.,  8.],
                [ 8., 14.]])
    """
    n_dims = inputs.dim() - 2
    _ops.gram_conv_accumulate_.default(
        gram,
        inputs,
        kernel_size=_per_dimension(kernel_size, n_dims),
        stride=_per_dimension(stride, n_dims),
        padding=_flat_padding(padding, n_dims),
        dilation=_per_dimension(dilation, n_dims),
        groups=groups,
    )


def project_out(grad: Tensor, basis: Tensor) -> Tensor:
    """Remove from each row of a gradient its part inside a subspace.

    ``G - (G U) U^T`` with ``G = grad`` viewed as ``[out, d]`` and ``U = basis``

    Differentiable in ``grad`` to any order; ``basis`` gets no gradient. The map is linear and self-adjoint,
    so its backward is itself.

    Args:
        grad: Weight gradient ``[out, ...]`` with d scalars per output; float32, float16, bfloat16 or float64.
        basis: Orthonormal columns ``[d, k]``, or ``[groups, d, k]`` for a grouped layer, whose ``grad`` is
            viewed as ``[groups, out / groups, d]``; dtype of ``grad``, or float32 beside float16 and
            bfloat16.

    Returns:
        The projection, of the shape and dtype of ``grad``.

    Raises:
        ValueError: If shapes or devices do not fit.
        TypeError: If a dtype is not supported.

    Source:
        Saha, Garg & Roy, "Gradient Projection Memory for Continual Learning", ICLR 2021, equation 6; Hoang,
        Rana, Gupta & Venkatesh, "Learn to Unlearn for Deep Neural Networks", WACV 2024.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> ops.project_out(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
        tensor([[0., 4.]])
    """
    projection: Tensor = _ops.project_out.default(grad, basis)
    return projection


def project_out_(grad: Tensor | Sequence[Tensor], basis: Tensor | Sequence[Tensor]) -> None:
    """Remove from the rows of one or many gradients their part inside a subspace, in place.

    ``G <- G - (G U) U^T`` as ``project_out``, for a tensor and its basis or for two lists of them.

    Args:
        grad: Weight gradient ``[out, ...]`` or a sequence of them, written in place; float32, float16,
            bfloat16 or float64.
        basis: Orthonormal columns ``[d, k]`` or ``[groups, d, k]``, or one such tensor per gradient.

    Raises:
        ValueError: If counts, shapes or devices do not fit, or written memory overlaps.
        TypeError: If a dtype is not supported.

    Source:
        As ``project_out``.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> grad = torch.tensor([[3.0, 4.0]])
        >>> ops.project_out_(grad, torch.tensor([[1.0], [0.0]]))
        >>> grad
        tensor([[0., 4.]])
    """
    op = _ops.project_out_.default if isinstance(grad, Tensor) else _ops.project_out_.list
    op(grad, basis)


def project_onto(grad: Tensor, basis: Tensor) -> Tensor:
    """Keep of each row of a gradient only its part inside a subspace.

    ``(G V) V^T`` with ``G = grad`` viewed as ``[out, d]`` and ``V = basis``. The cheaper form of
    ``project_out`` when the space to leave has more than d/2 dimensions: project onto its complement.

    Differentiable in ``grad`` to any order; ``basis`` gets no gradient.

    Args:
        grad: Weight gradient ``[out, ...]`` with d scalars per output; float32, float16, bfloat16 or float64.
        basis: Orthonormal columns ``[d, k]``, or ``[groups, d, k]`` for a grouped layer, whose ``grad`` is
            viewed as ``[groups, out / groups, d]``; dtype of ``grad``, or float32 beside float16 and
            bfloat16.

    Returns:
        The projection, of the shape and dtype of ``grad``.

    Raises:
        ValueError: If shapes or devices do not fit.
        TypeError: If a dtype is not supported.

    Source:
        As ``project_out``.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> ops.project_onto(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0], [0.0]]))
        tensor([[3., 0.]])
    """
    projection: Tensor = _ops.project_onto.default(grad, basis)
    return projection


def project_onto_(grad: Tensor | Sequence[Tensor], basis: Tensor | Sequence[Tensor]) -> None:
    """Keep of the rows of one or many gradients only their part inside a subspace, in place.

    ``G <- (G V) V^T`` as ``project_onto``, for a tensor and its basis or for two lists of them.

    Args:
        grad: Weight gradient ``[out, ...]`` or a sequence of them, written in place; float32, float16,
            bfloat16 or float64.
        basis: Orthonormal columns ``[d, k]`` or ``[groups, d, k]``, or one such tensor per gradient.

    Raises:
        ValueError: If counts, shapes or devices do not fit, or written memory overlaps.
        TypeError: If a dtype is not supported.

    Source:
        As ``project_out``.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> grad = torch.tensor([[3.0, 4.0]])
        >>> ops.project_onto_([grad], [torch.tensor([[1.0], [0.0]])])
        >>> grad
        tensor([[3., 0.]])
    """
    op = _ops.project_onto_.default if isinstance(grad, Tensor) else _ops.project_onto_.list
    op(grad, basis)


def _per_dimension(value: int | Sequence[int], n_dims: int) -> Sequence[int]:
    return [value] * n_dims if isinstance(value, int) else value


def _flat_padding(padding: int | Sequence[int | tuple[int, int]], n_dims: int) -> list[int]:
    entries = [padding] * n_dims if isinstance(padding, int) else padding
    if all(isinstance(entry, int) for entry in entries):
        return [entry for entry in entries if isinstance(entry, int)]
    pairs = [(entry, entry) if isinstance(entry, int) else entry for entry in entries]
    return [amount for pair in pairs for amount in pair]


# Fakes: shape, dtype and device of what an op returns, for torch.compile and FakeTensorMode. Ops that only
# write in place need none.


def _fake_selected_counts(
    importance_full: Sequence[Tensor], importance_forget: Sequence[Tensor], alphas: Sequence[float]
) -> Tensor:
    device = importance_full[0].device if importance_full else torch.device("cpu")
    return torch.empty((len(alphas), len(importance_full)), dtype=torch.int64, device=device)


def _fake_ratio_quantile(
    importance_full: Sequence[Tensor], importance_forget: Sequence[Tensor], q: float
) -> Tensor:
    return importance_full[0].new_empty(())


def _fake_pack_mask(mask: Tensor) -> Tensor:
    return mask.new_empty(((mask.numel() + 7) // 8,), dtype=torch.uint8)


def _fake_unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    return packed.new_empty(shape, dtype=torch.bool)


def _fake_topk_mask(scores: Sequence[Tensor], k: int, *, largest: bool = True) -> list[Tensor]:
    return [_fake_pack_mask(score) for score in scores]


def _fake_projection(grad: Tensor, basis: Tensor) -> Tensor:
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


torch.library.register_fake("unlearn_ext::selected_counts", _fake_selected_counts)
torch.library.register_fake("unlearn_ext::ratio_quantile", _fake_ratio_quantile)
torch.library.register_fake("unlearn_ext::pack_mask", _fake_pack_mask)
torch.library.register_fake("unlearn_ext::unpack_mask", _fake_unpack_mask)
torch.library.register_fake("unlearn_ext::topk_mask", _fake_topk_mask)
torch.library.register_fake("unlearn_ext::project_out", _fake_projection)
torch.library.register_fake("unlearn_ext::project_onto", _fake_projection)


# A projection G -> G P with symmetric P is its own adjoint, so the backward pass is the op itself, and
# calling the public op there makes higher derivatives work too.


class _BasisContext(Protocol):
    saved_tensors: tuple[Tensor, ...]

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def _save_basis(ctx: _BasisContext, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _project_out_backward(ctx: _BasisContext, grad_output: Tensor) -> tuple[Tensor, None]:
    return project_out(grad_output, ctx.saved_tensors[0]), None


def _project_onto_backward(ctx: _BasisContext, grad_output: Tensor) -> tuple[Tensor, None]:
    return project_onto(grad_output, ctx.saved_tensors[0]), None


torch.library.register_autograd("unlearn_ext::project_out", _project_out_backward, setup_context=_save_basis)
torch.library.register_autograd(
    "unlearn_ext::project_onto", _project_onto_backward, setup_context=_save_basis
)
