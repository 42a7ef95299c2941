"""Random calls of every op: ``python tests/faults/op_fuzz.py --calls 1000000``.

Each call goes through ``torch.ops``, through the direct door and to the kernels in plain PyTorch, on copies
of the same arguments: any shapes, dtypes, layouts, aliases and numbers, most of them fit, some do not. All
three give the same answer and leave the same in what they write, or refuse in the same words and write
nothing.
"""

import argparse
import collections
import copy
import math
import random
import warnings

import torch

from unlearn_ext import _C, ops
from unlearn_ext.ops.fallback import KERNELS

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool, torch.complex64)
ODD = (math.nan, math.inf, -math.inf, 0.0, -0.0, 1e-45, 1e-300, 1e300, -1.0, 2.0**62)
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

    def tensor(self, shape, dtype, **settings):
        return self.laid_out(self.numbers(shape, dtype, **settings))

    def mask(self, n):
        return ops.pack_mask(
            torch.rand(n, generator=self.generator) < self.random.choice([0.0, 0.1, 0.5, 1.0])
        )

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
    n = draw.random.choice([0, 1, 7, 8, 9, 64, 65, 200])
    return [draw.laid_out(torch.rand(n, generator=draw.generator) < 0.5)], {}


def _unpack(draw):
    shape = draw.shape()
    return [draw.mask(math.prod(shape)), shape], {}


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
    "pack_mask": _pack,
    "unpack_mask": _unpack,
    "gram_accumulate_": _gram,
    "gram_conv_accumulate_": _gram_conv,
    "project_out": _project,
    "project_out_": _project,
    "project_onto": _project,
    "project_onto_": _project,
    "fisher_linear_": _linear,
    "fisher_bias_": _bias,
    "fisher_affine_": _affine,
    "fisher_embedding_": _embedding,
    "fisher_conv_": _conv,
}
# These decide and copy bits; the others add up, in an order of their own.
EXACT = {"selected_counts", "topk_mask", "apply_mask_", "pack_mask", "unpack_mask"}


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
    elif isinstance(found[at], int):
        found[at] = draw.random.choice(ODD_INTS)
    elif isinstance(found[at], float):
        found[at] = draw.random.choice(ODD)
    return found


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


def run(call, arguments, settings):
    """Call on a copy; what comes back, what was left in the arguments, and the words of a refusal."""
    # The huge ones share one element: copied as they are.
    given = copy.deepcopy(arguments)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            back = call(*given, **settings)
    except (ValueError, TypeError, RuntimeError, IndexError, NotImplementedError) as error:
        return given, None, error
    return given, back, None


def _bits(tensor):
    flat = tensor.clone(memory_format=torch.contiguous_format).flatten()
    return flat.view(torch.uint8) if flat.numel() else flat


UNITS = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def same(a, b, unit):
    """Whether two tensors are alike: bit by bit where unit is 0, else as sums in another order are."""
    if a.shape != b.shape or a.dtype != b.dtype or a.device != b.device:
        return False
    if a.device.type == "meta" or a.numel() == 0 or a.numel() > 2**30:
        return True
    if not unit or not a.is_floating_point():
        return torch.equal(_bits(a), _bits(b))
    x, y = a.double(), b.double()
    odd = ~(torch.isfinite(x) & torch.isfinite(y))
    if odd.any():  # an overflow on the way may come earlier or later
        if not bool((~torch.isfinite(x[odd]) | ~torch.isfinite(y[odd])).all()):
            return False
        x, y = x[~odd], y[~odd]
    size = float(x.abs().max()) if x.numel() else 0.0
    return bool(((x - y).abs() <= unit * (size + x.abs()) + 1e-44).all())


def words_of(error):
    """What a refusal says; which of two that share memory is named first depends on where they lie."""
    text = str(error).split("\n")[0]
    for what in ("must not share memory with another argument", "can't allocate memory"):
        if what in text:
            return what
    return text


def judge(name, arguments, settings):
    """Run a call through all doors.

    Returns:
        What happened: ``"answered"``, ``"refused"``, or what is wrong with it.
    """
    op = getattr(torch.ops.unlearn_ext, name)
    before = copy.deepcopy(arguments)
    has_meta = any(tensor.device.type == "meta" for tensor in tensors_in(arguments))
    given, back, error = run(op, arguments, settings)
    if error is not None:
        touched = [
            not torch.equal(_bits(a), _bits(b))
            for a, b in zip(tensors_in(given), tensors_in(before), strict=True)
            if a.device.type != "meta" and a.numel() < 2**30
        ]
        if any(touched):
            return f"refused and written: {error}"
    if has_meta:
        return "refused" if error is not None else "answered"
    for door, call in (("direct door", getattr(_C, name)), ("plain PyTorch", KERNELS[name])):
        theirs, answer, refusal = run(call, arguments, settings)
        if (error is None) != (refusal is None):
            return f"{door} differs: {error!r} against {refusal!r}"
        if error is not None:
            words = {words_of(error), words_of(refusal)}
            if (
                len(words) > 1 and "can't allocate memory" not in words
            ):  # at which point memory runs out may differ
                return f"{door} says otherwise: {error!r} against {refusal!r}"
            continue
        dtypes = [tensor.dtype for tensor in tensors_in(arguments) if tensor.is_floating_point()]
        coarsest = max((UNITS.get(dtype, 0.0) for dtype in dtypes), default=0.0)
        unit = 0.0 if name in EXACT or door == "direct door" else coarsest
        mine = [*tensors_in([back]), *tensors_in(given)]
        others = [*tensors_in([answer]), *tensors_in(theirs)]
        if len(mine) != len(others) or not all(same(a, b, unit) for a, b in zip(mine, others, strict=True)):
            return f"{door} has another answer"
    return "refused" if error is not None else "answered"


def is_symmetric(gram):
    """Whether a matrix is its own transpose; of what is none, an op says what is wrong with it."""
    if not isinstance(gram, torch.Tensor) or gram.device.type == "meta" or gram.ndim != 2:
        return True
    return gram.shape[0] != gram.shape[1] or gram.numel() > 2**20 or torch.equal(_bits(gram), _bits(gram.T))


def fuzz(n_calls, seed, say=None):
    """Make random calls.

    Args:
        n_calls: How many.
        seed: Of the first; every call can be made again by its own.
        say: What to do with what is wrong.

    Returns:
        How often what happened.
    """
    happened = collections.Counter()
    for number in range(seed, seed + n_calls):
        draw = Draw(number)
        name = draw.random.choice(list(OPS))
        arguments, settings = OPS[name](draw)
        if draw.random.random() < 0.3:
            arguments = spoiled(draw, arguments)
        if name.startswith("gram") and not is_symmetric(arguments[0]):
            continue  # of what is no Gram matrix the two halves are nobody's business
        outcome = judge(name, arguments, settings)
        if outcome not in ("answered", "refused"):
            if say is not None:
                say(f"call {number}, {name}: {outcome}")
            outcome = "wrong"
        happened[outcome] += 1
    return happened


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = fuzz(options.calls, options.seed, lambda text: print(text, flush=True))
    print(dict(found))
    raise SystemExit(bool(found["wrong"]))
