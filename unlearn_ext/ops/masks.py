"""Masks of one bit per scalar: packing, the exact top k, masked gradients."""

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from unlearn_ext.ops import sharded
from unlearn_ext.ops.library import OPS


@overload
def pack_mask(mask: Tensor) -> Tensor: ...
@overload
def pack_mask(mask: Sequence[Tensor]) -> list[Tensor]: ...
def pack_mask(mask: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    """Pack one or many boolean masks into bits: one bit per scalar, row-major, lowest bit first.

    ``packed[i // 8] = sum_i mask.flatten()[i] << (i % 8)``; unused bits of the last byte are 0. A list of
    any shapes and devices is packed together, device by device.

    Args:
        mask: Bool tensor of any shape, or a sequence of them; True may change.

    Returns:
        uint8 tensor ``[ceil(mask.numel() / 8)]``, as ``numpy.packbits(mask, axis=None, bitorder="little")``;
        of a sequence, a list of them.

    Raises:
        TypeError: If a mask is not bool.

    Source:
        The bit order of ``numpy.packbits(bitorder="little")``.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> ops.pack_mask(torch.tensor([True, False, True, True]))
        tensor([13], dtype=torch.uint8)
    """
    if not isinstance(mask, Tensor):
        if sharded.has_dtensors(mask):
            (mask,) = sharded.local_lists("pack_mask", mask)
        several: list[Tensor] = OPS.pack_mask.list(mask)
        return several
    if sharded.has_dtensors([mask]):
        ((mask,),) = sharded.local_lists("pack_mask", [mask])
    packed: Tensor = OPS.pack_mask.default(mask)
    return packed


@overload
def unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor: ...
@overload
def unpack_mask(packed: Sequence[Tensor], shape: Sequence[Sequence[int]]) -> list[Tensor]: ...
def unpack_mask(
    packed: Tensor | Sequence[Tensor], shape: Sequence[int] | Sequence[Sequence[int]]
) -> Tensor | list[Tensor]:
    """Unpack the bits of one or many masks: the inverse of ``pack_mask``.

    ``mask.flatten()[i] = (packed[i // 8] >> (i % 8)) & 1``; unused bits of the last byte are ignored.

    Args:
        packed: uint8 tensor ``[ceil(n / 8)]`` with n the product of ``shape``, or a sequence of them.
        shape: Shape of the mask, or one per mask.

    Returns:
        Bool tensor of that shape, or a list of them.

    Raises:
        ValueError: If counts differ, or a number of bytes does not fit its shape.
        TypeError: If packed bits are not uint8.

    Source:
        The bit order of ``numpy.unpackbits(bitorder="little")``.

    Example:
        >>> import torch
        >>> from unlearn_ext import ops
        >>> ops.unpack_mask(torch.tensor([13], dtype=torch.uint8), (2, 2))
        tensor([[ True, False],
                [ True,  True]])
    """
    if not isinstance(packed, Tensor):
        sharded.refuse_dtensors("unpack_mask", *packed)
        several: list[Tensor] = OPS.unpack_mask.list(packed, shape)
        return several
    sharded.refuse_dtensors("unpack_mask", packed)
    mask: Tensor = OPS.unpack_mask.default(packed, shape)
    return mask


def topk_mask(scores: Sequence[Tensor], k: int, *, largest: bool = True) -> list[Tensor]:
    """Mark the k largest (or smallest) scores of all tensors together.

    Exactly k bits are set. Equal scores, -0 and +0 among them, are taken by lowest flat index, counted
    through the list from the first tensor to the last. The scores are neither sorted nor concatenated.

    Of DTensors, all ranks of their mesh call it together: the selection is that of the gathered scores, ties
    included, and every rank gets the masks of its own shards.

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
    if sharded.has_dtensors(scores):
        return sharded.topk_mask(scores, k, largest=largest, pack=pack_mask)
    masks: list[Tensor] = OPS.topk_mask.default(scores, k, largest=largest)
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
    if sharded.has_dtensors(grads):
        (grads,) = sharded.local_lists("apply_mask_", grads)
    sharded.refuse_dtensors("apply_mask_", *masks)
    OPS.apply_mask_.default(grads, masks)
