"""What runs on every rank in test_sharded_readings.py: what a sharded model's passes have read."""

import copy
import itertools
import warnings

import pytest
import torch
import torch.distributed as dist
from sharded_checks import all_of, own
from sharded_models import images, language_model, shard, shares, small, texts
from sharded_training import random_masks
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import unlearn_ext as ux
from unlearn_ext.methods.readings import Tally
from unlearn_ext.methods.until import measure


class Passes:
    """Yields something else in every pass."""

    def __init__(self, *passes):
        self.passes = itertools.cycle(passes)

    def __iter__(self):
        return iter(next(self.passes))


def as_alone(make, sizes):
    """All ranks' samples make one reading, that of one process, by no more collectives than steps and one."""
    world = dist.get_world_size()
    model = {"images": small, "texts": lambda: language_model("llama")}[make]()
    parts = shares({"images": images, "texts": texts}[make], world, sizes)
    sharded = shard(copy.deepcopy(model))
    measure(sharded, own(parts))
    reduce, calls = dist.all_reduce, []
    dist.all_reduce = lambda *args, **settings: calls.append(1) or reduce(*args, **settings)
    try:
        found = measure(sharded, own(parts))
    finally:
        dist.all_reduce = reduce
    expected = measure(model, all_of(parts))
    assert found.reading == expected.reading
    assert found.reading.labels
    assert found.samples == expected.samples
    assert len(calls) == max(map(len, parts)) + 2
    return found.reading


def _told(forget, retain, **settings):
    """Warnings about passes, and notes, of a run of masked training."""
    sharded = shard(small())
    settings = {"objective": "finetune", "epochs": 1, "lr": 1e-3, **settings}
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = ux.gradient_masking(sharded, forget, retain, **settings)
    told = [str(warning.message) for warning in found if "pass" in str(warning.message)]
    return told, [entry["note"] for entry in result.history if "note" in entry]


def others_on_one_rank(what):
    """Only one rank's loader yields something else in its last pass."""
    forget, retain = shares(images, 2, [[3, 2], [4]]), shares(images, 2, [[4, 2], [5, 5]])
    mine = own(retain)
    if dist.get_rank() == 1:
        x, y = retain[1][0]
        other = {
            "labels": [(x, (y + 1) % 5), retain[1][1]],
            "inputs": [(x + 1, y), retain[1][1]],
            "fewer": [retain[1][1]],
        }[what]
        mine = Passes(retain[1], retain[1], other)
    return _told(own(forget), mine, masks=random_masks(small()))


def goal_watched():
    """Measured many times on the way, and told once."""
    forget, retain = shares(images, 2, [[3, 2], [4]]), shares(images, 2, [[4, 2], [5, 5]])
    mine = own(forget)
    if dist.get_rank() == 0:
        (x, y), *rest = mine
        mine = Passes(mine, *[[(x, (y + 1) % 5), *rest]] * 20)
    told, _ = _told(mine, own(retain), until=lambda model: False, budget=1.0, epochs=3)
    return told


def shuffled(on):
    """Loaders that shuffle are not told of; one that draws anew is, on all ranks, though only one has it."""
    x = torch.cat([x for x, _ in images(5, [24])])
    y = torch.zeros(24, dtype=torch.long)
    data = TensorDataset(x, y)
    loader = DataLoader(data, 5, shuffle=True)
    if dist.get_rank() == on:
        loader = DataLoader(data, 5, sampler=RandomSampler(data, replacement=True))
    sharded, readings = shard(small()), []
    for seed in (0, 2):
        torch.manual_seed(seed + dist.get_rank())
        readings.append(measure(sharded, loader).reading)
    first, later = readings
    if on < 0:
        assert first == later
    else:
        assert first.labels == later.labels
        assert first.rest != later.rest
    return later.anew


def failing_on_one_rank():
    """What cannot be taken up on one rank ends the call on all."""
    sharded, data = shard(small()), own(shares(images, 2))
    add = Tally.add

    def failing(tally, batch, n):
        if dist.get_rank() == 1:
            raise OSError("no memory left")
        add(tally, batch, n)

    Tally.add = failing
    try:
        with pytest.raises(OSError, match="no memory left"):
            measure(sharded, data)
    finally:
        Tally.add = add
    return measure(sharded, data).samples
