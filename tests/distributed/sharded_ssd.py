"""What runs on every rank in test_sharded_ssd.py."""

import copy

import pytest
import torch
import torch.distributed as dist
from sharded_checks import all_of, own, whole
from sharded_models import images, shard, shares, small

import unlearn_ext as ux

# Sets that differ in their inputs, so that a dampening has something to tell apart.
FORGET, RETAIN = [[3, 2], [2], [1, 1]], [[6, 4], [5, 5], [3]]


def sets(world):
    forget = [[(x + 2, y * 0) for x, y in part] for part in shares(images, world, FORGET)]
    return forget, shares(lambda seed, sizes: images(seed + 50, sizes), world, RETAIN)


def parameters_of(model):
    for module in model.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return {
        name: getattr(p, "full_tensor", lambda p=p: p)().detach().clone()
        for name, p in model.named_parameters()
    }


def plan():
    """Same importances, same bits; put back to the bit; the record is that of the whole model."""
    model = small()
    forget, retain = sets(dist.get_world_size())
    sharded = shard(copy.deepcopy(model))
    before = parameters_of(sharded)
    many = ux.plan_ssd(sharded, own(forget), own(retain), alpha="adaptive", lambda_=0.5)
    one = ux.plan_ssd(
        model,
        many.importance_forget.gathered(),
        importance=many.importance_full.gathered(),
        alpha=many.alpha,
        lambda_=0.5,
    )
    assert many.importance_full.n_samples == sum(len(y) for _, y in all_of(forget) + all_of(retain))
    alone = ux.plan_ssd(model, all_of(forget), all_of(retain), alpha="adaptive", lambda_=0.5)
    assert abs(alone.alpha - many.alpha) <= 1e-4 * alone.alpha
    lines = [text.splitlines()[2:] for text in (one.summary(), many.summary())]
    assert lines[0] == lines[1], lines
    grids = [[tuple(row) for row in map(_values, p.sweep([1.0, 2.0]))] for p in (one, many)]
    assert grids[0] == grids[1]
    sharded(own(retain)[0][0])  # the root stays gathered after this
    result, record = one.apply(), many.apply()
    changed = parameters_of(sharded)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, changed[name]), name
    assert any(not torch.equal(changed[name], before[name]) for name in before)
    assert record.changed == result.changed > 0
    assert record.changed_per_parameter == result.changed_per_parameter
    model.eval()
    x = all_of(retain)[0][0]
    assert torch.allclose(sharded.eval()(x), model(x), atol=1e-6)
    many.revert()
    for name, value in parameters_of(sharded).items():
        assert torch.equal(value, before[name])
    many.apply()
    if dist.get_rank() == 0:
        with torch.no_grad():
            for parameter in sharded.parameters():
                parameter.to_local().mul_(2)
    with pytest.raises(RuntimeError, match="has changed since apply\\(\\), on this rank or another"):
        many.revert()


def loop():
    """The closed loop tries, measures and chooses what one process does with all ranks' data."""
    from sharded_models import digits_like

    model, forget, retain = digits_like(dist.get_world_size())
    sharded = shard(copy.deepcopy(model))
    before = parameters_of(sharded)
    alone = ux.plan_ssd(model, all_of(forget), all_of(retain), budget=0.5)
    many = ux.plan_ssd(sharded, own(forget), own(retain), budget=0.5)
    tried = [[(c.round, c.scope, c.k, c.reached) for c in p.candidates] for p in (alone, many)]
    assert tried[0] == tried[1]
    assert alone.reached
    assert many.reached
    assert len(many.candidates) > 1
    for one, other in zip(alone.candidates, many.candidates, strict=True):
        assert one.forget.accuracy == other.forget.accuracy
        assert one.forget.samples == other.forget.samples
        assert abs(one.selected - other.selected) <= 2
    assert many.summary().splitlines()[1] == alone.summary().splitlines()[1]
    for name, value in parameters_of(sharded).items():
        assert torch.equal(value, before[name])
    result, expected = many.apply(), alone.apply()
    assert abs(result.changed - expected.changed) <= 0.01
    assert result.after["forget_accuracy"] == expected.after["forget_accuracy"]
    for name, value in parameters_of(sharded).items():
        assert torch.allclose(value, dict(model.named_parameters())[name], rtol=1e-3, atol=1e-4)
    many.revert()
    for name, value in parameters_of(sharded).items():
        assert torch.equal(value, before[name])
    return len(many.candidates)


def judged_by_a_function():
    """What one rank alone takes for good enough does for none, and nobody waits."""
    from sharded_models import digits_like

    model, forget, retain = digits_like(dist.get_world_size())
    sharded = shard(model)
    asked = []

    def until(_):
        asked.append(1)
        return dist.get_rank() == 0

    plan = ux.plan_ssd(sharded, own(forget), own(retain), until=until, budget=0.5)
    assert not plan.reached
    assert len(asked) > 1
    assert ux.plan_ssd(sharded, own(forget), own(retain), until=lambda _: True).reached
    return len(asked)


def _values(row):
    return row.alpha, row.lambda_, row.selected, round(row.mean_factor, 12)


def at_once():
    model = small()
    forget, retain = sets(dist.get_world_size())
    sharded = shard(copy.deepcopy(model))
    result = ux.ssd(sharded, own(forget), own(retain), alpha=1.2)
    expected = ux.ssd(model, all_of(forget), all_of(retain), alpha=1.2)
    assert abs(result.changed - expected.changed) <= 0.01
    for name, value in parameters_of(sharded).items():
        assert torch.allclose(value, dict(model.named_parameters())[name], rtol=1e-3, atol=1e-5)


def masks():
    """Scores and masks are those of the whole, to the bit, and a masked optimizer takes them."""

    model = small()
    forget, retain = sets(dist.get_world_size())
    sharded = shard(copy.deepcopy(model))
    for score in ("obd", "ratio"):
        scores = ux.saliency(sharded, own(forget), own(retain), score=score)
        alone = ux.saliency(model, all_of(forget), all_of(retain), score=score)
        gathered = {name: tensor.full_tensor() for name, tensor in scores.items()}
        for name, tensor in gathered.items():
            assert torch.allclose(tensor, alone[name], rtol=1e-4, atol=1e-6 * float(alone[name].max())), name
        for scope in ("global", "layer"):
            found = ux.select_mask(scores, 0.3, scope=scope, exclude=["head.bias"])
            expected = ux.select_mask(gathered, 0.3, scope=scope, exclude=["head.bias"])
            for name, mask in found.items():
                whole_mask = ux.ops.unpack_mask(expected[name], gathered[name].shape)
                assert torch.equal(_gathered(mask), whole_mask), name
    before = parameters_of(sharded)
    optimizer = ux.optim.MaskedAdamW(sharded.named_parameters(), lr=0.1, masks=found)
    x, y = own(retain)[0]
    torch.nn.functional.cross_entropy(sharded(x), y).backward()
    optimizer.step()
    for name, value in parameters_of(sharded).items():
        free = _gathered(found[name])
        assert torch.equal(value[~free], before[name][~free])
        assert not torch.equal(value[free], before[name][free]) or not free.any()
    with pytest.raises(NotImplementedError, match="rule must be 'density'"):
        ux.select_mask(scores, 0.3, rule="mass")
    whole_scores = ux.masks.Scores(gathered, scores.groups, score="ratio")
    for unit in ("neuron", "layer"):
        for rule in ("density", "quantile", "mass"):
            settings = {"granularity": unit, "rule": rule, "min_depth": 0.3, "reduction": "mean"}
            found = ux.select_mask(scores, 0.4, **settings)
            expected = ux.select_mask(whole_scores, 0.4, **settings)
            for name, mask in found.items():
                packed = ux.ops.unpack_mask(expected[name], gathered[name].shape)
                assert torch.equal(_gathered(mask), packed), (unit, rule, name)


def _gathered(mask):
    # all_gather of bool is not to be had everywhere
    from torch.distributed.tensor import DTensor

    local = mask.to_local().to(torch.int32)
    like = (mask.device_mesh, mask.placements)
    return DTensor.from_local(local, *like, shape=mask.shape, stride=mask.stride()).full_tensor().bool()


def stored(folder):
    """Through a distributed checkpoint and back: facts, values, and what a file of one process means here."""
    import torch.distributed.checkpoint as checkpoint

    model = small()
    forget, retain = sets(dist.get_world_size())
    sharded = shard(copy.deepcopy(model))
    full = ux.fisher_diagonal(sharded, own(forget)) + ux.fisher_diagonal(sharded, own(retain))
    checkpoint.save({"importance": full}, checkpoint_id=folder)
    again = type(full).like(sharded)
    checkpoint.load({"importance": again}, checkpoint_id=folder)
    for name, tensor in full.items():
        assert torch.equal(tensor.to_local(), again[name].to_local())
    assert again._facts() == full._facts()
    with pytest.raises(NotImplementedError, match=r"torch\.distributed\.checkpoint"):
        full.save(f"{folder}/whole.safetensors")
    gathered = full.gathered()
    # Whole importances are cut to the shards; the weights are known to be the same.
    plan = ux.plan_ssd(sharded, own(forget), importance=gathered, alpha=2.0)
    for name, tensor in plan.importance_full.items():
        assert torch.equal(tensor.full_tensor(), gathered[name])
    less = full - ux.fisher_diagonal(sharded, own(forget))
    expected = ux.fisher_diagonal(sharded, own(retain))
    for name, tensor in whole(less).items():
        assert torch.allclose(tensor, whole(expected)[name], rtol=1e-3, atol=1e-6)
    return {name: tensor.tolist() for name, tensor in gathered.items()}, full._facts()
