import itertools
import math
import os
import subprocess
import sys
import threading
import warnings
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from layer_calls import LAYERS
from op_cases import (
    CASES,
    DIRECT,
    FLOATS,
    LAYER_OPS,
    LAYOUTS,
    SHAPES,
    SIZES,
    WIDE,
    accumulator_dtype,
    any_number_of_threads,
    assert_gaps_untouched,
    assert_same_bits,
    assert_within,
    bits,
    bound,
    compiled,
    convolved,
    copied,
    doors,
    importance,
    laid_out,
    mapped,
    normal,
    orthonormal,
    random_mask,
    sliced,
    tensors_of,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.library import opcheck

from unlearn_ext import ops
from unlearn_ext.ops import reference

each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.schema)
each_writing_case = pytest.mark.parametrize(
    "case", [c for c in CASES if c.written], ids=lambda case: case.schema
)
each_float = pytest.mark.parametrize("dtype", FLOATS, ids=str)
each_wide = pytest.mark.parametrize("dtype", WIDE, ids=str)

NAN, INF = math.nan, math.inf


def _id(value):
    return getattr(value, "schema", None) or str(value).removeprefix("torch.").replace(" ", "_")


def _samples():
    # What depends on the number or the length of the tensors does not depend on the dtype: these are slow.
    costly = {"many": (torch.float32,), "large": (torch.float32, torch.bfloat16)}
    return [
        (case, variant, dtype)
        for case in CASES
        for variant, dtype in itertools.product(case.variants, case.dtypes)
        if dtype in costly.get(variant, case.dtypes) or case.dtypes[0] not in FLOATS
    ]


def _first(case):
    return case.variants[0], case.dtypes[0]


# ---- Generated from the table


@pytest.mark.parametrize("case, variant, dtype", _samples(), ids=_id)
def test_agrees_with_the_specification_in_float64(case, variant, dtype, device, generator):
    args, kwargs = case.sample(device, dtype, generator, variant)
    expected, bounds = case.expect(args, kwargs)
    assert_within(case.run(getattr(ops, case.name), args, kwargs), expected, bounds)


@pytest.mark.parametrize("case, variant", [(c, v) for c in CASES for v in c.variants], ids=_id)
def test_both_doors_give_the_same_bits(case, variant, device, generator):
    args, kwargs = case.sample(device, case.dtypes[0], generator, variant)
    every = [getattr(ops, case.name), *case.doors.values()]
    results = [case.run(door, copied(args), kwargs) for door in every]
    for outputs in results[1:]:
        assert len(outputs) == len(results[0])
        for output, expected in zip(outputs, results[0], strict=True):
            assert_same_bits(output, expected)


def _laid_out_samples():
    shaped = ("mixed", "image", "volume", "groups", "sequence", "tall", "kernel")
    return [
        (case, variant, layout, dtype)
        for case in CASES
        for variant, layout, dtype in itertools.product(case.variants, LAYOUTS, case.dtypes)
        if variant in shaped and dtype not in (torch.float64, torch.float16)
    ]


@pytest.mark.parametrize("case, variant, layout, dtype", _laid_out_samples(), ids=_id)
def test_strides_do_not_matter(case, variant, layout, dtype, device, generator):
    args, kwargs = case.sample(device, dtype, generator, variant)
    args = laid_out(case, args, layout)
    strides = [tensor.stride() for tensor in tensors_of(args)]
    expected, bounds = case.expect(args, kwargs)
    assert_within(case.run(getattr(ops, case.name), args, kwargs), expected, bounds)
    assert [tensor.stride() for tensor in tensors_of(args)] == strides
    assert_gaps_untouched([args[i] for i in case.written])


@any_number_of_threads
@pytest.mark.parametrize(
    "case, dtype", [(c, d) for c in CASES for d in c.dtypes if d != torch.float64], ids=_id
)
def test_same_bits_from_run_to_run_and_for_any_number_of_threads(case, dtype, device, generator):
    args, kwargs = case.sample(device, dtype, generator, "large")
    results = []
    for n_threads in (2, 2, 1, 4):
        torch.set_num_threads(n_threads)
        results.append(case.run(case.overload, copied(args), kwargs))
    for outputs in results[1:]:
        for output, expected in zip(outputs, results[0], strict=True):
            assert_same_bits(output, expected)


@pytest.mark.cuda
@each_case
def test_runs_on_the_current_stream(case, device, generator):
    if device != "cuda":
        pytest.skip("streams are a matter of CUDA devices")
    args, kwargs = case.sample(device, case.dtypes[0], generator, "large")
    expected = case.run(case.overload, copied(args), kwargs)
    # The arguments arrive late on a stream of their own: an op on another stream would read the zeros.
    late = mapped(torch.zeros_like, args)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        for tensor, value in zip(tensors_of(late), tensors_of(args), strict=True):
            tensor.copy_(value)
        outputs = case.outputs(late, case.overload(*late, **kwargs))
    stream.synchronize()
    for output, wanted in zip(outputs, expected, strict=True):
        assert_same_bits(output, wanted)


def _lesser_capabilities():
    info = ops.build_info()
    best_first = info["cpu_capabilities"]
    return best_first[best_first.index(info["cpu_capability"]) + 1 :]


@pytest.mark.parametrize("capability", _lesser_capabilities())
def test_kernels_for_lesser_cpus_pass_too(capability):
    chosen = "specification and (mixed or sizes or tall or groups or kernel) or exact or keep or stable_sort"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__, "-k", chosen],
        cwd=Path(__file__).parents[1],
        env=os.environ | {"UNLEARN_CPU_CAPABILITY": capability},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


@each_case
def test_passes_opcheck(case, device, generator):
    variant, dtype = _first(case)
    args, kwargs = case.sample(device, dtype, generator, variant)
    if case.name in ("project_out", "project_onto"):
        args[0].requires_grad_()
    opcheck(case.overload, tuple(args), kwargs)


def _assert_compiled_agrees(case, device, generator, backend):
    variant, dtype = _first(case)
    args, kwargs = case.sample(device, dtype, generator, variant)
    function = getattr(ops, case.name)

    def call(args):
        return function(*args, **kwargs)

    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend=backend)
    eager_args, compiled_args = copied(args), copied(args)
    expected = case.outputs(eager_args, call(eager_args))
    for output, wanted in zip(case.outputs(compiled_args, compiled(compiled_args)), expected, strict=True):
        assert_same_bits(output, wanted)


@each_case
def test_compiles_as_one_graph(case, device, generator):
    _assert_compiled_agrees(case, device, generator, "aot_eager")


@pytest.mark.slow
@each_case
def test_compiles_with_inductor(case, device, generator):
    _assert_compiled_agrees(case, device, generator, "inductor")


def test_compiles_for_dynamic_shapes(device):
    @torch.compile(fullgraph=True, backend="aot_eager", dynamic=True)
    def round_trip(mask):
        return ops.unpack_mask(ops.pack_mask(mask), mask.shape)

    for n in (5, 9, 64):
        mask = torch.arange(3 * n, device=device).view(3, n) % 3 == 0
        assert torch.equal(round_trip(mask), mask)


@each_case
def test_fakes_tell_shapes_dtypes_and_devices(case, generator):
    for variant in case.variants:
        if variant == "many":
            continue
        args, kwargs = case.sample("cpu", case.dtypes[0], generator, variant)
        real = list(tensors_of(case.overload(*args, **kwargs)))
        empty = not list(tensors_of(args))
        with FakeTensorMode():
            fakes = [
                mapped(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda"), tree)
                for tree in (args, kwargs)
            ]
            fake = list(tensors_of(case.overload(*fakes[0], **fakes[1])))
        assert [(t.shape, t.dtype, t.stride()) for t in fake] == [
            (t.shape, t.dtype, t.stride()) for t in real
        ]
        assert {t.device.type for t in fake} <= {"cpu" if empty else "cuda"}


@pytest.mark.parametrize("name", ["project_out", "project_onto"])
def test_fakes_of_projections_have_the_strides_of_what_is_projected(name):
    grad, basis = torch.randn(3, 4).T, torch.linalg.qr(torch.randn(3, 2))[0]
    real = getattr(ops, name)(grad, basis)
    with FakeTensorMode() as mode:
        fake = getattr(ops, name)(mode.from_tensor(grad), mode.from_tensor(basis))
    assert (fake.shape, fake.stride()) == (real.shape, real.stride())


# ---- Autograd, versions, modes


@each_writing_case
def test_writes_leaves_that_require_grad(case, device, generator):
    variant, dtype = _first(case)
    args, kwargs = case.sample(device, dtype, generator, variant)
    expected = case.run(case.overload, copied(args), kwargs)
    for door in (getattr(ops, case.name), *case.doors.values()):
        leaves = copied(args)
        for i in case.written:
            for tensor in tensors_of(leaves[i]):
                tensor.requires_grad_()
        versions = [tensor._version for i in case.written for tensor in tensors_of(leaves[i])]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            outputs = case.outputs(leaves, door(*leaves, **kwargs))
            sum(output.sum() for output in outputs).backward()
        for output, wanted, version in zip(outputs, expected, versions, strict=True):
            assert output.is_leaf
            assert output.requires_grad
            assert output._version > version
            assert_same_bits(output, wanted)


def test_a_write_invalidates_what_autograd_saved(device):
    param = torch.ones(3, device=device, requires_grad=True)
    loss = (param**2).sum()
    ops.masked_sgd_([param], [torch.ones(3, device=device)], [], [ops.pack_mask(param > 0)], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@each_case
def test_runs_on_inference_tensors(case, device, generator):
    variant, dtype = _first(case)
    args, kwargs = case.sample(device, dtype, generator, variant)
    expected = case.run(case.overload, copied(args), kwargs)
    for door in (getattr(ops, case.name), *case.doors.values()):
        with torch.inference_mode():
            outputs = case.run(door, copied(args), kwargs)
        for output, wanted in zip(outputs, expected, strict=True):
            assert_same_bits(output, wanted)


@pytest.mark.parametrize("op", [ops.project_out, ops.project_onto])
@pytest.mark.parametrize("shape, groups", [((3, 4), 1), ((4, 2, 3), 1), ((4, 3), 2)])
def test_projections_are_differentiable_in_the_gradient(op, shape, groups, device, generator):
    d = math.prod(shape[1:])
    basis = torch.stack([orthonormal(d, 2, torch.float64, device, generator) for _ in range(groups)])
    basis = basis if groups > 1 else basis[0]
    grad = normal(shape, torch.float64, device, generator).requires_grad_()
    assert torch.autograd.gradcheck(lambda g: op(g, basis), (grad,))
    assert torch.autograd.gradgradcheck(lambda g: op(g, basis), (grad,))


@pytest.mark.parametrize("op", [ops.project_out, ops.project_onto])
def test_projections_give_the_basis_no_gradient(op, device):
    grad = torch.ones(2, 3, device=device, requires_grad=True)
    basis = torch.eye(3, device=device)[:, :1].requires_grad_()
    op(grad, basis).sum().backward()
    assert grad.grad is not None
    assert basis.grad is None


def test_calls_from_several_threads_do_not_disturb_each_other(generator):
    samples = [case.sample("cpu", case.dtypes[0], generator, "large") for case in CASES]
    expected = [c.run(c.overload, copied(a), k) for c, (a, k) in zip(CASES, samples, strict=True)]
    failures = []

    def work():
        try:
            for case, (args, kwargs), wanted in zip(CASES, samples, expected, strict=True):
                outputs = case.run(case.overload, copied(args), kwargs)
                for output, one in zip(outputs, wanted, strict=True):
                    assert_same_bits(output, one)
        except AssertionError as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- Lists and memory


@pytest.mark.parametrize("door", doors(ops, "fisher_accumulate_"))
def test_one_call_takes_tensors_of_several_dtypes(door, device, generator):
    dtypes = [torch.float32, torch.float16, torch.float64, torch.bfloat16, torch.float32, torch.float64]
    grads = [normal((9, 5), dtype, device, generator) for dtype in dtypes]
    fisher = [importance((9, 5), dtype, device, generator) for dtype in dtypes]
    wide = [tensor.double() for tensor in fisher]
    reference.fisher_accumulate_(wide, grads, weight=0.5)
    door(fisher, grads, weight=0.5)
    assert_within(fisher, wide, [bound(w, f.dtype, f.dtype, 4) for w, f in zip(wide, fisher, strict=True)])


def test_one_optimizer_call_takes_parameters_of_several_dtypes(device, generator):
    dtypes = [torch.bfloat16, torch.float64, torch.float32, torch.float16, torch.float64]
    arguments = []
    for dtype in dtypes:
        state = accumulator_dtype(dtype)
        shape = (4, 33)
        arguments.append(
            (
                normal(shape, dtype, device, generator),
                normal(shape, dtype, device, generator),
                normal(shape, state, device, generator),
                random_mask(shape, device, generator),
            )
        )
    together, alone = copied(arguments), copied(arguments)
    ops.masked_sgd_(*zip(*together, strict=True), lr=0.1, momentum=0.9)
    for param, grad, buffer, mask in alone:
        ops.masked_sgd_([param], [grad], [buffer], [mask], lr=0.1, momentum=0.9)
    for one, other in zip(tensors_of(together), tensors_of(alone), strict=True):
        assert_same_bits(one, other)


def test_selected_counts_takes_lists_of_both_dtypes(device, generator):
    dtypes = [torch.float64, torch.float32, torch.float64, torch.float32]
    full = [importance((50,), dtype, device, generator) for dtype in dtypes]
    forget = [importance((50,), dtype, device, generator) for dtype in dtypes]
    alphas = [0.5, 2.0]
    assert torch.equal(
        ops.selected_counts(full, forget, alphas), reference.selected_counts(full, forget, alphas)
    )


def test_sequences_other_than_lists_are_fine(device):
    params = torch.nn.ParameterList([torch.ones(3, device=device), torch.ones(2, device=device)])
    grads = tuple(torch.ones_like(param) for param in params)
    masks = tuple(ops.pack_mask(torch.ones_like(param, dtype=torch.bool)) for param in params)
    ops.masked_sgd_(params, grads, (), masks, lr=0.5)
    assert [param.tolist() for param in params] == [[0.5] * 3, [0.5] * 2]


@pytest.mark.parametrize("door", doors(ops, "fisher_accumulate_"))
@pytest.mark.parametrize(
    "views",
    [
        lambda base: [base[:2], base[2:]],
        lambda base: [base[3:], base[:3]],
        lambda base: [base[:, :2], base[:, 2:]],
        lambda base: [base[:, 0::2], base[:, 1::2]],
        lambda base: list(base.T),
    ],
    ids=["rows", "rows backwards", "blocks of columns", "interleaved", "columns"],
)
def test_written_views_of_one_tensor_that_share_no_element_are_fine(door, views, device):
    base = torch.arange(30.0, device=device).view(5, 6)
    written = views(base)
    door(written, [torch.ones_like(view) for view in written])
    assert torch.equal(base, torch.arange(30.0, device=device).view(5, 6) + 1)


def test_read_only_tensors_may_share_memory(device, generator):
    grad = normal((4, 6), torch.float32, device, generator)
    fisher = [torch.zeros_like(grad) for _ in range(3)]
    ops.fisher_accumulate_(fisher[:2], [grad, grad])
    assert torch.equal(fisher[0], fisher[1])
    ops.fisher_accumulate_(fisher[2:], [grad[:1].expand(4, 6)])
    assert torch.equal(fisher[2], (grad[:1] ** 2).expand(4, 6))
    same = grad.abs()
    assert ops.selected_counts([same], [same], [1.0, 0.5]).tolist() == [[0], [24]]


def _lazily_negated(n, device):
    """The imaginary part of a conjugate: a view whose memory holds the opposite sign."""
    view = torch.complex(torch.ones(n), torch.arange(1.0, n + 1)).to(device).conj().imag
    assert view.is_neg()
    return view


@pytest.mark.parametrize("door", doors(ops))
@pytest.mark.parametrize("n", [1, 4])
def test_lazily_negated_gradients_are_read_with_their_sign(n, door, device):
    params = torch.zeros(n, device=device)
    masks = [ops.pack_mask(torch.ones(n, dtype=torch.bool, device=device))]
    door.masked_sgd_([params], [_lazily_negated(n, device)], [], masks, lr=1.0)
    assert params.tolist() == list(range(1, n + 1))


@pytest.mark.parametrize("door", doors(ops))
@pytest.mark.parametrize("n", [1, 4])
def test_lazily_negated_parameters_are_refused(n, door, device):
    params = _lazily_negated(n, device)
    before = params.clone()
    masks = [ops.pack_mask(torch.ones(n, dtype=torch.bool, device=device))]
    # torch's own dispatcher refuses them with a RuntimeError.
    with pytest.raises((RuntimeError, ValueError)):
        door.masked_sgd_([params], [torch.ones(n, device=device)], [], masks, lr=1.0)
    assert torch.equal(params, before)


@pytest.mark.slow
def test_twenty_thousand_tensors_in_one_call(device, generator):
    shapes = [(i % 5 + 1,) for i in range(20_000)]
    grads = [normal(shape, torch.float32, device, generator) for shape in shapes]
    fisher = [torch.zeros(shape, device=device) for shape in shapes]
    ops.fisher_accumulate_(fisher, grads)
    assert all(torch.equal(f, g * g) for f, g in zip(fisher, grads, strict=True))
    masks = ops.topk_mask(grads, 30_000)
    chosen = [ops.unpack_mask(mask, shape) for mask, shape in zip(masks, shapes, strict=True)]
    assert torch.equal(torch.cat(chosen), torch.cat(grads) >= torch.cat(grads).topk(30_000).values.min())
    ops.apply_mask_(grads, masks)
    assert sum(int(grad.count_nonzero()) for grad in grads) == 30_000


def _clear_in_any_order(shapes, orders, dtypes, device, generator):
    """apply_mask_ to a list of tensors in several memory orders, against plain indexing."""
    grads, masks, wanted = [], [], []
    for shape, order, dtype in zip(shapes, orders, dtypes, strict=True):
        grads.append(torch.ones(shape, dtype=dtype, device=device).contiguous(memory_format=order))
        flags = (torch.rand(shape, generator=generator) < 0.5).to(device)
        masks.append(ops.pack_mask(flags))
        wanted.append(flags.to(dtype))
    ops.apply_mask_(grads, masks)
    assert all(torch.equal(grad, clear) for grad, clear in zip(grads, wanted, strict=True))


def test_masks_are_brought_into_the_memory_order_of_each_tensor_of_a_list(device, generator):
    orders = [torch.channels_last, torch.contiguous_format, torch.channels_last, torch.channels_last]
    shapes = [(3, 5, 2, 3), (2, 3, 3, 2), (0, 4, 2, 2), (9, 2, 3, 3)]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.float16]
    _clear_in_any_order(shapes * 3, orders * 3, dtypes * 3, device, generator)


@pytest.mark.slow
def test_masks_of_more_scalars_than_wait_for_their_memory_order_at_once(device, generator):
    shapes = [(2**22, 3, 1, 3), (2**22, 3, 3, 1), (2, 3, 2, 2)]  # 2^26 wait at most
    _clear_in_any_order(shapes, [torch.channels_last] * 3, [torch.float16] * 3, device, generator)


# ---- Tensors of more than 2^31 scalars, each test under 16 GB

HUGE = 2**31 + 77


def _chunks(n, size=2**26):
    return ((begin, min(begin + size, n)) for begin in range(0, n, size))


@pytest.mark.slow
def test_pack_and_unpack_more_than_two_billion_scalars():
    mask = torch.zeros(HUGE, dtype=torch.bool)
    ones = [0, 8, 2**31 - 1, 2**31, 2**31 + 3, HUGE - 1]
    mask[ones] = True
    packed = ops.pack_mask(mask)
    assert packed.shape == ((HUGE + 7) // 8,)
    assert packed.nonzero().flatten().tolist() == sorted({i // 8 for i in ones})
    for i in ones:
        assert int(packed[i // 8]) >> (i % 8) & 1
    assert torch.equal(ops.unpack_mask(packed, (HUGE,)), mask)


@pytest.mark.slow
def test_apply_mask_to_more_than_two_billion_scalars():
    grad = torch.ones(HUGE, dtype=torch.float16)
    packed = torch.full(((HUGE + 7) // 8,), 0b0101_1010, dtype=torch.uint8)
    ops.apply_mask_([grad], [packed])
    pattern = torch.tensor([0, 1, 0, 1, 1, 0, 1, 0], dtype=torch.float16)
    for begin, end in _chunks(HUGE):
        assert torch.equal(grad[begin:end], pattern.repeat((end - begin + 7) // 8)[: end - begin]), begin


@pytest.mark.slow
def test_accumulate_more_than_two_billion_scalars():
    grad = torch.full((HUGE,), 2.0, dtype=torch.float16)
    fisher = torch.full((HUGE,), 1.0)
    ops.fisher_accumulate_([fisher], [grad], weight=0.5, decay=3.0)
    for begin, end in _chunks(HUGE):
        assert bool((fisher[begin:end] == 5.0).all()), begin


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fisher_linear_", "fisher_bias_", "fisher_affine_"])
def test_fisher_of_more_than_two_billion_positions(name):
    grads = torch.zeros(3, HUGE // 3 + 1, 1, dtype=torch.float16)
    for sample, position in ((0, 0), (2, 5), (2, -1), (2, -2)):
        grads[sample, position] = 2.0
    args = {"fisher_linear_": [grads.new_ones(1, 1, 1).expand_as(grads), grads], "fisher_bias_": [grads]}
    fisher = torch.zeros((1, 1) if name == "fisher_linear_" else (1,))
    getattr(ops, name)(fisher, *args.get(name, [grads, grads]))
    # Sums of 2 and of 6, or of 4 and of 12.
    assert fisher.item() == (4 + 36 if name in args else 16 + 144)


@pytest.mark.slow
def test_fisher_of_an_embedding_of_more_than_two_billion_scalars():
    n_rows = HUGE // 64 + 1
    fisher = torch.zeros(n_rows, 64)
    ops.fisher_embedding_(fisher, torch.tensor([[0, n_rows - 1, n_rows - 1]]), torch.ones(1, 3, 64))
    assert bool((fisher[0] == 1.0).all())
    assert bool((fisher[-1] == 4.0).all())
    for begin, end in _chunks(n_rows, 2**20):
        rows = fisher[max(begin, 1) : min(end, n_rows - 1)]
        assert not rows.any(), begin


@pytest.mark.slow
@pytest.mark.parametrize("positions", [1, 2])
def test_fisher_of_a_linear_layer_of_more_than_two_billion_scalars(positions):
    outputs, inputs = 2**15 + 3, 2**16
    fisher = torch.zeros(outputs, inputs)
    steps = torch.arange(inputs) % 5
    ops.fisher_linear_(
        fisher,
        steps.to(torch.bfloat16).expand(1, positions, inputs),
        torch.ones(1, positions, outputs, dtype=torch.bfloat16),
    )
    expected = (positions * steps.float()) ** 2
    for begin, end in _chunks(outputs, 2**10):
        assert bool((fisher[begin:end] == expected).all()), begin


# ---- Fisher accumulation


@each_float
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("weight, decay", [(1.0, 1.0), (0.25, 0.0), (0.0, 0.5), (-1.0, 1.0)])
def test_fisher_follows_nan_and_inf(power, weight, decay, dtype, device):
    values = [NAN, INF, -INF, 0.0, -0.0, 1.0]
    grid = list(itertools.product(values, values))
    fisher = torch.tensor([f for f, _ in grid], dtype=accumulator_dtype(dtype), device=device)
    grads = torch.tensor([g for _, g in grid], dtype=dtype, device=device)
    expected = fisher.double()
    reference.fisher_accumulate_([expected], [grads], weight=weight, decay=decay, power=power)
    ops.fisher_accumulate_([fisher], [grads], weight=weight, decay=decay, power=power)
    assert_within([fisher], [expected], [torch.zeros(())])


def test_fisher_squares_small_half_precision_gradients_in_float32(device):
    grads = torch.tensor([6e-8, 1e-4, -1e-3], dtype=torch.float16, device=device)
    fisher = torch.zeros(3, device=device)
    ops.fisher_accumulate_([fisher], [grads])
    assert torch.equal(fisher, grads.float() ** 2)
    assert (fisher > 0).all()


@each_wide
def test_fisher_keeps_subnormal_squares(dtype, device):
    smallest = torch.finfo(dtype).smallest_normal
    grads = torch.tensor([math.sqrt(smallest) / 16] * 70, dtype=dtype, device=device)
    fisher = torch.zeros(70, dtype=dtype, device=device)
    ops.fisher_accumulate_([fisher], [grads])
    assert torch.equal(fisher, grads * grads)
    assert ((fisher > 0) & (fisher < smallest)).all()


# ---- Fisher diagonals of layers

LAYER_CASES = [case for case in CASES if case.name in LAYER_OPS]
LAYER_SAMPLES = [(case, variant) for case in LAYER_CASES for variant in case.variants]
each_layer_sample = pytest.mark.parametrize("case, variant", LAYER_SAMPLES, ids=_id)


def _small_integers(case, variant, dtype, device, generator):
    """Arguments of which every product and sum is a number of the accumulator."""
    args, kwargs = case.sample(device, dtype, generator, variant)

    def drawn(tensor):
        integers = torch.randint(-2, 3, tensor.shape, generator=generator)
        return integers.to(tensor.dtype).to(device) if tensor.is_floating_point() else tensor

    return [drawn(args[0]).abs(), *map(drawn, args[1:])], kwargs


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("power", [1, 2])
def test_layers_are_those_of_autograd(name, power, device, generator):
    layer = LAYERS[name](device, generator)
    fisher = torch.ones(layer.gradients.shape[1:], dtype=torch.float64, device=device)
    getattr(ops, layer.name)(fisher, *layer.tensors, weight=0.5, power=power, **layer.constants)
    expected = 1 + 0.5 * (layer.gradients.abs() ** power).sum(0)
    assert torch.allclose(fisher, expected, rtol=1e-12, atol=0)


@each_layer_sample
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_small_integers_give_exact_diagonals(case, variant, dtype, device, generator):
    args, kwargs = _small_integers(case, variant, dtype, device, generator)
    for weight, power in ((1.0, 1), (1.0, 2), (-0.5, 2), (0.0, 1)):
        constants = kwargs | {"weight": weight, "power": power}
        fisher, expected = args[0].clone(), args[0].double()
        case.reference(expected, *args[1:], **constants)
        getattr(ops, case.name)(fisher, *args[1:], **constants)
        assert_same_bits(fisher.double(), expected)


@pytest.mark.parametrize(
    "case, variant", [(c, v) for c, v in LAYER_SAMPLES if v in ("long", "long and wide", "large")], ids=_id
)
def test_long_sums_in_float32_err_by_less_than_a_hundred_thousandth(case, variant, device, generator):
    args, kwargs = case.sample(device, torch.float32, generator, variant)
    (expected,), _ = case.expect(args, kwargs)
    (fisher,) = case.run(getattr(ops, case.name), args, kwargs)
    assert (fisher - expected).abs().max() < 1e-5 * expected.max()


@each_layer_sample
def test_samples_add_up_in_any_order_and_in_any_batches(case, variant, device, generator):
    args, kwargs = case.sample(device, torch.float32, generator, variant)
    expected, bounds = case.expect(args, kwargs)
    n = args[1].shape[0]
    order = torch.randperm(n, generator=generator)
    shuffled = [tensor[order] for tensor in args[1:]]
    for sizes in ([1] * n, [n // 3, n - n // 3]):
        fisher = args[0].clone()
        for batch in zip(*(tensor.split(sizes) for tensor in shuffled), strict=True):
            getattr(ops, case.name)(fisher, *batch, **kwargs)
        assert_within([fisher], expected, bounds)


@any_number_of_threads
@each_layer_sample
def test_diagonals_have_the_same_bits_for_any_number_of_threads(case, variant, device, generator):
    args, kwargs = case.sample(device, torch.float32, generator, variant)
    results = []
    for n_threads in (1, 2, 3):
        torch.set_num_threads(n_threads)
        results.append(args[0].clone())
        getattr(ops, case.name)(results[-1], *args[1:], **kwargs)
    for result in results[1:]:
        assert_same_bits(result, results[0])


# Large enough to be cut into blocks, of which there are as many as threads share evenly.
@any_number_of_threads
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("samples, positions, inputs, outputs", [(3, 40, 700, 800), (2, 300, 1300, 400)])
def test_diagonals_of_large_layers_have_the_same_bits_for_any_number_of_threads(
    dtype, samples, positions, inputs, outputs, device, generator
):
    rows = torch.randn(samples, positions, inputs, generator=generator).to(device, dtype)
    grads = torch.randn(samples, positions, outputs, generator=generator).to(device, dtype)
    results = []
    for n_threads in (1, 2, 5, 8):
        torch.set_num_threads(n_threads)
        results.append(torch.zeros(outputs, inputs, device=device))
        ops.fisher_linear_(results[-1], rows, grads)
    for result in results[1:]:
        assert_same_bits(result, results[0])


@each_layer_sample
def test_values_may_be_repeated_by_strides_of_zero(case, variant, device, generator):
    args, kwargs = case.sample(device, torch.float32, generator, variant)
    n_dims = args[1].dim()
    # The gradient of a sum repeats one number, that of a mean over positions one row.
    for axes in (range(n_dims), range(1, n_dims), range(1, n_dims - 1), [n_dims - 1]):
        repeated = [args[0].clone()]
        for tensor in args[1:]:
            one = tensor
            for axis in axes:
                one = one[(slice(None),) * axis + (slice(0, 1),)] if axis < one.dim() else one
            repeated.append(one.expand(tensor.shape))
        expected, bounds = case.expect(repeated, kwargs)
        assert_within(case.run(getattr(ops, case.name), repeated, kwargs), expected, bounds)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize(
    "case, variant",
    [
        (c, v)
        for c, v in LAYER_SAMPLES
        if v in ("sequence", "vectors", "tall", "image", "groups", "depthwise")
    ],
    ids=_id,
)
@each_float
def test_nan_and_inf_reach_what_depends_on_them(dtype, case, variant, value, device, generator):
    args, kwargs = _small_integers(case, variant, dtype, device, generator)
    if "padding" in kwargs:
        # Whether a gradient meets the zeros around an image is left to the kernel, and 0 * inf is NaN.
        kwargs["padding"] = [0] * len(kwargs["stride"])
        convolution = {name: kwargs[name] for name in ("stride", "padding", "dilation")}
        size = convolved(args[1].shape[2:], kernel_size=args[0].shape[2:], **convolution)
        args[2] = args[2][(..., *map(slice, size))]
    for i, tensor in enumerate(args):
        if not tensor.is_floating_point():
            continue
        for place in (0, tensor.numel() // 2, tensor.numel() - 1):
            changed = copied(args)
            changed[i].view(-1)[place] = value
            expected = changed[0].double()
            case.reference(expected, *changed[1:], **kwargs)
            assert not expected.isfinite().all()
            assert expected.numel() < 5 or expected.isfinite().any()
            limits = [expected.abs().nan_to_num() * 8 * torch.finfo(changed[0].dtype).eps]
            assert_within(case.run(getattr(ops, case.name), changed, kwargs), [expected], limits)


@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("size", [2.0**-20, 2.0**15], ids=["small", "large"])
def test_half_precision_gradients_are_multiplied_and_squared_in_float32(size, positions, device):
    # The squares, and the products of large ones, are out of the range of float16.
    grads = torch.full((2, positions, 70), size, dtype=torch.float16, device=device)
    ones = torch.ones_like(grads)
    square = (positions * size) ** 2
    for name, tensors, shape, each in (
        ("fisher_linear_", (ones, grads), (70, 70), square),
        ("fisher_linear_", (grads, grads), (70, 70), square * size**2),
        ("fisher_bias_", (grads,), (70,), square),
        ("fisher_affine_", (ones, grads), (70,), square),
        ("fisher_affine_", (grads, grads), (70,), square * size**2),
    ):
        fisher = torch.zeros(shape, device=device)
        getattr(ops, name)(fisher, *tensors)
        assert torch.equal(fisher, torch.full_like(fisher, 2 * each))
    fisher = torch.zeros(1, 70, device=device)
    ops.fisher_embedding_(fisher, torch.zeros(2, positions, dtype=torch.int64, device=device), grads)
    assert torch.equal(fisher, torch.full_like(fisher, 2 * square))


@pytest.mark.parametrize(
    "convolution, lists",
    [
        ({"stride": 2, "padding": 1, "dilation": 1}, ([2, 2], [1, 1], [1, 1])),
        ({"stride": (1, 1), "padding": [(1, 0), (2, 1)], "dilation": 1}, ([1, 1], [1, 0, 2, 1], [1, 1])),
        ({"stride": [1, 2], "padding": [(1, 2), 1], "dilation": [2, 1]}, ([1, 2], [1, 2, 1, 1], [2, 1])),
        ({"stride": 1, "padding": [0, 2], "dilation": 1}, ([1, 1], [0, 2], [1, 1])),
    ],
    ids=["ints", "pairs", "an int among pairs", "one int per dimension"],
)
def test_constants_of_a_fisher_convolution_may_be_ints_and_pairs(convolution, lists, device, generator):
    inputs = normal((2, 3, 7, 6), torch.float32, device, generator)
    schema = dict(zip(("stride", "padding", "dilation"), lists, strict=True))
    size = convolved((7, 6), kernel_size=(2, 3), **schema)
    grads = normal((2, 4, *size), torch.float32, device, generator)
    diagonals = [torch.zeros(4, 3, 2, 3, device=device) for _ in range(3)]
    ops.fisher_conv_(diagonals[0], inputs, grads, **convolution)
    DIRECT.fisher_conv_(diagonals[1], inputs, grads, **schema)
    reference.fisher_conv_(diagonals[2], inputs, grads, **convolution)
    assert_same_bits(diagonals[0], diagonals[1])
    assert torch.allclose(diagonals[0], diagonals[2], rtol=1e-5, atol=1e-5)


def test_a_diagonal_may_lie_between_the_values_that_are_read(device, generator):
    base = normal((4, 9), torch.float32, device, generator)
    expected = base.clone()
    reference.fisher_linear_(expected[:, ::3], base[:, 1::3], base[:, 2::3].repeat(1, 2)[:, :4])
    ops.fisher_linear_(base[:, ::3], base[:, 1::3], base[:, 2::3].repeat(1, 2)[:, :4])
    assert torch.allclose(base, expected, rtol=1e-5, atol=1e-5)
    assert_same_bits(base[:, 1::3], expected[:, 1::3])


@pytest.mark.parametrize("door", doors(ops))
def test_lazily_negated_diagonals_are_written(door, device):
    fisher = _lazily_negated(4, device)
    before, ones = fisher.clone(), torch.ones(2, 4, device=device)
    # torch's dispatcher hands the op a copy, and writes that back.
    door.fisher_bias_(fisher, ones)
    assert torch.equal(fisher, before + 2)


def _written(name):
    """A call of an op that writes a single tensor: shapes, that of the written one first, and settings."""
    wide = {"stride": [1], "padding": [0], "dilation": [1]}
    return {
        "fisher_linear_": ((4, 3), (2, 5, 3), (2, 5, 4), {}),
        "fisher_conv_": ((4, 3, 2), (2, 3, 6), (2, 4, 5), wide),
        "fisher_bias_": ((4,), (2, 4), {}),
        "fisher_affine_": ((4,), (2, 4), (2, 4), {}),
        "fisher_embedding_": ((5, 4), None, (2, 3, 4), {}),
        "gram_accumulate_": ((4, 4), (6, 4), {}),
        "gram_conv_accumulate_": ((6, 6), (2, 3, 6), {"kernel_size": [2], **wide}),
        "project_out_": ((4, 3), (3, 2), {}),
        "project_onto_": ((4, 3), (3, 2), {}),
    }[name]


WRITING = [
    name
    for name in sorted(set(ops.__all__) - {"build_info"})
    for first in torch._C._get_schema(f"unlearn_ext::{name}", "").arguments[:1]
    if str(first.type) == "Tensor" and first.is_write
]


@pytest.mark.parametrize("name", WRITING)
@pytest.mark.parametrize("door", doors(ops))
def test_ops_that_write_one_tensor_take_lazily_negated_ones(door, name, device, generator):
    # torch's fallback for them reads freed memory after an op that returns nothing.
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"unlearn_ext::{name}", "Negative")
    *shapes, settings = _written(name)
    values = [
        torch.arange(6, device=device).view(2, 3) % 5
        if shape is None
        else normal(shape, torch.float32, device, generator)
        for shape in shapes
    ]

    def negated(value):
        return torch.complex(torch.ones_like(value), -value).conj().imag

    for lazily in range(len(values)):
        if not values[lazily].is_floating_point():
            continue
        plain = [value.clone() for value in values]
        lazy = [negated(value) if place == lazily else value.clone() for place, value in enumerate(values)]
        assert lazy[lazily].is_neg()
        for _ in range(2):
            getattr(door, name)(*plain, **settings)
            getattr(door, name)(*lazy, **settings)
        assert torch.equal(lazy[0].resolve_neg(), plain[0])


@pytest.mark.cuda
def test_a_gpu_skips_indices_out_of_range(device):
    if device != "cuda":
        pytest.skip("an error on the CPU")
    indices = torch.tensor([[0, -1, 3], [2**40, 2, 2], [-(2**63), 3, 4]], device=device)
    fisher = torch.zeros(4, 1, device=device)
    ops.fisher_embedding_(fisher, indices, torch.ones(3, 3, 1, device=device))
    assert fisher.flatten().tolist() == [1.0, 0.0, 4.0, 2.0]


def _peak_memory(call, device):
    """Most bytes in use during a call beyond those in use before."""
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before

    def resident(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

    try:
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    except OSError as error:
        pytest.skip(f"no way to reset the peak of memory: {error}")
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


def _memory_calls(device):
    def rand(*shape):
        return torch.rand(shape, device=device)

    images, image_grads = rand(16, 32, 64, 64), rand(16, 4, 64, 64)
    same = {"stride": 1, "padding": 2, "dilation": 1}
    indices = torch.randint(0, 20_000, (64, 8), device=device)
    return {
        # What must not be stored: the gradients of all samples, or all patches.
        "vectors": (ops.fisher_linear_, rand(512, 512), (rand(256, 512), rand(256, 512)), {}, 256 * 512**2),
        "sequences": (
            ops.fisher_linear_,
            rand(512, 512),
            (rand(256, 4, 512), rand(256, 4, 512)),
            {},
            256 * 512**2,
        ),
        "patches": (
            ops.fisher_conv_,
            rand(4, 32, 5, 5),
            (images, image_grads),
            same,
            images.numel() * 25,
        ),
        "tables": (
            ops.fisher_embedding_,
            rand(20_000, 16),
            (indices, rand(64, 8, 16)),
            {},
            64 * 20_000 * 16,
        ),
    }


@compiled
@pytest.mark.parametrize("name", ["vectors", "sequences", "patches", "tables"])
def test_neither_gradients_of_samples_nor_patches_are_stored(name, device):
    op, fisher, tensors, kwargs, n_scalars = _memory_calls(device)[name]
    assert _peak_memory(lambda: op(fisher, *tensors, **kwargs), device) < n_scalars * 4 / 4


# ---- Selective dampening


def _bit_patterns(shape, dtype, device, generator):
    """Any bits: NaNs of any payload, infinities, subnormals, both zeros."""
    integer = bits(torch.zeros((), dtype=dtype)).dtype
    low, high = torch.iinfo(integer).min, torch.iinfo(integer).max
    patterns = torch.randint(low, high, shape, generator=generator, dtype=torch.int64).to(integer)
    # Random bits are rarely special in the wide dtypes: give a third of them a full exponent.
    exponent = bits(torch.tensor(INF, dtype=dtype))
    patterns = torch.where(torch.rand(shape, generator=generator) < 0.33, patterns | exponent, patterns)
    return patterns.view(dtype).to(device)


@each_float
@pytest.mark.parametrize("exponent", [1.0, 0.5])
def test_dampening_keeps_the_bits_of_what_is_not_selected(exponent, dtype, device, generator):
    shape = (4099,)
    params = _bit_patterns(shape, dtype, device, generator)
    full, forget = (_bit_patterns(shape, accumulator_dtype(dtype), device, generator) for _ in range(2))
    full, forget = full.abs(), forget.abs()
    before = params.clone()
    selected = torch.tensor(
        [
            math.isfinite(a) and math.isfinite(b) and Fraction(b) > Fraction(1.5) * Fraction(a)
            for a, b in zip(full.tolist(), forget.tolist(), strict=True)
        ],
        device=device,
    )
    ops.selective_dampen_([params], [full], [forget], alpha=1.5, lambda_=0.5, exponent=exponent)
    assert_same_bits(params[~selected], before[~selected])
    assert 0 < int(selected.sum()) < selected.numel()
    assert int(selected.sum()) == int(ops.selected_counts([full], [forget], [1.5]))
    finite = selected & before.isfinite() & (before != 0)
    assert (params[finite].abs() < before[finite].abs()).all()


@each_wide
def test_dampening_selects_strictly_and_without_rounding_the_product(dtype, device):
    one = torch.tensor(1.0, dtype=dtype)
    up, down = (torch.nextafter(one, torch.tensor(to, dtype=dtype)) for to in (2.0, 0.0))
    alpha, full = up.item(), up
    # alpha * full = 1 + 2 eps + eps^2, which rounds to 1 + 2 eps.
    tie = torch.nextafter(up, torch.tensor(2.0, dtype=dtype))
    above = torch.nextafter(tie, torch.tensor(2.0, dtype=dtype))
    forget = torch.stack([up, tie, above, down]).to(device)
    full = full.expand(4).contiguous().to(device)
    params = torch.ones(4, dtype=dtype, device=device)
    ops.selective_dampen_([params], [full], [forget], alpha=alpha, lambda_=0.5)
    assert (params < 1).tolist() == [False, False, True, False]
    # (1 - eps/2) (1 + eps) = 1 + eps/2 - eps^2/2, which rounds to 1: equal to forget only if rounded.
    forget = one.expand(70).contiguous().to(device)
    full = down.expand(70).contiguous().to(device)
    assert ops.selected_counts([full], [forget], [up.item(), 1.0]).tolist() == [[0], [70]]


@each_wide
def test_equal_importances_are_not_selected(dtype, device, generator):
    same = importance((1000,), dtype, device, generator)
    params = normal((1000,), dtype, device, generator)
    before = params.clone()
    ops.selective_dampen_([params], [same], [same], alpha=1.0, lambda_=0.1)
    assert_same_bits(params, before)


@each_wide
def test_selection_is_exact_among_subnormal_importances(dtype, device):
    step = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    pairs = [(a, b) for a in range(20) for b in range(20)]
    full = torch.tensor([a for a, _ in pairs], dtype=dtype, device=device) * step
    forget = torch.tensor([b for _, b in pairs], dtype=dtype, device=device) * step
    for alpha in (0.9375, 0.96875, 1.03125, 0.25):
        counts = ops.selected_counts([full], [forget], [alpha])
        assert counts.item() == sum(b > alpha * a for a, b in pairs)
        params = torch.ones(len(pairs), dtype=dtype, device=device)
        ops.selective_dampen_([params], [full], [forget], alpha=alpha, lambda_=0.0)
        assert (params == 0).tolist() == [b > alpha * a for a, b in pairs]


@each_wide
def test_alpha_is_rounded_to_the_importances(dtype, device):
    alpha = 1.1
    rounded = torch.tensor(alpha, dtype=dtype)
    full = torch.ones(3, dtype=dtype, device=device)
    forget = torch.stack([torch.nextafter(rounded, torch.tensor(v, dtype=dtype)) for v in (0.0, 1.1, 2.0)])
    forget[1] = rounded
    assert ops.selected_counts([full], [forget.to(device)], [alpha]).item() == 1


@pytest.mark.parametrize("name", ["full", "forget"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@each_float
def test_importances_that_are_not_finite_select_nothing(dtype, value, name, device):
    state = accumulator_dtype(dtype)
    importances = {"full": torch.ones(70, dtype=state), "forget": torch.full((70,), 8.0, dtype=state)}
    importances[name].fill_(value)
    full, forget = importances["full"].to(device), importances["forget"].to(device)
    params = torch.full((70,), 3.0, dtype=dtype, device=device)
    ops.selective_dampen_([params], [full], [forget], alpha=1.0, lambda_=0.5)
    assert (params == 3.0).all()
    assert ops.selected_counts([full], [forget], [0.0, 1.0]).tolist() == [[0], [0]]


def test_a_scalar_without_full_importance_becomes_zero_and_beta_min_prevents_it(device):
    zero, one = torch.zeros(3, device=device), torch.ones(3, device=device)
    for beta_min in (0.0, 0.25):
        params = torch.tensor([2.0, -2.0, 0.0], device=device)
        ops.selective_dampen_([params], [zero], [one], alpha=1.0, lambda_=1.0, beta_min=beta_min)
        assert params.tolist() == [2 * beta_min, -2 * beta_min, 0.0]


def test_beta_max_bounds_the_factor_from_above(device):
    full, forget = torch.ones(3, device=device), torch.full((3,), 2.0, device=device)
    for beta_max, expected in ((1.0, 1.0), (3.0, 3.0), (10.0, 5.0)):
        params = torch.ones(3, device=device)
        ops.selective_dampen_([params], [full], [forget], alpha=1.0, lambda_=10.0, beta_max=beta_max)
        assert params.tolist() == [expected] * 3


@each_wide
def test_selected_counts_agree_with_brute_force(dtype, device, generator):
    shapes = [(n,) for n in SIZES]
    full = [importance(shape, dtype, device, generator) for shape in shapes]
    forget = [importance(shape, dtype, device, generator) for shape in shapes]
    alphas = [0.0, 2.0, 0.5, 0.5, 1e-3, 1e3, 10.0] + [1 + i / 64 for i in range(70)]
    alphas = [float(torch.tensor(alpha, dtype=dtype)) for alpha in alphas]
    expected = [
        [int((b.double() > alpha * a.double()).sum()) for a, b in zip(full, forget, strict=True)]
        for alpha in alphas
    ]
    assert ops.selected_counts(full, forget, alphas).tolist() == expected
    assert ops.selected_counts(full, forget, []).shape == (0, len(shapes))


# ---- Quantile of ratios


def _numpy_quantile(full, forget, q):
    with np.errstate(all="ignore"):
        ratios = np.concatenate(
            [
                (b / a).ravel()
                for a, b in zip(
                    [t.cpu().numpy() for t in full], [t.cpu().numpy() for t in forget], strict=True
                )
            ]
        )
    ratios = np.where(np.isfinite(ratios), ratios, np.nan)
    return float(np.nanquantile(ratios.astype(np.float64), q, method="linear"))


@each_wide
@pytest.mark.parametrize("q", [0.0, 1.0, 0.5, 0.25, 0.9, 0.999, 1 / 3, 1e-9])
def test_ratio_quantile_agrees_with_numpy(dtype, q, device, generator):
    for shapes in (SHAPES["mixed"], SHAPES["sizes"], [(1,)], [(2,)], [(0,), (3,)], SHAPES["large"]):
        full = [importance(shape, dtype, device, generator) for shape in shapes]
        forget = [importance(shape, dtype, device, generator) for shape in shapes]
        full[-1].flatten()[0] = 2.0
        result = ops.ratio_quantile(full, forget, q)
        assert (result.shape, result.dtype, result.device.type) == ((), dtype, device)
        expected = _numpy_quantile(full, forget, q)
        assert float(result) == pytest.approx(expected, rel=2 * torch.finfo(dtype).eps, abs=0)


@each_wide
def test_ratio_quantile_leaves_out_ratios_that_are_not_finite(dtype, device):
    full = torch.tensor([0.0, 0.0, 1.0, NAN, 1.0, INF, 1e-30, 1.0, 2.0, 4.0], dtype=dtype, device=device)
    forget = torch.tensor([0.0, 1.0, NAN, 1.0, INF, INF, 1e30, 0.0, 4.0, 4.0], dtype=dtype, device=device)
    # 1e30 / 1e-30 is Inf in float32 and a number in float64.
    kept = [0.0, 1.0, 2.0] if dtype == torch.float32 else [0.0, 1.0, 2.0, 1e60]
    for q in (0.0, 0.25, 0.5, 1.0):
        expected = float(np.quantile(kept, q))
        assert float(ops.ratio_quantile([full], [forget], q)) == pytest.approx(expected, rel=1e-6)


@each_wide
def test_ratio_quantile_of_signed_and_subnormal_ratios(dtype, device):
    tiny = torch.finfo(dtype).smallest_normal / 4
    forget = torch.tensor([-3.0, -tiny, -0.0, 0.0, tiny, 2 * tiny, 5.0], dtype=dtype, device=device)
    full = torch.ones_like(forget)
    for index in range(7):
        assert float(ops.ratio_quantile([full], [forget], index / 6)) == float(forget[index])


@each_wide
def test_ratio_quantile_of_equal_ratios(dtype, device):
    forget = torch.full((5000,), 0.3, dtype=dtype, device=device)
    full = torch.ones_like(forget)
    for q in (0.0, 0.37, 1.0):
        assert torch.equal(ops.ratio_quantile([full], [forget], q), forget[0])


# ---- Packed masks


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, *SIZES, 100_003])
def test_packing_is_that_of_numpy(n, device, generator):
    mask = torch.rand(n, generator=generator) < 0.4
    packed = ops.pack_mask(mask.to(device))
    assert packed.dtype == torch.uint8
    assert packed.device.type == device
    expected = np.packbits(mask.numpy(), bitorder="little")
    assert torch.equal(packed.cpu(), torch.from_numpy(expected))
    assert torch.equal(ops.unpack_mask(packed, (n,)).cpu(), mask)


def test_masks_are_row_major_whatever_their_strides(device, generator):
    mask = (torch.rand((2, 3, 4, 5), generator=generator) < 0.5).to(device)
    expected = ops.pack_mask(mask)
    for view in (
        mask.contiguous(memory_format=torch.channels_last),
        sliced(mask),
        mask[:1].expand(2, 3, 4, 5),
    ):
        if view.stride(0) == 0:
            expected = ops.pack_mask(view.contiguous())
        assert torch.equal(ops.pack_mask(view), expected)


def test_unpacked_masks_are_proper_bools(device):
    packed = torch.full((9,), 255, dtype=torch.uint8, device=device)
    mask = ops.unpack_mask(packed, (8, 9))
    assert mask.is_contiguous()
    assert int(mask.view(torch.uint8).max()) == 1


def test_pack_mask_reads_any_non_zero_byte_as_true(device):
    # Bool tensors that view other memory may hold bytes other than 0 and 1.
    loose = torch.tensor([0, 1, 2, 255, 128, 0, 64, 3, 7], dtype=torch.uint8, device=device).view(torch.bool)
    assert ops.pack_mask(loose).tolist() == [0b1101_1110, 1]


# ---- Top-k


def _chosen(masks, scores):
    return torch.cat([ops.unpack_mask(m, s.shape).flatten() for m, s in zip(masks, scores, strict=True)])


def _stable_choice(scores, k, largest):
    joined = np.concatenate([score.double().cpu().numpy().ravel() for score in scores])
    keys = -joined if largest else joined
    chosen = np.zeros(joined.size, dtype=bool)
    chosen[np.argsort(keys + 0.0, kind="stable")[:k]] = True
    return torch.from_numpy(chosen)


@each_float
@pytest.mark.parametrize("largest", [True, False])
@pytest.mark.parametrize("levels", [1, 3, 10**6], ids=["all equal", "many ties", "few ties"])
def test_topk_is_the_head_of_a_stable_sort(dtype, largest, levels, device, generator):
    shapes = [(257,), (0,), (3, 50), (), (4096,), (65, 3)]
    scores = [
        (torch.rand(shape, generator=generator, dtype=torch.float64) * levels).floor().sub(levels // 2)
        for shape in shapes
    ]
    scores = [score.div(max(levels // 100, 1)).to(dtype).to(device) for score in scores]
    total = sum(score.numel() for score in scores)
    for k in (0, 1, 2, 64, 256, 257, 258, total // 2, total - 1, total):
        masks = ops.topk_mask(scores, k, largest=largest)
        chosen = _chosen(masks, scores).cpu()
        assert int(chosen.sum()) == k
        assert torch.equal(chosen, _stable_choice(scores, k, largest))
        assert (
            sum(int(np.unpackbits(mask.cpu().numpy()).sum()) for mask in masks) == k
        )  # no bits past the end


@each_float
@pytest.mark.parametrize("largest", [True, False])
def test_topk_takes_zeros_of_both_signs_as_equal(dtype, largest, device):
    scores = [torch.tensor([-0.0, 0.0, -0.0], dtype=dtype), torch.tensor([0.0, -0.0], dtype=dtype)]
    scores = [score.to(device) for score in scores]
    for k in range(6):
        masks = ops.topk_mask(scores, k, largest=largest)
        assert _chosen(masks, scores).tolist() == [i < k for i in range(5)]


@each_float
@pytest.mark.parametrize("largest", [True, False])
def test_topk_orders_infinities_subnormals_and_signs(dtype, largest, device):
    tiny = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    values = [1.0, -INF, tiny, 0.0, INF, -tiny, torch.finfo(dtype).max, -1.0, INF, torch.finfo(dtype).min]
    scores = [torch.tensor(values, dtype=dtype, device=device)]
    for k in range(len(values) + 1):
        masks = ops.topk_mask(scores, k, largest=largest)
        assert torch.equal(_chosen(masks, scores).cpu(), _stable_choice(scores, k, largest))


@each_float
@pytest.mark.parametrize("k", [0, 1, 5])
def test_topk_refuses_nan_on_the_cpu(dtype, k):
    scores = [torch.ones(2, dtype=dtype), torch.tensor([1.0, NAN, 2.0], dtype=dtype)]
    for door in (ops.topk_mask, DIRECT.topk_mask):
        with pytest.raises(ValueError, match=r"^topk_mask: scores\[1\] must not be NaN, got "):
            door(scores, k)


@pytest.mark.cuda
@each_float
@pytest.mark.parametrize("largest", [True, False])
def test_topk_ranks_nan_last_on_a_gpu(dtype, largest, device):
    if device != "cuda":
        pytest.skip("an error on the CPU")
    scores = [torch.tensor([NAN, 1.0, -INF], dtype=dtype, device=device)]
    scores.append(torch.tensor([-NAN, INF], dtype=dtype, device=device))
    for k in range(6):
        expected = reference.topk_mask(scores, k, largest=largest)
        for mask, wanted in zip(ops.topk_mask(scores, k, largest=largest), expected, strict=True):
            assert torch.equal(mask, wanted)


@each_wide
def test_topk_tells_neighbouring_floats_apart(dtype, device, generator):
    one = bits(torch.tensor(1.0, dtype=dtype))
    scores = (one + torch.randperm(10_007, generator=generator).to(one.dtype)).view(dtype).to(device)
    for k in (1, 5000, 10_006):
        (mask,) = ops.topk_mask([scores], k)
        assert torch.equal(
            ops.unpack_mask(mask, scores.shape), scores >= scores.sort(descending=True).values[k - 1]
        )


# ---- Masked gradients and masked steps


def _masks(shape, device, generator):
    rows = torch.rand(shape[0], generator=generator) < 0.3
    return {
        "none": torch.zeros(shape, dtype=torch.bool, device=device),
        "all": torch.ones(shape, dtype=torch.bool, device=device),
        "random": (torch.rand(shape, generator=generator) < 0.5).to(device),
        "sparse": (torch.rand(shape, generator=generator) < 0.01).to(device),
        "neurons": rows[:, None].expand(shape).contiguous().to(device),
    }


MASKS = ("none", "all", "random", "sparse", "neurons")
MASKED_SHAPE = (37, 131)


@each_float
@pytest.mark.parametrize("kind", MASKS)
def test_masked_gradients_are_zero_outside_and_untouched_inside(kind, dtype, device, generator):
    mask = _masks(MASKED_SHAPE, device, generator)[kind]
    grads = _bit_patterns(MASKED_SHAPE, dtype, device, generator)
    before = grads.clone()
    ops.apply_mask_([grads], [ops.pack_mask(mask)])
    assert_same_bits(grads[mask], before[mask])
    assert not bits(grads[~mask]).any()  # +0, for NaN, Inf and -0 too


def _sgd(door, tensors, mask, **kwargs):
    params, grads, buffers = tensors
    door(
        [params],
        [grads],
        [buffers],
        [mask],
        lr=0.1,
        momentum=0.9,
        dampening=0.2,
        weight_decay=0.3,
        **kwargs,
    )


def _adamw(door, tensors, mask, **kwargs):
    params, grads, means, squares = tensors
    door([params], [grads], [means], [squares], [mask], step=3, lr=0.1, weight_decay=0.3, **kwargs)


STEPS = {"masked_sgd_": (_sgd, 1), "masked_adamw_": (_adamw, 2)}


@each_float
@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_masked_out_scalars_and_their_state_keep_their_bits(name, kind, layout, dtype, device, generator):
    step, n_states = STEPS[name]
    mask = _masks(MASKED_SHAPE, device, generator)[kind]
    packed = ops.pack_mask(mask)
    dtypes = [dtype, dtype] + [accumulator_dtype(dtype)] * n_states
    clean = [normal(MASKED_SHAPE, one, device, generator) for one in dtypes]
    if n_states == 2:
        clean[3] = clean[3].abs()
    # Outside the mask anything may be found: NaN payloads, infinities, subnormals.
    dirty = [
        torch.where(mask, tensor, _bit_patterns(MASKED_SHAPE, tensor.dtype, device, generator))
        for tensor in clean
    ]
    place = {
        "contiguous": torch.clone,
        "transposed": lambda tensor: tensor.T.contiguous().T,
        "sliced": sliced,
    }[layout]
    dirty = [place(tensor) for tensor in dirty]
    before = [tensor.clone() for tensor in dirty]
    step(getattr(ops, name), dirty, packed)
    step(getattr(ops, name), clean, packed)
    for tensor, old, wanted in zip(dirty, before, clean, strict=True):
        assert_same_bits(tensor[~mask], old[~mask])
        assert_same_bits(tensor[mask], wanted[mask])
    assert_same_bits(dirty[1], before[1])


SGD_OPTIONS = {
    "plain": {},
    "decay": {"weight_decay": 0.1},
    "momentum": {"momentum": 0.9},
    "dampening": {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.01},
    "maximize": {"momentum": 0.9, "maximize": True, "weight_decay": 0.1},
}
ADAMW_OPTIONS = {
    "default": {},
    "no decay": {"weight_decay": 0.0},
    "strong decay": {"weight_decay": 0.5, "betas": (0.5, 0.9), "eps": 1e-3},
    "maximize": {"maximize": True},
}


def _assert_equal_to_two_ulps(actual, expected, magnitude):
    """Within two spacings of the magnitude that the terms of the result have."""
    limit = 2 * torch.finfo(actual.dtype).eps * magnitude.abs() + torch.finfo(actual.dtype).smallest_normal
    error = (actual.double() - expected.double()).abs()
    assert (error <= limit).all(), (error / limit).max().item()


@each_wide
@pytest.mark.parametrize("options", SGD_OPTIONS.values(), ids=SGD_OPTIONS)
@pytest.mark.parametrize("kind", ["all", "random", "neurons"])
def test_free_scalars_take_the_step_of_torch_sgd(kind, options, dtype, device, generator):
    mask = _masks(MASKED_SHAPE, device, generator)[kind]
    packed = ops.pack_mask(mask)
    param = torch.nn.Parameter(normal(MASKED_SHAPE, dtype, device, generator))
    optimizer = torch.optim.SGD([param], lr=0.1, foreach=False, fused=False, **options)
    momentum = options.get("momentum", 0.0)
    buffer = torch.zeros_like(param)
    for step in range(4):
        ours = param.detach().clone()
        grad = normal(MASKED_SHAPE, dtype, device, generator)
        param.grad = grad.clone()
        before, buffer_before = ours.clone(), buffer.clone()
        first = {"dampening": 0.0} if step == 0 else {}
        ops.masked_sgd_(
            [ours], [grad], [buffer] if momentum else [], [packed], **({"lr": 0.1} | options | first)
        )
        optimizer.step()
        update = grad.abs() + options.get("weight_decay", 0.0) * before.abs()
        average = momentum * buffer_before.abs() + update
        change = 0.1 * (update + momentum * average if options.get("nesterov") else average)
        _assert_equal_to_two_ulps(ours[mask], param.detach()[mask], (before.abs() + change)[mask])
        assert_same_bits(ours[~mask], before[~mask])
        if momentum:
            theirs = optimizer.state[param]["momentum_buffer"]
            _assert_equal_to_two_ulps(buffer[mask], theirs[mask], average[mask])
            assert_same_bits(buffer[~mask], buffer_before[~mask])
            buffer = theirs.clone()


@each_wide
@pytest.mark.parametrize("options", ADAMW_OPTIONS.values(), ids=ADAMW_OPTIONS)
@pytest.mark.parametrize("kind", ["all", "random", "neurons"])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["int step", "tensor step"])
def test_free_scalars_take_the_step_of_torch_adamw(kind, options, as_tensor, dtype, device, generator):
    mask = _masks(MASKED_SHAPE, device, generator)[kind]
    packed = ops.pack_mask(mask)
    param = torch.nn.Parameter(normal(MASKED_SHAPE, dtype, device, generator))
    optimizer = torch.optim.AdamW([param], lr=0.1, foreach=False, fused=False, **options)
    betas = options.get("betas", (0.9, 0.999))
    kwargs = {"beta1": betas[0], "beta2": betas[1]} | {k: v for k, v in options.items() if k != "betas"}
    mean, square = torch.zeros_like(param), torch.zeros_like(param)
    for step in range(1, 5):
        ours = param.detach().clone()
        grad = normal(MASKED_SHAPE, dtype, device, generator)
        param.grad = grad.clone()
        before, mean_before = ours.clone(), mean.clone()
        number = torch.tensor(float(step), device=device) if as_tensor else step
        ops.masked_adamw_([ours], [grad], [mean], [square], [packed], step=number, lr=0.1, **kwargs)
        optimizer.step()
        state = optimizer.state[param]
        terms = mean_before.abs() + grad.abs()
        change = 0.1 * terms / (state["exp_avg_sq"].sqrt() + 1e-8) * (1 - betas[1] ** step) ** 0.5
        change = change / (1 - betas[0] ** step)
        _assert_equal_to_two_ulps(ours[mask], param.detach()[mask], (before.abs() + change)[mask])
        _assert_equal_to_two_ulps(mean[mask], state["exp_avg"][mask], terms[mask])
        _assert_equal_to_two_ulps(square[mask], state["exp_avg_sq"][mask], state["exp_avg_sq"][mask])
        assert_same_bits(ours[~mask], before[~mask])
        mean, square = state["exp_avg"].clone(), state["exp_avg_sq"].clone()


@each_float
@pytest.mark.parametrize("name", STEPS)
def test_masked_steps_follow_nan_and_inf(name, dtype, device):
    step, n_states = STEPS[name]
    values = [NAN, INF, -INF, 1.0, 0.0]
    grid = torch.tensor(list(itertools.product(values, repeat=2 + n_states)), dtype=torch.float64)
    dtypes = [dtype, dtype] + [accumulator_dtype(dtype)] * n_states
    tensors = [column.to(one).to(device) for column, one in zip(grid.T, dtypes, strict=True)]
    if n_states == 2:
        tensors[3] = tensors[3].abs()
    wide = [tensor.double() for tensor in tensors]
    packed = ops.pack_mask(torch.ones(len(grid), dtype=torch.bool, device=device))
    step(getattr(ops, name), tensors, packed)
    step(getattr(reference, name), wide, packed)
    for tensor, wanted in zip(tensors, wide, strict=True):
        stored = wanted.to(tensor.dtype).double()  # what overflows a narrow dtype is infinite there
        assert_within([tensor], [stored], [stored.abs() * 0.02 + 0.02])


@each_float
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_decay_leaves_infinite_parameters_out_of_the_gradient(momentum, dtype, device):
    param = torch.tensor([INF, -INF, 1.0], dtype=dtype, device=device)
    grad = torch.ones(3, dtype=dtype, device=device)
    buffers = [torch.zeros(3, dtype=accumulator_dtype(dtype), device=device)]
    packed = ops.pack_mask(torch.ones(3, dtype=torch.bool, device=device))
    ops.masked_sgd_([param], [grad], buffers, [packed], lr=0.5, momentum=momentum)
    assert param.tolist() == [INF, -INF, 0.5]


def test_buffers_are_left_alone_without_momentum(device):
    param, grad = torch.ones(3, device=device), torch.ones(3, device=device)
    buffer = torch.tensor([NAN, 5.0, -1.0], device=device)
    before = buffer.clone()
    ops.masked_sgd_([param], [grad], [buffer], [ops.pack_mask(param > 0)], lr=0.5)
    assert_same_bits(buffer, before)
    assert param.tolist() == [0.5] * 3


@each_wide
def test_a_step_of_zero_length_changes_only_the_state(dtype, device, generator):
    param = normal((70,), dtype, device, generator)
    before = param.clone()
    buffer = torch.zeros_like(param)
    packed = ops.pack_mask(torch.ones(70, dtype=torch.bool, device=device))
    ops.masked_sgd_([param], [torch.ones_like(param)], [buffer], [packed], lr=0.0, momentum=0.5)
    assert torch.equal(param, before)
    assert (buffer == 1).all()


def test_late_adamw_steps_need_no_correction(device):
    packed = ops.pack_mask(torch.ones(3, dtype=torch.bool, device=device))
    param, mean, square = (torch.full((3,), v, device=device) for v in (1.0, 0.5, 0.25))
    ops.masked_adamw_(
        [param],
        [torch.full((3,), 0.5, device=device)],
        [mean],
        [square],
        [packed],
        step=10**9,
        lr=0.5,
        weight_decay=0.0,
        eps=0.0,
    )
    assert param.tolist() == pytest.approx([0.5] * 3, rel=1e-6)


# ---- Gram matrices


@each_float
@pytest.mark.parametrize("total", WIDE, ids=str)
def test_gram_stays_symmetric_to_the_bit(dtype, total, device, generator):
    gram = torch.zeros(130, 130, dtype=total, device=device)
    conv = torch.zeros(2, 36, 36, dtype=total, device=device)
    for _ in range(3):
        ops.gram_accumulate_(gram, normal((70, 130), dtype, device, generator))
        ops.gram_conv_accumulate_(
            conv,
            normal((2, 8, 6, 5), dtype, device, generator),
            kernel_size=3,
            stride=1,
            padding=1,
            dilation=1,
            groups=2,
        )
    assert_same_bits(gram, gram.T.contiguous())
    assert_same_bits(conv, conv.mT.contiguous())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gram_in_float64_loses_nothing_over_a_long_stream(dtype, device, generator):
    d, rows, steps = 8, 1024, 200
    gram = torch.zeros(d, d, dtype=torch.float64, device=device)
    exact = torch.zeros_like(gram)
    block = torch.rand((rows, d), generator=generator).add_(1.0).to(dtype).to(device)
    for step in range(steps):
        inputs = block.roll(step, 1)
        ops.gram_accumulate_(gram, inputs)
        exact += inputs.double().T @ inputs.double()
    # The error of one call, whatever their number: a float32 total would be off by far more than this.
    relative = ((gram - exact) / exact).abs().max()
    assert relative < 4e-6
    per_call = torch.zeros(d, d, dtype=torch.float64, device=device)
    ops.gram_accumulate_(per_call, block)
    exact_call = block.double().T @ block.double()
    assert relative < 4 * ((per_call - exact_call) / exact_call).abs().max() + 1e-12


def test_gram_of_doubles_is_computed_in_double(device, generator):
    inputs = normal((300, 20), torch.float64, device, generator)
    gram = torch.zeros(20, 20, dtype=torch.float64, device=device)
    ops.gram_accumulate_(gram, inputs)
    assert torch.allclose(gram, inputs.T @ inputs, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("value", [NAN, INF])
def test_gram_follows_nan_and_inf(value, device):
    inputs = torch.ones(5, 4, device=device)
    inputs[2, 1] = value
    gram = torch.zeros(4, 4, device=device)
    ops.gram_accumulate_(gram, inputs)
    expected = torch.full((4, 4), 5.0, device=device)
    expected[1, :] = value
    expected[:, 1] = value
    assert torch.equal(gram.nan_to_num(nan=-1.0), expected.nan_to_num(nan=-1.0))


@pytest.mark.parametrize(
    "shape, weight, options",
    [
        ((3, 4, 12), (5, 4, 3), {"stride": 2, "padding": 1, "dilation": 2}),
        ((2, 4, 9, 8), (6, 2, 3, 2), {"stride": (2, 1), "padding": (2, 1), "dilation": (1, 2), "groups": 2}),
        ((2, 3, 5, 4, 6), (2, 1, 2, 3, 1), {"stride": 1, "padding": 1, "dilation": 1, "groups": 3}),
    ],
    ids=["1d", "2d", "3d"],
)
def test_gram_gives_the_energy_of_a_convolution(shape, weight, options, device, generator):
    # |conv(x, w)|^2 = sum over outputs of w_o^T G w_o: true only if the columns are ordered as the weight's.
    conv = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[len(shape) - 2]
    groups = options.get("groups", 1)
    inputs = normal(shape, torch.float64, device, generator)
    weights = normal((weight[0] * groups, *weight[1:]), torch.float64, device, generator)
    d = math.prod(weight[1:])
    gram = torch.zeros((groups, d, d) if groups > 1 else (d, d), dtype=torch.float64, device=device)
    ops.gram_conv_accumulate_(gram, inputs, kernel_size=weight[2:], **options)
    energy = conv(inputs, weights, **options).square().sum(dim=[0, *range(2, len(shape))])
    rows = weights.view(groups, -1, d)
    expected = torch.einsum("goi,gij,goj->go", rows, gram.view(groups, d, d), rows).flatten()
    assert torch.allclose(energy, expected, rtol=1e-12)


@pytest.mark.parametrize(
    "ints, lists",
    [
        ({"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 1}, ([3, 3], [2, 2], [1, 1], [1, 1])),
        (
            {"kernel_size": (2, 3), "stride": (1, 1), "padding": [(1, 0), (2, 1)], "dilation": 1},
            ([2, 3], [1, 1], [1, 0, 2, 1], [1, 1]),
        ),
        (
            {"kernel_size": 3, "stride": [1, 2], "padding": [(1, 2), 1], "dilation": [2, 1]},
            ([3, 3], [1, 2], [1, 2, 1, 1], [2, 1]),
        ),
        ({"kernel_size": 3, "stride": 1, "padding": [0, 2], "dilation": 1}, ([3, 3], [1, 1], [0, 2], [1, 1])),
    ],
    ids=["ints", "pairs", "an int among pairs", "one int per dimension"],
)
def test_convolution_arguments_may_be_ints_and_pairs(ints, lists, device, generator):
    inputs = normal((2, 3, 7, 6), torch.float32, device, generator)
    d = 3 * math.prod(lists[0])
    grams = [torch.zeros(d, d, device=device) for _ in range(3)]
    ops.gram_conv_accumulate_(grams[0], inputs, **ints)
    names = ("kernel_size", "stride", "padding", "dilation")
    DIRECT.gram_conv_accumulate_(grams[1], inputs, **dict(zip(names, lists, strict=True)))
    reference.gram_conv_accumulate_(grams[2], inputs, **ints)
    assert_same_bits(grams[0], grams[1])
    assert torch.allclose(grams[0], grams[2], rtol=1e-5, atol=1e-5)


# ---- Projections


@each_wide
@pytest.mark.parametrize("shape, groups, k", [((64, 96), 1, 40), ((12, 3, 3, 3), 1, 5), ((8, 3, 3), 2, 4)])
def test_projections_split_a_gradient_into_orthogonal_parts(shape, groups, k, dtype, device, generator):
    d = math.prod(shape[1:])
    basis = torch.stack([orthonormal(d, k, dtype, device, generator) for _ in range(groups)])
    grad = normal(shape, dtype, device, generator)
    columns = basis if groups > 1 else basis[0]
    outside, inside = ops.project_out(grad, columns), ops.project_onto(grad, columns)
    limit = 32 * torch.finfo(dtype).eps * d**0.5
    assert torch.allclose(outside + inside, grad, atol=limit, rtol=0)
    rows = outside.view(groups, -1, d)
    assert (rows @ basis).abs().max() < limit
    assert torch.allclose(ops.project_out(outside, columns), outside, atol=limit, rtol=0)
    assert torch.allclose(ops.project_onto(inside, columns), inside, atol=limit, rtol=0)
    assert ops.project_onto(outside, columns).abs().max() < limit


def test_projections_use_every_group_s_own_basis(device, generator):
    grad = normal((4, 3), torch.float32, device, generator)
    axes = torch.eye(3, device=device)
    basis = torch.stack([axes[:, :1], axes[:, 2:]])
    expected = grad.clone()
    expected[:2, 0] = 0
    expected[2:, 2] = 0
    assert torch.equal(ops.project_out(grad, basis), expected)


def test_projections_of_both_forms_agree(device, generator):
    grad = normal((16, 30), torch.float64, device, generator)
    full = orthonormal(30, 30, torch.float64, device, generator)
    for k in (0, 1, 13, 30):
        away, complement = full[:, :k], full[:, k:]
        assert torch.allclose(
            ops.project_out(grad, away), ops.project_onto(grad, complement), rtol=0, atol=1e-13
        )


@each_float
def test_in_place_projections_give_the_bits_of_their_twins(dtype, device, generator):
    grads = [normal(shape, dtype, device, generator) for shape in [(6, 5), (8, 2, 3), (6, 5)]]
    bases = [orthonormal(d, k, dtype, device, generator) for d, k in [(5, 2), (6, 3), (5, 4)]]
    for twin, in_place in ((ops.project_out, ops.project_out_), (ops.project_onto, ops.project_onto_)):
        expected = [twin(g, u) for g, u in zip(grads, bases, strict=True)]
        together, alone = copied(grads), copied(grads)
        in_place(together, bases)
        for grad, basis in zip(alone, bases, strict=True):
            in_place(grad, basis)
        for wanted, one, other in zip(expected, together, alone, strict=True):
            assert_same_bits(one, wanted)
            assert_same_bits(other, wanted)


def test_projection_returns_fresh_memory(device, generator):
    grad = normal((3, 4), torch.float32, device, generator)
    for k in (0, 2, 4):
        for op in (ops.project_out, ops.project_onto):
            assert op(grad, orthonormal(4, k, torch.float32, device, generator)).data_ptr() != grad.data_ptr()
