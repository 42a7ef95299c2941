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


def _figures(model, forget, retain, test, **group):
    other = work.model_of(work.Plain, 5)
    found = [ux.metrics.accuracy(model, forget, **group)]
    for convention in ("paper", "release"):
        found.append(ux.metrics.zrf(model, other, forget, convention, **group))
    found.append(ux.metrics.js_divergence(model, other, retain, **group))
    found.append(ux.metrics.activation_distance(model, other, test, **group))
    attack = ux.metrics.mia(
        model,
        forget=forget,
        retain=retain,
        test=test,
        convention="loss",
        reference=other,
        calibration=[other],
        bootstrap=20,
        **group,
    )
    return [*found, attack.auc, attack.tpr, *attack.auc_interval, attack.reference_auc]


def _sets_for_figures(world):
    whole = [work.batches(*work.samples(n, seed=n), 4) for n in (18, 30, 21)]
    shared = [
        work.shares(part, world, form) for part, form in zip(whole, ("empty", "even", "ragged"), strict=True)
    ]
    # In the order in which the ranks' samples are joined.
    return shared, [[batch for share in shares for batch in share] for shares in shared]


def _measured(rank, world):
    shared, _ = _sets_for_figures(world)
    model = DistributedDataParallel(work.model_of(work.Plain))
    return _figures(model, *(shares[rank] for shares in shared), process_group=dist.group.WORLD)


def test_figures_over_shards_are_those_over_all_data():
    found = many.run(_measured, 2)
    assert found[0] == found[1]
    assert found[0] == pytest.approx(_figures(work.model_of(work.Plain), *_sets_for_figures(2)[1]), rel=1e-6)
