"""The optimizers against torch.optim, and against the promise that nothing masked or protected moves."""

import copy
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

from unlearn_ext import ops
from unlearn_ext.optim.masked import MaskedAdamW, MaskedSGD
from unlearn_ext.optim.projected import ProjectedSGD

SHAPES = ((7, 5), (1,), (3, 4, 3, 3), (129,), ())
SGD_OPTIONS = [
    {
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "weight_decay": decay,
        "maximize": up,
    }
    for momentum, dampening, nesterov, decay, up in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (False, True), (0.0, 0.05), (False, True)
    )
    if not (nesterov and (momentum == 0 or dampening != 0))
]
ADAMW_OPTIONS = [
    {"betas": betas, "eps": eps, "weight_decay": decay, "maximize": up}
    for betas, eps, decay, up in itertools.product(
        ((0.9, 0.999), (0.0, 0.5)), (1e-8, 1e-3), (0.0, 0.05), (False, True)
    )
]
PAIRS = {MaskedSGD: torch.optim.SGD, MaskedAdamW: torch.optim.AdamW}
FUSED = ops.build_info()["cpu_capability"] != "baseline"
ROUNDINGS = {MaskedSGD: 0 if FUSED else 40, MaskedAdamW: 40}
MASKED = [
    pytest.param(MaskedSGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.2, "weight_decay": 0.05}, id="sgd"),
    pytest.param(MaskedAdamW, {"lr": 0.1, "weight_decay": 0.05}, id="adamw"),
]


def make_params(dtype=torch.float32, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def named(params):
    return [(f"p{i}", p) for i, p in enumerate(params)]


def random_masks(params, density=0.5, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(p.shape, generator=generator) < density for name, p in named(params)}


def set_grads(params, seed):
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


def run(optimizer, params, steps, start=0):
    for step in range(start, start + steps):
        set_grads(params, seed=100 + step)
        optimizer.step()


def bits(tensor):
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().clone().view(sizes[tensor.element_size()])


def state_tensors(optimizer, param):
    return {key: value for key, value in optimizer.state[param].items() if key != "step"}


def assert_like_torch(ours, theirs, our_params, their_params):
    for a, b in zip(our_params, their_params, strict=True):
        tolerance = ROUNDINGS[type(ours)] * torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
        for key, value in ours.state.get(a, {}).items():
            torch.testing.assert_close(value, theirs.state[b][key], rtol=tolerance, atol=tolerance)


def assert_same_run(ours, theirs, our_params, their_params, steps=20):
    for step in range(steps):
        for optimizer, params in ((ours, our_params), (theirs, their_params)):
            set_grads(params, seed=step)
            optimizer.step()
        assert_like_torch(ours, theirs, our_params, their_params)


# The same numbers as torch.optim, in the path whose formula the ops follow (foreach=False). With SGD bit for
# bit, where both have fused multiply-adds. With AdamW the parameters differ by a rounding per step, because
# torch does not round square roots correctly on the CPU and the ops do; two per step are allowed for the 20
# steps of a test.


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", SGD_OPTIONS, ids=str)
def test_sgd_with_full_masks_is_torch_sgd(options, dtype):
    our_params, their_params = make_params(dtype), make_params(dtype)
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in named(our_params)}
    ours = MaskedSGD(named(our_params), lr=0.1, masks=masks, **options)
    theirs = torch.optim.SGD(their_params, lr=0.1, foreach=False, **options)
    assert_same_run(ours, theirs, our_params, their_params)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", ADAMW_OPTIONS, ids=str)
def test_adamw_with_full_masks_is_torch_adamw(options, dtype):
    our_params, their_params = make_params(dtype), make_params(dtype)
    masks = {name: torch.ones(p.shape, dtype=torch.bool) for name, p in named(our_params)}
    ours = MaskedAdamW(named(our_params), lr=0.1, masks=masks, **options)
    theirs = torch.optim.AdamW(their_params, lr=0.1, foreach=False, **options)
    assert_same_run(ours, theirs, our_params, their_params)
    assert all(ours.state[p]["step"] == 20 for p in our_params)


@pytest.mark.parametrize("cls, options", MASKED)
def test_without_masks_everything_is_trained(cls, options):
    our_params, their_params = make_params(), make_params()
    ours, theirs = cls(our_params, **options), PAIRS[cls](their_params, foreach=False, **options)
    assert_same_run(ours, theirs, our_params, their_params)


@pytest.mark.parametrize("cls, options", MASKED)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_parameters_are_updated_in_float32_and_rounded_once(cls, options, dtype):
    our_params, their_params = make_params(dtype), make_params(dtype)
    their_params = [nn.Parameter(p.detach().float()) for p in their_params]
    ours, theirs = cls(our_params, **options), PAIRS[cls](their_params, foreach=False, **options)
    for step in range(20):
        set_grads(our_params, seed=step)
        for a, b in zip(our_params, their_params, strict=True):
            b.grad = a.grad.float()
        ours.step()
        theirs.step()
        for a, b in zip(our_params, their_params, strict=True):
            b.data = b.data.to(dtype).float()
            # A float32 rounding apart, parameters can be rounded to neighbours in half precision.
            tolerance = torch.finfo(dtype).eps if ROUNDINGS[cls] else 0
            torch.testing.assert_close(a.float(), b, rtol=tolerance, atol=0)
            b.data = a.detach().float()
            tolerance = ROUNDINGS[cls] * torch.finfo(torch.float32).eps
            for key, value in state_tensors(ours, a).items():
                torch.testing.assert_close(value, theirs.state[b][key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cls, options", MASKED)
def test_a_mask_does_not_change_what_free_scalars_do(cls, options):
    dense_params, masked_params = make_params(), make_params()
    masks = random_masks(masked_params)
    run(cls(dense_params, **options), dense_params, 20)
    run(cls(named(masked_params), masks=masks, **options), masked_params, 20)
    for (name, masked), dense, start in zip(named(masked_params), dense_params, make_params(), strict=True):
        assert torch.equal(masked, torch.where(masks[name], dense, start))


# What is masked stays.


@pytest.mark.parametrize("cls, options", MASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_masked_scalars_and_their_state_keep_their_bits(cls, options, dtype):
    params = make_params(dtype)
    masks = random_masks(params)
    # State from a time when everything was free, so that frozen scalars have momentum that wants to move
    # them.
    dense = cls(named(params), **options)
    run(dense, params, 3)
    optimizer = cls(named(params), masks=masks, **options)
    optimizer.load_state_dict(dense.state_dict())
    with torch.no_grad():
        frozen = ~masks["p3"]
        params[3][frozen.nonzero()[0]] = float("nan")
        params[3][frozen.nonzero()[1]] = -0.0
    before = [(bits(p), {k: bits(v) for k, v in state_tensors(optimizer, p).items()}) for p in params]
    for step in range(200):
        set_grads(params, seed=step)
        for name, p in named(params):
            p.grad[~masks[name]] = (float("nan"), float("inf"), 1.0)[step % 3]
        optimizer.step()
    for (name, p), (start, state) in zip(named(params), before, strict=True):
        frozen = ~masks[name]
        assert torch.equal(bits(p)[frozen], start[frozen])
        assert p[masks[name]].isfinite().all()
        for key, value in state_tensors(optimizer, p).items():
            assert value[frozen].abs().max() > 0 if frozen.sum() > 3 else True
            assert torch.equal(bits(value)[frozen], state[key][frozen])
            assert value[masks[name]].isfinite().all()


@pytest.mark.parametrize("cls, options", MASKED)
def test_packed_masks_are_bool_masks(cls, options):
    a, b = make_params(), make_params()
    masks = random_masks(a)
    packed = {name: ops.pack_mask(mask) for name, mask in masks.items()}
    run(cls(named(a), masks=masks, **options), a, 5)
    run(cls(named(b), masks=packed, **options), b, 5)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_masks_are_copied():
    params = make_params()
    packed = {name: torch.zeros_like(ops.pack_mask(mask)) for name, mask in random_masks(params).items()}
    optimizer = MaskedSGD(named(params), lr=0.1, masks=packed)
    for mask in packed.values():
        mask.fill_(255)
    run(optimizer, params, 1)
    assert all(torch.equal(p, start) for p, start in zip(params, make_params(), strict=True))


# Everyday life of an optimizer.


def make_model(dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3, groups=2),
        nn.Flatten(),
        nn.Linear(96, 4),
    )
    return model.to(dtype=dtype, **options)


def model_loss(model):
    torch.manual_seed(1)
    return nn.functional.cross_entropy(model(torch.randn(16, 3, 8, 8)), torch.arange(16) % 4)


def model_masks(model, density=0.5):
    generator = torch.Generator().manual_seed(2)
    return {name: torch.rand(p.shape, generator=generator) < density for name, p in model.named_parameters()}


def same_parameters(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("cls, options", MASKED)
@pytest.mark.parametrize(
    "make_scheduler",
    [
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=8),
        lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.5, total_steps=12),
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: float(epoch > 2)),
    ],
    ids=["cosine", "one cycle, with momentum", "warm-up from zero"],
)
def test_schedulers(cls, options, make_scheduler):
    our_params, their_params = make_params(), make_params()
    ours, theirs = cls(named(our_params), **options), PAIRS[cls](their_params, foreach=False, **options)
    schedulers = [make_scheduler(ours), make_scheduler(theirs)]
    for step in range(10):
        assert_same_run(ours, theirs, our_params, their_params, steps=1)
        for scheduler in schedulers:
            scheduler.step()
        assert ours.param_groups[0]["lr"] == theirs.param_groups[0]["lr"], step


@pytest.mark.parametrize("cls, options", MASKED)
def test_learning_rate_as_a_tensor(cls, options):
    a, b = make_params(), make_params()
    run(cls(a, **options), a, 3)
    run(cls(b, **{**options, "lr": torch.tensor(options["lr"], dtype=torch.float64)}), b, 3)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("cls, options", MASKED)
def test_grad_scaler_unscales_and_skips(cls, options):
    scaled, plain = make_model(), make_model()
    masks = model_masks(plain)
    ours = cls(scaled.named_parameters(), masks=masks, **options)
    reference = cls(plain.named_parameters(), masks=masks, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        ours.zero_grad()
        scaler.scale(model_loss(scaled)).backward()
        if step == 2:
            next(scaled.parameters()).grad[0] = float("inf")
        scaler.step(ours)
        scaler.update()
        if step == 2:
            assert scaler.get_scale() == 512.0
            continue
        reference.zero_grad()
        model_loss(plain).backward()
        reference.step()
        assert same_parameters(scaled, plain)  # powers of two scale without rounding


@pytest.mark.parametrize("cls, options", MASKED)
def test_gradient_clipping(cls, options):
    our_params, their_params = make_params(), make_params()
    ours, theirs = cls(named(our_params), **options), PAIRS[cls](their_params, foreach=False, **options)
    for step in range(5):
        for optimizer, params in ((ours, our_params), (theirs, their_params)):
            set_grads(params, seed=step)
            torch.nn.utils.clip_grad_norm_(params, 0.5)
            optimizer.step()
    assert_like_torch(ours, theirs, our_params, their_params)


@pytest.mark.parametrize("cls, options", MASKED)
def test_parameter_groups_have_their_own_options(cls, options):
    our_params, their_params = make_params(), make_params()

    def groups(pairs):
        return [{"params": pairs[:2], "lr": 0.01}, {"params": pairs[2:], "weight_decay": 0.0}]

    ours = cls(groups(named(our_params)), **options)
    theirs = PAIRS[cls](groups(named(their_params)), foreach=False, **options)
    assert_same_run(ours, theirs, our_params, their_params)


@pytest.mark.parametrize("cls, options", MASKED)
def test_a_group_added_after_the_first_steps_starts_afresh(cls, options):
    our_params, their_params = make_params(), make_params()
    ours = cls(named(our_params)[:3], **options)
    theirs = PAIRS[cls](named(their_params)[:3], foreach=False, **options)
    for optimizer, params in ((ours, our_params), (theirs, their_params)):
        run(optimizer, params, 3)
        optimizer.add_param_group({"params": named(params)[3:], "lr": 0.02})
    assert_same_run(ours, theirs, our_params, their_params, steps=5)


@pytest.mark.parametrize("cls, options", MASKED)
def test_an_added_group_brings_its_masks(cls, options):
    params = make_params()
    masks = random_masks(params)
    optimizer = cls(named(params)[:3], masks=masks, **options)
    with pytest.raises(ValueError, match=r"masks\['p3'\] must be given"):
        optimizer.add_param_group({"params": named(params)[3:]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": named(params)[3:], "masks": masks})
    assert "masks" not in optimizer.param_groups[1]
    run(optimizer, params, 2)
    for (name, p), start in zip(named(params), make_params(), strict=True):
        assert torch.equal(p != start, masks[name])


@pytest.mark.parametrize("cls, options", MASKED)
def test_parameters_without_gradient_are_skipped(cls, options):
    our_params, their_params = make_params(), make_params()
    ours, theirs = cls(named(our_params), **options), PAIRS[cls](their_params, foreach=False, **options)
    pattern = [(0, 1), (0, 1, 2), (2, 3), (), (0, 1, 2, 3, 4), (1, 4), (0, 1, 2, 3, 4)]
    for step, active in enumerate(pattern):
        for optimizer, params in ((ours, our_params), (theirs, their_params)):
            set_grads(params, seed=step)
            for index, p in enumerate(params):
                p.grad = p.grad if index in active else None
            optimizer.step()
        assert_like_torch(ours, theirs, our_params, their_params)
        assert [p in ours.state for p in our_params] == [p in theirs.state for p in their_params]


@pytest.mark.parametrize("cls, options", MASKED)
def test_frozen_parameters_need_no_mask_until_they_are_thawed(cls, options):
    params = make_params()
    masks = random_masks(params)
    params[2].requires_grad_(False)
    del masks["p2"]
    optimizer = cls(named(params), masks=masks, **options)
    for index in (0, 1, 3, 4):
        params[index].grad = torch.ones_like(params[index])
    optimizer.step()
    assert torch.equal(params[2], make_params()[2])
    after = [p.detach().clone() for p in params]
    params[2].requires_grad_(True).grad = torch.ones_like(params[2])
    with pytest.raises(ValueError, match=r"masks\['p2'\] must be given"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, after, strict=True))


@pytest.mark.parametrize("cls, options", MASKED)
def test_tied_parameters_are_updated_once(cls, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    twin = copy.deepcopy(model)
    ours = cls(model.named_parameters(), masks=model_masks(model, 2.0), **options)
    theirs = PAIRS[cls](twin.parameters(), foreach=False, **options)
    for optimizer, net in ((ours, model), (theirs, twin)):
        net(torch.ones(2, 4)).square().sum().backward()
        optimizer.step()
    assert_like_torch(ours, theirs, list(model.parameters()), list(twin.parameters()))


@pytest.mark.parametrize("cls, options", MASKED)
def test_masks_are_found_by_name_in_a_compiled_model(cls, options):
    plain, inner = make_model(), make_model()
    masks = model_masks(plain)
    compiled = torch.compile(inner, backend="eager")
    for model in (plain, compiled):
        optimizer = cls(model.named_parameters(), masks=masks, **options)
        for _ in range(3):
            optimizer.zero_grad()
            model_loss(model).backward()
            optimizer.step()
    assert same_parameters(plain, inner)


@pytest.mark.parametrize("cls, options", MASKED)
def test_closure(cls, options):
    model = make_model()
    optimizer = cls(model.named_parameters(), masks=model_masks(model), **options)

    def closure():
        optimizer.zero_grad()
        loss = model_loss(model)
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(5)]
    assert losses[-1] < losses[0]
    with torch.no_grad():
        assert optimizer.step(closure) < losses[0]
    assert optimizer.step() is None


@pytest.mark.parametrize("cls, options", MASKED)
def test_deepcopy_and_pickle_carry_masks_and_state(cls, options):
    model = make_model()
    optimizer = cls(model.named_parameters(), masks=model_masks(model), **options)

    def train(model, optimizer):
        optimizer.zero_grad()
        model_loss(model).backward()
        optimizer.step()
        return model

    train(model, optimizer)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer)
    for twin, twin_optimizer in copies:
        assert not same_parameters(twin, model)
        assert same_parameters(train(twin, twin_optimizer), model)
        twin_optimizer.add_param_group(
            {"params": [("x", nn.Parameter(torch.ones(2)))], "masks": {"x": torch.ones(1).byte()}}
        )


@pytest.mark.parametrize("cls, options", MASKED)
def test_one_op_call_per_group(cls, options, monkeypatch):
    model = make_model()
    op = "masked_sgd_" if cls is MaskedSGD else "masked_adamw_"
    calls = []
    real = getattr(ops, op)
    monkeypatch.setattr(ops, op, lambda *a, **k: (calls.append(len(a[0])), real(*a, **k)))
    optimizer = cls(model.named_parameters(), masks=model_masks(model), **options)
    for _ in range(3):
        model_loss(model).backward()
        optimizer.step()
    assert calls == [len(list(model.parameters()))] * 3


def test_equal_step_counts_come_together_in_one_call(monkeypatch):
    params = make_params()
    optimizer = MaskedAdamW(params, lr=0.1)
    run(optimizer, params, 2)
    for p in params:  # as a tool leaves them that writes the state itself
        optimizer.state[p]["step"] = optimizer.state[p]["step"].clone()
    calls = []
    real = ops.masked_adamw_
    monkeypatch.setattr(ops, "masked_adamw_", lambda *a, **k: (calls.append(k["step"]), real(*a, **k)))
    run(optimizer, params, 2)
    assert calls == [3, 4]
    assert [float(optimizer.state[p]["step"]) for p in params] == [4.0] * len(params)


@pytest.mark.parametrize("cls, options", MASKED)
def test_a_step_is_visible_to_autograd(cls, options):
    weight = nn.Parameter(torch.ones(3))
    optimizer = cls([weight], **options)
    loss = (weight * weight).sum()
    weight.grad = torch.ones(3)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_capturable_keeps_the_step_where_the_parameters_are():
    a, b = make_params(), make_params()
    plain, capturable = MaskedAdamW(named(a), lr=0.1), MaskedAdamW(named(b), lr=0.1, capturable=True)
    for optimizer, params in ((plain, a), (capturable, b)):
        run(optimizer, params, 5)
        params[1].grad = None
        optimizer.step()
        run(optimizer, params, 2)
    for p, q in zip(a, b, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)  # bias correction in float32 on the device
        assert capturable.state[q]["step"] == plain.state[p]["step"]


# Checkpoints.


@pytest.mark.parametrize("cls, options", MASKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_a_resumed_run_is_the_same_run(cls, options, dtype):
    params = make_params(dtype)
    masks = random_masks(params)
    optimizer = cls(named(params), masks=masks, **options)
    run(optimizer, params, 5)
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    twins = [nn.Parameter(p.detach().clone()) for p in params]
    resumed = cls(named(twins), masks=masks, **{**options, "lr": 7.0})
    buffer.seek(0)
    resumed.load_state_dict(torch.load(buffer))
    for p, twin in zip(params, twins, strict=True):
        for key, value in state_tensors(optimizer, p).items():
            assert resumed.state[twin][key].dtype == value.dtype
            assert torch.equal(bits(resumed.state[twin][key]), bits(value))
    run(optimizer, params, 5, start=5)
    run(resumed, twins, 5, start=5)
    assert all(torch.equal(p, twin) for p, twin in zip(params, twins, strict=True))


@pytest.mark.parametrize("cls, options", MASKED)
def test_loading_copies(cls, options):
    params = make_params()
    optimizer = cls(named(params), **options)
    run(optimizer, params, 2)
    checkpoint = optimizer.state_dict()
    kept = copy.deepcopy(checkpoint)
    optimizer.load_state_dict(checkpoint)
    run(optimizer, params, 2)
    for index, state in kept["state"].items():
        for key, value in state.items():
            assert torch.equal(checkpoint["state"][index][key], value)


@pytest.mark.parametrize("cls, options", MASKED)
def test_a_checkpoint_of_torch_optim_can_be_continued(cls, options):
    our_params, their_params = make_params(), make_params()
    theirs = PAIRS[cls](their_params, foreach=False, **options)
    run(theirs, their_params, 3)
    for ours, other in zip(our_params, their_params, strict=True):
        ours.data.copy_(other)
    ours = cls(our_params, lr=7.0)
    ours.load_state_dict(theirs.state_dict())
    assert_same_run(ours, theirs, our_params, their_params)


def test_hooks_enclose_the_load():
    params = make_params(torch.bfloat16)
    optimizer = MaskedSGD(named(params), lr=0.1, momentum=0.9)
    run(optimizer, params, 2)
    wanted = 1.0009765625  # needs more bits than bfloat16 has
    seen = []

    def rewrite(_, checkpoint):
        checkpoint = copy.deepcopy(checkpoint)
        for state in checkpoint["state"].values():
            state["momentum_buffer"].fill_(wanted)
        return checkpoint

    optimizer.register_load_state_dict_pre_hook(rewrite)
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append(o.state[params[0]]["momentum_buffer"]))
    optimizer.load_state_dict(optimizer.state_dict())
    assert (seen[0] == wanted).all()


@pytest.mark.parametrize(
    "cls, option",
    [
        *((cls, {key: True}) for cls in (MaskedSGD, MaskedAdamW) for key in ("amsgrad", "differentiable")),
        (MaskedAdamW, {"decoupled_weight_decay": False, "weight_decay": 0.1}),
    ],
)
def test_a_group_of_another_variant_is_refused_and_not_stepped_as_if_it_were_none(cls, option):
    params = make_params()
    key = next(iter(option))
    with pytest.raises(ValueError, match=f"{cls.__name__}: {key} must be {not option[key]} in every group"):
        cls([{"params": list(named(params)), **option}], lr=0.1)
    first, *others = named(params)
    optimizer = cls([first], lr=0.1)
    with pytest.raises(ValueError, match=key):
        optimizer.add_param_group({"params": others, **option})
    assert len(optimizer.param_groups) == 1
    harmless = {key: not option[key], "foreach": True}  # as in groups that were taken from torch.optim
    optimizer.add_param_group({"params": others, **harmless})
    assert len(optimizer.param_groups) == 2


def test_without_weight_decay_a_group_of_adam_is_one_of_adamw():
    params = make_params()
    MaskedAdamW([{"params": list(named(params)), "decoupled_weight_decay": False, "weight_decay": 0}], lr=0.1)


@pytest.mark.parametrize(
    "cls, other, change, message",
    [
        (MaskedSGD, MaskedAdamW, None, "hold momentum_buffer"),
        (MaskedAdamW, MaskedSGD, None, "hold step"),
        (
            MaskedSGD,
            MaskedSGD,
            lambda s: s["state"][0].update(momentum_buffer=torch.ones(1)),
            r"shape \[7, 5\]",
        ),
        (MaskedSGD, MaskedSGD, lambda s: s["param_groups"][0]["params"].pop(), "doesn't match the size"),
        (MaskedAdamW, MaskedAdamW, lambda s: s["param_groups"][0].update(amsgrad=True), "without amsgrad"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(cls, other, change, message):
    options = {MaskedSGD: {"momentum": 0.9}, MaskedAdamW: {}}
    params = make_params()
    foreign = other(named(params), lr=0.5, **options[other])
    run(foreign, params, 1)
    checkpoint = copy.deepcopy(foreign.state_dict())
    if change is not None:
        change(checkpoint)
    optimizer = cls(named(params), lr=0.1, **options[cls])
    run(optimizer, params, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(checkpoint)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, state in before["state"].items():
        assert all(torch.equal(after["state"][index][key], value) for key, value in state.items())


# Memory formats.


@pytest.mark.parametrize("cls, options", MASKED)
def test_channels_last_is_the_same_update_in_memory_order(cls, options, monkeypatch):
    plain, strided = make_model(torch.float64), make_model(torch.float64, memory_format=torch.channels_last)
    masks = model_masks(plain)
    packs = []
    real_pack = ops.pack_mask
    monkeypatch.setattr(ops, "pack_mask", lambda mask: (packs.append(1), real_pack(mask))[1])
    op = "masked_sgd_" if cls is MaskedSGD else "masked_adamw_"
    real_op = getattr(ops, op)
    contiguous = []

    def spy(params, grads, *lists, **options):
        state = lists[:-1]
        contiguous.append(all(t.is_contiguous() for tensors in (params, *state) for t in tensors))
        real_op(params, grads, *lists, **options)

    monkeypatch.setattr(ops, op, spy)
    optimizers = [cls(model.named_parameters(), masks=masks, **options) for model in (plain, strided)]
    n_masks = len(packs)
    for step in range(4):
        for model, optimizer in zip((plain, strided), optimizers, strict=True):
            set_grads(list(model.parameters()), seed=step)
            optimizer.step()
        assert same_parameters(plain, strided)
        assert len(packs) == n_masks + 2, (
            "each of the two kernels that lie channels_last is packed again once"
        )
    assert all(contiguous)
    assert strided[0].weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("cls, options", MASKED)
def test_a_model_may_change_its_memory_format_between_steps(cls, options):
    plain, changed = make_model(torch.float64), make_model(torch.float64)
    masks = model_masks(plain)
    optimizers = [cls(model.named_parameters(), masks=masks, **options) for model in (plain, changed)]
    formats = (torch.contiguous_format, torch.channels_last, torch.contiguous_format, torch.channels_last)
    for step, memory_format in enumerate(formats):
        changed.to(memory_format=memory_format)
        for model, optimizer in zip((plain, changed), optimizers, strict=True):
            set_grads(list(model.parameters()), seed=step)
            optimizer.step()
        assert same_parameters(plain, changed)


def test_any_strides():
    def params():
        return [
            nn.Parameter(torch.arange(20.0).view(4, 5).t()),
            nn.Parameter(torch.arange(40.0).view(4, 10)[:, ::2]),
            nn.Parameter(torch.arange(60.0).view(3, 4, 5).permute(1, 2, 0)),
        ]

    strided, plain = params(), [nn.Parameter(p.detach().contiguous()) for p in params()]
    masks = random_masks(plain)
    for tensors in (strided, plain):
        run(MaskedSGD(named(tensors), lr=0.1, momentum=0.9, masks=masks), tensors, 3)
    assert all(torch.equal(a, b) for a, b in zip(strided, plain, strict=True))


# Errors.


def bad_masks(change):
    params = make_params()
    masks = random_masks(params)
    change(masks)
    return {"params": named(params), "masks": masks}


@pytest.mark.parametrize("cls", [MaskedSGD, MaskedAdamW])
@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            bad_masks(lambda m: m.pop("p3")),
            ValueError,
            r"masks\['p3'\] must be given, as for every trainable",
        ),
        (
            bad_masks(lambda m: m.update(p0=torch.ones(5, 7, dtype=torch.bool))),
            ValueError,
            r"masks\['p0'\] must be bool \[7, 5\] or packed uint8 \[5\], got torch.bool \[5, 7\]",
        ),
        (
            bad_masks(lambda m: m.update(p0=torch.ones(7, 5, dtype=torch.uint8))),
            ValueError,
            r"torch.uint8 \[7, 5\]",
        ),
        (bad_masks(lambda m: m.update(p0=torch.ones(7, 5))), TypeError, r"got torch.float32 \[7, 5\]"),
        ({"params": make_params(), "masks": {}}, ValueError, r"params must be named_parameters\(\)"),
        (
            {"params": make_params(torch.complex64)},
            TypeError,
            r"params\[0\] must be float32.*got torch.complex64",
        ),
        ({"params": make_params()[:1] * 2}, ValueError, "params must hold every parameter once"),
        ({"params": []}, ValueError, "empty parameter list"),
        ({"params": make_params(), "lr": -0.1}, ValueError, "lr must be finite and >= 0, got -0.1"),
        ({"params": make_params(), "lr": float("nan")}, ValueError, "lr must be finite and >= 0, got nan"),
        ({"params": make_params(), "weight_decay": -1.0}, ValueError, "weight_decay must be finite and >= 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
def test_bad_arguments(cls, arguments, error, message):
    with pytest.raises(error, match=message):
        cls(**arguments)


@pytest.mark.parametrize(
    "cls, options, message",
    [
        (MaskedSGD, {"momentum": -0.1}, "momentum must be finite and >= 0"),
        (MaskedSGD, {"dampening": float("inf")}, "dampening must be finite"),
        (MaskedSGD, {"nesterov": True}, "nesterov must have momentum and no dampening, got momentum=0.0"),
        (MaskedSGD, {"nesterov": True, "momentum": 0.9, "dampening": 0.1}, "got momentum=0.9, dampening=0.1"),
        (MaskedAdamW, {"betas": (0.9, 1.0)}, r"betas must lie in \[0, 1\)"),
        (MaskedAdamW, {"eps": -1e-8}, "eps must be finite and >= 0"),
    ],
)
def test_bad_hyperparameters(cls, options, message):
    with pytest.raises(ValueError, match=message):
        cls(make_params(), **options)


@pytest.mark.parametrize("cls", [MaskedSGD, MaskedAdamW])
def test_a_sparse_gradient_stops_the_step_before_anything_moves(cls):
    torch.manual_seed(0)
    dense, embedding = nn.Linear(2, 2), nn.Embedding(4, 2, sparse=True)
    groups = [{"params": list(m.named_parameters())} for m in (dense, embedding)]
    optimizer = cls(groups, lr=0.1)
    before = [p.detach().clone() for p in (*dense.parameters(), *embedding.parameters())]
    dense(embedding(torch.tensor([1, 2]))).sum().backward()
    with pytest.raises(ValueError, match=r"the gradient of params\['weight'\] must be dense.*sparse=False"):
        optimizer.step()
    assert all(
        torch.equal(p, q) for p, q in zip((*dense.parameters(), *embedding.parameters()), before, strict=True)
    )
    assert not optimizer.state


# Projected SGD.


def make_basis(d, k, groups=None, dtype=torch.float64, seed=3):
    generator = torch.Generator().manual_seed(seed)
    shape = (d, d) if groups is None else (groups, d, d)
    return torch.linalg.qr(torch.randn(shape, generator=generator, dtype=torch.float64)).Q[..., :k].to(dtype)


def model_bases(share):
    # Linear, convolution, and a grouped convolution with one basis for all its groups.
    return {
        name: make_basis(d, round(share * d))
        for name, d in (("0.weight", 27), ("3.weight", 36), ("5.weight", 96))
    }


def protected_part(change, basis):
    rows = (
        change.reshape(-1, basis.shape[-2])
        if basis.dim() == 2
        else change.reshape(*basis.shape[:1], -1, basis.shape[1])
    )
    return float((rows @ basis).norm() / rows.norm())


PROJECTED_OPTIONS = [
    {},
    {"momentum": 0.9, "weight_decay": 0.05},
    {"momentum": 0.9, "dampening": 0.3, "maximize": True},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.05},
]


@pytest.mark.parametrize("options", PROJECTED_OPTIONS, ids=str)
@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_updates_stay_out_of_the_protected_space(options, share, memory_format):
    model = make_model(torch.float64, memory_format=memory_format)
    bases = model_bases(share)
    optimizer = ProjectedSGD(model.named_parameters(), lr=0.1, bases=bases, **options)
    for step in range(5):
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        set_grads(list(model.parameters()), seed=step)
        optimizer.step()
        for name, p in model.named_parameters():
            change = p.detach() - before[name]
            if name in bases:
                assert change.norm() > 0
                assert protected_part(change, bases[name]) < 1e-12
            else:
                assert torch.equal(p, before[name])


@pytest.mark.parametrize("share", [0.2, 0.8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_projection_is_exact_to_float32(share, dtype):
    model = make_model(dtype)
    bases = {name: basis.float() for name, basis in model_bases(share).items()}
    optimizer = ProjectedSGD(model.named_parameters(), lr=0.1, momentum=0.9, weight_decay=0.05, bases=bases)
    for step in range(20):
        set_grads(list(model.parameters()), seed=step)
        optimizer.step()
        # The momentum is the update before it is rounded into the parameter.
        for name, p in model.named_parameters():
            if name in bases:
                assert protected_part(optimizer.state[p]["momentum_buffer"], bases[name]) < 1e-5


@pytest.mark.parametrize("options", PROJECTED_OPTIONS, ids=str)
@pytest.mark.parametrize("k", [0, 3, 10, 11, 18, 20])
def test_both_forms_are_the_formula(options, k):
    weight = make_params(torch.float64, shapes=((6, 5, 2, 2),))[0]
    basis = make_basis(20, k)
    projector = torch.eye(20, dtype=torch.float64) - basis @ basis.T
    expected, momentum = weight.detach().clone().view(6, 20), None
    optimizer = ProjectedSGD([("w", weight)], lr=0.1, bases={"w": basis}, **options)
    for step in range(6):
        set_grads([weight], seed=step)
        sign = -1 if options.get("maximize") else 1
        g = sign * weight.grad.view(6, 20) + options.get("weight_decay", 0) * expected
        m = options.get("momentum", 0)
        momentum = g if momentum is None else m * momentum + (1 - options.get("dampening", 0)) * g
        update = g + m * momentum if options.get("nesterov") else (momentum if m else g)
        expected = expected - 0.1 * update @ projector
        optimizer.step()
        torch.testing.assert_close(weight.detach().view(6, 20), expected, rtol=1e-12, atol=1e-12)


def test_a_full_basis_freezes_and_an_empty_one_does_not_bind():
    frozen, free = make_params(torch.float64, shapes=((6, 5), (6, 5)))
    twin = nn.Parameter(free.detach().clone())
    bases = {"p0": make_basis(5, 5), "p1": make_basis(5, 0)}
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    ours = ProjectedSGD(named([frozen, free]), bases=bases, **options)
    theirs = torch.optim.SGD([twin], foreach=True, **options)
    before = bits(frozen)
    for step in range(10):
        set_grads([frozen, free], seed=step)
        twin.grad = free.grad.clone()
        ours.step()
        theirs.step()
    assert torch.equal(bits(frozen), before)
    assert torch.equal(free, twin)


def test_other_parameters_are_frozen_or_trained_as_asked():
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.05, "nesterov": True}
    models = [make_model(torch.float64) for _ in range(3)]
    bases = model_bases(0.5)
    optimizers = [
        ProjectedSGD(models[0].named_parameters(), bases=bases, **options),
        ProjectedSGD(models[1].named_parameters(), bases=bases, others="train", **options),
        torch.optim.SGD(models[2].parameters(), **options),
    ]
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):
            set_grads(list(model.parameters()), seed=step)
            optimizer.step()
    start = dict(make_model(torch.float64).named_parameters())
    for (name, frozen), (_, trained), (_, plain) in zip(*(m.named_parameters() for m in models), strict=True):
        assert torch.equal(frozen, trained if name in bases else start[name])
        if name not in bases:
            assert torch.equal(trained, plain)


def test_outputs_on_protected_inputs_do_not_change():
    torch.manual_seed(0)
    layer = nn.Linear(16, 5, dtype=torch.float64)
    retained = torch.randn(40, 4, dtype=torch.float64) @ torch.randn(4, 16, dtype=torch.float64)
    basis = torch.linalg.svd(retained.T, full_matrices=False).U[:, :4]
    before, forgotten = layer(retained), torch.randn(8, 16, dtype=torch.float64)
    optimizer = ProjectedSGD(
        layer.named_parameters(), lr=0.1, momentum=0.9, maximize=True, bases={"weight": basis}
    )
    for _ in range(10):
        optimizer.zero_grad()
        nn.functional.cross_entropy(layer(forgotten), torch.arange(8) % 5).backward()
        optimizer.step()
    torch.testing.assert_close(layer(retained), before, rtol=1e-12, atol=1e-12)
    assert (layer(forgotten) @ torch.ones(5, dtype=torch.float64)).std() > 0


@pytest.mark.parametrize("k", [3, 15])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_grouped_convolution_may_have_a_basis_per_group(k, memory_format):
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 9, (1, 3), groups=3, bias=False, dtype=torch.float64)
    conv = nn.Conv2d(6, 9, (3, 3), groups=3, bias=False, dtype=torch.float64).to(memory_format=memory_format)
    basis = make_basis(18, k, groups=3)
    before = conv.weight.detach().clone()
    optimizer = ProjectedSGD(conv.named_parameters(), lr=0.1, bases={"weight": basis})
    set_grads([conv.weight], seed=0)
    optimizer.step()
    change = (conv.weight.detach() - before).reshape(3, 3, 18)
    grad = conv.weight.grad.reshape(3, 3, 18)
    torch.testing.assert_close(change, -0.1 * (grad - grad @ basis @ basis.mT), rtol=1e-11, atol=1e-13)


def test_foreign_momentum_cannot_lead_into_the_protected_space():
    weight = make_params(torch.float64, shapes=((6, 20),))[0]
    dense = torch.optim.SGD([("w", weight)], lr=0.1, momentum=0.9)
    run(dense, [weight], 3)
    basis = make_basis(20, 8)
    optimizer = ProjectedSGD([("w", weight)], lr=0.1, momentum=0.9, bases={"w": basis})
    optimizer.load_state_dict(dense.state_dict())
    before = weight.detach().clone()
    run(optimizer, [weight], 1)
    assert protected_part(weight.detach() - before, basis) < 1e-12


def test_projected_sgd_resumes_and_copies():
    model = make_model(torch.bfloat16)
    bases = {name: basis.float() for name, basis in model_bases(0.7).items()}
    optimizer = ProjectedSGD(model.named_parameters(), lr=0.1, momentum=0.9, others="train", bases=bases)
    run(optimizer, list(model.parameters()), 3)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    third = copy.deepcopy(model)
    third_optimizer = ProjectedSGD(third.named_parameters(), bases=bases)
    third_optimizer.load_state_dict(optimizer.state_dict())
    for net, opt in ((model, optimizer), (twin, twin_optimizer), (third, third_optimizer)):
        run(opt, list(net.parameters()), 3, start=3)
    assert same_parameters(model, twin)
    assert same_parameters(model, third)


def test_projection_takes_one_call_per_form(monkeypatch):
    calls = []
    for op in ("project_out_", "project_onto_"):
        real = getattr(ops, op)
        monkeypatch.setattr(ops, op, lambda g, b, op=op, real=real: (calls.append((op, len(g))), real(g, b)))
    model = make_model(torch.float64)
    bases = {**model_bases(0.2), "5.weight": make_basis(96, 90)}
    optimizer = ProjectedSGD(model.named_parameters(), lr=0.1, bases=bases)
    run(optimizer, list(model.parameters()), 1)
    assert calls == [("project_out_", 2), ("project_onto_", 1)]


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (
            {"bases": {"0": make_basis(27, 3)}},
            ValueError,
            r"bases must be keyed by names of parameters.*\['0'\]",
        ),
        ({"bases": {"0.weight": make_basis(26, 3)}}, ValueError, r"bases\['0.weight'\] must be \[27, k\]"),
        ({"bases": {"0.weight": torch.ones(27)}}, ValueError, r"bases\['0.weight'\] must be \[27, k\]"),
        ({"bases": {"0.weight": torch.eye(27)[None].expand(3, 27, 27)}}, ValueError, r"got \[3, 27, 27\]"),
        ({"bases": {"0.bias": torch.eye(1)}}, ValueError, r"bases\['0.bias'\] must belong to a parameter"),
        (
            {"bases": {"0.weight": 2 * make_basis(27, 3)}},
            ValueError,
            r"must have orthonormal columns, got max .* = 3",
        ),
        (
            {"bases": {"0.weight": float("nan") * make_basis(27, 3)}},
            ValueError,
            "must have orthonormal columns",
        ),
        ({"bases": {"0.weight": torch.ones(27, 3, dtype=torch.int64)}}, TypeError, "must be floating point"),
        ({"bases": {}, "others": "skip"}, ValueError, "others must be 'freeze' or 'train', got 'skip'"),
    ],
)
def test_bad_bases(arguments, error, message):
    with pytest.raises(error, match=message):
        ProjectedSGD(make_model().named_parameters(), **arguments)


def test_bases_need_names():
    with pytest.raises(ValueError, match=r"params must be named_parameters\(\)"):
        ProjectedSGD(make_model().parameters(), bases={})


def test_an_added_group_brings_its_bases():
    params = make_params(torch.float64, shapes=((4, 6), (4, 6)))
    basis = make_basis(6, 2)
    optimizer = ProjectedSGD(named(params)[:1], lr=0.1, bases={"p0": basis})
    with pytest.raises(ValueError, match="bases must be keyed by names of parameters"):
        optimizer.add_param_group({"params": named(params)[1:], "bases": {"p0": basis}})
    optimizer.add_param_group({"params": named(params)[1:], "bases": {"p1": basis}})
    before = [p.detach().clone() for p in params]
    run(optimizer, params, 2)
    assert all(protected_part(p.detach() - q, basis) < 1e-12 for p, q in zip(params, before, strict=True))


# On a GPU.

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.cuda
@needs_cuda
@pytest.mark.parametrize("cls, options", MASKED)
def test_masks_follow_a_model_that_is_moved(cls, options):
    here, there = make_model(), make_model()
    masks = model_masks(here)
    optimizers = [cls(model.named_parameters(), masks=masks, **options) for model in (here, there)]
    there.cuda()
    for step in range(3):
        set_grads(list(here.parameters()), seed=step)
        for p, q in zip(here.parameters(), there.parameters(), strict=True):
            q.grad = p.grad.cuda()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(p, q.cpu(), rtol=1e-6, atol=1e-6)


@pytest.mark.cuda
@needs_cuda
def test_a_captured_adamw_step_counts():
    eager_params = [nn.Parameter(p.detach().cuda()) for p in make_params()]
    graph_params = [nn.Parameter(p.detach().clone()) for p in eager_params]
    masks = random_masks(make_params())
    eager = MaskedAdamW(named(eager_params), lr=0.1, masks=masks)
    captured = MaskedAdamW(named(graph_params), lr=0.1, masks=masks, capturable=True)
    for params in (eager_params, graph_params):
        for p in params:
            p.grad = torch.ones_like(p)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        captured.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for _ in range(4):
        graph.replay()
    for _ in range(5):
        eager.step()
    for p, q in zip(eager_params, graph_params, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)
        assert captured.state[q]["step"] == 5
    with (
        pytest.raises(RuntimeError, match="capturable must be True"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        eager.step()
