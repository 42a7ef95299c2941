"""What runs on every rank in test_sharded_*.py."""

import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_models import SHARES, blocks_of, images, language_model, shard, shares, small, texts

sys.path.append(str(Path(__file__).parents[1] / "engine"))
from oracle import errors, one_by_one

import unlearn_ext as ux


def whole(importance):
    """Importances gathered on every rank."""
    return {name: getattr(t, "full_tensor", lambda t=t: t)() for name, t in importance.items()}


def own(parts):
    return parts[dist.get_rank()]


def all_of(parts):
    return [batch for part in parts for batch in part]


def loop_over(model, batches, loss, power):
    """The loop over single samples, of batches of several sizes."""
    sizes = [len(next(ux.data.tensors_in(batch))) for batch in batches]
    found = [one_by_one(model, batch, loss, power) for batch in batches]
    total = sum(sizes)
    return {name: sum(n * each[name] for n, each in zip(sizes, found, strict=True)) / total for name in found[0]}


def assert_as_alone(model, sharded, parts, *, fused=True, tolerance=1e-5, power=2, loss_fn=None, **settings):
    """The sharded model's importances are those of one float64 loop over all ranks' samples."""
    found = ux.fisher_diagonal(sharded, own(parts), power=power, loss_fn=loss_fn, **settings)
    batches = all_of(parts)
    is_text = isinstance(batches[0], dict)
    loss = loss_fn or (ux.tasks.CausalLM().loss if is_text else ux.losses.cross_entropy)
    expected = loop_over(model, batches, loss, power)
    worst = errors(whole(found), expected, power)
    wrong = {name: error for name, error in worst.items() if not error <= tolerance}
    assert not wrong, wrong
    assert found.n_samples == sum(len(next(ux.data.tensors_in(batch))) for batch in batches)
    assert found.n_batches == len(batches)
    if fused is True:
        assert set(found.coverage.values()) == {"fused"}, found.coverage
    elif fused is not None:
        assert {name for name, how in found.coverage.items() if how != "fused"} == set(fused), found.coverage
    parameters = dict(sharded.named_parameters())
    for name, tensor in found.items():
        if hasattr(parameters[name], "placements"):
            assert tensor.placements == parameters[name].placements
            assert tensor.to_local().shape == parameters[name].to_local().shape
    assert found.weights_digest == ux.fisher_diagonal(model, batches[:1], loss_fn=loss).weights_digest
    return max(worst.values())


def language(kind, settings=None, sharding=None, **checks):
    model = language_model(kind, **(settings or {}))
    parts = shares(texts, dist.get_world_size())
    sharded = shard(copy.deepcopy(model), **(sharding or {}))
    return assert_as_alone(model, sharded, parts, **checks)
