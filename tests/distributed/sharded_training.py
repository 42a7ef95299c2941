"""What runs on every rank in test_sharded_training.py: masked training, against one process."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from sharded_checks import all_of, mesh_of, own
from sharded_models import digits_like, images, language_model, shard, shares, small, texts
from sharded_ssd import parameters_of

import unlearn_ext as ux
from unlearn_ext.methods.until import UnlearningFailed

EPOCHS = 2


def sets(world, make=images):
    """Shares of both sets; the last rank has no batch of one of them."""
    forget = shares(make, world, [[3, 2], [4], [1, 1]])
    retain = shares(lambda seed, sizes: make(seed + 50, sizes), world, [[6, 4, 2], [5, 5], []])
    return forget, retain


def _joined(batches):
    batches = [batch for batch in batches if batch is not None]
    if isinstance(batches[0], dict):
        return {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    return tuple(torch.cat(column) for column in zip(*batches, strict=True))


def together(parts):
    """The batches of all ranks, step by step."""
    longest = max(map(len, parts))
    return [_joined([part[i] if i < len(part) else None for part in parts]) for i in range(longest)]


def beside(first, second, epochs=EPOCHS):
    """Of pairs: the second set's batches for all steps, each rank going on in its own."""
    at, found = [0] * len(first), []
    for _ in range(epochs):
        for step in range(max(map(len, first))):
            batches = []
            for rank, part in enumerate(first):
                if step < len(part) and second[rank]:
                    batches.append(second[rank][at[rank] % len(second[rank])])
                    at[rank] += 1
            found.append(_joined(batches))
    return found


def random_masks(model, density=0.4):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.rand(p.shape, generator=generator) < density for name, p in model.named_parameters()}


def assert_as_alone(model, sharded, tolerance=1e-6):
    """Weights of the sharded model are those of the one that was trained in one process."""
    expected = {name: p.detach() for name, p in model.named_parameters()}
    worst = 0.0
    for name, value in parameters_of(sharded).items():
        scale = max(1.0, float(expected[name].abs().max()))
        worst = max(worst, float((value - expected[name]).abs().max()) / scale)
    assert worst <= tolerance, worst
    return worst


def losses_of(result):
    return [entry["loss"] for entry in result.history if "loss" in entry]


def given_masks(objective, make="images", optimizer="sgd", sharding=None):
    """Masked training on shards: the weights of one process, and what is masked keeps its bits."""
    world = dist.get_world_size()
    maker = {"images": images, "texts": texts}[make]
    model = small() if make == "images" else language_model("llama", tie_word_embeddings=True)
    forget, retain = sets(world, maker)
    masks = random_masks(model)
    sharded = shard(copy.deepcopy(model), **(sharding or {}))
    before = parameters_of(sharded)
    flags = [module.training for module in sharded.modules()]
    settings = {"objective": objective, "epochs": EPOCHS, "lr": 0.01, "masks": masks, "optimizer": optimizer}
    settings["weight_decay"] = 0.01
    paired = objective in ("relabel", "ascend")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that little was forgotten
        many = ux.gradient_masking(sharded, own(forget), own(retain), **settings)
        one = ux.gradient_masking(
            model, together(forget), beside(forget, retain) if paired else together(retain), **settings
        )
    worst = assert_as_alone(model, sharded, 1e-6 if optimizer == "sgd" else 2e-5)
    assert abs(many.changed - one.changed) <= 0.01
    assert losses_of(many) == pytest.approx(losses_of(one), rel=1e-5)
    if not paired:  # else the retain set of one process has other batches
        assert many.before == pytest.approx(one.before, rel=1e-5)
        assert many.after == pytest.approx(one.after, rel=1e-4)
    for name, value in parameters_of(sharded).items():
        assert torch.equal(value[~masks[name]], before[name][~masks[name]]), name
        assert not masks[name].any() or not torch.equal(value, before[name]), name
    for p in sharded.parameters():
        assert p.grad is None
        assert p.requires_grad
    assert flags == [module.training for module in sharded.modules()]
    return worst


def hybrid():
    return given_masks("relabel", sharding={"mesh": mesh_of((dist.get_world_size(), 1))})


def gathered_throughout():
    return given_masks("relabel", "texts", sharding={"reshard_after_forward": False})


def selected(granularity, score):
    """Masks that the method finds itself are those of one process."""
    world = dist.get_world_size()
    model = language_model("llama")
    forget, retain = sets(world, texts)
    sharded = shard(copy.deepcopy(model))
    settings = {"score": score, "granularity": granularity, "density": 0.3, "objective": "finetune"}
    settings |= {"epochs": 1, "lr": 0.02}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        many = ux.gradient_masking(sharded, own(forget), own(retain), **settings)
        one = ux.gradient_masking(model, all_of(forget), together(retain), **settings)
    facts = [next(entry for entry in r.history if entry["phase"] == "mask") for r in (many, one)]
    assert facts[0] == facts[1]
    assert 0 < facts[0]["selected"] < 1
    return assert_as_alone(model, sharded)


def averaged_otherwise():
    """Whatever FSDP was told to divide gradients by, and in which precision it adds them up."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    model = small()
    forget, retain = sets(dist.get_world_size())
    masks = random_masks(model)
    settings = {"objective": "finetune", "epochs": 1, "lr": 0.05, "masks": masks}
    sharded = shard(copy.deepcopy(model), mp_policy=MixedPrecisionPolicy(reduce_dtype=torch.bfloat16))
    sharded.set_gradient_divide_factor(7.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ux.gradient_masking(sharded, own(forget), own(retain), **settings)
        ux.gradient_masking(model, together(forget), together(retain), **settings)
    return assert_as_alone(model, sharded)


def offloaded():
    from torch.distributed.fsdp import CPUOffloadPolicy

    return given_masks("finetune", sharding={"offload_policy": CPUOffloadPolicy(pin_memory=False)})


def without_data_on_a_rank():
    """A rank without any batch of either set takes all steps with the others."""
    world = dist.get_world_size()
    model = small()
    forget = shares(images, world, [[3, 2], [], []])
    retain = shares(lambda seed, sizes: images(seed + 50, sizes), world, [[6, 4, 2], [], []])
    settings = {"objective": "relabel", "epochs": EPOCHS, "lr": 0.05, "masks": random_masks(model)}
    sharded = shard(copy.deepcopy(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ux.gradient_masking(sharded, own(forget), own(retain), **settings)
        ux.gradient_masking(model, together(forget), beside(forget, retain), **settings)
    return assert_as_alone(model, sharded)


def salun_and_scores():
    """SalUn's mask is that of one process, and every score is."""
    world = dist.get_world_size()
    model = small()
    model.stem[1] = torch.nn.GroupNorm(1, 3)  # statistics of a batch are refused
    forget, retain = sets(world)
    sharded = shard(copy.deepcopy(model))
    for score in ("grad", "taylor"):
        found = ux.saliency(sharded, own(forget), score=score)
        expected = ux.saliency(model, all_of(forget), score=score)
        for name, tensor in found.items():
            assert tensor.placements == dict(sharded.named_parameters())[name].placements
            torch.testing.assert_close(tensor.full_tensor(), expected[name], rtol=1e-4, atol=1e-7)
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    drawn = ux.saliency(sharded, own(forget), score="random", generator=seeds[0])
    for tensor in drawn.values():
        assert 0 <= float(tensor.full_tensor().min()) <= float(tensor.full_tensor().max()) < 1
    settings = {"epochs": EPOCHS, "density": 0.3}
    before = parameters_of(sharded)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        many = ux.salun(sharded, own(forget), own(retain), **settings)
        one = ux.salun(copy.deepcopy(model), all_of(forget), together(retain), **settings)
    facts = [next(entry for entry in r.history if entry["phase"] == "mask") for r in (many, one)]
    assert facts[0] == facts[1]
    scores = ux.saliency(model, all_of(forget), score="grad")
    expected = ux.select_mask(scores, 0.3)
    for name, value in parameters_of(sharded).items():
        free = ux.ops.unpack_mask(expected[name], value.shape)
        assert torch.equal(value[~free], before[name][~free]), name
    assert many.changed == pytest.approx(0.3, abs=0.01)
    return many.changed


def closed_loop():
    """Goals, budgets and what they leave are those that all ranks measure together."""
    model, forget, retain = digits_like(dist.get_world_size())
    model.stem[1].eval()
    found, losses = [], []
    settings = {"density": 0.5, "min_depth": 0.0, "lr": 0.3, "objective": "ascend", "epochs": 30}
    for until, budget in (("forgotten", 0.5), (lambda _: dist.get_rank() >= 0, 0.5), ("unseen", 0.5)):
        sharded = shard(copy.deepcopy(model))
        more = {"validation": own(forget)} if until == "unseen" else {}
        result = ux.gradient_masking(
            sharded, own(forget), own(retain), until=until, budget=budget, **settings, **more
        )
        assert result.reached
        losses = losses or losses_of(result)
        found.append((result.before, result.after, [e for e in result.history if e["phase"] == "goal"]))
    assert found[0][1]["forget_accuracy"] <= 0.01
    assert found[0][2]
    alone = copy.deepcopy(model)
    one = ux.gradient_masking(
        alone, together(forget), beside(forget, retain, 30), until="forgotten", budget=0.5, **settings
    )
    assert one.after["forget_accuracy"] == found[0][1]["forget_accuracy"]
    assert losses_of(one)[:4] == pytest.approx(losses[:4], rel=1e-3)
    # What cannot be reached within the budget leaves every bit as it was.
    sharded = shard(copy.deepcopy(model))
    before = parameters_of(sharded)
    with pytest.raises(UnlearningFailed, match="the model is as it was"):
        ux.gradient_masking(
            sharded,
            own(forget),
            own(retain),
            until=lambda _: dist.get_rank() == 0,
            strict=True,
            **settings | {"epochs": 2},
        )
    for name, value in parameters_of(sharded).items():
        assert torch.equal(value, before[name])
    return found


class Broken(list):
    """Batches, and a failure behind them."""

    def __iter__(self):
        yield from super().__iter__()
        raise OSError("disk on fire")


def _failing(call, sharded, before):
    try:
        call()
    except Exception as error:
        for name, value in parameters_of(sharded).items():
            assert torch.equal(value, before[name]), name
        for p in sharded.parameters():
            assert p.grad is None
        return type(error).__name__, str(error)
    return "", ""


def failures():
    """What fails on one rank ends the call on all, with every bit in place, and the next call works."""
    world, rank = dist.get_world_size(), dist.get_rank()
    model = small()
    forget, retain = sets(world)
    sharded = shard(copy.deepcopy(model))
    before = parameters_of(sharded)
    masks = random_masks(model)
    settings = {"objective": "relabel", "epochs": EPOCHS, "lr": 0.05, "masks": masks, "retain_weight": 0.0}
    bad = [(x * float("inf"), y) if rank == 1 else (x, y) for x, y in own(forget)]
    mine = {"masks": masks if rank == 0 else {n: m.clone().fill_(True) for n, m in masks.items()}}
    packed = {name: ux.ops.pack_mask(mask) for name, mask in masks.items()}
    wrong = [(x, y + 100) if rank == 1 else (x, y) for x, y in own(forget)]
    calls = [
        lambda: ux.gradient_masking(sharded, bad, **settings),
        lambda: ux.gradient_masking(sharded, Broken(own(forget)) if rank == 0 else own(forget), **settings),
        lambda: ux.gradient_masking(sharded, own(forget), **settings | {"lr": 0.1 * (rank + 1)}),
        lambda: ux.gradient_masking(sharded, own(forget), **settings | mine),
        lambda: ux.gradient_masking(sharded, own(forget), **settings | {"masks": packed}),
        lambda: ux.gradient_masking(sharded, own(forget), process_group=dist.group.WORLD, **settings),
        lambda: ux.gradient_masking(sharded, [], **settings),
        lambda: ux.gradient_masking(sharded, [(x[:0], y[:0]) for x, y in own(forget)], **settings),
        lambda: ux.gradient_masking(sharded, wrong, **settings),
        lambda: ux.salun(sharded, own(forget), own(retain), masks=masks),
        lambda: ux.methods.pgu(sharded, own(forget), own(retain)),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = [_failing(call, sharded, before) for call in calls]
        ux.gradient_masking(sharded, own(forget), **settings)
        ux.gradient_masking(model, together(forget), **settings)
    assert_as_alone(model, sharded)
    return found
