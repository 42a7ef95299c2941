"""Random arguments of every op, for ``op_fuzz.py``: any shapes, dtypes, layouts, aliases and numbers."""

import math
import random

import torch

from unlearn_ext import ops

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
ODD = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-300, 1e300, -1.0, 2.0**62)
AROUND_BYTES = (0, 1, 7, 8, 9, 63, 64, 65, 200, 4097)
ODD_INTS = (-1, 0, 1, 2, 3, 7, 2**31, 2**62, -(2**40))


class Draw:
    """Random arguments, by one seed."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)

    def shape(self, most=4, longest=6):
        return [
            self.random.randint(0 if self.random.random() < 0.1 else 1, longest)
            for _ in range(self.random.randint(0, most))
        ]

    def dtype(self):
        return torch.float32 if self.random.random() < 0.6 else self.random.choice(FLOATS)

    def numbers(self, shape, dtype, *, unsigned=False):
        found = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        if self.random.random() < 0.3:
            found *= 10.0 ** self.random.uniform(-8, 8)
        if found.numel() and self.random.random() < 0.15:
            flat = found.flatten()
            flat[self.random.randrange(flat.numel())] = self.random.choice(ODD)
            found = flat.view(shape)
        found = found.abs() if unsigned else found
        return found.to(dtype)

    def laid_out(self, tensor):
        """The same values in another layout."""
        kind = self.random.choice(["plain"] * 4 + ["transposed", "strided", "offset"])
        if tensor.ndim == 0 or tensor.numel() == 0 or kind == "plain":
            return tensor
        if kind == "transposed":
            return tensor.transpose(0, -1).contiguous().transpose(0, -1)
        if kind == "strided":
            wide = torch.zeros([*tensor.shape[:-1], 2 * tensor.shape[-1]], dtype=tensor.dtype)
            wide[..., ::2] = tensor
            return wide[..., ::2]
        long = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
        long[1:] = tensor.flatten()
        return long[1:].view(tensor.shape)

    def some(self, items, most):
        """As many as `most` of the items, some of them more than once."""
        return [self.random.choice(items) for _ in range(self.random.randint(0, most))]

    def tensor(self, shape, dtype, **settings):
        return self.laid_out(self.numbers(shape, dtype, **settings))

    def mask(self, n):
        return ops.pack_mask(
            torch.rand(n, generator=self.generator) < self.random.choice([0.0, 0.1, 0.5, 1.0])
        )

    def partly_meta(self, tensors):
        """The list, rarely with one or all of its tensors without memory."""
        chance = self.random.random()
        if tensors and chance < 0.04:
            at = self.random.randrange(len(tensors))
            return [*tensors[:at], tensors[at].to("meta"), *tensors[at + 1 :]]
        return [tensor.to("meta") for tensor in tensors] if chance < 0.07 else tensors

    def scalar(self, usual):
        return usual if self.random.random() < 0.9 else self.random.choice(ODD)

    def lists(self, *unsigned, dtypes=None):
        """Lists of tensors, of the same shapes."""
        shapes = [self.shape() for _ in range(self.random.randint(0, 4))]
        kinds = dtypes or [self.dtype()] * len(unsigned)
        return [
            [self.tensor(shape, dtype, unsigned=is_unsigned) for shape in shapes]
            for is_unsigned, dtype in zip(unsigned, kinds, strict=True)
        ]


def _accumulate(draw):
    dtype = draw.dtype()
    total = torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype
    fisher, grads = draw.lists(True, False, dtypes=[total, dtype])
    settings = {
        "weight": draw.scalar(0.5),
        "decay": draw.scalar(0.9),
        "power": draw.random.choice([1, 2, 2, 3]),
    }
    return [fisher, grads], settings


def _dampen(draw):
    found = draw.lists(False, True, True)
    settings = {"alpha": draw.scalar(draw.random.uniform(0, 3)), "lambda_": draw.scalar(0.5)}
    if draw.random.random() < 0.3:
        settings |= {"exponent": draw.scalar(0.7), "beta_min": draw.scalar(0.1), "beta_max": draw.scalar(0.8)}
    return found, settings


def _counts(draw):
    alphas = [draw.scalar(draw.random.uniform(0, 3)) for _ in range(draw.random.randint(0, 5))]
    return [*draw.lists(True, True), alphas], {}


def _quantile(draw):
    return [*draw.lists(True, True), draw.scalar(draw.random.random())], {}


def _topk(draw):
    (scores,) = draw.lists(False)
    total = sum(tensor.numel() for tensor in scores)
    k = draw.random.randint(0, total) if draw.random.random() < 0.9 else draw.random.choice(ODD_INTS)
    return [scores, k], {"largest": draw.random.random() < 0.7}


def _apply(draw):
    (grads,) = draw.lists(False)
    return [grads, [draw.mask(grad.numel()) for grad in grads]], {}


def _sgd(draw):
    params, grads = draw.lists(False, False)
    wide = [torch.float64 if p.dtype == torch.float64 else torch.float32 for p in params]
    momentum = draw.random.choice([0.0, 0.9])
    buffers = [draw.tensor(p.shape, dtype) for p, dtype in zip(params, wide, strict=True)] if momentum else []
    masks = [draw.mask(p.numel()) for p in params] if draw.random.random() < 0.8 else []
    settings = {"lr": draw.scalar(0.1), "momentum": momentum, "weight_decay": draw.scalar(0.01)}
    settings |= {"nesterov": draw.random.random() < 0.3, "maximize": draw.random.random() < 0.3}
    return [params, grads, buffers, masks], settings


def _adamw(draw):
    params, grads = draw.lists(False, False)
    wide = [torch.float64 if p.dtype == torch.float64 else torch.float32 for p in params]
    first = [draw.tensor(p.shape, dtype) for p, dtype in zip(params, wide, strict=True)]
    second = [draw.tensor(p.shape, dtype, unsigned=True) for p, dtype in zip(params, wide, strict=True)]
    masks = [draw.mask(p.numel()) for p in params] if draw.random.random() < 0.8 else []
    step = (
        draw.random.choice([1, 2, 10, 10_000]) if draw.random.random() < 0.9 else draw.random.choice(ODD_INTS)
    )
    return [params, grads, first, second, masks], {"step": step, "lr": draw.scalar(0.1)}


def _pack(draw):
    n = draw.random.choice(AROUND_BYTES)
    return [draw.laid_out(torch.rand(n, generator=draw.generator) < 0.5)], {}


def _unpack(draw):
    shape = draw.shape()
    return [draw.mask(math.prod(shape)), shape], {}


def _adamw_tensor_step(draw):
    arguments, settings = _adamw(draw)
    dtype = draw.random.choice([torch.float32, torch.float64])
    return arguments, settings | {"step": torch.tensor(float(settings["step"]), dtype=dtype)}


def _flags(draw):
    """A mask before it is packed, in any layout."""
    shape = draw.shape() if draw.random.random() < 0.8 else [draw.random.choice(AROUND_BYTES)]
    flags = torch.rand(shape, generator=draw.generator) < draw.random.choice([0.0, 0.1, 0.5, 1.0])
    kind = draw.random.choice(["any", "any", "any", "channels_last", "expanded", "bytes"])
    if kind == "channels_last" and flags.ndim == 4:
        return flags.contiguous(memory_format=torch.channels_last)
    if kind == "expanded" and flags.numel():
        return flags.unsqueeze(0).expand(draw.random.randint(1, 9), *flags.shape)
    if kind == "bytes":  # what is true may be any byte but 0
        return flags.to(torch.uint8).mul_(draw.random.choice([1, 2, 128, 255])).view(torch.bool)
    return draw.laid_out(flags)


def _pack_list(draw):
    masks = [_flags(draw) for _ in range(draw.random.randint(0, 6))]
    if masks and draw.random.random() < 0.3:  # read alone: they may share memory
        masks = draw.some([*masks, masks[0].flatten(), masks[0][..., None], masks[0][None]], 8)
    return [draw.partly_meta(masks)], {}


def _unpack_list(draw):
    shapes = [draw.shape() for _ in range(draw.random.randint(0, 6))]
    pairs = [(draw.laid_out(draw.mask(math.prod(shape))), shape) for shape in shapes]
    if pairs and draw.random.random() < 0.3:
        packed, shape = pairs[0]
        pairs = draw.some([*pairs, (packed, [math.prod(shape)]), (packed, [*shape, 1])], 8)
    packed = draw.partly_meta([bits for bits, _ in pairs])
    return [packed, [list(shape) for _, shape in pairs]], {}


def _symmetric(draw, n, dtype):
    found = draw.numbers([n, n], dtype)
    return draw.laid_out(found + found.T)


def _gram(draw):
    dtype, n = draw.dtype(), draw.random.randint(1, 9)
    total = draw.random.choice([torch.float32, torch.float64])
    return [_symmetric(draw, n, total), draw.tensor([draw.random.randint(0, 7), n], dtype)], {}


def _project(draw):
    dtype = draw.random.choice([torch.float32, torch.float32, torch.float64])
    n, rank = draw.random.randint(1, 8), draw.random.randint(0, 5)
    return [draw.tensor([draw.random.randint(0, 6), n], dtype), draw.tensor([n, rank], dtype)], {}


def _project_list(draw):
    pairs = [_project(draw)[0] for _ in range(draw.random.randint(0, 4))]
    return [[grad for grad, _ in pairs], [basis for _, basis in pairs]], {}


def _linear(draw):
    dtype, total = draw.dtype(), draw.random.choice([torch.float32, torch.float32, torch.float64])
    samples, positions = draw.random.randint(0, 4), draw.random.randint(1, 4)
    inputs, outputs = draw.random.randint(1, 9), draw.random.randint(1, 9)
    middle = [] if draw.random.random() < 0.3 else [positions]
    shapes = [outputs, inputs], [samples, *middle, inputs], [samples, *middle, outputs]
    found = [
        draw.tensor(shapes[0], total, unsigned=True),
        *(draw.tensor(shape, dtype) for shape in shapes[1:]),
    ]
    return found, {"weight": draw.scalar(0.5), "power": draw.random.choice([1, 2, 2, 3])}


def _bias(draw):
    channels, dtype = draw.random.randint(1, 6), draw.dtype()
    shape = [draw.random.randint(0, 4), draw.random.randint(1, 5), channels]
    return [draw.tensor([channels], torch.float32, unsigned=True), draw.tensor(shape, dtype)], {
        "channel_dim": -1
    }


def _affine(draw):
    channels, dtype = draw.random.randint(1, 6), draw.dtype()
    shape = [draw.random.randint(0, 4), draw.random.randint(1, 5), channels]
    fisher = draw.tensor([channels], torch.float32, unsigned=True)
    return [fisher, draw.tensor(shape, dtype), draw.tensor(shape, dtype)], {"channel_dim": -1}


def _embedding(draw):
    rows, width, dtype = draw.random.randint(1, 6), draw.random.randint(1, 5), draw.dtype()
    shape = [draw.random.randint(0, 4), draw.random.randint(1, 5)]
    indices = torch.randint(rows, shape, generator=draw.generator)
    if indices.numel() and draw.random.random() < 0.05:
        indices.flatten()[0] = draw.random.choice([-1, rows, 2**40])
    fisher = draw.tensor([rows, width], torch.float32, unsigned=True)
    settings = {"padding_idx": draw.random.choice([-1, 0]), "power": draw.random.choice([1, 2])}
    return [fisher, indices, draw.tensor([*shape, width], dtype)], settings


def _geometry(draw):
    kernel = [draw.random.randint(1, 3) for _ in range(2)]
    stride, dilation = ([draw.random.randint(1, 2) for _ in range(2)] for _ in range(2))
    padding = [draw.random.randint(0, 2) for _ in range(2)]
    image = [draw.random.randint(1, 7) for _ in range(2)]
    if draw.random.random() < 0.05:
        draw.random.choice([stride, dilation, padding])[0] = draw.random.choice(ODD_INTS)
    return kernel, {"stride": stride, "padding": padding, "dilation": dilation}, image


def _conv(draw):
    kernel, settings, image = _geometry(draw)
    groups, dtype = draw.random.choice([1, 1, 2]), draw.dtype()
    channels, outputs, samples = (
        groups * draw.random.randint(1, 3),
        groups * draw.random.randint(1, 3),
        draw.random.randint(0, 3),
    )
    sizes = zip(image, kernel, settings["stride"], settings["padding"], settings["dilation"], strict=True)
    places = [max(0, (size + 2 * p - d * (k - 1) - 1) // max(1, s) + 1) for size, k, s, p, d in sizes]
    places = [place if place < 50 else 1 for place in places]
    fisher = draw.tensor([outputs, channels // groups, *kernel], torch.float32, unsigned=True)
    return [
        fisher,
        draw.tensor([samples, channels, *image], dtype),
        draw.tensor([samples, outputs, *places], dtype),
    ], {**settings, "groups": groups, "power": draw.random.choice([1, 2])}


def _gram_conv(draw):
    kernel, settings, image = _geometry(draw)
    groups, channels = 1, draw.random.randint(1, 3)
    size = channels * math.prod(kernel)
    inputs = draw.tensor([draw.random.randint(0, 3), channels, *image], draw.dtype())
    return [_symmetric(draw, size, torch.float64), inputs], {
        "kernel_size": kernel,
        **settings,
        "groups": groups,
    }


OPS = {
    "fisher_accumulate_": _accumulate,
    "selective_dampen_": _dampen,
    "selected_counts": _counts,
    "ratio_quantile": _quantile,
    "topk_mask": _topk,
    "apply_mask_": _apply,
    "masked_sgd_": _sgd,
    "masked_adamw_": _adamw,
    "masked_adamw_.tensor_step": _adamw_tensor_step,
    "pack_mask": _pack,
    "pack_mask.list": _pack_list,
    "unpack_mask": _unpack,
    "unpack_mask.list": _unpack_list,
    "gram_accumulate_": _gram,
    "gram_conv_accumulate_": _gram_conv,
    "project_out": _project,
    "project_out_": _project,
    "project_out_.list": _project_list,
    "project_onto": _project,
    "project_onto_": _project,
    "project_onto_.list": _project_list,
    "fisher_linear_": _linear,
    "fisher_bias_": _bias,
    "fisher_affine_": _affine,
    "fisher_embedding_": _embedding,
    "fisher_conv_": _conv,
}
# These decide and copy bits; the others add up, in an order of their own.
EXACT = {
    "selected_counts",
    "topk_mask",
    "apply_mask_",
    "pack_mask",
    "pack_mask.list",
    "unpack_mask",
    "unpack_mask.list",
}


def spoiled(draw, arguments):
    """Make one argument unfit: another dtype or shape, an alias, memory that overlaps, a short list."""
    at = draw.random.randrange(len(arguments))
    found = list(arguments)
    lists = [
        number for number, value in enumerate(found) if list(tensors_in([value])) and isinstance(value, list)
    ]
    if isinstance(found[at], list) and found[at] and isinstance(found[at][0], torch.Tensor):
        where = draw.random.randrange(len(found[at]))
        found[at] = list(found[at])
        if draw.random.random() < 0.2:
            del found[at][where]
        elif draw.random.random() < 0.3 and len(lists) > 1:
            found[at][where] = draw.random.choice(found[draw.random.choice(lists)])
        else:
            found[at][where] = _spoiled_tensor(draw, found[at][where])
    elif isinstance(found[at], torch.Tensor):
        others = [value for value in found if isinstance(value, torch.Tensor)]
        found[at] = (
            draw.random.choice(others) if draw.random.random() < 0.2 else _spoiled_tensor(draw, found[at])
        )
    elif isinstance(found[at], list):
        found[at] = _spoiled_numbers(draw, found[at])
    elif isinstance(found[at], int):
        found[at] = draw.random.choice(ODD_INTS)
    elif isinstance(found[at], float):
        found[at] = draw.random.choice(ODD)
    return found


def _spoiled_numbers(draw, numbers):
    """A shape, a list of shapes or of thresholds with one of its entries another, more or left out."""
    if not numbers:  # of no one knows what
        return numbers
    at = draw.random.randrange(len(numbers))
    if isinstance(numbers[at], list):
        another = _spoiled_numbers(draw, numbers[at])
    else:
        another = draw.random.choice(ODD if isinstance(numbers[at], float) else ODD_INTS)
    kept = draw.random.choice([[], [another], [another], [another, numbers[at]]])
    return [*numbers[:at], *kept, *numbers[at + 1 :]]


def _spoiled_tensor(draw, tensor):
    if not isinstance(tensor, torch.Tensor):
        return tensor
    kind = draw.random.choice(["dtype", "shape", "overlap", "meta", "rank", "huge", "window"])
    if kind == "dtype":
        return tensor.to(draw.random.choice(DTYPES))
    if kind == "shape":
        return draw.numbers(draw.shape(), torch.float32).to(tensor.dtype)
    if kind == "overlap" and tensor.ndim:
        return tensor[:1].expand_as(tensor) if tensor.shape[0] else tensor
    if kind == "meta":
        return tensor.to("meta")
    if kind == "rank":
        return tensor.unsqueeze(0)
    if kind == "huge":  # much memory in name only
        return torch.zeros(1, dtype=tensor.dtype).expand(2**40)
    if kind == "window" and tensor.numel() > 2:
        return tensor.flatten().unfold(0, 2, 1)
    return tensor


def tensors_in(values):
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
