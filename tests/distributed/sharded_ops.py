"""What runs on every rank in test_sharded_ops.py: ops on DTensors, against the same ops on whole tensors."""

import random

import torch
import torch.distributed as dist
from sharded_checks import mesh_of
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import unlearn_ext as ux
from unlearn_ext import ops


def layouts(world):
    """Meshes and placements: cut along either dimension, or copied, on one or two mesh dimensions."""
    flat, wide = mesh_of((world,)), mesh_of((1, world))
    return [
        (flat, [Shard(0)]),
        (flat, [Shard(1)]),
        (flat, [Replicate()]),
        (wide, [Replicate(), Shard(0)]),
        (mesh_of((world, 1)), [Replicate(), Shard(0)]),
    ]


def gather_mask(packed, like):
    """The whole of a mask whose parts lie on the ranks."""
    local = ops.unpack_mask(packed, like.to_local().shape) if isinstance(like, DTensor) else None
    if local is None:
        return ops.unpack_mask(packed, like.shape)
    whole = DTensor.from_local(
        local.to(torch.int32), like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
    return whole.full_tensor().bool()


def random_tensors(generator, dtype, draw):
    """Matrices with heavy ties: few different values, zeros of either sign."""
    count = draw.randint(1, 5)
    shapes = [(draw.randint(1, 9), draw.randint(1, 7)) for _ in range(count)]
    values = draw.choice([2, 5, 1000])
    tensors = []
    for shape in shapes:
        whole = torch.randint(-values, values + 1, shape, generator=generator).to(dtype) / 3
        tensors.append(torch.where(torch.rand(shape, generator=generator) < 0.2, -0.0 * whole, whole))
    return tensors


def selections(cases, seed=0):
    """Top k and quantiles of random tensors: how many differ from those of the whole tensors."""
    world = dist.get_world_size()
    known = layouts(world)
    draw = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    wrong = 0
    for case in range(cases):
        dtype = draw.choice([torch.float32, torch.float64, torch.bfloat16, torch.float16])
        mesh, _ = base = known[draw.randrange(len(known))]
        whole = random_tensors(generator, dtype, draw)
        places = [
            next(p for m, p in draw.sample(known, len(known)) if m == mesh)
            if draw.random() < 0.5
            else base[1]
            for _ in whole
        ]
        parts = [distribute_tensor(t, mesh, p) for t, p in zip(whole, places, strict=True)]
        if case % 5 == 0:
            parts[0] = whole[0]  # not sharded at all
        if not any(isinstance(part, DTensor) for part in parts):
            continue
        k = draw.randint(0, sum(t.numel() for t in whole))
        largest = draw.random() < 0.5
        expected = ops.topk_mask(whole, k, largest=largest)
        found = ops.topk_mask(parts, k, largest=largest)
        for tensor, part, right, mask in zip(whole, parts, expected, found, strict=True):
            wrong += not torch.equal(gather_mask(mask, part), ops.unpack_mask(right, tensor.shape))
        if dtype in (torch.float32, torch.float64):
            forget = [t.abs() for t in whole]
            full = [(t.abs().flip(0) * 3).round() for t in whole]
            if not any(bool((f / a).isfinite().any()) for f, a in zip(forget, full, strict=True)):
                continue
            q = draw.choice([0.0, 1.0, draw.random()])
            sharded = [
                [distribute_tensor(t, mesh, p) for t, p in zip(ts, places, strict=True)]
                for ts in (full, forget)
            ]
            one, many = ops.ratio_quantile(full, forget, q), ops.ratio_quantile(*sharded, q)
            wrong += not torch.equal(one, many)
            alphas = [0.0, 0.3, 1.0]
            one, many = ops.selected_counts(full, forget, alphas), ops.selected_counts(*sharded, alphas)
            wrong += not torch.equal(one, many)
    return wrong


def in_place():
    """Ops that work scalar by scalar give the bits of the whole, and optimizers step alike."""
    torch.manual_seed(0)
    world = dist.get_world_size()
    for mesh, places in layouts(world):
        shapes = [(5, 4), (3, 6), (1, 3)]

        def both(tensors, mesh=mesh, places=places):
            return tensors, [distribute_tensor(t, mesh, places) for t in tensors]

        def same(wholes, parts):
            return all(torch.equal(w, p.full_tensor()) for w, p in zip(wholes, parts, strict=True))

        params, sharded = both([torch.randn(s) for s in shapes])
        full, full_sharded = both([torch.rand(s) for s in shapes])
        forget, forget_sharded = both([2 * torch.rand(s) for s in shapes])
        for lists in ((params, full, forget), (sharded, full_sharded, forget_sharded)):
            ops.selective_dampen_(*lists, alpha=1.0, lambda_=0.5)
        assert same(params, sharded)
        for lists in ((full, params), (full_sharded, sharded)):
            ops.fisher_accumulate_(*lists, weight=0.3, decay=0.9)
        assert same(full, full_sharded)
        masks = [torch.rand(s) < 0.5 for s in shapes]
        mask_parts = [ops.pack_mask(distribute_tensor(m, mesh, places)) for m in masks]
        masks = [ops.pack_mask(m) for m in masks]
        ops.masked_sgd_(params, full, [], masks, lr=0.1)
        ops.masked_sgd_(sharded, full_sharded, [], mask_parts, lr=0.1)
        assert same(params, sharded)
        states, state_parts = zip(*(both([torch.zeros(s) for s in shapes]) for _ in range(2)), strict=True)
        ops.masked_adamw_(params, full, *states, masks, step=1, lr=0.1)
        ops.masked_adamw_(sharded, full_sharded, *state_parts, mask_parts, step=1, lr=0.1)
        assert same(params, sharded)
        assert all(same(s, p) for s, p in zip(states, state_parts, strict=True))
        ops.apply_mask_(forget, masks)
        ops.apply_mask_(forget_sharded, mask_parts)
        assert same(forget, forget_sharded)
        if places[-1] != Shard(1):
            bases = [torch.linalg.qr(torch.randn(s[1], 2)).Q for s in shapes]
            for op in (ops.project_out_, ops.project_onto_):
                op(full, bases)
                op(full_sharded, bases)
                for whole, part in zip(full, full_sharded, strict=True):
                    assert torch.allclose(whole, part.full_tensor(), rtol=1e-5, atol=1e-6)


def refusals():
    """Every message, on every rank; nothing is written."""
    mesh = mesh_of((dist.get_world_size(),))
    whole = torch.rand(4, 4)
    rows, columns = (distribute_tensor(whole.clone(), mesh, [Shard(d)]) for d in (0, 1))
    partial = DTensor.from_local(whole.clone(), mesh, [Partial()])
    basis = torch.eye(4)[:, :2]
    mask = ops.pack_mask(torch.ones(4, 4, dtype=torch.bool))
    calls = [
        lambda: ops.selective_dampen_([rows], [columns], [rows], alpha=1.0, lambda_=1.0),
        lambda: ops.selective_dampen_([rows], [whole], [rows], alpha=1.0, lambda_=1.0),
        lambda: ops.selective_dampen_([partial], [partial], [partial], alpha=1.0, lambda_=1.0),
        lambda: ops.fisher_accumulate_([partial], [partial]),
        lambda: ops.topk_mask([partial], 1),
        lambda: ops.topk_mask([rows], 17),
        lambda: ops.topk_mask([distribute_tensor(whole * float("nan"), mesh, [Shard(0)])], 3),
        lambda: ops.ratio_quantile([rows], [columns], 0.5),
        lambda: ops.ratio_quantile([rows], [rows], 1.5),
        lambda: ops.project_out_(columns, basis),
        lambda: ops.project_out(rows, basis),
        lambda: ops.fisher_linear_(rows, whole, whole),
        lambda: ops.gram_accumulate_(rows, whole),
        lambda: ops.unpack_mask(distribute_tensor(mask, mesh, [Shard(0)]), [4, 4]),
        lambda: ux.optim.MaskedSGD([("w", torch.nn.Parameter(rows))], masks={"w": mask}),
        lambda: ux.optim.MaskedSGD([("w", torch.nn.Parameter(rows))], masks={"w": columns > 0.5}),
        lambda: ux.optim.ProjectedSGD([("w", torch.nn.Parameter(columns))], bases={"w": basis}),
    ]
    messages = []
    for number, call in enumerate(calls):
        try:
            call()
        except (ValueError, NotImplementedError, TypeError) as error:
            messages.append(str(error))
        else:
            raise AssertionError(f"call {number} was not refused")
    assert torch.equal(rows.full_tensor(), whole)
    assert torch.equal(columns.full_tensor(), whole)
    return messages


def optimizers():
    """A sharded model is trained to the bits of a whole one, and its checkpoint goes on to the bits."""
    import copy

    from sharded_models import images, shard, small
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    torch.manual_seed(0)
    model = small()
    generator = torch.Generator().manual_seed(0)
    masks = {name: torch.rand(p.shape, generator=generator) < 0.5 for name, p in model.named_parameters()}
    (x, y) = images(0, [6])[0]
    worst = 0.0
    for make in (
        lambda m, given: ux.optim.MaskedAdamW(m.named_parameters(), lr=0.01, masks=given),
        lambda m, given: ux.optim.MaskedSGD(m.named_parameters(), lr=0.05, momentum=0.9, masks=given),
    ):
        alone, parted = copy.deepcopy(model), shard(copy.deepcopy(model))
        start = {name: p.detach().clone() for name, p in alone.named_parameters()}
        in_parts = {
            name: distribute_tensor(masks[name], p.device_mesh, p.placements)
            for name, p in parted.named_parameters()
        }
        one, many = make(alone, masks), make(parted, in_parts)
        again = make(shard(copy.deepcopy(model)), masks)  # whole masks on every rank
        for step in range(4):
            for net, optimizer in ((alone, one), (parted, many)):
                optimizer.zero_grad()
                torch.nn.functional.cross_entropy(net(x), y).backward()
                if step == 3:  # the same gradients, to compare bits of the steps themselves
                    for p, q in zip(net.parameters(), alone.parameters(), strict=True):
                        if isinstance(p, DTensor):
                            p.grad = distribute_tensor(q.grad, p.device_mesh, p.placements)
                optimizer.step()
        for (name, p), q in zip(alone.named_parameters(), parted.parameters(), strict=True):
            whole = q.full_tensor()
            free = masks[name]
            assert torch.equal(whole[~free], start[name][~free])
            worst = max(worst, float((whole - p).abs().max()))
            for key, value in many.state[q].items():
                if key != "step":
                    assert value.placements == q.placements
        for mine, theirs in zip(again._constraints.values(), many._constraints.values(), strict=True):
            assert torch.equal(mine.tensor, theirs.tensor)
        saved = get_optimizer_state_dict(parted, many)
        fresh = make(parted, in_parts)
        set_optimizer_state_dict(parted, fresh, saved)
        for p in parted.parameters():
            for key, value in many.state[p].items():
                other = fresh.state[p][key]
                if isinstance(value, DTensor):
                    value, other = value.to_local(), other.to_local()
                assert torch.equal(value, other)
    assert worst <= 1e-5, worst
    return worst
