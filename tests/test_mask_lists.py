"""``pack_mask`` and ``unpack_mask`` of lists: bit for bit those of every tensor by itself, from one pass."""

import pytest
import torch
from op_cases import (
    COMPILED,
    assert_same_bits,
    bits,
    channels_last,
    contiguous,
    offset,
    padded_rows,
    permuted,
    sliced,
)
from torch._subclasses import FakeTensorMode

from unlearn_ext import ops

try:
    from unlearn_ext import _C
except ImportError:
    _C = None

SHAPES = [(5, 7), (), (0,), (2, 3, 4, 5), (8,), (1,), (0, 4), (70, 3), (2, 3, 2, 3, 2), (4097,), (3, 64)]

LAYOUTS = {
    layout.__name__: layout for layout in (contiguous, channels_last, permuted, sliced, padded_rows, offset)
}

DOORS = {
    "ops": (ops.pack_mask, ops.unpack_mask),
    "torch.ops": (torch.ops.unlearn_ext.pack_mask.list, torch.ops.unlearn_ext.unpack_mask.list),
} | ({"_C": (_C.pack_mask, _C.unpack_mask)} if COMPILED else {})
each_door = pytest.mark.parametrize("door", DOORS)


def _masks(generator, device="cpu"):
    return [(torch.rand(shape, generator=generator) < 0.5).to(device) for shape in SHAPES]


@each_door
@pytest.mark.parametrize("layout", LAYOUTS)
def test_lists_give_what_every_tensor_gives_by_itself(door, layout, device, generator):
    pack, unpack = DOORS[door]
    masks = [LAYOUTS[layout](mask) for mask in _masks(generator, device)]
    packed = pack(masks)
    assert isinstance(packed, list)
    assert len(packed) == len(masks)
    for got, mask in zip(packed, masks, strict=True):
        assert_same_bits(got, ops.pack_mask(mask))
    unpacked = unpack([LAYOUTS[layout](one) for one in packed], SHAPES)
    assert isinstance(unpacked, list)
    for got, one, mask in zip(unpacked, packed, masks, strict=True):
        assert_same_bits(got, ops.unpack_mask(one, mask.shape))
        assert torch.equal(got, mask)


@each_door
def test_layouts_may_differ_within_a_list(door, device, generator):
    pack, _ = DOORS[door]
    mask = (torch.rand((4, 3, 5, 6), generator=generator) < 0.5).to(device)
    masks = [make(mask) for make in LAYOUTS.values()] + [mask[:1].expand(4, 3, 5, 6)]
    *same, repeated = pack(masks)
    for packed in same:
        assert_same_bits(packed, ops.pack_mask(mask))
    assert_same_bits(repeated, ops.pack_mask(masks[-1].contiguous()))


def test_copies_beyond_the_limit_go_in_several_passes(generator):
    # Not row-major, so copied; more scalars than wait for a pass together.
    wide = torch.zeros((64, 2**20), dtype=torch.bool)
    wide[5::7] = True
    wide[:, ::3] ^= True
    small = torch.rand((9, 3), generator=generator) < 0.5
    masks = [small.T, wide.T, wide.T[: 2**10], small]
    for got, mask in zip(ops.pack_mask(masks), masks, strict=True):
        assert_same_bits(got, ops.pack_mask(mask.contiguous()))


@each_door
def test_bits_past_the_end_do_not_matter_and_flags_are_proper_bools(door, device):
    _, unpack = DOORS[door]
    packed = [torch.full(((n + 7) // 8,), 255, dtype=torch.uint8, device=device) for n in (9, 64, 1)]
    for mask, n in zip(unpack(packed, [(9,), (8, 8), ()]), (9, 64, 1), strict=True):
        assert mask.is_contiguous()
        assert bits(mask).tolist() == torch.ones(mask.shape, dtype=torch.uint8).tolist()
        assert mask.numel() == n


@each_door
def test_any_non_zero_byte_is_true(door, device):
    pack, _ = DOORS[door]
    loose = torch.tensor([0, 1, 2, 255, 128, 0, 64, 3, 7], dtype=torch.uint8, device=device).view(torch.bool)
    assert [one.tolist() for one in pack([loose, loose[3:]])] == [[0b1101_1110, 1], [0b11_1011]]


@each_door
def test_arguments_may_share_memory_and_results_do_not(door, generator):
    pack, unpack = DOORS[door]
    mask = torch.rand(40, generator=generator) < 0.5
    before = mask.clone()
    packed = pack([mask, mask, mask[3:], mask.view(5, 8).T])
    assert_same_bits(packed[0], packed[1])
    packed[0].zero_()
    assert torch.equal(mask, before)
    assert_same_bits(packed[1], ops.pack_mask(mask))
    assert_same_bits(packed[2], ops.pack_mask(before[3:]))
    assert_same_bits(packed[3], ops.pack_mask(before.view(5, 8).T.contiguous()))
    first, second = unpack([packed[1], packed[1]], [(40,), (5, 8)])
    first.zero_()
    assert torch.equal(second.flatten(), before)
    assert_same_bits(packed[1], ops.pack_mask(before))


@each_door
def test_a_failing_call_leaves_every_tensor_as_it_was(door, generator):
    pack, unpack = DOORS[door]
    masks = _masks(generator)
    packed = ops.pack_mask(masks)
    before = [one.clone() for one in (*masks, *packed)]
    with pytest.raises(TypeError, match=r"^pack_mask: masks\[11\] must be bool, got"):
        pack([*masks, torch.ones(3)])
    with pytest.raises(ValueError, match=r"^unpack_mask: packed\[10\] must have shape \[25\] for 193"):
        unpack(packed, [*SHAPES[:-1], (193,)])
    for now, then in zip((*masks, *packed), before, strict=True):
        assert_same_bits(now, then)


@each_door
def test_tensors_without_memory_give_such_and_do_not_mix_with_others(door):
    pack, unpack = DOORS[door]
    mask, bare = torch.ones(9, dtype=torch.bool), torch.ones((3, 4), dtype=torch.bool, device="meta")
    assert [(one.device.type, one.shape) for one in pack([bare, bare])] == [("meta", (2,))] * 2
    bits_of = torch.ones(2, dtype=torch.uint8)
    assert [one.shape for one in unpack([bits_of.to("meta")], [(3, 4)])] == [(3, 4)]
    for given in ([mask, bare], [bare, mask]):
        with pytest.raises(ValueError, match="pack_mask: tensors must all be on the meta device or none"):
            pack(given)
    with pytest.raises(ValueError, match="unpack_mask: tensors must all be on the meta device or none"):
        unpack([bits_of, bits_of.to("meta")], [(9,), (9,)])


def test_scores_with_and_without_memory_are_refused():
    scores = [torch.arange(5.0), torch.ones(3, device="meta")]
    with pytest.raises(ValueError, match="topk_mask: tensors must all be on the meta device or none"):
        ops.topk_mask(scores, 2)


@pytest.mark.parametrize(
    "name, rest",
    [("selected_counts", ([1.0],)), ("ratio_quantile", (0.5,)), ("project_out", ()), ("project_onto", ())],
)
def test_pairs_with_and_without_memory_are_refused(name, rest):
    real, bare = torch.ones(3, 3), torch.ones(3, 3, device="meta")
    for pair in ((real, bare), (bare, real)):
        given = pair if name.startswith("project") else tuple([tensor] for tensor in pair)
        for op in (getattr(ops, name), getattr(torch.ops.unlearn_ext, name)):
            with pytest.raises(ValueError, match=f"{name}: tensors must all be on the meta device or none"):
                op(*given, *rest)


@each_door
def test_empty_lists_give_empty_lists(door):
    pack, unpack = DOORS[door]
    assert pack([]) == []
    assert unpack([], []) == []


def test_devices_are_kept_tensor_by_tensor():
    with FakeTensorMode():
        masks = [
            torch.ones(9, dtype=torch.bool, device=place) for place in ("cpu", "cuda:0", "cuda:1", "cpu")
        ]
        packed = ops.pack_mask(masks)
        unpacked = ops.unpack_mask(packed, [(9,), (3, 3), (9, 1), (9,)])
    assert [one.device for one in packed] == [one.device for one in masks]
    assert [(one.device, one.shape) for one in unpacked] == [
        (torch.device(place), shape)
        for place, shape in (("cpu", (9,)), ("cuda:0", (3, 3)), ("cuda:1", (9, 1)), ("cpu", (9,)))
    ]


@pytest.mark.cuda
@each_door
def test_lists_may_lie_on_several_devices(door, generator):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pack, unpack = DOORS[door]
    masks = [mask.to("cuda" if i % 2 else "cpu") for i, mask in enumerate(_masks(generator))]
    packed = pack(masks)
    for got, mask in zip(packed, masks, strict=True):
        assert_same_bits(got, ops.pack_mask(mask))
    for got, mask in zip(unpack(packed, SHAPES), masks, strict=True):
        assert_same_bits(got, mask)


def test_compiled_functions_take_lists(generator):
    def there_and_back(masks):
        return ops.unpack_mask(ops.pack_mask(masks), [mask.shape for mask in masks])

    masks = _masks(generator)
    whole = torch.compile(there_and_back, backend="aot_eager", fullgraph=True)
    for got, mask in zip(whole(masks), masks, strict=True):
        assert torch.equal(got, mask)
    for got, mask in zip(whole([mask[:0] for mask in masks[3:]]), masks[3:], strict=True):
        assert got.shape == mask[:0].shape
