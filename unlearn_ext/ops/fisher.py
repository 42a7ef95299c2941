"""Accumulation of powers of gradients: whole gradients, and per sample from what a layer saw."""

from collections.abc import Sequence

from torch import Tensor

from unlearn_ext.ops import sharded
from unlearn_ext.ops.arguments import flat_padding, per_dimension
from unlearn_ext.ops.library import OPS


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
    DTensors that are sharded alike are worked on shard by shard.

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
    if sharded.has_dtensors(fisher, grads):
        fisher, grads = sharded.local_lists("fisher_accumulate_", fisher, grads)
    OPS.fisher_accumulate_.default(fisher, grads, weight=weight, decay=decay, power=power)


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
    sharded.refuse_dtensors("fisher_linear_", fisher, inputs, grad_outputs)
    OPS.fisher_linear_.default(fisher, inputs, grad_outputs, weight=weight, power=power)


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
    sharded.refuse_dtensors("fisher_conv_", fisher, inputs, grad_outputs)
    n_dims = inputs.dim() - 2
    OPS.fisher_conv_.default(
        fisher,
        inputs,
        grad_outputs,
        stride=per_dimension(stride, n_dims),
        padding=flat_padding(padding, n_dims),
        dilation=per_dimension(dilation, n_dims),
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
    sharded.refuse_dtensors("fisher_bias_", fisher, grad_outputs)
    OPS.fisher_bias_.default(fisher, grad_outputs, channel_dim=channel_dim, weight=weight, power=power)


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
    sharded.refuse_dtensors("fisher_affine_", fisher, normalized, grad_outputs)
    OPS.fisher_affine_.default(
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
    sharded.refuse_dtensors("fisher_embedding_", fisher, indices, grad_outputs)
    OPS.fisher_embedding_.default(
        fisher, indices, grad_outputs, padding_idx=padding_idx, weight=weight, power=power
    )
