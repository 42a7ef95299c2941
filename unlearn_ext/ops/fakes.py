"""What ``torch.compile`` and autograd know of the ops: fakes, and the projections' backward passes."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from unlearn_ext.ops.subspaces import project_onto, project_out

# Fakes: shape, dtype and device of what an op returns, for torch.compile and FakeTensorMode. Ops that only
# write in place need none.


def _require_all_with_memory_or_none(op: str, tensors: Sequence[Tensor]) -> None:
    # One meta tensor brings the whole call here, where nothing would be computed of the others.
    if len({tensor.device.type == "meta" for tensor in tensors}) > 1:
        devices = sorted({str(tensor.device) for tensor in tensors})
        raise ValueError(f"{op}: tensors must all be on the meta device or none, got {', '.join(devices)}")


def _fake_selected_counts(
    importance_full: Sequence[Tensor], importance_forget: Sequence[Tensor], alphas: Sequence[float]
) -> Tensor:
    _require_all_with_memory_or_none("selected_counts", [*importance_full, *importance_forget])
    device = importance_full[0].device if importance_full else torch.device("cpu")
    return torch.empty((len(alphas), len(importance_full)), dtype=torch.int64, device=device)


def _fake_ratio_quantile(
    importance_full: Sequence[Tensor], importance_forget: Sequence[Tensor], q: float
) -> Tensor:
    _require_all_with_memory_or_none("ratio_quantile", [*importance_full, *importance_forget])
    return importance_full[0].new_empty(())


def _fake_pack_mask(mask: Tensor) -> Tensor:
    return mask.new_empty(((mask.numel() + 7) // 8,), dtype=torch.uint8)


def _fake_unpack_mask(packed: Tensor, shape: Sequence[int]) -> Tensor:
    return packed.new_empty(shape, dtype=torch.bool)


def _fake_pack_mask_list(masks: Sequence[Tensor]) -> list[Tensor]:
    _require_all_with_memory_or_none("pack_mask", masks)
    return [_fake_pack_mask(mask) for mask in masks]


def _fake_unpack_mask_list(packed: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
    _require_all_with_memory_or_none("unpack_mask", packed)
    return [_fake_unpack_mask(bits, shape) for bits, shape in zip(packed, shapes, strict=True)]


def _fake_topk_mask(scores: Sequence[Tensor], k: int, *, largest: bool = True) -> list[Tensor]:
    _require_all_with_memory_or_none("topk_mask", scores)
    return [_fake_pack_mask(score) for score in scores]


def _fake_project_out(grad: Tensor, basis: Tensor) -> Tensor:
    _require_all_with_memory_or_none("project_out", [grad, basis])
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


def _fake_project_onto(grad: Tensor, basis: Tensor) -> Tensor:
    _require_all_with_memory_or_none("project_onto", [grad, basis])
    return torch.empty_like(grad, memory_format=torch.contiguous_format)


torch.library.register_fake("unlearn_ext::selected_counts", _fake_selected_counts)

torch.library.register_fake("unlearn_ext::ratio_quantile", _fake_ratio_quantile)

torch.library.register_fake("unlearn_ext::pack_mask", _fake_pack_mask)

torch.library.register_fake("unlearn_ext::unpack_mask", _fake_unpack_mask)

torch.library.register_fake("unlearn_ext::pack_mask.list", _fake_pack_mask_list)

torch.library.register_fake("unlearn_ext::unpack_mask.list", _fake_unpack_mask_list)

torch.library.register_fake("unlearn_ext::topk_mask", _fake_topk_mask)

torch.library.register_fake("unlearn_ext::project_out", _fake_project_out)

torch.library.register_fake("unlearn_ext::project_onto", _fake_project_onto)


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
