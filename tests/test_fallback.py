"""The kernels in plain PyTorch: what they compute and refuse, where they serve, and what is said of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from op_cases import (
    CASES,
    LAYOUTS,
    assert_gaps_untouched,
    assert_same_bits,
    assert_within,
    compiled,
    laid_out,
    tensors_of,
)
from test_errors import BAD_CALLS, CASE_OF

from unlearn_ext import ops
from unlearn_ext.ops import fallback
from unlearn_ext.ops.fallback import memory, running
from unlearn_ext.ops.fallback.schemas import SCHEMAS

ROOT = Path(__file__).parents[1]
CSRC = ROOT / "csrc" / "torch"


# ---- One set of schemas


@compiled
def test_schemas_are_those_of_the_compiled_library():
    assert list(SCHEMAS) == ops.build_info()["schemas"]


@pytest.mark.skipif(not CSRC.is_dir(), reason="needs the sources")
def test_schemas_are_those_of_the_sources():
    found = []
    for path in CSRC.glob("*.h"):
        for strings in re.findall(r'\bOp<((?:\s*"[^"]*")+)', path.read_text(encoding="utf-8")):
            found.append("".join(re.findall(r'"([^"]*)"', strings)))
    assert sorted(found) == sorted(SCHEMAS)


def test_every_schema_has_a_kernel():
    assert set(fallback.KERNELS) == {schema.partition("(")[0] for schema in SCHEMAS}


# ---- What the kernels compute and refuse


def _samples():
    return [
        (case, variant) for case in CASES for variant in case.variants if variant not in ("many", "large")
    ]


@pytest.mark.parametrize(
    "case, variant", _samples(), ids=lambda value: value if isinstance(value, str) else value.schema
)
def test_kernels_agree_with_the_specification_in_float64(case, variant, generator):
    for dtype in {case.dtypes[0], case.dtypes[-1]}:
        args, kwargs = case.sample("cpu", dtype, generator, variant)
        expected, bounds = case.expect(args, kwargs)
        assert_within(case.run(fallback.KERNELS[case.schema], args, kwargs), expected, bounds)


@pytest.mark.parametrize("op", [ops.unpack_mask, fallback.KERNELS["unpack_mask"]])
def test_shapes_whose_strides_cannot_be_counted_are_refused_although_nothing_is_in_them(op):
    with pytest.raises(RuntimeError, match="Stride calculation overflowed"):
        op(torch.zeros(0, dtype=torch.uint8), [0, 4, 2**62, 4])
    assert op(torch.zeros(0, dtype=torch.uint8), [0, 4, 2**40]).shape == (0, 4, 2**40)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.schema)
def test_strides_do_not_matter(case, layout, generator):
    args, kwargs = case.sample("cpu", case.dtypes[0], generator, case.variants[0])
    args = laid_out(case, args, layout)
    expected, bounds = case.expect(args, kwargs)
    assert_within(case.run(fallback.KERNELS[case.schema], args, kwargs), expected, bounds)
    assert_gaps_untouched([args[i] for i in case.written])


FISHER_LAYERS = [case for case in CASES if case.name.startswith("fisher_")]


@pytest.mark.parametrize("case", FISHER_LAYERS, ids=lambda case: case.schema)
def test_batches_may_be_taken_in_parts(case, generator, monkeypatch):
    monkeypatch.setattr(running, "_PART_BYTES", 1)  # one sample at a time
    args, kwargs = case.sample("cpu", torch.float32, generator, case.variants[0])
    expected, bounds = case.expect(args, kwargs)
    assert_within(case.run(fallback.KERNELS[case.schema], args, kwargs), expected, bounds)


def _raised(call, arguments):
    with pytest.raises((ValueError, TypeError)) as raised:
        call(**arguments)
    return type(raised.value), str(raised.value)


@compiled
@pytest.mark.parametrize("bad", BAD_CALLS, ids=str)
def test_refusals_are_those_of_the_compiled_kernels_word_for_word(bad):
    arguments = bad.arguments()
    before = [tensor.clone() for tensor in tensors_of(arguments)]
    found = _raised(fallback.KERNELS[bad.schema], arguments)
    for tensor, old in zip(tensors_of(arguments), before, strict=True):
        assert_same_bits(tensor, old)
    wanted = _raised(CASE_OF[bad.schema].overload, bad.arguments())
    if "share memory" in wanted[1]:
        # Of two written tensors either may be named first.
        assert found[0] is wanted[0]
        assert sorted(re.findall(r"\w+\[\d\]", found[1])) == sorted(re.findall(r"\w+\[\d\]", wanted[1]))
    else:
        assert found == wanted


@pytest.mark.parametrize(
    "shape, strides, shared",
    [
        ((3, 4), (4, 1), False),
        ((3, 4), (1, 3), False),
        ((3, 4), (2, 5), False),
        ((6, 4), (2, 5), True),
        ((3, 4), (0, 1), True),
        ((1, 4), (0, 1), False),
        ((3, 4), (1, 1), True),
        ((), (), False),
    ],
)
def test_overlaps_within_a_tensor_are_found_exactly(shape, strides, shared):
    assert memory.overlaps_itself(torch.zeros(99).as_strided(shape, strides)) is shared


def test_memory_shared_between_dtypes_is_found():
    base = torch.zeros(8, dtype=torch.float64)
    halves = base.view(torch.float16)[1::4]  # the second quarter of every number

    def shared(other):
        extents = [
            memory.extent_of("a", 0, halves, written=True),
            memory.extent_of("b", 0, other, written=False),
        ]
        return memory.first_shared(extents) is not None

    assert shared(base)
    assert shared(base.view(torch.float16)[1::8])
    assert not shared(base.view(torch.float16)[2::4])
    assert not shared(base.view(torch.float32)[1::2])


def test_reduced_precision_of_products_is_off_inside_and_back_after(generator):
    flag = torch.backends.mkldnn.matmul
    before = flag.fp32_precision
    try:
        flag.fp32_precision = "bf16"
        with running.as_given():
            assert flag.fp32_precision == "ieee"
            with running.as_given():
                assert flag.fp32_precision == "ieee"
            assert flag.fp32_precision == "ieee"
        assert flag.fp32_precision == "bf16"
    finally:
        flag.fp32_precision = before


# ---- Devices without kernels of ours


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.schema)
def test_every_op_has_a_kernel_on_every_device(case):
    for key in ("CPU", "CUDA", *fallback.OTHER_DEVICES):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"unlearn_ext::{case.schema}", key), key
    for key in ("Meta", "CompositeImplicitAutograd", "CompositeExplicitAutograd"):
        has = torch._C._dispatch_has_kernel_for_dispatch_key(f"unlearn_ext::{case.schema}", key)
        assert has == (key == "Meta" and not case.name.endswith("_")), key


def test_ops_and_methods_run_on_devices_of_somebody_elses():
    # In a process of its own: a device stays registered.
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            ROOT / "tests" / "foreign_device.py",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout


def test_views_of_one_storage_share_memory_where_addresses_mean_nothing(monkeypatch):
    monkeypatch.setattr(memory, "_ADDRESSED", ())
    base, other = torch.zeros(12), torch.zeros(12)

    def shared(a, b):
        extents = [memory.extent_of("a", 0, a, written=True), memory.extent_of("b", 0, b, written=False)]
        return memory.first_shared(extents) is not None

    assert shared(base[:7], base[6:])
    assert not shared(base[:6], base[6:])
    assert not shared(base, other)
