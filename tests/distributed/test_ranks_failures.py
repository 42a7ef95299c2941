"""Where one rank fails, or is called with other things, all ranks say so, and every model is as it was."""

import many
import pytest
import torch
import torch.distributed as dist
import work
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Partial, init_device_mesh
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import unlearn_ext as ux
from unlearn_ext.distributed import Shards
from unlearn_ext.distributed.group import Ranks


def _told(function, *args, **settings):
    """What a call raises: its type and text; None if it returns."""
    try:
        function(*args, process_group=dist.group.WORLD, **settings)
    except Exception as error:
        return type(error).__name__, str(error)
    return None


def _data(size=5):
    return work.batches(*work.samples(), size)


class _Reader:
    """Batches, of which one cannot be read."""

    def __init__(self, data, bad):
        self.data, self.bad = data, bad

    def __iter__(self):
        for index, batch in enumerate(self.data):
            if index == self.bad:
                raise OSError("the disk is gone")
            yield batch


def _in_the_middle(rank, world):
    model = work.model_of()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    whole, found = _data(), {}
    mine = whole[rank::world]
    holes = torch.tensor([torch.nan] * 16 + [0.0])
    bad = [(x + holes, y) for x, y in mine] if rank == 1 else mine
    found["nan"] = [_told(function, model, bad) for function in (ux.fisher_diagonal, ux.kfac_factors)]
    found["unreadable"] = _told(ux.activation_gram, model, _Reader(mine, 1 if rank == world - 1 else -1))
    found["one-shot"] = _told(ux.saliency, model, iter(mine) if rank == 0 else mine, score="fisher")
    found["no data"] = [_told(function, model, []) for function in (ux.fisher_diagonal, ux.activation_gram)]
    found["argument"] = _told(ux.fisher_diagonal, model, mine, **({"nonsense": 1} if rank else {}))
    found["mixed up"] = _told(ux.fisher_diagonal if rank else ux.activation_gram, model, mine)
    # And the ranks are still together.
    found["good"] = dict(ux.fisher_diagonal(model, mine, process_group=dist.group.WORLD))
    assert many.same_bits(before, dict(model.state_dict()))
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_fail_with_the_one_that_does(world):
    found = many.run(_in_the_middle, world)
    for rank, each in enumerate(found):
        prefix = "" if rank == 1 else "rank 1: "
        for told, who in zip(each["nan"], ("fisher_diagonal", "kfac_factors"), strict=True):
            assert told[0] == "FloatingPointError"
            assert told[1].startswith(f"{prefix}{who}: the loss must be finite")
        last = "" if rank == world - 1 else f"rank {world - 1}: "
        assert each["unreadable"] == ("OSError", f"{last}the disk is gone")
        assert each["one-shot"][0] == "ValueError"
        assert "re-iterable" in each["one-shot"][1]
        assert [told[0] for told in each["no data"]] == ["ValueError"] * 2
        assert all("at least one sample" in told[1] for told in each["no data"])
        assert each["argument"][0] == "TypeError"
        assert each["mixed up"][0] == "RuntimeError"
        assert "same function" in each["mixed up"][1]
    assert many.same_bits(found[0]["good"], found[1]["good"])
    alone = ux.fisher_diagonal(work.model_of(), _data())
    assert many.difference(found[0]["good"], dict(alone)) <= 1e-6


def _at_the_start(rank, world):
    found, mine = {}, _data()[rank::world]
    group = dist.group.WORLD
    found["weights"] = _told(ux.fisher_diagonal, work.model_of(seed=rank), mine)
    moved = work.model_of()
    moved.norm.running_mean.add_(rank)
    found["buffers"] = _told(ux.activation_gram, moved, mine)
    found["other model"] = _told(ux.kfac_factors, work.model_of(work.Plain if rank else work.Net), mine)
    found["settings"] = _told(ux.fisher_diagonal, work.model_of(), mine, power=1 + rank)
    found["frozen"] = _told(ux.fisher_diagonal, work.model_of().requires_grad_(rank == 0), mine)
    stored = ux.Importance.from_dict({"head.weight": torch.full((3, 12), 1.0 + rank)}, 100)
    plain = work.model_of(work.Plain)
    found["importance"] = _told(ux.ssd, plain, mine, importance=stored, alpha=2.0)
    found["missing"] = _told(ux.ssd, plain, mine, mine if rank else None, alpha=2.0)

    partitioned = work.model_of(work.Plain)
    if rank == world - 1:
        partitioned.head.weight.ds_id = 7
    found["deepspeed"] = _told(ux.fisher_diagonal, partitioned, mine)
    quantised = work.model_of(work.Plain)
    quantised.table = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
    found["quantised"] = _told(ux.fisher_diagonal, quantised, mine)
    found["meta"] = _told(ux.fisher_diagonal, work.model_of(work.Plain).to("meta" if rank else "cpu"), mine)
    found["parallel"] = _told(ux.fisher_diagonal, nn.DataParallel(plain), mine)
    wrapped = FullyShardedDataParallel(work.model_of(work.Plain), device_id=torch.device("cpu"))
    found["fsdp1"] = _told(ux.fisher_diagonal, wrapped, mine)
    partial = work.model_of(work.Plain)
    mesh = init_device_mesh("cpu", (world,))
    partial.head.bias = nn.Parameter(DTensor.from_local(partial.head.bias.detach(), mesh, [Partial()]))
    found["partial"] = _told(ux.fisher_diagonal, partial, mine)

    others = dist.new_group([0])
    model = work.model_of(work.Plain)
    if rank:
        with pytest.raises(ValueError, match="must hold this process"):
            ux.fisher_diagonal(model, mine, process_group=others)
    else:
        assert ux.fisher_diagonal(model, mine, process_group=others).n_samples
    with pytest.raises(TypeError, match=r"mesh\.get_group"):
        ux.fisher_diagonal(model, mine, process_group=mesh)
    ux.fisher_diagonal(model, mine, process_group=mesh.get_group(), progress=rank == 0)
    dist.barrier(group)
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_calls_that_differ_and_models_that_are_not_whole_are_refused_on_all_ranks(world):
    found = many.run(_at_the_start, world)
    wanted = {
        "weights": ("ValueError", "other values of conv.weight"),
        "buffers": ("ValueError", "norm.running_mean, buffers"),
        "other model": ("ValueError", "model must be the same on all ranks"),
        "settings": ("ValueError", "power must be the same on all ranks, got 1 on rank 0 and 2 on rank 1"),
        "frozen": ("ValueError", "must have a trainable parameter"),
        "importance": ("ValueError", "importance must be the same on all ranks"),
        "missing": ("ValueError", "retain must be the same on all ranks"),
        "deepspeed": ("NotImplementedError", "DeepSpeed"),
        "quantised": ("NotImplementedError", "dequantised"),
        "meta": ("NotImplementedError", "meta device"),
        "parallel": ("NotImplementedError", "DataParallel"),
        "fsdp1": ("NotImplementedError", "FullyShardedDataParallel"),
        "partial": ("NotImplementedError", "DTensor"),
    }
    for each in found:
        assert each.keys() == wanted.keys()
        for name, (kind, text) in wanted.items():
            assert each[name] is not None, name
            assert each[name][0] == kind, (name, each[name])
            assert text in each[name][1], (name, each[name])


def _dying(rank, world):
    model, mine = work.model_of(work.Plain), _data()[rank::world]
    if rank == 1:

        class Last(_Reader):
            def __iter__(self):
                import os

                yield self.data[0]
                os._exit(3)

        mine = Last(mine, -1)
    ux.fisher_diagonal(model, mine, process_group=dist.group.WORLD)


def test_a_rank_that_dies_ends_the_others():
    found = many.outcomes(_dying, 3, timeout=60.0)
    assert found[1] == (False, ("Died", "exit code 3", ""))
    assert not found[0][0]
    assert not found[2][0]


def _sharing(rank, world):
    group = dist.group.WORLD
    inputs, labels = work.samples()
    model = work.model_of(work.Plain)
    loader = DataLoader(TensorDataset(inputs, labels), batch_size=5, shuffle=True)
    shards = ux.data.shard_batches(loader, group)
    torch.manual_seed(rank)  # which a shuffling loader would draw its order from
    passes = [[x.clone() for x, _ in shards] for _ in range(2)]
    found = {"passes": passes, "len": len(shards)}
    found["sum"] = dict(ux.fisher_diagonal(model, shards, process_group=group))
    if rank == 0:
        list(shards)
    found["out of step"] = _told(ux.fisher_diagonal, model, shards)
    one_shot = iter(_data())
    with pytest.raises(ValueError, match="re-iterable"):
        ux.data.shard_batches(one_shot, group)
    with pytest.raises(ValueError, match="shard already"):
        ux.data.shard_batches(shards, group)
    sampler = DistributedSampler(loader.dataset, shuffle=False)
    padded = DataLoader(loader.dataset, batch_size=5, sampler=sampler)
    with pytest.raises(ValueError, match="DistributedSampler"):
        ux.data.shard_batches(padded, group)
    with pytest.warns(UserWarning, match="counts twice"):
        n = ux.fisher_diagonal(model, padded, process_group=group).n_samples
    found["padded"] = n
    for data in (padded, shards):
        with pytest.warns(UserWarning, match="no process_group was given"):
            ux.activation_gram(model, data)
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_shards_make_up_the_whole_loader_in_one_order(world, recwarn):
    found = many.run(_sharing, world)
    inputs, _ = work.samples()
    orders = []
    for number in range(2):
        rows = [row for each in found for batch in each["passes"][number] for row in batch]
        orders.append([row.tolist() for row in rows])
        assert sorted(orders[-1]) == sorted(inputs.tolist())
    assert orders[0] != orders[1]
    assert [each["len"] for each in found] == [len(each["passes"][0]) for each in found]
    alone = ux.fisher_diagonal(work.model_of(work.Plain), _data())
    for each in found:
        assert many.same_bits(each["sum"], found[0]["sum"])
        assert many.difference(each["sum"], dict(alone)) <= 1e-6
        assert each["out of step"][0] == "ValueError"
        assert "shards" in each["out of step"][1]
        assert each["padded"] == -(-37 // world) * world > 37


def test_shards_of_any_loader_are_as_long_as_they_say():
    for n in range(8):
        whole = [(torch.zeros(1),)] * n
        for world in (1, 2, 3):
            shards = [ux.data.shard_batches(whole, None)] if world == 1 else []
            shards = shards or [Shards(whole, rank, world) for rank in range(world)]
            assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards]
            assert sum(len(shard) for shard in shards) == n


def test_what_fails_within_a_collective_is_known_to_have_broken_it():
    """Whoever cleans up asks, and does not wait for ranks that are not coming."""
    ranks = Ranks(None, "here")
    with pytest.raises(RuntimeError), ranks.failing_together():
        raise RuntimeError
    assert not ranks.is_broken
    with pytest.raises(RuntimeError), ranks.in_collectives():
        raise RuntimeError
    assert ranks.is_broken
