"""The functional ops: typed, documented doors to ``torch.ops.unlearn_ext``.

Importing this package loads the compiled library and registers the ops with PyTorch; where it is missing,
and on devices it has no kernels for, they have kernels in plain PyTorch (``unlearn_ext.ops.fallback``).
Every op takes tensors of any strides. The compiled kernels give the same bits from run to run and for any
number of threads. An op whose name ends in ``_`` writes in place, returns nothing and ignores autograd:
parameters that require a gradient are written without ``torch.no_grad()``. ``unlearn_ext.ops.reference``
holds the same ops in plain PyTorch.

Tensors are checked by the kernels, behind both ``torch.ops.unlearn_ext`` and ``unlearn_ext._C``; the
functions here only bring their arguments into the form of the schema.
"""

from unlearn_ext.ops import fakes as fakes
from unlearn_ext.ops import negated as negated
from unlearn_ext.ops.dampen import ratio_quantile, selected_counts, selective_dampen_
from unlearn_ext.ops.fisher import (
    fisher_accumulate_,
    fisher_affine_,
    fisher_bias_,
    fisher_conv_,
    fisher_embedding_,
    fisher_linear_,
)
from unlearn_ext.ops.library import build_info
from unlearn_ext.ops.masks import apply_mask_, pack_mask, topk_mask, unpack_mask
from unlearn_ext.ops.steps import masked_adamw_, masked_sgd_
from unlearn_ext.ops.subspaces import (
    gram_accumulate_,
    gram_conv_accumulate_,
    project_onto,
    project_onto_,
    project_out,
    project_out_,
)

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
