"""What ``torch.compile`` and autograd know of the ops: fakes, and the projections' backward passes."""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from unlearn_ext.ops.subspaces import project_onto, project_out

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
