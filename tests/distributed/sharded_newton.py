"""What runs on every rank in test_sharded_newton.py: Kronecker factors and second-order steps on shards."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from sharded_checks import all_of, own
from sharded_models import CutOff, digits_like, images, language_model, shard, shares, small, texts
from sharded_ssd import parameters_of
from sharded_training import assert_as_alone

import unlearn_ext as ux
from unlearn_ext.fisher import kfac_sharded


def _worst(found, expected):
    worst = 0.0
    for name, pair in expected.items():
        for a, b in zip(found[name], pair, strict=True):
            worst = max(worst, float((a - b).norm() / b.norm().clamp(min=1e-30)))
    return worst


def factors(kind, settings=None, sharding=None):
    """At the labels there are: totals, rows, samples and coverage of one process, the same on all ranks."""
    world = dist.get_world_size()
    if kind == "small":
        model, make, loss = small(), images, ux.losses.cross_entropy
    else:
        model, make, loss = language_model(kind, **(settings or {})), texts, ux.tasks.CausalLM().loss
    parts = shares(make, world, [[3, 2], [], [1]] if kind == "small" else [[3, 2], [4, 1], [1]])
    sharded = shard(copy.deepcopy(model), **(sharding or {}))
    before = parameters_of(sharded)
    found = ux.kfac_factors(sharded, own(parts), loss_fn=loss)
    expected = ux.kfac_factors(model, all_of(parts), loss_fn=loss)
    assert list(found) == list(expected)
    assert found.coverage == expected.coverage, (found.coverage, expected.coverage)
    assert (found.n_rows, found.n_samples) == (expected.n_rows, expected.n_samples)
    worst = _worst(found, expected)
    assert worst <= 1e-5, worst
    sums = [[t.sum().item() for pair in found.values() for t in pair]]
    told = [None] * world
    dist.all_gather_object(told, sums)
    assert all(each == told[0] for each in told)
    for name, value in parameters_of(sharded).items():
        assert torch.equal(value, before[name])
    assert all(p.grad is None for p in sharded.parameters())
    return worst


def cut_off():
    """Where a backward function answers None, nothing reaches the layers behind it: gradients of zero."""
    torch.manual_seed(0)
    model, loss = CutOff().eval(), ux.losses.cross_entropy
    parts = shares(images, dist.get_world_size(), [[3, 2], [1]])
    sharded = shard(copy.deepcopy(model))
    expected = ux.kfac_factors(model, all_of(parts), loss_fn=loss)
    found = ux.kfac_factors(sharded, own(parts), loss_fn=loss)
    assert list(expected) == ["head"]
    assert _worst(found, expected) <= 1e-5
    for name in set(found) - {"head"}:  # zeros that FSDP puts in for nothing
        assert not found[name][1].any()
    values = ux.fisher_diagonal(sharded, own(parts), loss_fn=loss)
    wanted = ux.fisher_diagonal(model, all_of(parts), loss_fn=loss)
    for name, value in values.items():
        torch.testing.assert_close(value.full_tensor(), wanted[name], rtol=1e-4, atol=1e-7)
    assert wanted["head.weight"].any()
    assert not wanted["body.1.weight"].any()


def of_one_sample():
    parts = shares(images, dist.get_world_size(), [[1], []])
    loss = ux.losses.cross_entropy
    expected = ux.kfac_factors(small(), all_of(parts), loss_fn=loss)
    found = ux.kfac_factors(shard(small()), own(parts), loss_fn=loss)
    assert found.n_samples == expected.n_samples == 1
    worst = _worst(found, expected)
    assert worst <= 1e-5, worst


def checkpointed(use_reentrant):
    model = language_model("llama").train()
    parts = shares(texts, dist.get_world_size())
    loss = ux.tasks.CausalLM().loss
    expected = ux.kfac_factors(model, all_of(parts), loss_fn=loss)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    found = ux.kfac_factors(shard(model), own(parts), loss_fn=loss)
    assert found.coverage == expected.coverage
    worst = _worst(found, expected)
    assert worst <= 1e-5, worst
    return worst


def offloaded():
    from torch.distributed.fsdp import CPUOffloadPolicy

    return factors("small", sharding={"offload_policy": CPUOffloadPolicy(pin_memory=False)})


def drawn():
    """Labels that each rank draws from a stream of its own are those of one process with that stream."""
    model = small()
    parts = shares(images, dist.get_world_size())
    found = ux.kfac_factors(
        shard(copy.deepcopy(model)), own(parts), generator=torch.Generator().manual_seed(5)
    )
    seed = int(torch.randint(2**62, (), generator=torch.Generator().manual_seed(5)))
    pooled = None
    for rank, part in enumerate(parts):
        one = ux.kfac_factors(model, part, generator=torch.Generator().manual_seed(seed + rank))
        pooled = one if pooled is None else pooled + one
    worst = _worst(found, pooled)
    assert worst <= 1e-5, worst
    return worst


class Sharing(torch.nn.Module):
    """Layers that must be left out: a weight used beside its call, samples that meet, one that never runs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice = torch.nn.Linear(25, 6), torch.nn.Linear(6, 6)
        self.beside, self.last = torch.nn.Linear(6, 6), torch.nn.Linear(6, 5)
        self.idle = torch.nn.Linear(3, 3)

    def forward(self, x):
        x = self.twice(self.twice(self.first(x.flatten(1)).tanh()).tanh())
        x = self.beside(x).tanh() + x @ self.beside.weight
        return self.last(x)


def left_out():
    from torch.distributed.fsdp import fully_shard

    model = Sharing()
    sharded = copy.deepcopy(model)
    fully_shard(sharded.twice)
    fully_shard(sharded)
    parts = shares(images, dist.get_world_size())
    found = ux.kfac_factors(sharded, own(parts), loss_fn=ux.losses.cross_entropy)
    expected = ux.kfac_factors(model, all_of(parts), loss_fn=ux.losses.cross_entropy)
    assert found.coverage == expected.coverage
    assert list(found) == list(expected) == ["first", "twice", "last"]
    assert _worst(found, expected) <= 1e-5


def step(kind="images", sharding=None):
    """The step, the search and the outcome are those of one process; the weights too."""
    world = dist.get_world_size()
    settings = {"budget": 1.0, "class_budget": 1.0, "validation_budget": 1.0}
    if kind == "images":
        model, forget, retain = digits_like(world)
        validation = shares(lambda seed, sizes: images(seed + 90, sizes), world, [[20], [15, 15], [9]])
        settings |= {"loss_fn": ux.losses.cross_entropy}
        loss = ux.losses.cross_entropy
    else:
        model = language_model("llama")
        forget, retain, validation = (
            shares(lambda seed, sizes, at=at: texts(seed + at, sizes), world, sizes)
            for at, sizes in ((0, [[2], [1, 1], []]), (40, [[3], [2], [2]]), (80, [[4], [4], [4]]))
        )
        settings |= {"exclude": ["lm_head"], "until": "unseen", "rounds": 2}
        loss = ux.tasks.CausalLM().loss
    sharded = shard(copy.deepcopy(model), **(sharding or {}))
    before = parameters_of(sharded)
    given = [
        ux.kfac_factors(sharded, own(retain), loss_fn=loss),
        ux.kfac_factors(model, all_of(retain), loss_fn=loss),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        many = ux.newton(
            sharded, own(forget), own(retain), validation=own(validation), factors=given[0], **settings
        )
        one = ux.newton(
            model, all_of(forget), all_of(retain), validation=all_of(validation), factors=given[1], **settings
        )
    assert many.reached == one.reached
    assert many.reached
    searched = [[entry["step"] for entry in r.history if entry["phase"] == "search"] for r in (many, one)]
    assert searched[0] == searched[1]
    assert searched[0]
    assert many.changed == pytest.approx(one.changed, abs=0.01)
    assert many.changed > 0.1
    assert many.before == pytest.approx(one.before, rel=1e-5)
    assert many.after == pytest.approx(one.after, rel=1e-4)
    if kind != "images":
        assert torch.equal(parameters_of(sharded)["lm_head.weight"], before["lm_head.weight"])
    return assert_as_alone(model, sharded)


def with_factors_of_its_own():
    """Drawn labels differ from those of one process; the goal is reached all the same, or nothing changes."""
    model, forget, retain = digits_like(dist.get_world_size())
    validation = [(x + 0.1, y) for x, y in own(retain)]
    sharded = shard(model)
    before = parameters_of(sharded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = ux.newton(
            sharded,
            own(forget),
            own(retain),
            validation=validation,
            until=0.5,
            budget=0.0,
            class_budget=0.0,
            validation_budget=0.0,
        )
        judged = ux.newton(
            shard(digits_like(dist.get_world_size())[0]),
            own(forget),
            own(retain),
            validation=validation,
            until=lambda _: dist.get_rank() == 0,
        )
    assert not judged.reached
    for name, value in parameters_of(sharded).items():
        assert result.reached or torch.equal(value, before[name])
    return result.reached, result.after


def failures():
    """What fails on one rank, or is too large, ends the call on all with every bit in place."""
    rank = dist.get_rank()
    model, forget, retain = digits_like(dist.get_world_size())
    sharded = shard(model)
    before = parameters_of(sharded)
    bad = [(x * float("inf"), y) if rank == 1 else (x, y) for x, y in own(forget)]
    wrong = [(x, y + 100 * (rank == 0)) for x, y in own(retain)]
    found = []

    def fails(kind, call):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(kind) as error:
                call()
        for name, value in parameters_of(sharded).items():
            assert torch.equal(value, before[name]), name
        found.append(str(error.value))

    good = ux.kfac_factors(sharded, own(retain))
    fails(FloatingPointError, lambda: ux.kfac_factors(sharded, bad))
    fails(ValueError, lambda: ux.kfac_factors(sharded, wrong))
    fails(ValueError, lambda: ux.kfac_factors(sharded, []))
    fails(NotImplementedError, lambda: ux.kfac_factors(sharded, own(retain), checkpoint="x"))
    fails(ValueError, lambda: ux.kfac_factors(sharded, own(retain), process_group=dist.group.WORLD))
    settings = {"validation": own(retain), "factors": good, "until": 0.5}
    fails(FloatingPointError, lambda: ux.newton(sharded, bad, own(retain), **settings))
    fails(ValueError, lambda: ux.newton(sharded, own(forget), wrong, **settings))
    fails(ValueError, lambda: ux.newton(sharded, own(forget), own(retain), budget=0.1 + rank, **settings))
    largest, kfac_sharded.LARGEST = kfac_sharded.LARGEST, 1 << 10
    try:
        fails(NotImplementedError, lambda: ux.kfac_factors(sharded, own(retain)))
    finally:
        kfac_sharded.LARGEST = largest
    again = ux.kfac_factors(sharded, own(retain), loss_fn=ux.losses.cross_entropy)
    assert again.n_samples == sum(len(y) for _, y in all_of(retain))
    return found
