"""Kernels in plain PyTorch, for every device that has none of ours: ``reference`` behind the checks of C++.

They work where the compiled library is missing, and beside it on devices it has no kernels for. What they
write is what the compiled ones write, up to rounding, and they refuse the same calls in the same words. They
are slower and take temporaries (samples in parts of bounded size), and torch's matrix products need not give
the same bits for another number of threads.
"""

import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from unlearn_ext.ops.fallback import importances, layers, masked, subspaces

# Devices with strided memory that torch has kernels for, beside CPUs and CUDA.
OTHER_DEVICES = ("MPS", "XPU", "HPU", "MTIA", "MAIA", "PrivateUse1")

# By the name of the schema.
KERNELS: dict[str, Callable[..., Any]] = {
    "fisher_accumulate_": importances.fisher_accumulate_,
    "fisher_affine_": layers.fisher_affine_,
    "fisher_bias_": layers.fisher_bias_,
    "fisher_conv_": layers.fisher_conv_,
    "fisher_embedding_": layers.fisher_embedding_,
    "fisher_linear_": layers.fisher_linear_,
    "selective_dampen_": importances.selective_dampen_,
    "selected_counts": importances.selected_counts,
    "ratio_quantile": importances.ratio_quantile,
    "pack_mask": masked.pack_mask,
    "pack_mask.list": masked.pack_mask_list,
    "unpack_mask": masked.unpack_mask,
    "unpack_mask.list": masked.unpack_mask_list,
    "topk_mask": masked.topk_mask,
    "apply_mask_": masked.apply_mask_,
    "masked_sgd_": masked.masked_sgd_,
    "masked_adamw_": masked.masked_adamw_,
    "masked_adamw_.tensor_step": masked.masked_adamw_,
    "gram_accumulate_": subspaces.gram_accumulate_,
    "gram_conv_accumulate_": subspaces.gram_conv_accumulate_,
    "project_out": subspaces.project_out,
    "project_out_": subspaces.project_out_,
    "project_out_.list": subspaces.project_out_list_,
    "project_onto": subspaces.project_onto,
    "project_onto_": subspaces.project_onto_,
    "project_onto_.list": subspaces.project_onto_list_,
}

_DIFFERENTIABLE = ("project_out", "project_onto")


def _has_tensor(value: object) -> bool:
    return isinstance(value, Tensor) or (isinstance(value, (list, tuple)) and any(map(_has_tensor, value)))


def _selecting(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    # Calls whose lists are all empty reach no device: they run here, the others go on.
    stem, _, overload = name.partition(".")
    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.BackendSelect)

    def select(keys: Any, *args: Any, **settings: Any) -> Any:  # noqa: ANN401 - a kernel of any signature
        if not _has_tensor([*args, *settings.values()]):
            return kernel(*args, **settings)
        op = getattr(getattr(torch.ops.unlearn_ext, stem), overload or "default")
        return op.redispatch(keys & below, *args, **settings)

    return select


def define(schemas: Iterable[str]) -> torch.library.Library:
    """Define the ops, where no compiled library does, with kernels for every device.

    Args:
        schemas: Their schemas.

    Returns:
        The registrations, which end with it.
    """
    library = torch.library.Library("unlearn_ext", "DEF")  # type: ignore[no-untyped-call]
    for schema in schemas:
        name = schema.partition("(")[0]
        kernel = KERNELS[name]
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
        for key in ("CPU", "CUDA", *OTHER_DEVICES):
            library.impl(name, kernel, key)  # type: ignore[no-untyped-call]
        library.impl(name, _selecting(name, kernel), "BackendSelect", with_keyset=True)  # type: ignore[no-untyped-call]
        if name not in _DIFFERENTIABLE:
            # Else autograd would warn on the next backward through every parameter that an op has written.
            library.impl(name, torch.library.fallthrough_kernel, "Autograd")  # type: ignore[no-untyped-call]
    return library


def fill_in(said_of_cuda: str) -> torch.library.Library:
    """Register kernels beside the compiled ones, on the devices that have none.

    Args:
        said_of_cuda: The warning before the first op on a CUDA device, for a library that was built without.

    Returns:
        The registrations, which end with it.
    """
    library = torch.library.Library("unlearn_ext", "IMPL")  # type: ignore[no-untyped-call]
    has_kernel: Any = torch._C._dispatch_has_kernel_for_dispatch_key
    warn_once = functools.cache(lambda: warnings.warn(said_of_cuda, stacklevel=4))

    def warned(kernel: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **settings: Any) -> Any:  # noqa: ANN401 - a kernel of any signature
            warn_once()
            return kernel(*args, **settings)

        return call

    for name, kernel in KERNELS.items():
        for key in OTHER_DEVICES:
            library.impl(name, kernel, key)  # type: ignore[no-untyped-call]
        if not has_kernel(f"unlearn_ext::{name}", "CUDA"):
            library.impl(name, warned(kernel), "CUDA")  # type: ignore[no-untyped-call]
    return library
