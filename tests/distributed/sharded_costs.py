"""What runs on every rank in test_sharded_costs.py: what is held and sent, against bench/sharded_costs.py."""

import copy
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from sharded_checks import own
from sharded_models import blocks_of, language_model, shard, shares, small, texts
from sharded_models import images as pictures

sys.path.append(str(Path(__file__).parents[2]))
import unlearn_ext as ux
from bench.sharded import Traffic
from bench.sharded_costs import Sharded, factors, llama

gradient_masking = sys.modules["unlearn_ext.methods.gradient_masking"]

GATHERED, SCATTERED = ("_allgather_base_",), ("reduce_scatter_tensor", "_reduce_scatter_base_")


def shapes_of(model, world):
    """The model's groups, read off the model."""
    blocks = [tuple(tuple(p.shape) for p in block.parameters()) for block in blocks_of(model)]
    inside = {id(p) for block in blocks_of(model) for p in block.parameters()}
    rest = tuple(tuple(p.shape) for p in model.parameters() if id(p) not in inside)
    return Sharded(tuple(blocks), rest, world)


def sent(call):
    with Traffic() as traffic, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call()
    found = traffic.bytes
    return tuple(sum(found.get(name, 0) for name in names) for names in (GATHERED, SCATTERED))


def check(kind):
    world = dist.get_world_size()
    model, make = (small(), pictures) if kind == "small" else (language_model("llama"), texts)
    known = shapes_of(model, world)
    if kind != "small":
        sizes = {"hidden": 32, "inner": 48, "layers": 2, "key_values": 16, "vocabulary": 40}
        formula = llama(world, 4, **sizes)
        assert sorted(formula.rest) == sorted(known.rest)
        assert [sorted(b) for b in formula.blocks] == [sorted(b) for b in known.blocks]
    assert known.scalars == sum(p.numel() for p in model.parameters())
    data = own(shares(make, world, [[2, 2]] * world))
    sharded = shard(copy.deepcopy(model))

    found = ux.fisher_diagonal(sharded, data)
    held = sum(t.to_local().numel() * t.to_local().element_size() for t in found.values())
    told = [None] * world
    dist.all_gather_object(told, held)
    assert max(told) == known.accumulators(), (told, known.accumulators())

    found = ux.kfac_factors(sharded, data)
    layers = {name: (pair.outputs.shape[-1], pair.inputs.shape[-1]) for name, pair in found.items()}
    held = sum(t.numel() * t.element_size() for pair in found.values() for t in pair if t.ndim > 1)
    without_tokens = {name: pair for name, pair in layers.items() if found[name].inputs.ndim > 1}
    tokens = sum(8 * pair.outputs.numel() for name, pair in found.items() if name not in without_tokens)
    assert held == factors(without_tokens) + tokens

    optimizers = []
    make_optimizer = gradient_masking._optimizer
    gradient_masking._optimizer = lambda *args: optimizers.append(make_optimizer(*args)) or optimizers[-1]
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in model.named_parameters()}

    def train(epochs):
        net = shard(copy.deepcopy(model))
        settings = {"objective": "finetune", "masks": masks, "lr": 1e-4}
        ux.gradient_masking(net, data, data, epochs=epochs, **settings)

    try:
        one, two = sent(lambda: train(1)), sent(lambda: train(2))
    finally:
        gradient_masking._optimizer = make_optimizer
    steps = len(data)
    assert two[0] - one[0] == steps * known.gathered(), (two[0] - one[0], steps * known.gathered())
    assert two[1] - one[1] == steps * known.scattered(), (two[1] - one[1], steps * known.scattered())
    state = [value for each in optimizers[0].state.values() for value in each.values()]
    held = sum(value.to_local().numel() * value.to_local().element_size() for value in state)
    dist.all_gather_object(told, held)
    assert max(told) == known.momentum()
    return two[0] - one[0], two[1] - one[1]
