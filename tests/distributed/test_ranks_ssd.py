"""Selective synaptic dampening on ranks: the plan and the model of one process with all data."""

import many
import pytest
import torch
import torch.distributed as dist
import work
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import unlearn_ext as ux


def trained(n=120, steps=50):
    """A model that knows its classes, and its data by class: forget class 1 of five."""
    inputs, _ = work.samples(n, seed=3)
    labels = torch.arange(n) % 5
    inputs = inputs + 4 * torch.eye(5, 17)[labels]
    model = work.model_of(lambda: nn.Sequential(nn.Linear(17, 64), nn.ReLU(), nn.Linear(64, 5))).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(inputs), labels).backward()
        optimizer.step()
    is_forgotten = labels == 1
    forget = work.batches(inputs[is_forgotten], labels[is_forgotten], 4)
    retain = work.batches(inputs[~is_forgotten], labels[~is_forgotten], 7)
    return model, forget, retain


def _outcome(model, result):
    facts = {"changed": result.changed, "reached": result.reached, "passes": result.passes}
    return dict(model.state_dict()), facts, {**result.before, **result.after}


def _one(alpha, model, forget, retain, **group):
    wrapped = DistributedDataParallel(model) if group else model
    result = ux.ssd(wrapped, forget, retain, alpha=alpha, **group)
    return _outcome(model, result)


def _on_rank(rank, world, forms, alpha):
    found = {}
    for form in forms:
        model, forget, retain = trained()
        shares = [work.shares(part, world, form)[rank] for part in (forget, retain)]
        found[form] = _one(alpha, model, *shares, process_group=dist.group.WORLD)
    return found


CASES = [
    (2, "auto", ["ragged", "empty"]),
    (3, "auto", ["even"]),
    (2, "adaptive", ["even"]),
    (3, 1.5, ["ragged"]),
]


@pytest.mark.parametrize("world, alpha, forms", CASES)
def test_ssd_on_shards_is_ssd_on_all_data(world, alpha, forms):
    weights, facts, figures = _one(alpha, *trained())
    found = many.run(_on_rank, world, forms, alpha)
    assert all(many.same_bits(each, found[0]) for each in found)
    for form in forms:
        ours, our_facts, our_figures = found[0][form]
        assert our_facts == facts, form
        assert many.difference(ours, weights) <= 1e-6, form
        assert our_figures == pytest.approx(figures, rel=1e-5, abs=1e-6), form
    assert facts["changed"] > 0
    assert facts["reached"] is (True if alpha == "auto" else None)
