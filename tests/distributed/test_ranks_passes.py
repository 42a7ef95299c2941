"""Passes over data that is spread over ranks: the same as one process with all of it, on every rank."""

import many
import pytest
import torch
import torch.distributed as dist
import work
from torch.nn.parallel import DistributedDataParallel

import unlearn_ext as ux


def _passes(model, data, **group):
    """Every pass once; nested dictionaries of tensors and facts."""
    found = {}
    for estimator, power in (("per_sample", 2), ("per_sample", 1), ("batch", 2)):
        importance = ux.fisher_diagonal(model, data, estimator=estimator, power=power, **group)
        facts = {"n": importance.n_samples, "b": importance.n_batches, "s": importance.batch_size}
        found[f"{estimator}{power}"] = (dict(importance), facts, importance.coverage)
    gram = ux.activation_gram(model, data, **group)
    found["gram"] = (dict(gram), {"n": gram.n_samples}, {})
    factors = ux.kfac_factors(model, data, loss_fn=ux.losses.cross_entropy, **group)
    pairs = {
        f"{name}/{side}": t for name, pair in factors.items() for side, t in zip("ag", pair, strict=True)
    }
    found["kfac"] = (pairs, {"n": factors.n_samples, "rows": factors.n_rows}, factors.coverage)
    for score in ("ratio", "grad", "taylor", "random"):
        torch.manual_seed(5)
        scores = ux.saliency(model, data, data, score=score, **group)
        found[score] = (dict(scores), {"groups": [group.name for group in scores.groups]}, scores.coverage)
    return found


def _on_rank(rank, world, forms, size):
    found = {}
    for form in forms:
        model = work.model_of()
        whole = work.batches(*work.samples(), size)
        before = model.state_dict()
        model = DistributedDataParallel(model)
        found[form] = _passes(model, work.shares(whole, world, form)[rank], process_group=dist.group.WORLD)
        assert many.same_bits(dict(before), dict(model.module.state_dict()))
    # The first call on a model, which proves layouts, may group its sums otherwise than later ones.
    again = _passes(work.model_of(), work.shares(whole, world, form)[rank], process_group=dist.group.WORLD)
    assert many.same_bits(again, found[form])
    return found


@pytest.mark.parametrize("world, size, forms", [(2, 5, ["ragged", "empty"]), (3, 4, ["even"])])
def test_passes_over_shards_are_those_over_all_data(world, size, forms):
    whole = work.batches(*work.samples(), size)
    alone = _passes(work.model_of(), whole)
    oracle = _passes(
        work.model_of(dtype=torch.float64), work.batches(*work.samples(dtype=torch.float64), size)
    )
    found = many.run(_on_rank, world, forms, size)
    for rank in range(1, world):
        assert many.same_bits(found[rank], found[0])
    for form in forms:
        for name, (tensors, facts, coverage) in alone.items():
            ours, our_facts, our_coverage = found[0][form][name]
            assert our_facts == facts, (form, name)
            assert our_coverage == coverage, (form, name)
            assert list(ours) == list(tensors)
            if name != "random":  # of which no two calls know anything
                assert many.difference(ours, tensors) <= 1e-6, (form, name)
                assert many.difference(ours, oracle[name][0]) <= 2e-6, (form, name)
