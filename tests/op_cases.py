"""Every op once: how to call it, what it should give, and how far rounding may take it from that.

A case names its schema, draws arguments in the form of that schema (lists of tensors, flat padding), and
derives the tolerance of each output from the number of roundings in the formula and the unit roundoffs of the
dtypes involved. The tests in test_ops.py are generated from the table ``CASES``.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from unlearn_ext.ops import reference

try:
    from unlearn_ext import _C
except ImportError:
    _C = None

# With UNLEARN_OPS=reference the tests of the ops run on the kernels in plain PyTorch, as without a compiler.
COMPILED = _C is not None
# Takes arguments in the form of the schema.
DIRECT = _C if COMPILED else torch.ops.unlearn_ext
compiled = pytest.mark.skipif(not COMPILED, reason="of the compiled library, which is not there")
any_number_of_threads = pytest.mark.skipif(
    not COMPILED, reason="plain PyTorch's products may depend on the number of threads"
)

Args = list
Kwargs = dict

FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
WIDE = (torch.float32, torch.float64)

# Sizes around the words, vectors and chunks that kernels work in.
SIZES = (1, 31, 63, 64, 65, 256, 4095, 4096, 4097)

SHAPES: dict[str, list[tuple[int, ...]]] = {
    "mixed": [(5, 7), (3,), (2, 3, 4, 5), (), (2, 3, 2, 3, 2), (70, 3)],
    "sizes": [(n,) for n in SIZES],
    "empty list": [],
    "empty first": [(0,), (6,), (3, 2)],
    "empty middle": [(6,), (2, 0, 3), (3, 2)],
    "empty last": [(6,), (3, 2), (0, 4)],
    "all empty": [(0,), (0, 4)],
    "scalars": [(), ()],
    "many": [(i % 9,) for i in range(2000)],
    "large": [(100_003,), (3, 5), (64, 17, 3, 3), (129, 257)],
}
LISTS = tuple(SHAPES)
# Where at least one value has to be left.
FILLED = tuple(name for name in LISTS if name not in ("empty list", "all empty"))


@dataclass(frozen=True)
class OpCase:
    """An op: arguments to draw, the specification, and the error that rounding may cause.

    Attributes:
        schema: Name of the schema with its overload, ``name`` or ``name.overload``.
        sample: ``(device, dtype, generator, variant) -> (args, kwargs)``, contiguous, drawn on the CPU.
        tolerance: ``(args, kwargs, expected) -> bounds``: the greatest absolute error of every output.
        written: Positions of the arguments written in place.
        widened: Positions of the arguments that the oracle casts to float64; those written if not given.
        dtypes: Dtypes of the parameters, gradients, importances or scores.
        variants: Names that ``sample`` knows.
        exact: Whether every bit of the result is specified, so that the tolerance is 0.
    """

    schema: str
    sample: Callable[[str, torch.dtype, torch.Generator, str], tuple[Args, Kwargs]]
    tolerance: Callable[[Args, Kwargs, list[Tensor]], list[Tensor]]
    written: tuple[int, ...] = ()
    widened: tuple[int, ...] | None = None
    dtypes: tuple[torch.dtype, ...] = FLOATS
    variants: tuple[str, ...] = LISTS
    exact: bool = False

    @property
    def name(self) -> str:
        """Name of the function in ``unlearn_ext.ops``, ``unlearn_ext.reference`` and ``unlearn_ext._C``."""
        return self.schema.partition(".")[0]

    @property
    def overload(self):
        """The op behind the dispatcher's door."""
        return getattr(getattr(torch.ops.unlearn_ext, self.name), self.schema.partition(".")[2] or "default")

    @property
    def direct(self) -> Callable:
        """The op behind pybind11's door."""
        return getattr(_C, self.name)

    @property
    def doors(self) -> dict[str, Callable]:
        """Both doors, or the one that is there."""
        return {"torch.ops": self.overload} | ({"_C": self.direct} if COMPILED else {})

    @property
    def reference(self) -> Callable:
        """The op in plain PyTorch."""
        return getattr(reference, self.name)

    def outputs(self, args: Args, result: object) -> list[Tensor]:
        """What a call gives: the tensors written, then the tensors returned."""
        return [*tensors_of([args[i] for i in self.written]), *tensors_of(result)]

    def run(self, call: Callable, args: Args, kwargs: Kwargs) -> list[Tensor]:
        """Call an op and check that everything it only reads keeps its bits.

        Returns:
            The outputs.
        """
        read_only = list(tensors_of([[a for i, a in enumerate(args) if i not in self.written], kwargs]))
        before = [tensor.clone() for tensor in read_only]
        result = call(*args, **kwargs)
        for tensor, copy in zip(read_only, before, strict=True):
            assert_same_bits(tensor, copy)
        return self.outputs(args, result)

    def expect(self, args: Args, kwargs: Kwargs) -> tuple[list[Tensor], list[Tensor]]:
        """Evaluate the specification in float64, on copies.

        Returns:
            The outputs and the greatest error allowed in each.
        """
        args = copied(args)
        widened = self.written if self.widened is None else self.widened
        wide = [mapped(_to_double, a) if i in widened else mapped(torch.clone, a) for i, a in enumerate(args)]
        expected = self.outputs(wide, self.reference(*wide, **kwargs))
        return expected, self.tolerance(args, kwargs, expected)


def tensors_of(tree: object) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for item in tree:
            yield from tensors_of(item)
    elif isinstance(tree, dict):
        yield from tensors_of(list(tree.values()))


def mapped(function: Callable[[Tensor], Tensor], tree):
    """The same nested lists with ``function`` applied to every tensor."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, list | tuple):
        return [mapped(function, item) for item in tree]
    if isinstance(tree, dict):
        return {key: mapped(function, value) for key, value in tree.items()}
    return tree


def copied(tree):
    """The same values in fresh contiguous memory."""
    return mapped(lambda tensor: tensor.detach().clone(memory_format=torch.contiguous_format), tree)


def bits(tensor: Tensor) -> Tensor:
    """The bit patterns of a tensor as integers."""
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integer)


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Require equal shapes, dtypes, devices and bit patterns; NaN equals a NaN of the same payload."""
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
    different = bits(actual) != bits(expected)
    assert not different.any(), (
        f"{int(different.sum())} of {different.numel()} differ, "
        f"first {actual[different][0]!r} for {expected[different][0]!r}"
    )


def assert_within(actual: Sequence[Tensor], expected: Sequence[Tensor], bounds: Sequence[Tensor]) -> None:
    """Require every output within its bound; NaN and Inf must be where the specification has them."""
    assert len(actual) == len(expected)
    for index, (got, wanted, bound) in enumerate(zip(actual, expected, bounds, strict=True)):
        assert got.shape == wanted.shape, index
        got, wanted, bound = got.detach().double(), wanted.double(), bound.double()
        both = got.isfinite() & wanted.isfinite()
        same = (got == wanted) | (got.isnan() & wanted.isnan())
        wrong = ~torch.where(both, (got - wanted).abs() <= bound, same)
        assert not wrong.any(), (
            f"output {index}: {int(wrong.sum())} of {wrong.numel()} wrong, first {got[wrong][0].item()!r} "
            f"for {wanted[wrong][0].item()!r} +- {bound.expand_as(wrong)[wrong][0].item()!r}"
        )


# Memory layouts. Each gives the same values; where memory lies between them it is filled with FILLER.

FILLER = 7


def contiguous(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def channels_last(tensor: Tensor) -> Tensor:
    format_of = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.clone(memory_format=format_of.get(tensor.dim(), torch.contiguous_format))


def permuted(tensor: Tensor) -> Tensor:
    backwards = list(reversed(range(tensor.dim())))
    return tensor.permute(backwards).clone(memory_format=torch.contiguous_format).permute(backwards)


def sliced(tensor: Tensor) -> Tensor:
    """Every second element of a larger tensor: no two values are neighbours."""
    if tensor.dim() == 0:
        return tensor.new_full((3,), FILLER)[1].copy_(tensor)
    base = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 1), FILLER)
    return base[..., 1::2].copy_(tensor)


def padded_rows(tensor: Tensor) -> Tensor:
    """Dense rows with a gap after each."""
    if tensor.dim() == 0:
        return sliced(tensor)
    base = tensor.new_full((*tensor.shape[:-1], tensor.shape[-1] + 3), FILLER)
    return base[..., : tensor.shape[-1]].copy_(tensor)


def offset(tensor: Tensor) -> Tensor:
    """Dense memory that starts one element after an aligned address."""
    return tensor.new_full((tensor.numel() + 2,), FILLER)[1:-1].view(tensor.shape).copy_(tensor)


def expanded(tensor: Tensor) -> Tensor:
    """The first slice repeated with stride 0; other values than the tensor's, and for reading only."""
    if tensor.dim() == 0 or tensor.shape[0] == 0:
        return contiguous(tensor)
    return contiguous(tensor[:1]).expand(tensor.shape)


# Name -> layout of what is written, layout of what is only read.
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "channels last": (channels_last, channels_last),
    "channels last written": (channels_last, contiguous),
    "channels last read": (contiguous, channels_last),
    "permuted": (permuted, permuted),
    "permuted written": (permuted, contiguous),
    "permuted read": (contiguous, permuted),
    "sliced": (sliced, sliced),
    "sliced written": (sliced, contiguous),
    "sliced read": (contiguous, sliced),
    "padded rows": (padded_rows, padded_rows),
    "offset": (offset, offset),
    "offset written": (offset, contiguous),
    "offset read": (contiguous, offset),
    "expanded read": (contiguous, expanded),
    "expanded read, permuted written": (permuted, expanded),
}


def laid_out(case: OpCase, args: Args, layout: str) -> Args:
    """Copies of the arguments in a named layout."""
    written, read_only = LAYOUTS[layout]
    return [mapped(written if i in case.written else read_only, arg) for i, arg in enumerate(args)]


def assert_gaps_untouched(args: Args) -> None:
    """Require that memory between the elements of a view still holds FILLER. Overwrites the views."""
    for tensor in tensors_of(args):
        base = tensor._base
        if base is not None and base.numel() > tensor.numel():
            tensor.fill_(FILLER)
            assert (base == FILLER).all()


# Error bounds. A correctly rounded operation has a relative error of at most the unit roundoff u = eps / 2 of
# its dtype, so r of them in a row err by about r * u times the magnitude of the terms; storing the result
# in a narrower dtype adds one roundoff of that dtype. Results below the normal range err by up to half its
# spacing instead.


def unit_roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def spacing_at_zero(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def bound(magnitude: Tensor, stored: torch.dtype, computed: torch.dtype, roundings: float) -> Tensor:
    """Greatest error of a result of terms of this magnitude, after ``roundings`` operations and a store."""
    relative = unit_roundoff(stored) + roundings * unit_roundoff(computed)
    return magnitude.abs().double() * relative + spacing_at_zero(stored)


def no_error(args: Args, kwargs: Kwargs, expected: list[Tensor]) -> list[Tensor]:
    return [torch.zeros((), device=output.device) for output in expected]


# Values, drawn on the CPU so that every device gets the same.


def normal(shape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).to(device)


def importance(shape, dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    """Positive values over a few orders of magnitude; about one in eight is 0."""
    values = torch.randn(shape, generator=generator, dtype=torch.float64).mul(1.5).exp()
    zero = torch.rand(shape, generator=generator) < 0.125
    return values.masked_fill(zero, 0.0).to(accumulator_dtype(dtype)).to(device)


def random_mask(shape, device: str, generator: torch.Generator, density: float = 0.5) -> Tensor:
    return reference.pack_mask(torch.rand(shape, generator=generator) < density).to(device)


def orthonormal(d: int, k: int, dtype: torch.dtype, device: str, generator: torch.Generator) -> Tensor:
    columns = torch.linalg.qr(torch.randn((d, d), generator=generator, dtype=torch.float64)).Q[:, :k]
    return columns.to(dtype).to(device)


def doors(first, name: str = "", *, ids: tuple[str, str] = ("torch.ops", "_C")) -> list:
    """Parameters for both doors: modules, or of each the function of that name."""
    direct = getattr(_C, name, None) if name else _C
    first = getattr(first, name) if name else first
    return [pytest.param(first, id=ids[0]), pytest.param(direct, id=ids[1], marks=compiled)]


# Samples and tolerances, op by op.


def _fisher_sample(device, dtype, generator, variant):
    shapes = SHAPES[variant]
    fisher = [importance(shape, dtype, device, generator) for shape in shapes]
    grads = [normal(shape, dtype, device, generator) for shape in shapes]
    power = 1 if variant in ("mixed", "scalars") else 2
    return [fisher, grads], {"weight": 0.3, "decay": 0.9, "power": power}


def _fisher_tolerance(args, kwargs, expected):
    # Both constants and the power rounded, two products, one sum.
    return [
        bound(wanted, total.dtype, total.dtype, 5) for wanted, total in zip(expected, args[0], strict=True)
    ]


def _dampen_sample(device, dtype, generator, variant):
    shapes = SHAPES[variant]
    params = [normal(shape, dtype, device, generator) for shape in shapes]
    full = [importance(shape, dtype, device, generator) for shape in shapes]
    forget = [importance(shape, dtype, device, generator) for shape in shapes]
    kwargs = {"alpha": 1.3, "lambda_": 0.7}
    if variant in ("mixed", "sizes"):
        kwargs |= {"exponent": 0.5, "beta_min": 0.1, "beta_max": 0.6}
    return [params, full, forget], kwargs


def _dampen_tolerance(args, kwargs, expected):
    # The rounding of lambda, a product and a quotient: three errors, multiplied by the exponent in the power.
    # Then the power itself (two), the rounding of the exponent (times |log ratio| < 16) and the last product.
    exponent = kwargs.get("exponent", 1.0)
    roundings = 3 * exponent + 4 + 16 * exponent
    return [
        bound(wanted, param.dtype, accumulator_dtype(param.dtype), roundings)
        for wanted, param in zip(expected, args[0], strict=True)
    ]


def _importances(device, dtype, generator, variant):
    shapes = SHAPES[variant]
    return [[importance(shape, dtype, device, generator) for shape in shapes] for _ in range(2)]


def _counts_sample(device, dtype, generator, variant):
    return [*_importances(device, dtype, generator, variant), [0.0, 0.1, 1.0, 1.3, 50.0]], {}


def _quantile_sample(device, dtype, generator, variant):
    full, forget = _importances(device, dtype, generator, variant)
    for tensor in full[-1:]:
        tensor.flatten()[:1] = 1.0  # a ratio that is left in, however small the sample
    if variant == "empty last":
        full[0].flatten()[0] = 1.0
    return [full, forget, 0.9], {}


def _quantile_tolerance(args, kwargs, expected):
    # Both interpolate in float64 between the same two values; one rounding to the dtype each.
    return [bound(wanted, wanted.dtype, wanted.dtype, 1) for wanted in expected]


MASK_SHAPES = {f"size {n}": (n,) for n in SIZES} | {
    "matrix": (5, 7),
    "image": (2, 3, 4, 5),
    "empty": (0, 3),
    "scalar": (),
    "large": (301, 1003),
}


def _pack_sample(device, dtype, generator, variant):
    return [(torch.rand(MASK_SHAPES[variant], generator=generator) < 0.5).to(device)], {}


def _unpack_sample(device, dtype, generator, variant):
    shape = MASK_SHAPES[variant]
    n_bytes = (math.prod(shape) + 7) // 8
    # Random bits past the end as well: they must not matter.
    packed = torch.randint(0, 256, (n_bytes,), generator=generator, dtype=torch.uint8)
    return [packed.to(device), list(shape)], {}


def _pack_list_sample(device, dtype, generator, variant):
    return [[(torch.rand(shape, generator=generator) < 0.5).to(device) for shape in SHAPES[variant]]], {}


def _unpack_list_sample(device, dtype, generator, variant):
    shapes = [list(shape) for shape in SHAPES[variant]]
    sizes = [(math.prod(shape) + 7) // 8 for shape in shapes]
    packed = [torch.randint(0, 256, (n,), generator=generator, dtype=torch.uint8) for n in sizes]
    return [[bits.to(device) for bits in packed], shapes], {}


def _topk_sample(device, dtype, generator, variant):
    # Rounded to halves, so that ties run across tensors.
    scores = [
        (normal(shape, torch.float64, "cpu", generator) * 4).round().div(2).to(dtype).to(device)
        for shape in SHAPES[variant]
    ]
    return [scores, sum(score.numel() for score in scores) // 3], {"largest": variant != "sizes"}


def _apply_mask_sample(device, dtype, generator, variant):
    shapes = SHAPES[variant]
    grads = [normal(shape, dtype, device, generator) for shape in shapes]
    return [grads, [random_mask(shape, device, generator) for shape in shapes]], {}


def _sgd_sample(device, dtype, generator, variant):
    shapes = SHAPES[variant]
    params = [normal(shape, dtype, device, generator) for shape in shapes]
    grads = [normal(shape, dtype, device, generator) for shape in shapes]
    buffers = [normal(shape, accumulator_dtype(dtype), device, generator) for shape in shapes]
    masks = [random_mask(shape, device, generator) for shape in shapes]
    kwargs = {"lr": 0.1, "momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01}
    if variant == "mixed":
        kwargs |= {"dampening": 0.0, "nesterov": True, "maximize": True}
    if variant in ("scalars", "empty middle"):
        buffers, kwargs = [], {"lr": 0.1, "weight_decay": 0.01}
    return [params, grads, buffers, masks], kwargs


def _sgd_tolerance(args, kwargs, expected):
    params, grads, buffers, masks = copied(args)
    absolute = [[tensor.double().abs() for tensor in tensors] for tensors in (params, grads, buffers)]
    # With a negative rate and no sign flips every term of the formula adds up: the magnitude of the terms.
    same_signs = kwargs | {"lr": -kwargs["lr"], "maximize": False}
    reference.masked_sgd_(*absolute, masks, **same_signs)
    return [
        bound(magnitude, tensor.dtype, accumulator_dtype(tensor.dtype), 10)
        for magnitude, tensor in zip(absolute[0] + absolute[2], params + buffers, strict=True)
    ]


def _adamw_sample(device, dtype, generator, variant):
    shapes = SHAPES[variant]
    state = accumulator_dtype(dtype)
    params = [normal(shape, dtype, device, generator) for shape in shapes]
    grads = [normal(shape, dtype, device, generator) for shape in shapes]
    means = [normal(shape, state, device, generator) for shape in shapes]
    squares = [normal(shape, state, device, generator) ** 2 for shape in shapes]
    masks = [random_mask(shape, device, generator) for shape in shapes]
    kwargs = {"step": 3, "lr": 0.1, "beta1": 0.8, "beta2": 0.95, "weight_decay": 0.1}
    if variant == "mixed":
        kwargs |= {"maximize": True, "eps": 1e-3}
    return [params, grads, means, squares, masks], kwargs


def _adamw_tensor_step_sample(device, dtype, generator, variant):
    args, kwargs = _adamw_sample(device, dtype, generator, variant)
    return args, kwargs | {"step": torch.tensor(3.0, device=device)}


def _adamw_tolerance(args, kwargs, expected):
    params, grads, means, squares, masks = copied(args)
    absolute = [[t.double().abs() for t in tensors] for tensors in (params, grads, means, squares)]
    same_signs = kwargs | {"lr": -kwargs["lr"], "maximize": False}
    reference.masked_adamw_(*absolute, masks, **same_signs)
    # The mean is m + (1 - beta1) * (g - m), whose terms are up to three times as large as those added here.
    return [
        bound(magnitude, tensor.dtype, accumulator_dtype(tensor.dtype), 24)
        for magnitude, tensor in zip(
            absolute[0] + absolute[2] + absolute[3], params + means + squares, strict=True
        )
    ]


GRAM_SHAPES = {
    "rows": (7, 5),
    "sequence": (2, 3, 5),
    "one row": (5,),
    "one column": (4, 1),
    "no rows": (0, 5),
    "no columns": (3, 0),
    "wide": (3, 70),
    "tall": (300, 65),
    "float64 total": (40, 9),
    "large": (1100, 210),
}


def _gram_dtype(dtype, variant):
    return torch.float64 if variant == "float64 total" else accumulator_dtype(dtype)


def _symmetric(shape, dtype, device, generator):
    factor = normal(shape, torch.float64, "cpu", generator)
    return (factor + factor.mT).to(dtype).to(device)


def _gram_sample(device, dtype, generator, variant):
    inputs = normal(GRAM_SHAPES[variant], dtype, device, generator)
    d = inputs.shape[-1]
    return [_symmetric((d, d), _gram_dtype(dtype, variant), device, generator), inputs], {}


def _gram_bounds(gram, inputs, magnitude, n_rows):
    # A sum of n products errs by n roundoffs of the products' dtype at most (Higham, 2002, section 3.1), in
    # any order.
    products = magnitude * (n_rows + 1) * unit_roundoff(accumulator_dtype(inputs.dtype))
    return [products + bound(gram.abs().double() + magnitude, gram.dtype, gram.dtype, 8)]


def _gram_tolerance(args, kwargs, expected):
    gram, inputs = args
    magnitude = torch.zeros_like(gram, dtype=torch.float64)
    reference.gram_accumulate_(magnitude, inputs.double().abs())
    return _gram_bounds(gram, inputs, magnitude, math.prod(inputs.shape[:-1]))


def _convolution(shape, kernel_size, stride, padding, dilation, groups=1):
    constants = {"kernel_size": kernel_size, "stride": stride, "padding": padding, "dilation": dilation}
    return shape, constants | {"groups": groups}


# Shape of the input, kernel size, stride, padding (flat pairs where its sides differ), dilation, groups.
CONVOLUTIONS: dict[str, tuple[tuple[int, ...], dict]] = {
    "signal": _convolution((2, 3, 11), [3], [1], [1], [1]),
    "image": _convolution((2, 3, 6, 7), [3, 2], [1, 1], [1, 0], [1, 1]),
    "volume": _convolution((2, 2, 4, 5, 3), [2, 3, 1], [1, 2, 1], [0, 1, 1], [1, 1, 2]),
    "stride": _convolution((2, 3, 9, 8), [3, 3], [2, 3], [1, 1], [1, 1]),
    "dilation": _convolution((1, 2, 9, 8), [3, 2], [1, 2], [2, 1], [2, 3]),
    "groups": _convolution((2, 6, 5, 5), [3, 3], [1, 1], [1, 1], [1, 1], 3),
    "grouped volume": _convolution((2, 4, 3, 4, 3), [2, 2, 2], [1, 1, 1], [0, 1, 0], [1, 1, 1], 2),
    "depthwise signal": _convolution((3, 4, 10), [5], [2], [2], [1], 4),
    "uneven padding": _convolution((2, 2, 5, 4), [4, 3], [1, 2], [1, 2, 0, 3], [1, 1]),
    "causal signal": _convolution((2, 3, 7), [4], [1], [3, 0], [1]),
    "one pixel kernel": _convolution((2, 5, 3, 3), [1, 1], [2, 2], [0, 0], [1, 1]),
    "one output": _convolution((2, 3, 3, 3), [3, 3], [1, 1], [0, 0], [1, 1]),
    "no samples": _convolution((0, 3, 5, 5), [3, 3], [1, 1], [1, 1], [1, 1]),
    "float64 total": _convolution((2, 3, 6, 6), [3, 3], [1, 1], [1, 1], [1, 1]),
    "large": _convolution((3, 24, 17, 19), [3, 3], [1, 1], [1, 1], [1, 1]),
    "large signal": _convolution((2, 40, 300), [5], [1], [4, 2], [2]),
    "large groups": _convolution((9, 62, 12, 11), [3, 3], [1, 1], [2, 1], [2, 1], 2),
}


def _gram_conv_sample(device, dtype, generator, variant):
    shape, convolution = CONVOLUTIONS[variant]
    groups = convolution["groups"]
    d = shape[1] // groups * math.prod(convolution["kernel_size"])
    gram_shape = (groups, d, d) if groups > 1 else (d, d)
    gram = _symmetric(gram_shape, _gram_dtype(dtype, variant), device, generator)
    return [gram, normal(shape, dtype, device, generator)], dict(convolution)


def _gram_conv_tolerance(args, kwargs, expected):
    gram, inputs = args
    magnitude = torch.zeros_like(gram, dtype=torch.float64)
    reference.gram_conv_accumulate_(magnitude, inputs.double().abs(), **kwargs)
    # No more rows than padded positions; at most 6 are added to a dimension here.
    n_rows = inputs.shape[0] * math.prod(size + 6 for size in inputs.shape[2:])
    return _gram_bounds(gram, inputs, magnitude, n_rows)


# Fisher diagonals of layers. In all five ops samples are the first axis, and the gradients of the outputs the
# last tensor.

LAYER_OPS = ("fisher_linear_", "fisher_conv_", "fisher_bias_", "fisher_affine_", "fisher_embedding_")


def per_sample_bounds(op: Callable, args: Args, kwargs: Kwargs) -> list[Tensor]:
    """Greatest error of a sum over samples of powers of sums over positions."""
    fisher, *tensors = args
    grads, weight, power = tensors[-1], abs(kwargs.get("weight", 1.0)), kwargs.get("power", 2)
    channels = fisher.shape[1] if op is reference.fisher_embedding_ else fisher.shape[0]
    samples, positions = grads.shape[0], grads.numel() // max(1, grads.shape[0] * channels)

    def total(of: Sequence[Tensor]) -> Tensor:
        out = torch.zeros(fisher.shape, dtype=torch.float64, device=fisher.device)
        op(out, *of, **(kwargs | {"weight": 1.0}))
        return out

    # A sum of products errs by a roundoff per term, relative to the sum of their magnitudes. An error e of x
    # gives one of e in |x| and one of 2 |x| e + e^2 in x^2, whose sum over samples is bounded as Cauchy and
    # Schwarz do.
    wide = [tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors]
    values = total(wide)
    magnitudes = total([tensor.abs() if tensor.is_floating_point() else tensor for tensor in wide])
    computed = accumulator_dtype(grads.dtype)
    error = (positions + 2) * unit_roundoff(computed)
    powers = error * magnitudes
    if power == 2:
        powers = 2 * error * (values * magnitudes).sqrt() + error * powers
    # The samples may be added to the total one by one; the weight and the power are rounded as well.
    magnitude = fisher.abs() + weight * (values + powers)
    return [weight * powers + bound(magnitude, fisher.dtype, computed, samples + 8)]


# Samples, positions, inputs, outputs.
LINEARS: dict[str, tuple[int, tuple[int, ...], int, int]] = {
    "sequence": (3, (5,), 7, 6),
    "vectors": (33, (), 13, 9),
    "one sample": (1, (), 5, 6),
    "one position": (33, (1,), 65, 40),
    "two positions": (3, (2,), 33, 31),
    "image": (2, (3, 4), 6, 5),
    "volume": (2, (2, 3, 2), 5, 4),
    "tall": (3, (64,), 65, 33),
    "long": (1, (300,), 17, 34),
    "one by one": (33, (5,), 1, 1),
    "one input": (3, (64,), 1, 130),
    "one output": (3, (64,), 130, 1),
    "wide": (3, (5,), 130, 129),
    "wide vectors": (33, (), 130, 129),
    "long and wide": (3, (300,), 129, 130),
    "many samples": (500, (2,), 9, 8),
    "no samples": (0, (5,), 7, 6),
    "no positions": (3, (2, 0), 7, 6),
    "no inputs": (3, (5,), 0, 6),
    "no outputs": (3, (5,), 7, 0),
    "large": (33, (64,), 130, 97),
}


def _fisher_linear_sample(device, dtype, generator, variant):
    n, positions, inputs, outputs = LINEARS[variant]
    fisher = importance((outputs, inputs), dtype, device, generator)
    tensors = [normal((n, *positions, width), dtype, device, generator) for width in (inputs, outputs)]
    power = 1 if variant in ("vectors", "image", "tall", "one input", "long and wide") else 2
    return [fisher, *tensors], {"weight": 0.3, "power": power}


def _fisher_linear_tolerance(args, kwargs, expected):
    return per_sample_bounds(reference.fisher_linear_, args, kwargs)


# Convolution and outputs per group.
FISHER_CONVOLUTIONS: dict[str, tuple[tuple[tuple[int, ...], dict], int]] = {
    **{name: (CONVOLUTIONS[name], 3) for name in CONVOLUTIONS if name != "float64 total"},
    "depthwise": (_convolution((3, 9, 6, 7), [3, 3], [1, 2], [1, 1], [1, 1], 9), 1),
    "depthwise with a multiplier": (_convolution((3, 4, 6, 7), [3, 3], [1, 1], [1, 1], [1, 1], 4), 2),
    "patches": (_convolution((3, 3, 8, 12), [4, 4], [4, 4], [0, 0], [1, 1]), 35),
    "large kernel": (_convolution((2, 3, 12, 11), [9, 7], [1, 1], [4, 3], [1, 1]), 7),
    "long signal": (_convolution((1, 5, 304), [5], [1], [0], [1]), 9),
    "many samples": (_convolution((150, 3, 5, 4), [3, 3], [1, 1], [1, 1], [1, 1]), 17),
    "many outputs": (_convolution((2, 15, 4, 5), [3, 3], [1, 1], [1, 1], [1, 1]), 130),
    "positions in the padding alone": (_convolution((2, 3, 4), [2], [1], [3], [1]), 5),
    "input past the last position": (_convolution((2, 3, 8, 9), [2, 3], [3, 4], [0, 0], [1, 1]), 5),
    "no outputs": (_convolution((2, 3, 5), [2], [1], [0], [1]), 0),
}


def convolved(size: Sequence[int], kernel_size, stride, padding, dilation, groups=1) -> list[int]:
    """The size of what a convolution gives, without its channels."""
    pairs = zip(padding[::2], padding[1::2], strict=True) if len(padding) == 2 * len(size) else None
    total = [sum(pair) for pair in pairs] if pairs else [2 * amount for amount in padding]
    return [
        (extent + pad - d * (k - 1) - 1) // s + 1
        for extent, k, s, pad, d in zip(size, kernel_size, stride, total, dilation, strict=True)
    ]


def _fisher_conv_sample(device, dtype, generator, variant):
    (shape, convolution), per_group = FISHER_CONVOLUTIONS[variant]
    groups, outputs = convolution["groups"], per_group * convolution["groups"]
    fisher_shape = (outputs, shape[1] // groups, *convolution["kernel_size"])
    fisher = importance(fisher_shape, dtype, device, generator)
    inputs = normal(shape, dtype, device, generator)
    grads = normal((shape[0], outputs, *convolved(shape[2:], **convolution)), dtype, device, generator)
    constants = {name: value for name, value in convolution.items() if name != "kernel_size"}
    power = 1 if variant in ("volume", "depthwise", "one output", "long signal") else 2
    return [fisher, inputs, grads], constants | {"weight": 0.3, "power": power}


def _fisher_conv_tolerance(args, kwargs, expected):
    return per_sample_bounds(reference.fisher_conv_, args, kwargs)


# Shape of the gradients, axis of the channels.
CHANNELS: dict[str, tuple[tuple[int, ...], int]] = {
    "sequence": ((3, 5, 6), -1),
    "vectors": ((33, 7), 1),
    "image": ((2, 6, 4, 5), 1),
    "volume": ((2, 3, 4, 2, 3), 1),
    "tall": ((3, 300, 65), -1),
    "groups": ((3, 4, 5, 6), 2),
    "channels from the back": ((3, 4, 5, 6), -2),
    "planes": ((3, 17, 16, 19), 1),
    "one sample": ((1, 64, 33), -1),
    "one channel": ((5, 9, 1), -1),
    "many samples": ((500, 3, 5), -1),
    "one plane": ((5, 1, 9), 1),
    "wide vectors": ((33, 130), -1),
    "no samples": ((0, 5, 6), -1),
    "no positions": ((3, 0, 6), -1),
    "no channels": ((3, 5, 0), -1),
    "large": ((33, 97, 9, 7), 1),
}


def _fisher_bias_sample(device, dtype, generator, variant):
    shape, channel_dim = CHANNELS[variant]
    fisher = importance((shape[channel_dim],), dtype, device, generator)
    power = 1 if variant in ("vectors", "image", "tall") else 2
    grads = normal(shape, dtype, device, generator)
    return [fisher, grads], {"channel_dim": channel_dim, "weight": 0.3, "power": power}


def _fisher_bias_tolerance(args, kwargs, expected):
    return per_sample_bounds(reference.fisher_bias_, args, kwargs)


def _fisher_affine_sample(device, dtype, generator, variant):
    args, kwargs = _fisher_bias_sample(device, dtype, generator, variant)
    return [args[0], normal(args[1].shape, dtype, device, generator), args[1]], kwargs


def _fisher_affine_tolerance(args, kwargs, expected):
    return per_sample_bounds(reference.fisher_affine_, args, kwargs)


# Rows and columns of the table, shape of the indices, constants.
EMBEDDINGS: dict[str, tuple[int, int, tuple[int, ...], dict]] = {
    "sequence": (9, 6, (3, 5), {}),
    "vectors": (5, 7, (33,), {"power": 1}),
    "image": (20, 3, (2, 4, 5), {}),
    "tall": (7, 65, (3, 64), {}),
    "long": (3, 17, (1, 300), {"power": 1}),
    "one row": (1, 5, (3, 5), {}),
    "one column": (11, 1, (3, 20), {}),
    "many samples": (6, 9, (500, 2), {}),
    "padding": (4, 6, (3, 20), {"padding_idx": 2}),
    "nothing but padding": (1, 6, (3, 5), {"padding_idx": 0}),
    "large table": (5000, 16, (4, 30), {"padding_idx": 4999}),
    "no samples": (9, 6, (0, 5), {}),
    "no positions": (9, 6, (3, 0), {}),
    "no columns": (9, 0, (3, 5), {}),
    "no rows": (0, 6, (3, 0), {}),
    "large": (50, 97, (33, 64), {}),
}


def _fisher_embedding_sample(device, dtype, generator, variant):
    n_rows, width, shape, constants = EMBEDDINGS[variant]
    index_dtype = torch.int32 if variant in ("image", "padding") else torch.int64
    indices = torch.randint(0, max(1, n_rows), shape, generator=generator).to(index_dtype).to(device)
    fisher = importance((n_rows, width), dtype, device, generator)
    grads = normal((*shape, width), dtype, device, generator)
    return [fisher, indices, grads], {"weight": 0.3} | constants


def _fisher_embedding_tolerance(args, kwargs, expected):
    return per_sample_bounds(reference.fisher_embedding_, args, kwargs)


# Shape of the gradient, number of groups, columns of the basis.
PROJECTIONS: dict[str, tuple[tuple[int, ...], int, int]] = {
    "matrix": ((6, 5), 1, 2),
    "kernel": ((4, 2, 3, 3), 1, 7),
    "groups": ((6, 2, 3, 3), 3, 4),
    "all directions": ((6, 5), 1, 5),
    "no directions": ((6, 5), 1, 0),
    "one column": ((3, 1), 1, 1),
    "no rows": ((0, 5), 1, 2),
    "float32 basis": ((7, 9), 1, 3),
    "large": ((130, 257), 1, 67),
}
PROJECTION_LISTS = {
    "mixed": ["matrix", "kernel", "groups", "all directions", "no directions", "matrix"],
    "empty list": [],
    "empty first": ["no rows", "matrix"],
    "empty middle": ["kernel", "no rows", "matrix"],
    "empty last": ["matrix", "no rows"],
    "float32 basis": ["float32 basis"],
    "many": ["matrix", "one column"] * 200,
    "large": ["large", "matrix", "large"],
}


def _projection(device, dtype, generator, variant):
    shape, groups, k = PROJECTIONS[variant]
    basis_dtype = accumulator_dtype(dtype) if variant == "float32 basis" else dtype
    d = math.prod(shape[1:])
    bases = [orthonormal(d, k, basis_dtype, device, generator) for _ in range(groups)]
    return normal(shape, dtype, device, generator), torch.stack(bases) if groups > 1 else bases[0]


def _projection_sample(device, dtype, generator, variant):
    return list(_projection(device, dtype, generator, variant)), {}


def _projection_list_sample(device, dtype, generator, variant):
    pairs = [_projection(device, dtype, generator, name) for name in PROJECTION_LISTS[variant]]
    return [[grad for grad, _ in pairs], [basis for _, basis in pairs]], {}


def _projection_tolerance(args, kwargs, expected):
    bounds = []
    for grad, basis in zip(tensors_of([args[0]]), tensors_of([args[1]]), strict=True):
        # |G| + |G| |U| |U|^T: a sum of d products, then one of k.
        magnitude = grad.double().abs() + reference.project_onto(grad.double().abs(), basis.double().abs())
        roundings = basis.shape[-2] + basis.shape[-1] + 3
        bounds.append(bound(magnitude, grad.dtype, accumulator_dtype(grad.dtype), roundings))
    return bounds


def _to_double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


CASES: tuple[OpCase, ...] = (
    OpCase("fisher_accumulate_", _fisher_sample, _fisher_tolerance, written=(0,)),
    OpCase(
        "fisher_linear_",
        _fisher_linear_sample,
        _fisher_linear_tolerance,
        written=(0,),
        variants=tuple(LINEARS),
    ),
    OpCase(
        "fisher_conv_",
        _fisher_conv_sample,
        _fisher_conv_tolerance,
        written=(0,),
        variants=tuple(FISHER_CONVOLUTIONS),
    ),
    OpCase(
        "fisher_bias_", _fisher_bias_sample, _fisher_bias_tolerance, written=(0,), variants=tuple(CHANNELS)
    ),
    OpCase(
        "fisher_affine_",
        _fisher_affine_sample,
        _fisher_affine_tolerance,
        written=(0,),
        variants=tuple(CHANNELS),
    ),
    OpCase(
        "fisher_embedding_",
        _fisher_embedding_sample,
        _fisher_embedding_tolerance,
        written=(0,),
        variants=tuple(EMBEDDINGS),
    ),
    OpCase("selective_dampen_", _dampen_sample, _dampen_tolerance, written=(0,)),
    OpCase("selected_counts", _counts_sample, no_error, dtypes=WIDE, exact=True),
    OpCase("ratio_quantile", _quantile_sample, _quantile_tolerance, dtypes=WIDE, variants=FILLED),
    OpCase(
        "pack_mask", _pack_sample, no_error, dtypes=(torch.bool,), variants=tuple(MASK_SHAPES), exact=True
    ),
    OpCase("pack_mask.list", _pack_list_sample, no_error, dtypes=(torch.bool,), exact=True),
    OpCase(
        "unpack_mask",
        _unpack_sample,
        no_error,
        dtypes=(torch.uint8,),
        variants=tuple(MASK_SHAPES),
        exact=True,
    ),
    OpCase("unpack_mask.list", _unpack_list_sample, no_error, dtypes=(torch.uint8,), exact=True),
    OpCase("topk_mask", _topk_sample, no_error, exact=True),
    OpCase("apply_mask_", _apply_mask_sample, no_error, written=(0,), exact=True),
    OpCase("masked_sgd_", _sgd_sample, _sgd_tolerance, written=(0, 2)),
    OpCase("masked_adamw_", _adamw_sample, _adamw_tolerance, written=(0, 2, 3)),
    OpCase("masked_adamw_.tensor_step", _adamw_tensor_step_sample, _adamw_tolerance, written=(0, 2, 3)),
    OpCase("gram_accumulate_", _gram_sample, _gram_tolerance, written=(0,), variants=tuple(GRAM_SHAPES)),
    OpCase(
        "gram_conv_accumulate_",
        _gram_conv_sample,
        _gram_conv_tolerance,
        written=(0,),
        variants=tuple(CONVOLUTIONS),
    ),
    OpCase(
        "project_out", _projection_sample, _projection_tolerance, widened=(0,), variants=tuple(PROJECTIONS)
    ),
    OpCase(
        "project_out_", _projection_sample, _projection_tolerance, written=(0,), variants=tuple(PROJECTIONS)
    ),
    OpCase(
        "project_out_.list",
        _projection_list_sample,
        _projection_tolerance,
        written=(0,),
        variants=tuple(PROJECTION_LISTS),
    ),
    OpCase(
        "project_onto", _projection_sample, _projection_tolerance, widened=(0,), variants=tuple(PROJECTIONS)
    ),
    OpCase(
        "project_onto_", _projection_sample, _projection_tolerance, written=(0,), variants=tuple(PROJECTIONS)
    ),
    OpCase(
        "project_onto_.list",
        _projection_list_sample,
        _projection_tolerance,
        written=(0,),
        variants=tuple(PROJECTION_LISTS),
    ),
)
