"""Clipping over the free scalars: what torch does to a vector of them alone."""

import math

import pytest
import torch
from test_optim import make_params, named, random_masks, set_grads

from unlearn_ext import ops
from unlearn_ext.optim import clip_grad_norm_


def compacted(params, masks):
    """One parameter whose gradient is that of the free scalars."""
    rows = [p.grad[masks[name]] for name, p in named(params) if p.grad is not None]
    vector = torch.nn.Parameter(torch.zeros(sum(len(row) for row in rows), dtype=rows[0].dtype))
    vector.grad = torch.cat(rows)
    return vector


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("norm_type", [2.0, 1.0, 3.0, math.inf])
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_torchs_on_the_compacted_vector(dtype, max_norm, norm_type, packed):
    params = make_params(dtype)
    masks = random_masks(params, 0.3)
    set_grads(params, seed=0)
    params[1].grad = None
    vector = compacted(params, masks)
    expected = torch.nn.utils.clip_grad_norm_([vector], max_norm, norm_type)
    given = {name: ops.pack_mask(mask) for name, mask in masks.items()} if packed else masks
    total = clip_grad_norm_(named(params), max_norm, given, norm_type)
    assert total.dtype == dtype
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(total, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(compacted(params, masks).grad, vector.grad, rtol=tolerance, atol=0)


def test_full_masks_are_torchs():
    params, theirs = make_params(), make_params()
    for those in (params, theirs):
        set_grads(those, seed=0)
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in named(params)}
    total = clip_grad_norm_(named(params), 1.0, masks)
    torch.testing.assert_close(total, torch.nn.utils.clip_grad_norm_(theirs, 1.0), rtol=1e-6, atol=0)
    for mine, other in zip(params, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-6, atol=0)


def test_what_does_not_count_may_be_anything():
    params = make_params()
    masks = random_masks(params)
    set_grads(params, seed=0)
    vector = compacted(params, masks)
    expected = torch.nn.utils.clip_grad_norm_([vector], 0.5)
    for name, p in named(params):
        p.grad[~masks[name]] = math.nan
    total = clip_grad_norm_(named(params), 0.5, masks, error_if_nonfinite=True)
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(compacted(params, masks).grad, vector.grad, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    params = make_params(dtype)
    masks = random_masks(params)
    set_grads(params, seed=0)
    vector = compacted(params, masks).grad.double()
    total = clip_grad_norm_(named(params), 1e9, masks)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total.double(), vector.norm(), rtol=1e-6, atol=0)


def test_channels_last_gradients_meet_their_masks():
    params = make_params(shapes=((3, 4, 3, 3),))
    masks = random_masks(params)
    set_grads(params, seed=0)
    expected = clip_grad_norm_(named(params), 1.0, masks)
    set_grads(params, seed=0)
    params[0].grad = params[0].grad.contiguous(memory_format=torch.channels_last)
    packed = {name: ops.pack_mask(mask) for name, mask in masks.items()}
    torch.testing.assert_close(clip_grad_norm_(named(params), 1.0, packed), expected, rtol=1e-6, atol=0)


def test_nothing_to_clip():
    params = make_params()
    assert float(clip_grad_norm_(named(params), 1.0, random_masks(params))) == 0
    set_grads(params, seed=0)
    masks = {name: torch.zeros(p.shape, dtype=torch.bool) for name, p in named(params)}
    assert float(clip_grad_norm_(named(params), 1.0, masks)) == 0


@pytest.mark.parametrize(
    "settings, error, message",
    [
        ({"max_norm": -1.0}, ValueError, "max_norm must be >= 0, got -1.0"),
        ({"norm_type": 0.0}, ValueError, "norm_type must be > 0"),
        ({"params": "plain"}, ValueError, "must be named_parameters"),
        ({"masks": {}}, ValueError, r"masks\['p0'\] must be given"),
        ({"masks": {"p0": torch.ones(3, dtype=torch.bool)}}, ValueError, r"must be bool \[7, 5\] or packed"),
        ({"masks": {"p0": torch.ones(7, 5)}}, TypeError, r"got torch.float32 \[7, 5\]"),
        ({"sparse": True}, ValueError, "gradient of p0 must be dense"),
        ({"infinite": True}, RuntimeError, "must be finite, got inf"),
    ],
)
def test_bad_input_changes_nothing(settings, error, message):
    params = make_params()
    set_grads(params, seed=0)
    if settings.get("sparse"):
        params[0].grad = params[0].grad.to_sparse()
    if settings.get("infinite"):
        params[0].grad.fill_(math.inf)
    before = [p.grad.clone() for p in params]
    given = params if settings.get("params") else named(params)
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in named(params)}
    with pytest.raises(error, match=message):
        clip_grad_norm_(
            given,
            settings.get("max_norm", 1.0),
            settings.get("masks", masks),
            settings.get("norm_type", 2.0),
            error_if_nonfinite=True,
        )
    for p, grad in zip(params, before, strict=True):
        assert torch.equal(p.grad.to_dense(), grad.to_dense())
