"""Ops at the edges, behind both doors: subclasses, lazy views and clones, odd strides, huge numbers."""

import pytest
import torch
from op_cases import COMPILED, doors
from torch.autograd import forward_ad

from unlearn_ext import ops

DOORS = doors(torch.ops.unlearn_ext, ids=("dispatcher", "direct"))


@pytest.fixture(params=DOORS)
def door(request):
    return request.param


class Logged(torch.Tensor):
    """A subclass that only its own dispatch may look into."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        def plain(value):
            if isinstance(value, (list, tuple)):
                return [plain(entry) for entry in value]
            return value.inner if isinstance(value, cls) else value

        return func(*plain(list(args)), **{key: plain(value) for key, value in (kwargs or {}).items()})


def test_subclasses_reach_their_own_dispatch(door):
    fisher, grad = torch.zeros(3, 2), torch.randn(3, 2)
    door.fisher_accumulate_([Logged(fisher)], [Logged(grad)])
    torch.testing.assert_close(fisher, grad.square())
    mask = door.pack_mask(Logged(torch.tensor([True, False, True])))
    assert mask.tolist() == [0b101]


def test_meta_tensors_are_refused_not_read(door):
    lists = [torch.empty(3, device="meta")], [torch.empty(3, device="meta")]
    with pytest.raises(NotImplementedError):
        door.fisher_accumulate_(*lists)
    with pytest.raises(NotImplementedError):
        door.selective_dampen_([torch.empty(3, device="meta")], *lists, alpha=1.0, lambda_=1.0)


def test_lazily_negated_views_are_read_as_what_they_stand_for(door):
    values = torch.randn(9, dtype=torch.complex64)
    lazy = values.conj().imag
    assert lazy.is_neg()
    full, forget = torch.ones(9), lazy.abs()
    forget_lazy = torch.complex(torch.zeros(9), -forget).conj().imag
    assert forget_lazy.is_neg()
    counts = door.selected_counts([full], [forget_lazy], [0.5])
    assert counts.tolist() == [[int((forget > 0.5).sum())]]
    quantile = door.ratio_quantile([full], [forget_lazy], 0.5)
    torch.testing.assert_close(quantile, forget.quantile(0.5))
    kept = door.topk_mask([lazy], 4)[0]
    assert int(ops.unpack_mask(kept, [9]).sum()) == 4
    assert ops.unpack_mask(kept, [9])[lazy.argmax()]


def test_writing_to_a_lazy_clone_leaves_its_source_alone(door):
    source = torch.ones(4, 4)
    clone = torch._lazy_clone(source)
    door.fisher_accumulate_([clone], [torch.full((4, 4), 2.0)])
    assert source.eq(1).all()
    assert clone.eq(5).all()
    gram = torch._lazy_clone(source)
    door.gram_accumulate_(gram, torch.ones(3, 4))
    assert source.eq(1).all()
    assert gram.eq(4).all()
    fisher = torch._lazy_clone(source)
    door.fisher_linear_(fisher, torch.ones(2, 4), torch.ones(2, 4))
    assert source.eq(1).all()
    assert fisher.eq(3).all()
    grad = torch._lazy_clone(source)
    door.project_out_(grad, torch.eye(4)[:, :1])
    assert source.eq(1).all()
    assert grad[:, 0].eq(0).all()


def test_column_slices_are_written_and_interleaved_strides_looked_at(door):
    whole = torch.zeros(6, 8)
    part = whole[:, 2:5]
    door.fisher_accumulate_([part], [torch.ones(6, 3)])
    assert whole.sum() == 18
    interleaved = torch.zeros(20).as_strided((3, 4), (2, 5))  # 2 i + 5 j: no two alike for these sizes
    assert len({2 * i + 5 * j for i in range(3) for j in range(4)}) == 12
    door.fisher_accumulate_([interleaved], [torch.ones(3, 4)])
    assert interleaved.sum() == 12
    with pytest.raises(ValueError, match="must not overlap itself"):
        door.fisher_accumulate_(
            [torch.zeros(30).as_strided((6, 4), (2, 5))], [torch.ones(6, 4)]
        )  # 2 * 5 = 5 * 2


@pytest.mark.parametrize("value", [2**31, 2**60, 2**62])
@pytest.mark.parametrize("name", ["stride", "padding", "dilation", "kernel_size"])
def test_huge_geometry_is_refused(door, name, value):
    settings = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1], name: [value, value]}
    inputs = torch.zeros(1, 2, 4, 4)
    with pytest.raises(ValueError, match=r"must be below|at least as large"):
        door.gram_conv_accumulate_(torch.zeros(18, 18), inputs, **{"kernel_size": [3, 3], **settings})
    if name != "kernel_size":
        with pytest.raises(ValueError, match=r"must be below|at least as large"):
            door.fisher_conv_(torch.zeros(2, 2, 3, 3), inputs, torch.zeros(1, 2, 4, 4), **settings)


def test_patches_beyond_counting_are_refused(door):
    many = 2**31 - 1
    with pytest.raises(ValueError, match=r"fewer than 2\^63"):
        door.gram_conv_accumulate_(
            torch.zeros(2, 2),
            torch.zeros(2, 2, 2, 2, 2),
            kernel_size=[1, 1, 1],
            stride=[1, 1, 1],
            padding=[many, many, many],
            dilation=[1, 1, 1],
        )


@pytest.mark.parametrize("project", ["project_out", "project_onto"])
def test_forward_mode_is_refused_not_lost(door, project):
    grad, basis = torch.randn(3, 4), torch.linalg.qr(torch.randn(4, 2))[0]
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"):
        getattr(door, project)(forward_ad.make_dual(grad, torch.ones_like(grad)), basis)


@pytest.mark.parametrize("project", [ops.project_out, ops.project_onto])
def test_forward_mode_of_torch_func_is_refused(project):
    grad, basis = torch.randn(3, 4), torch.linalg.qr(torch.randn(4, 2))[0]
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jvp(lambda g: project(g, basis), (grad,), (torch.ones_like(grad),))
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.func.jacfwd(lambda g: project(g, basis))(grad)
    with pytest.raises(NotImplementedError, match="forward-mode"):
        torch.compile(
            lambda g: torch.func.jvp(lambda x: project(x, basis), (g,), (torch.ones_like(g),)),
            backend="eager",
        )(grad)


def test_autocast_does_not_lower_the_precision_of_products(door):
    inputs, basis = torch.randn(40, 16), torch.linalg.qr(torch.randn(16, 5))[0]
    plain, under = torch.zeros(16, 16), torch.zeros(16, 16)
    door.gram_accumulate_(plain, inputs)
    expected = door.project_out(inputs, basis)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        door.gram_accumulate_(under, inputs)
        found = door.project_out(inputs, basis)
    assert torch.equal(plain, under)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("samples", [1, 3, 64, 700])
def test_partial_sums_are_written_before_they_are_read(samples):
    inputs, grads = torch.randn(samples, 5, 24), torch.randn(samples, 5, 16)
    expected, found = torch.zeros(16, 24), torch.zeros(16, 24)
    ops.fisher_linear_(expected, inputs, grads)
    torch.use_deterministic_algorithms(True)  # new memory is filled with NaN
    threads = torch.get_num_threads()
    try:
        assert torch.empty(4).isnan().all()
        torch.set_num_threads(4)
        ops.fisher_linear_(found, inputs, grads)
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    if COMPILED:
        assert torch.equal(expected, found)
    else:  # BLAS rounds otherwise on another number of threads
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
