"""What the ops make of lazily negated tensors: views whose memory holds the opposite sign.

torch's own fallback hands an op resolved copies, and takes what the op returns for the tensor that was
written. Ops that write in place and return nothing leave it nothing to take: it reads memory that has been
freed. So those with a single tensor to write have kernels of their own here. (Lists of written tensors torch
refuses.)
"""

from typing import Any

import torch
from torch import Tensor

from unlearn_ext.ops.library import OPS

_WRITING = (
    "fisher_linear_",
    "fisher_conv_",
    "fisher_bias_",
    "fisher_affine_",
    "fisher_embedding_",
    "gram_accumulate_",
    "gram_conv_accumulate_",
    "project_out_",
    "project_onto_",
)

# Registrations end with it.
_LIBRARY = torch.library.Library("unlearn_ext", "IMPL", "Negative")  # type: ignore[no-untyped-call]


def _resolving(name: str) -> Any:  # noqa: ANN401 - a kernel of any signature
    op = getattr(OPS, name).default

    def kernel(written: Tensor, *tensors: Tensor, **settings: object) -> None:
        copy = written.resolve_neg()
        op(copy, *(tensor.resolve_neg() for tensor in tensors), **settings)
        if written.is_neg():
            written.detach().copy_(copy)

    return kernel


for _name in _WRITING:
    _LIBRARY.impl(_name, _resolving(_name))  # type: ignore[no-untyped-call]
