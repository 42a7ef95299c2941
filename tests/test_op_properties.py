"""What holds for every list of tensors, however long, shaped, laid out or filled."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from op_cases import (
    CASES,
    FLOATS,
    WIDE,
    accumulator_dtype,
    assert_gaps_untouched,
    assert_same_bits,
    assert_within,
    bits,
    bound,
    channels_last,
    contiguous,
    convolved,
    copied,
    expanded,
    importance,
    normal,
    offset,
    padded_rows,
    permuted,
    random_mask,
    sliced,
    spacing_at_zero,
    unit_roundoff,
)

from unlearn_ext import ops
from unlearn_ext.ops import reference

LAYOUTS = [contiguous, channels_last, permuted, sliced, padded_rows, offset]

shapes = st.lists(st.lists(st.integers(0, 5), max_size=5).map(tuple), max_size=6)
layouts = st.sampled_from(LAYOUTS)
read_only_layouts = st.sampled_from([*LAYOUTS, expanded])
generators = st.integers(0, 2**32).map(lambda seed: torch.Generator().manual_seed(seed))
floats = st.sampled_from(FLOATS)
wide = st.sampled_from(WIDE)

# Any magnitude: hypothesis likes zeros of both signs, subnormals and the largest numbers.
finite = st.floats(width=32, allow_nan=False, allow_infinity=False)
unsigned = st.floats(min_value=0.0, width=32, allow_nan=False, allow_infinity=False)
anything = st.floats(width=32)


def _split(data, values, dtype):
    """The values as consecutive tensors of drawn lengths, in drawn layouts."""
    cuts = sorted(data.draw(st.lists(st.integers(0, len(values)), max_size=4)))
    edges = [0, *cuts, len(values)]
    parts = [torch.tensor(values[a:b], dtype=dtype) for a, b in itertools.pairwise(edges)]
    return [data.draw(layouts)(part) for part in parts]


@given(shapes, floats, generators, st.sampled_from([1, 2]), st.data())
def test_fisher_of_any_lists(shapes, dtype, generator, power, data):
    fisher = [data.draw(layouts)(importance(shape, dtype, "cpu", generator)) for shape in shapes]
    grads = [data.draw(read_only_layouts)(normal(shape, dtype, "cpu", generator)) for shape in shapes]
    expected = [total.double().clone() for total in fisher]
    kwargs = {"weight": 0.3, "decay": 0.7, "power": power}
    reference.fisher_accumulate_(expected, grads, **kwargs)
    ops.fisher_accumulate_(fisher, grads, **kwargs)
    assert_within(
        fisher, expected, [bound(e, f.dtype, f.dtype, 5) for e, f in zip(expected, fisher, strict=True)]
    )
    assert_gaps_untouched(fisher)


def _assert_as_specified(name, args, kwargs):
    """For ops that write their first argument."""
    case = next(case for case in CASES if case.schema == name)
    expected, bounds = case.expect(args, kwargs)
    assert_within(case.run(getattr(ops, name), args, kwargs), expected, bounds)
    assert_gaps_untouched(args[:1])


@given(
    st.integers(0, 5),
    st.lists(st.integers(0, 6), max_size=5),
    st.integers(0, 40),
    st.integers(0, 40),
    floats,
    generators,
    st.data(),
)
def test_fisher_of_any_linear_layer(n, positions, inputs, outputs, dtype, generator, data):
    fisher = data.draw(layouts)(importance((outputs, inputs), dtype, "cpu", generator))
    tensors = [
        data.draw(read_only_layouts)(normal((n, *positions, width), dtype, "cpu", generator))
        for width in (inputs, outputs)
    ]
    kwargs = {"weight": data.draw(st.floats(-2, 2)), "power": data.draw(st.sampled_from([1, 2]))}
    _assert_as_specified("fisher_linear_", [fisher, *tensors], kwargs)


@given(st.integers(1, 3), st.integers(0, 3), st.integers(1, 3), st.integers(1, 3), generators, st.data())
def test_fisher_of_any_convolution(n_dims, n, channels, groups, generator, data):
    def draw(low, high):
        return [data.draw(st.integers(low, high)) for _ in range(n_dims)]

    kernel, stride, dilation = draw(1, 4), draw(1, 3), draw(1, 2)
    padding = [data.draw(st.integers(0, 2)) for _ in range(2 * n_dims)]
    sums = map(sum, zip(padding[::2], padding[1::2], strict=True))
    least = [max(1, d * (k - 1) + 1 - pad) for k, d, pad in zip(kernel, dilation, sums, strict=True)]
    spatial = [size + data.draw(st.integers(0, 3)) for size in least]
    outputs, dtype = groups * data.draw(st.integers(1, 9)), data.draw(floats)
    out = convolved(spatial, kernel, stride, padding, dilation)
    fisher = data.draw(layouts)(importance((outputs, channels, *kernel), dtype, "cpu", generator))
    tensors = [
        data.draw(read_only_layouts)(normal(shape, dtype, "cpu", generator))
        for shape in ((n, channels * groups, *spatial), (n, outputs, *out))
    ]
    kwargs = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    kwargs["power"] = data.draw(st.sampled_from([1, 2]))
    _assert_as_specified("fisher_conv_", [fisher, *tensors], kwargs)


@given(st.lists(st.integers(0, 9), min_size=2, max_size=6), floats, generators, st.data())
def test_fisher_of_any_channels(shape, dtype, generator, data):
    channel_dim = data.draw(st.integers(1, len(shape) - 1))
    fisher = data.draw(layouts)(importance((shape[channel_dim],), dtype, "cpu", generator))
    tensors = [data.draw(read_only_layouts)(normal(shape, dtype, "cpu", generator)) for _ in range(2)]
    if data.draw(st.booleans()):
        channel_dim -= len(shape)
    kwargs = {"channel_dim": channel_dim, "power": data.draw(st.sampled_from([1, 2]))}
    _assert_as_specified("fisher_bias_", [fisher.clone(), tensors[1]], kwargs)
    _assert_as_specified("fisher_affine_", [fisher, *tensors], kwargs)


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(0, 20),
    floats,
    generators,
    st.data(),
)
def test_fisher_of_any_embedding(shape, n_rows, width, dtype, generator, data):
    fisher = data.draw(layouts)(importance((n_rows, width), dtype, "cpu", generator))
    indices = torch.randint(0, n_rows, shape, generator=generator)
    indices = data.draw(read_only_layouts)(indices.to(data.draw(st.sampled_from([torch.int64, torch.int32]))))
    grads = data.draw(read_only_layouts)(normal((*shape, width), dtype, "cpu", generator))
    kwargs = {"padding_idx": data.draw(st.integers(-1, n_rows - 1))}
    kwargs["power"] = data.draw(st.sampled_from([1, 2]))
    _assert_as_specified("fisher_embedding_", [fisher, indices, grads], kwargs)


@given(shapes, floats, generators, st.floats(0, 1), st.data())
def test_masked_steps_of_any_lists(shapes, dtype, generator, density, data):
    def draw(strategy, make, one):
        return [data.draw(strategy)(make(shape, one, "cpu", generator)) for shape in shapes]

    state = accumulator_dtype(dtype)
    masks = [random_mask(shape, "cpu", generator, density) for shape in shapes]
    params, grads = draw(layouts, normal, dtype), draw(read_only_layouts, normal, dtype)
    means = draw(layouts, normal, state)
    squares = [square.abs_() for square in draw(layouts, normal, state)]
    kwargs = {"step": data.draw(st.integers(1, 10**6)), "lr": 0.01, "weight_decay": 0.1}
    before = copied([params, means, squares])
    wide = [[tensor.double().clone() for tensor in tensors] for tensors in before]
    reference.masked_adamw_(wide[0], grads, *wide[1:], masks, **kwargs)
    ops.masked_adamw_(params, grads, means, squares, masks, **kwargs)
    for tensors, olds, wanted in zip([params, means, squares], before, wide, strict=True):
        for tensor, old, value, mask in zip(tensors, olds, wanted, masks, strict=True):
            free = reference.unpack_mask(mask, tensor.shape)
            assert_same_bits(tensor[~free], old[~free])
            # Values of order one; a step of at most about a hundred times the learning rate.
            limit = 4 * unit_roundoff(tensor.dtype) * value.abs() + 32 * unit_roundoff(state) * (
                value.abs() + 8
            )
            assert_within([tensor], [value], [limit])
    assert_gaps_untouched([params, means, squares])


@given(shapes, floats, generators, st.data())
def test_gradient_masks_of_any_lists(shapes, dtype, generator, data):
    grads = [data.draw(layouts)(normal(shape, dtype, "cpu", generator)) for shape in shapes]
    masks = [random_mask(shape, "cpu", generator) for shape in shapes]
    expected = copied(grads)
    reference.apply_mask_(expected, masks)
    ops.apply_mask_(grads, masks)
    for grad, wanted in zip(grads, expected, strict=True):
        assert_same_bits(grad, wanted)
    assert_gaps_untouched(grads)


def _exactly_selected(alpha, full, forget):
    return [
        math.isfinite(a) and math.isfinite(b) and Fraction(b) > Fraction(alpha) * Fraction(a)
        for a, b in zip(full, forget, strict=True)
    ]


@given(
    st.lists(st.tuples(unsigned, unsigned), max_size=80),
    st.floats(0, 2.0**60, width=32),
    wide,
    st.data(),
)
def test_selection_at_any_magnitude(pairs, alpha, dtype, data):
    # Products next to which rounding would decide, beside whatever was drawn.
    full = [a for a, _ in pairs] * 2
    forget = [b for _, b in pairs] + [float(np.float32(min(alpha * a, 3e38))) for a, _ in pairs]
    expected = _exactly_selected(alpha, full, forget)
    lengths = data.draw(st.integers(0, len(full)))
    split = [lengths, len(full) - lengths]
    fulls = [data.draw(layouts)(part) for part in torch.tensor(full, dtype=dtype).split(split)]
    forgets = [data.draw(layouts)(part) for part in torch.tensor(forget, dtype=dtype).split(split)]
    counts = ops.selected_counts(fulls, forgets, [alpha])
    assert counts.tolist() == [[sum(expected[: split[0]]), sum(expected[split[0] :])]]
    params = [torch.ones(length, dtype=dtype) for length in split]
    ops.selective_dampen_(params, fulls, forgets, alpha=alpha, lambda_=0.0)
    assert (torch.cat(params) == 0).tolist() == expected


@given(
    st.lists(st.tuples(finite, anything, anything), min_size=1, max_size=80),
    st.floats(0, 8, width=32),
    st.floats(0, 1, width=32),
    floats,
    layouts,
)
def test_dampening_at_any_magnitude(triples, alpha, lambda_, dtype, layout):
    theta, full, forget = (list(column) for column in zip(*triples, strict=True))
    full, forget = [abs(a) for a in full], [abs(b) for b in forget]
    state = accumulator_dtype(dtype)
    params = torch.tensor(theta, dtype=torch.float64).clamp(-6e4, 6e4).to(dtype)
    before, laid_out = params.clone(), layout(params)
    full_, forget_ = torch.tensor(full, dtype=state), torch.tensor(forget, dtype=state)
    ops.selective_dampen_([laid_out], [full_], [forget_], alpha=alpha, lambda_=lambda_)
    selected = torch.tensor(_exactly_selected(alpha, full, forget))
    assert_same_bits(laid_out[~selected], before[~selected])
    # lambda * full may lose all but its first bits below the normal range, and so may the quotient.
    old, ratio = before[selected].double(), full_[selected].double() / forget_[selected].double()
    factor = (lambda_ * ratio).clamp(max=1.0)
    lost = spacing_at_zero(state) * (1 / forget_[selected].double() + 1)
    error = (4 * unit_roundoff(state) * factor + lost).clamp(max=1.0) * old.abs()
    expected = old * factor
    limit = error + unit_roundoff(dtype) * expected.abs() + spacing_at_zero(dtype)
    assert_within([laid_out[selected]], [expected], [limit])


@given(st.lists(anything.filter(lambda x: not math.isnan(x)), max_size=120), floats, st.booleans(), st.data())
def test_topk_is_the_head_of_a_stable_sort(values, dtype, largest, data):
    scores = _split(data, values, dtype)
    joined = np.concatenate([score.double().numpy().ravel() for score in scores])
    k = data.draw(st.integers(0, joined.size))
    note(f"k = {k} of {[tuple(score.shape) for score in scores]}")
    keys = (-joined if largest else joined) + 0.0
    expected = np.zeros(joined.size, dtype=bool)
    expected[np.argsort(keys, kind="stable")[:k]] = True
    masks = ops.topk_mask(scores, k, largest=largest)
    chosen = [reference.unpack_mask(m, s.shape) for m, s in zip(masks, scores, strict=True)]
    assert torch.cat(chosen).tolist() == expected.tolist()


@given(
    st.lists(anything, min_size=1, max_size=60).filter(lambda v: any(map(math.isnan, v))), floats, st.data()
)
def test_topk_refuses_any_nan(values, dtype, data):
    scores = _split(data, values, dtype)
    k = data.draw(st.integers(1, len(values)))
    with pytest.raises(ValueError, match=r"^topk_mask: scores\[\d+\] must not be NaN"):
        ops.topk_mask(scores, k)


@given(
    st.lists(st.tuples(anything, anything), min_size=1, max_size=80),
    wide,
    st.one_of(st.floats(0, 1), st.sampled_from([0.0, 0.5, 1.0])),
    st.data(),
)
def test_ratio_quantile_agrees_with_numpy(pairs, dtype, q, data):
    full = torch.tensor([abs(a) for a, _ in pairs], dtype=dtype)
    forget = torch.tensor([abs(b) for _, b in pairs], dtype=dtype)
    ratios = (forget / full).double()
    ratios = ratios[ratios.isfinite()].numpy()
    length = data.draw(st.integers(0, len(pairs)))
    split = [length, len(pairs) - length]
    fulls = [data.draw(layouts)(part) for part in full.split(split)]
    forgets = [data.draw(layouts)(part) for part in forget.split(split)]
    if ratios.size == 0:
        with pytest.raises(ValueError, match=r"^ratio_quantile: .*finite"):
            ops.ratio_quantile(fulls, forgets, q)
        return
    expected = float(np.quantile(ratios, q, method="linear"))
    limit = 2 * torch.finfo(dtype).eps * expected + spacing_at_zero(dtype)
    assert abs(float(ops.ratio_quantile(fulls, forgets, q)) - expected) <= limit


@given(st.lists(st.integers(0, 9), max_size=4), generators, layouts)
def test_masks_survive_a_round_trip(shape, generator, layout):
    mask = layout(torch.rand(shape, generator=generator) < 0.5)
    packed = ops.pack_mask(mask)
    expected = np.packbits(mask.numpy(), axis=None, bitorder="little")
    assert torch.equal(packed, torch.from_numpy(expected))
    assert torch.equal(ops.unpack_mask(layout(packed), shape), mask)


@given(st.integers(1, 40), st.integers(1, 40), floats, generators, st.data())
def test_gram_of_any_rows_in_any_pieces(n_rows, d, dtype, generator, data):
    inputs = normal((n_rows, d), dtype, "cpu", generator)
    gram = data.draw(layouts)(torch.zeros(d, d, dtype=torch.float64))
    cut = data.draw(st.integers(0, n_rows))
    for piece in (inputs[:cut], inputs[cut:]):
        ops.gram_accumulate_(gram, data.draw(read_only_layouts.filter(lambda f: f is not expanded))(piece))
    wide = inputs.double()
    magnitude = wide.abs().T @ wide.abs()
    limit = (n_rows + 2) * unit_roundoff(accumulator_dtype(dtype)) * magnitude
    assert_within([gram], [wide.T @ wide], [limit])
    assert_same_bits(gram, gram.T.clone())
    assert_gaps_untouched([gram])


@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 3),
    wide,
    generators,
    st.data(),
)
def test_gram_of_any_convolution(n_dims, n, channels, groups, dtype, generator, data):
    def draw(low, high):
        return [data.draw(st.integers(low, high)) for _ in range(n_dims)]

    kernel, stride, dilation = draw(1, 3), draw(1, 3), draw(1, 2)
    padding = [(data.draw(st.integers(0, 2)), data.draw(st.integers(0, 2))) for _ in range(n_dims)]
    least = [max(1, d * (k - 1) + 1 - sum(p)) for k, d, p in zip(kernel, dilation, padding, strict=True)]
    spatial = [size + data.draw(st.integers(0, 3)) for size in least]
    inputs = data.draw(layouts)(normal((n, channels * groups, *spatial), dtype, "cpu", generator))
    size = channels * math.prod(kernel)
    gram = torch.zeros((groups, size, size) if groups > 1 else (size, size), dtype=dtype)
    expected, magnitude = gram.double().clone(), gram.double().clone()
    kwargs = {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
    }
    reference.gram_conv_accumulate_(expected, inputs.double(), **kwargs)
    reference.gram_conv_accumulate_(magnitude, inputs.double().abs(), **kwargs)
    ops.gram_conv_accumulate_(gram, inputs, **kwargs)
    n_rows = n * math.prod(s + 4 for s in spatial)
    assert_within([gram], [expected], [(n_rows + 4) * unit_roundoff(dtype) * magnitude])
    assert_same_bits(gram, gram.mT.contiguous())


@given(st.integers(1, 3), st.integers(0, 4), st.integers(1, 12), floats, generators, st.data())
def test_projections_of_any_gradient(groups, rows, d, dtype, generator, data):
    k = data.draw(st.integers(0, d))
    basis = torch.linalg.qr(normal((groups, d, d), torch.float64, "cpu", generator)).Q[..., :k].to(dtype)
    basis = data.draw(read_only_layouts.filter(lambda f: f is not expanded))(
        basis if groups > 1 else basis[0]
    )
    grad = data.draw(layouts)(normal((groups * rows, d), dtype, "cpu", generator))
    for op in (ops.project_out, ops.project_onto):
        expected = getattr(reference, op.__name__)(grad.double(), basis.double())
        magnitude = grad.double().abs() + reference.project_onto(grad.double().abs(), basis.double().abs())
        limit = bound(magnitude, dtype, accumulator_dtype(dtype), d + k + 3)
        assert_within([op(grad, basis)], [expected], [limit])
        in_place = grad.clone()
        getattr(ops, op.__name__ + "_")(in_place, basis)
        assert torch.equal(bits(in_place), bits(op(grad, basis)))
