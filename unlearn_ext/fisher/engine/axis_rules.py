"""Which operators keep samples apart: rules that follow the axis of the samples through a forward pass.

An operator that is not known to keep samples apart, or used in a way that does not, counts as one that mixes
them. So do operands that the samples share and that say something else for every place in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from unlearn_ext.fisher.engine.axis_indexing import index, index_put
from unlearn_ext.fisher.engine.sample_axis import Found, MixedError, Operation, SampleAxis, aligned

Rule: TypeAlias = Callable[[Operation], Found]


def _pointwise(call: Operation) -> Found:
    if call.named.get("reduction", 0) != 0:
        raise MixedError(call.name)
    first = call.result[0] if isinstance(call.result, (tuple, list)) else call.result
    tensors = list(call.tensors())
    found = aligned(call, tensors[1:] if call.name == "copy" else tensors, first.ndim)
    if isinstance(call.result, (tuple, list)):
        return [found if r.shape == first.shape else None for r in call.result]
    return found


def _view(call: Operation) -> Found:
    tensor, at = call.first
    stride = at.inner * math.prod(tensor.shape[at.axis + 1 :])
    after = 1
    for axis in reversed(range(call.result.ndim)):
        size = call.result.shape[axis]
        if after <= stride < after * size:
            inner = stride // after
            if stride % after or size % (call.n * inner):
                break
            return SampleAxis(axis, inner)
        after *= size
    raise MixedError(call.name)


def _permute(call: Operation) -> Found:
    tensor, at = call.first
    return at.moved([d % tensor.ndim for d in call.named["dims"]].index(at.axis))


def _transpose(call: Operation) -> Found:
    tensor, at = call.first
    a, b = (call.named.get(key, default) % tensor.ndim for key, default in (("dim0", 0), ("dim1", -1)))
    return at.moved(b if at.axis == a else a if at.axis == b else at.axis)


def _unsqueeze(call: Operation) -> Found:
    tensor, at = call.first
    return at.moved(at.axis + (call.named["dim"] % (tensor.ndim + 1) <= at.axis))


def _squeeze(call: Operation) -> Found:
    tensor, at = call.first
    dims = call.dims(tensor.ndim)
    return at.moved(at.axis - sum(d < at.axis and tensor.shape[d] == 1 for d in dims))


def _expand(call: Operation) -> Found:
    tensor, at = call.first
    return at.moved(at.axis + call.result.ndim - tensor.ndim)


def _without_dim(call: Operation) -> Found:
    # Select, unbind, and reductions.
    tensor, at = call.only_first()
    dims = call.dims(tensor.ndim)
    if at.axis in dims:
        raise MixedError(call.name)
    keeps = call.named.get("keepdim", False)
    found = at if keeps else at.moved(at.axis - sum(d < at.axis for d in dims))
    return [found] * len(call.result) if isinstance(call.result, (tuple, list)) else found


def _part(call: Operation) -> Found:
    # Slices and splits: along the samples, only from one whole set of samples to another.
    tensor, at = call.first
    parts = call.result if isinstance(call.result, (tuple, list)) else [call.result]
    if call.dims(tensor.ndim) == [at.axis] and any(part.shape != tensor.shape for part in parts):
        step = call.n * at.inner
        start = call.named.get("start") or 0
        if call.named.get("step", 1) != 1 or any(
            s % step for s in (start, *(p.shape[at.axis] for p in parts))
        ):
            raise MixedError(call.name)
    return [at] * len(parts) if isinstance(call.result, (tuple, list)) else at


def _cat(call: Operation) -> Found:
    tensors = [tensor for tensor in call.tensors() if tensor.numel() or call.of(tensor)]
    dim, ndim = call.named.get("dim", 0), tensors[0].ndim
    is_stack = call.name == "stack"
    at = aligned(call, tensors, ndim)
    dim %= ndim + is_stack
    if not is_stack and dim == at.axis:
        step = call.n * at.inner
        if any(call.of(tensor) is None or tensor.shape[dim] % step for tensor in tensors):
            raise MixedError(call.name)
    return at.moved(at.axis + (is_stack and dim <= at.axis))


def _along(call: Operation) -> Found:
    # The same shape, and along some dimensions anything may depend on anything.
    tensors = [tensor for tensor in call.tensors() if tensor.ndim]
    ndim = tensors[0].ndim
    if call.name.startswith("index_"):
        tensors = [tensor for tensor in tensors if tensor is not call.named["index"]]
        if call.of(call.named["index"]):
            raise MixedError(call.name)
    at = aligned(call, tensors, ndim)
    if at.axis in call.dims(ndim):
        raise MixedError(call.name)
    return [at] * len(call.result) if isinstance(call.result, (tuple, list)) else at


def _index_select(call: Operation) -> Found:
    tensor, index = call.named["self"], call.named["index"]
    dim = call.named["dim"] % max(1, tensor.ndim)
    at = call.of(index)
    if at is None:
        return _along(call)
    if call.of(tensor) is not None:
        raise MixedError(call.name)
    return at.moved(dim)


def _embedding(call: Operation) -> Found:
    at = call.of(call.named["indices"])
    if at is None or call.of(call.named["weight"]) is not None or call.named.get("scale_grad_by_freq"):
        raise MixedError(call.name)
    return at


_FACTORS = {
    "addmm": ("mat1", "mat2"),
    "addmv": ("mat", "vec"),
    "baddbmm": ("batch1", "batch2"),
    "bmm": ("self", "mat2"),
    "mm": ("self", "mat2"),
    "mv": ("self", "vec"),
}


def _mm(call: Operation) -> Found:
    left, right = (call.named[key] for key in _FACTORS[call.name])
    a, b, last = call.of(left), call.of(right), left.ndim - 1
    found: SampleAxis | None = None
    if last == 2 and all(at.axis == 0 for at in (a, b) if at is not None):
        found = b if a is None else a
        shared = right if b is None else left
        if found and a != b and (None not in (a, b) or not call.is_constant(shared, found)):
            raise MixedError(call.name)
    elif a is not None and b is None and a.axis == last - 1:
        found = a
    elif b is not None and a is None and right.ndim == left.ndim and b.axis == last:
        found = b
    if found is None:
        raise MixedError(call.name)
    if call.name in ("addmm", "baddbmm", "addmv"):
        bias = call.named["self"]
        there, own = found.moved(found.axis - (call.result.ndim - bias.ndim)), call.of(bias)
        if own not in (None, there) or (
            own is None and there.axis >= 0 and not call.is_constant(bias, there)
        ):
            raise MixedError(call.name)
    return found


def _leading(call: Operation) -> Found:
    # Layers whose first axis is that of independent entries.
    tensor, at = call.only_first()
    if at.axis or (call.name in ("im2col", "col2im") and tensor.ndim == 3):
        raise MixedError(call.name)
    return (
        [
            at if i == 0 or (r is not None and r.ndim and r.shape[0] == tensor.shape[0]) else None
            for i, r in enumerate(call.result)
        ]
        if isinstance(call.result, (tuple, list))
        else at
    )


def _nll(call: Operation) -> Found:
    at, target = call.of(call.named["self"]), call.named["target"]
    if call.named["reduction"] != 0 or at is None or at.axis or call.of(target) not in (at, None):
        raise MixedError(call.name)
    if call.of(target) is None and not call.is_constant(target, at):
        raise MixedError(call.name)
    return [at, None]


def _normalized(call: Operation) -> Found:
    tensor, at = call.only_first()
    if at.axis >= tensor.ndim - len(call.named["normalized_shape"]):
        raise MixedError(call.name)
    return [at] * len(call.result) if isinstance(call.result, (tuple, list)) else at


def _batch_norm(call: Operation) -> Found:
    tensor, at = call.only_first()
    if at.axis == 1:  # statistics are those of one channel of one sample
        shared = [t for t in call.tensors() if t is not tensor and t.ndim == 1 and t.numel()]
        if not all(call.is_constant(t, at.moved(0)) for t in shared):
            raise MixedError(call.name)
    elif call.named.get("training", call.name.endswith(("no_training",)) is False):
        raise MixedError(call.name)
    return [at, *[None] * (len(call.result) - 1)]


def _spatial(call: Operation) -> Found:
    # What works on the last dimensions, as many as its name says.
    tensor, at = call.only_first()
    count = next((int(digit) for digit in "123" if f"{digit}d" in call.name), 3)
    if at.axis >= tensor.ndim - count:
        raise MixedError(call.name)
    return [at] * len(call.result) if isinstance(call.result, (tuple, list)) else at


def _matrices(call: Operation) -> Found:
    # What works on matrices in the last two dimensions.
    tensors = [tensor for tensor in call.tensors() if tensor.ndim]
    at = aligned(call, tensors, tensors[0].ndim)
    if at.axis >= tensors[0].ndim - 2:
        raise MixedError(call.name)
    results = call.result if isinstance(call.result, (tuple, list)) else [call.result]
    found = [at if r is not None and r.ndim > at.axis else None for r in results]
    return found if isinstance(call.result, (tuple, list)) else found[0]


def _attention(call: Operation) -> Found:
    tensors = [tensor for tensor in call.tensors() if tensor.ndim]
    at = aligned(call, tensors, tensors[0].ndim)
    if at.axis > 1:
        raise MixedError(call.name)
    size = tensors[0].shape[at.axis]
    return [
        at if isinstance(r, Tensor) and r.ndim > at.axis and r.shape[at.axis] == size else None
        for r in call.result
    ]


def _pad(call: Operation) -> Found:
    tensor, at = call.first
    pad = call.named["pad"]
    if tensor.ndim - len(pad) // 2 <= at.axis and any(pad[2 * (tensor.ndim - 1 - at.axis) :][:2]):
        raise MixedError(call.name)
    return at


def _repeat(call: Operation) -> Found:
    tensor, at = call.first
    return at.moved(at.axis + call.result.ndim - tensor.ndim)


def _diagonal(call: Operation) -> Found:
    tensor, at = call.first
    dims = [call.named.get(key, default) % tensor.ndim for key, default in (("dim1", 0), ("dim2", 1))]
    if at.axis in dims:
        raise MixedError(call.name)
    return at.moved(at.axis - sum(d < at.axis for d in dims))


def _restrided(call: Operation) -> Found:
    # Other strides of axes that have one entry only.
    tensor, at = call.first
    wanted = 1
    if list(call.named["size"]) != list(tensor.shape):
        raise MixedError(call.name)
    for size, stride in reversed(list(zip(tensor.shape, call.named["stride"], strict=True))):
        if size != 1 and stride != wanted:
            raise MixedError(call.name)
        wanted *= size
    return at


def _window(call: Operation) -> Found:
    tensor, at = call.first
    if call.named["dimension"] % tensor.ndim == at.axis:
        raise MixedError(call.name)
    return at


def _triangle(call: Operation) -> Found:
    tensor, at = call.first
    if at.axis >= tensor.ndim - 2:
        raise MixedError(call.name)
    return at


def _same(call: Operation) -> Found:
    return call.only_first()[1]


def _bucketize(call: Operation) -> Found:
    at = call.of(call.named["self"])
    shared = call.named.get("boundaries", call.named.get("sorted_sequence"))
    if at is None or call.of(shared) is not None or shared.ndim > 1:
        raise MixedError(call.name)
    return at


# Tagged as pointwise by PyTorch are most; these are not.
_POINTWISE = {
    *("_to_copy", "_prelu_kernel", "prelu", "where", "copy", "detach", "alias", "lift_fresh", "real", "imag"),
    *("_conj", "conj", "resolve_conj", "resolve_neg", "complex", "polar", "hardswish", "log_sigmoid_forward"),
    *("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss", "rsub"),
    *("binary_cross_entropy_with_logits", "special_i0", "isfinite", "contiguous", "clone", "fill", "zero"),
    *(
        "rrelu_with_noise",
        "lift",
        "nan_to_num",
        "_neg_view",
        "view_as",
        "expand_as",
        "masked_fill",
        "ones_like",
    ),
}
_BY_NAME: dict[str, Rule] = {
    **dict.fromkeys(_POINTWISE, _pointwise),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "_reshape_alias", "flatten", "unflatten"), _view),
    **dict.fromkeys(("transpose", "t", "swapaxes", "swapdims"), _transpose),
    **dict.fromkeys(("select", "unbind", "argmax", "argmin", "max", "min", "median", "mode"), _without_dim),
    **dict.fromkeys(("kthvalue", "nanmedian", "var_mean", "std_mean", "aminmax"), _without_dim),
    **dict.fromkeys(("slice", "split", "split_with_sizes", "narrow", "unsafe_split", "chunk"), _part),
    **dict.fromkeys(("cat", "stack", "concat"), _cat),
    **dict.fromkeys(
        ("_softmax", "_log_softmax", "_safe_softmax", "cumsum", "cumprod", "cummax", "cummin", "glu"), _along
    ),
    **dict.fromkeys(("logcumsumexp", "sort", "argsort", "topk", "gather", "scatter", "scatter_add"), _along),
    **dict.fromkeys(("scatter_reduce", "flip", "roll", "index_add", "index_copy", "index_fill"), _along),
    **dict.fromkeys(("_fft_r2c", "_fft_c2r", "_fft_c2c"), _along),
    **dict.fromkeys(("mm", "addmm", "bmm", "baddbmm", "mv", "addmv"), _mm),
    **dict.fromkeys(("convolution", "native_group_norm", "im2col", "col2im"), _leading),
    **dict.fromkeys(("nll_loss_forward", "nll_loss2d_forward"), _nll),
    **dict.fromkeys(("native_layer_norm", "_fused_rms_norm", "rms_norm"), _normalized),
    **dict.fromkeys(("native_batch_norm", "_native_batch_norm_legit_no_training"), _batch_norm),
    **dict.fromkeys(("cudnn_batch_norm", "_native_batch_norm_legit", "miopen_batch_norm"), _batch_norm),
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle", "channel_shuffle"), _spatial),
    **dict.fromkeys(("index", "_unsafe_index"), index),
    **dict.fromkeys(("index_put", "_index_put_impl", "_unsafe_index_put"), index_put),
    **dict.fromkeys(("tril", "triu"), _triangle),
    **dict.fromkeys(("view_as_real", "view_as_complex"), _same),
    **dict.fromkeys(("bucketize", "searchsorted"), _bucketize),
    "as_strided": _restrided,
    "permute": _permute,
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "expand": _expand,
    "index_select": _index_select,
    "embedding": _embedding,
    "constant_pad_nd": _pad,
    "repeat": _repeat,
    "diagonal": _diagonal,
    "unfold": _window,
    "grid_sampler_2d": _matrices,
    "grid_sampler_3d": _matrices,
}
# What comes out depends on sizes only.
FACTORIES = ("empty", "zeros", "ones", "full", "new_", "arange", "rand", "_has_", "sym_")


def rule_for(name: str, tags: Sequence[torch.Tag]) -> Rule | None:
    """Find the rule for an operator.

    Args:
        name: Its name.
        tags: What PyTorch says of it.

    Returns:
        The rule; None if nothing is known.
    """
    rule = _BY_NAME.get(name)
    if rule is not None:
        return rule
    if torch.Tag.pointwise in tags:
        return _pointwise
    if torch.Tag.reduction in tags:
        return _without_dim
    if "pool" in name or name.startswith(("upsample", "_upsample", "reflection_pad", "replication_pad")):
        return _spatial
    if name.startswith("_scaled_dot_product"):
        return _attention
    if name.startswith(("linalg_", "_linalg_")):
        return _matrices
    return None
