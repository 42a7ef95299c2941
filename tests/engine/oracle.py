"""The definition of a per-sample Fisher diagonal, a float64 loop of single samples."""

import copy

import torch

import unlearn_ext as ux
from unlearn_ext import fisher_diagonal
from unlearn_ext.tasks import losses


def split(batch, size):
    """The batch as batches of a size."""
    if isinstance(batch, dict):
        return [dict(zip(batch, part, strict=True)) for part in split(tuple(batch.values()), size)]
    return list(zip(*(tensor.split(size) for tensor in batch), strict=True))


def one_by_one(model, batch, loss_fn=losses.cross_entropy, power=2, dtype=torch.float64):
    model = copy.deepcopy(model).to(dtype).eval()
    wanted = {name: p for name, p in model.named_parameters() if p.requires_grad}
    wide = torch.promote_types(dtype, torch.float32)
    totals = {name: torch.zeros_like(p, dtype=wide) for name, p in wanted.items()}
    samples = split(batch, 1)
    for sample in samples:
        sample = ux.data.map_tensors(lambda t: t.to(dtype) if t.is_floating_point() else t, sample)
        grads = torch.autograd.grad(loss_fn(model, sample).sum(), list(wanted.values()), allow_unused=True)
        for total, grad in zip(totals.values(), grads, strict=True):
            if grad is not None:
                total += grad.to(wide).abs() ** power
    return {name: total / len(samples) for name, total in totals.items()}


def errors(found, expected, power=2):
    """Largest error of each parameter, relative to its largest value.

    Gradients that vanish in exact arithmetic, as those of the key biases of attention, leave rounding behind;
    they are held against the largest value of all.
    """
    assert list(found) == list(expected)
    expected = {name: value for name, value in expected.items() if value.numel()}
    largest = max(float(value.max()) for value in expected.values())
    least = (1e-6 if power == 2 else 0.1) * largest
    return {
        name: float((found[name] - value).abs().max()) / max(float(value.max()), least)
        for name, value in expected.items()
    }


def assert_exact(model, batch, *, power=2, tolerance=1e-5, size=None, fused=True, **settings):
    """Compare with the loop; ``fused`` is True, False for none, or the names of those that must be."""
    expected = one_by_one(model, batch, power=power, **settings)
    n = len(next(ux.data.tensors_in(batch)))
    found = fisher_diagonal(model, split(batch, size or n), power=power, **settings)
    wrong = {name: error for name, error in errors(found, expected, power).items() if not error <= tolerance}
    assert not wrong
    if fused is not None:
        names = set(expected) if fused is True else set(fused or ())
        assert {name for name, how in found.coverage.items() if how == "fused"} == names, found.coverage
    return found


def expected_of(model, batches, loss_fn=losses.cross_entropy, power=2):
    """The loop over all samples of batches of several sizes."""
    parts = [(len(b[0]), one_by_one(model, b, loss_fn, power)) for b in batches]
    total = sum(n for n, _ in parts)
    return {name: sum(n * part[name] for n, part in parts) / total for name in parts[0][1]}


def assert_right(model, batches, *, tolerance=1e-5, fused=None, loss_fn=losses.cross_entropy, power=2):
    """As ``assert_exact``, for batches of several sizes; ``fused`` None asks for nothing."""
    expected = expected_of(model, batches, loss_fn, power)
    found = fisher_diagonal(model, batches, loss_fn=loss_fn, power=power)
    wrong = {
        k: (e, found.coverage[k]) for k, e in errors(found, expected, power).items() if not e <= tolerance
    }
    assert not wrong
    if fused is not None:
        assert {k for k, how in found.coverage.items() if how == "fused"} == (
            set(expected) if fused is True else set(fused)
        ), found.coverage
    return found
