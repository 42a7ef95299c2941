"""Masked training inside the Trainer of transformers: no bit moved elsewhere, whatever it is wrapped in."""

import copy
import gc
import math
import weakref

import pytest
import torch
from language_models import make
from torch import nn
from trainer_runs import DATA, LR, assert_alike, assert_kept, packed, random_masks, train, values_of

import unlearn_ext as ux
from unlearn_ext import ops
from unlearn_ext.hf.naming import bare_name, masks_by_parameter

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


def test_the_trainers_own_clipping_is_about_the_free_scalars(tmp_path):
    model = make("Llama")
    other, masks = copy.deepcopy(model), random_masks(model, 0.05)
    for trained, clip, most in ((model, None, 0.01), (other, 0.01, 0.0)):
        optimizer = ux.hf.masked_adamw(trained, lr=LR, masks=masks, clip_free=clip)
        train(tmp_path, trained, trainer={"optimizer_cls_and_kwargs": optimizer}, max_grad_norm=most)
    assert_alike(model, other)


def test_masked_sgd(tmp_path):
    model = make("Llama")
    before, masks = values_of(model), random_masks(model)
    optimizer = ux.hf.masked_sgd(model, lr=0.1, momentum=0.9, masks=masks)
    train(tmp_path, model, trainer={"optimizer_cls_and_kwargs": optimizer})
    assert_kept(model, before, masks)
    model, other = make("Llama"), make("Llama")
    optimizer = ux.hf.masked_sgd(model, lr=0.1, momentum=0.9, clip_free=None)
    train(tmp_path, model, trainer={"optimizer_cls_and_kwargs": optimizer})
    theirs = torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}
    train(tmp_path, other, trainer={"optimizer_cls_and_kwargs": theirs})
    assert_alike(model, other)


@pytest.mark.parametrize("kind", ["optimizer", "callback"])
def test_resuming(tmp_path, kind):
    def run(folder, model, resume=None):
        masks = random_masks(model)
        given = (
            {"trainer": {"optimizer_cls_and_kwargs": ux.hf.masked_adamw(model, lr=LR, masks=masks)}}
            if kind == "optimizer"
            else {"callbacks": [ux.hf.mask_callback(masks)]}
        )
        settings = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear", **given}
        return train(folder, model, steps=6, resume=resume, **settings)

    whole = make("Llama")
    before = values_of(whole)
    run(tmp_path / "a", whole)
    again = make("Llama", seed=7)  # other weights, which the checkpoint replaces
    run(tmp_path / "b", again, resume=str(tmp_path / "a" / "checkpoint-3"))
    for (name, mine), theirs in zip(again.named_parameters(), whole.parameters(), strict=True):
        assert torch.equal(mine, theirs), name
    assert_kept(again, before, random_masks(again))


OPTIMIZERS = {
    "adamw": {"optim": "adamw_torch"},
    "fused": {"optim": "adamw_torch_fused"},
    "sgd": {"optim": "sgd"},
    "adafactor": {"optim": "adafactor"},
    "rmsprop": {"optim": "rmsprop"},
}


@pytest.mark.parametrize("settings", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_callback_masks_any_optimizer(tmp_path, settings):
    model = make("Llama")
    before, masks = values_of(model), random_masks(model)
    run = train(tmp_path, model, callbacks=[ux.hf.mask_callback(packed(masks))], **settings)
    assert_kept(model, before, masks)
    for name, p in model.named_parameters():
        for value in run.optimizer.state[p].values():
            if isinstance(value, torch.Tensor) and value.shape == p.shape and value.dim():
                assert not bool(value[~masks[name]].any())
    train(tmp_path, model, callbacks=[], **settings)  # the hooks are gone
    assert all(
        not torch.equal(p[~masks[name]], before[name][~masks[name]]) for name, p in model.named_parameters()
    )


def test_the_callback_is_the_masked_optimizer(tmp_path):
    model = make("Llama").double()  # in which rounding decides over no step
    other, masks = copy.deepcopy(model), random_masks(model)
    optimizer = ux.hf.masked_adamw(model, lr=LR, masks=masks)
    train(tmp_path, model, trainer={"optimizer_cls_and_kwargs": optimizer})
    train(tmp_path, other, callbacks=[ux.hf.mask_callback(masks)], optim="adamw_torch")
    assert_alike(model, other)


def test_the_callback_holds_momentum_from_before():
    from unlearn_ext.hf.guard import MaskGuard

    model = nn.Linear(4, 3)
    masks, before = random_masks(model), values_of(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    before = values_of(model)
    momentum = {p: optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()}
    guard = MaskGuard(masks)
    guard.enter(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        assert all(not bool(p.grad[~masks[name]].any()) for name, p in model.named_parameters())
        guard.keep(optimizer)
        optimizer.step()
        guard.put_back(optimizer)
    assert_kept(model, before, masks)
    for name, p in model.named_parameters():
        held = optimizer.state[p]["momentum_buffer"]
        assert torch.equal(held[~masks[name]], momentum[p][~masks[name]])


def test_the_callback_holds_what_is_unfrozen_on_the_way():
    from unlearn_ext.hf.guard import MaskGuard

    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    masks, before = random_masks(model, 0.5), values_of(model)
    model[0].requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    guard = MaskGuard(masks)
    guard.enter(model)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 4)).sum().backward()
        guard.keep(optimizer)
        optimizer.step()
        guard.put_back(optimizer)
        model[0].requires_grad_(True)
    assert_kept(model, before, masks)
    model[0].requires_grad_(False)
    guard = MaskGuard({name: mask for name, mask in masks.items() if name.startswith("1.")})
    guard.enter(model)
    model[0].requires_grad_(True)
    with pytest.raises(ValueError, match=r"masks\['0.weight'\] must be given"):
        guard.keep(optimizer)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["optimizer", "callback"])
def test_compiled(tmp_path, kind):
    model = make("Llama")
    before, masks = values_of(model), random_masks(model)
    given = (
        {"trainer": {"optimizer_cls_and_kwargs": ux.hf.masked_adamw(model, lr=LR, masks=masks)}}
        if kind == "optimizer"
        else {"callbacks": [ux.hf.mask_callback(masks)]}
    )
    train(tmp_path, model, torch_compile=True, torch_compile_backend="aot_eager", **given)
    assert_kept(model, before, masks)


def test_adapters(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(make("Llama"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    before = values_of(model)
    scores = ux.saliency(model, [{k: torch.stack([d[k] for d in DATA]) for k in DATA[0]}], score="grad_abs")
    masks = ux.select_mask(scores, 0.5)
    optimizer = ux.hf.masked_adamw(model, lr=LR, masks=masks)
    train(tmp_path, model, trainer={"optimizer_cls_and_kwargs": optimizer})
    frozen = {n: torch.zeros(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}
    shapes = {name: list(p.shape) for name, p in model.named_parameters()}
    assert_kept(model, before, frozen | {n: ops.unpack_mask(m, shapes[n]) for n, m in masks.items()})


def test_other_tensors_in_the_parameters_place():
    """As accelerate puts them there, when it shards a model after its optimizer was made."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    other, masks = copy.deepcopy(model), random_masks(model)
    cls, kwargs = ux.hf.masked_adamw(model, lr=LR, masks=masks, clip_free=0.1)
    ours = cls([{"params": [p]} for p in model.parameters()], **kwargs)
    swapped = {id(p): nn.Parameter(p.detach().clone()) for p in model.parameters()}
    for module in (model[0], model[1]):
        module.weight, module.bias = swapped[id(module.weight)], swapped[id(module.bias)]
    for group in ours.param_groups:
        group["params"] = [swapped[id(p)] for p in group["params"]]
    theirs = ux.optim.MaskedAdamW(other.named_parameters(), lr=LR, masks=masks)
    for _ in range(3):
        for trained, optimizer in ((model, ours), (other, theirs)):
            optimizer.zero_grad()
            trained(torch.ones(2, 4)).square().sum().backward()
            if trained is other:
                ux.optim.clip_grad_norm_(other.named_parameters(), 0.1, masks)
            optimizer.step()
    assert_alike(model, other)


def test_bases_are_not_cut_for_parameters_that_are_sharded_later(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.Linear(4, 3)
        bases = {"weight": torch.eye(4)[:, :1]}
        optimizer = ux.optim.ProjectedSGD(model.named_parameters(), lr=LR, bases=bases)
        mesh = init_device_mesh("cpu", (1,))
        optimizer.param_groups[0]["params"] = [
            nn.Parameter(distribute_tensor(p.detach(), mesh)) for p in model.parameters()
        ]
        for p in optimizer.param_groups[0]["params"]:
            p.grad = torch.ones_like(p)
        with pytest.raises(NotImplementedError, match=r"bases\['weight'\] must be given after .* sharded"):
            optimizer.step()
    finally:
        torch.distributed.destroy_process_group()


def _one_of_two_sharded(rank, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3), nn.Linear(3, 1))
    other, masks, before = copy.deepcopy(model), random_masks(model), values_of(model)
    cls, kwargs = ux.hf.masked_adamw(model, lr=LR, masks=packed(masks), clip_free=0.1)
    ours = cls([{"params": [p]} for p in model.parameters()], **kwargs)
    for layer in (model[0], model[2], model):
        torch.distributed.fsdp.fully_shard(layer)
    for group, p in zip(ours.param_groups, model.parameters(), strict=True):
        group["params"] = [p]  # as accelerate does
    theirs = ux.optim.MaskedAdamW(other.named_parameters(), lr=LR, masks=masks)
    for step in range(3):
        for trained, optimizer in ((model, ours), (other, theirs)):
            optimizer.zero_grad()
            trained(torch.full((2, 4), 1.0 + step)).square().sum().backward()
            if trained is other:
                expected = ux.optim.clip_grad_norm_(other.named_parameters(), 0.1, masks)
            else:
                for norm_type in (2.0, math.inf):
                    total = ux.optim.clip_grad_norm_(model.named_parameters(), math.inf, masks, norm_type)
                    free = [p.grad.full_tensor()[masks[name]] for name, p in model.named_parameters()]
                    wanted = torch.cat(free).norm(norm_type)
                    torch.testing.assert_close(total, wanted, rtol=1e-6, atol=0)
                found = ux.optim.clip_grad_norm_(model.named_parameters(), math.inf, masks)
            optimizer.step()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    for (name, mine), wanted in zip(model.named_parameters(), other.parameters(), strict=True):
        value = mine.full_tensor()
        torch.testing.assert_close(value, wanted, rtol=1e-6, atol=1e-6)
        assert torch.equal(value[~masks[name]], before[name][~masks[name]])
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_a_model_that_is_sharded_after_its_optimizer_was_made(tmp_path):
    torch.multiprocessing.start_processes(
        _one_of_two_sharded, args=(str(tmp_path),), nprocs=2, start_method="spawn"
    )


def _one_of_two(rank, folder):
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    masks, before = random_masks(model), values_of(model)
    cls, kwargs = ux.hf.masked_adamw(model, lr=LR, masks=masks, clip_free=0.1)
    optimizer = cls([{"params": list(model.parameters())}], **kwargs)
    for view in (False, True):
        parallel = nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=view)
        for step in range(3):
            optimizer.zero_grad()
            parallel(torch.full((2, 4), float(rank + step + 1))).square().sum().backward()
            # What the Trainer clips next.
            assert not any(bool(p.grad[~masks[name]].any()) for name, p in model.named_parameters())
            optimizer.step()
    assert_kept(model, before, masks)
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    first = mine.clone()
    torch.distributed.broadcast(first, 0)
    assert torch.equal(mine, first)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes(tmp_path):
    torch.multiprocessing.start_processes(_one_of_two, args=(str(tmp_path),), nprocs=2, start_method="spawn")


def test_hooks_do_not_keep_an_optimizer():
    model = nn.Linear(4, 3)
    cls, kwargs = ux.hf.masked_adamw(model, lr=LR, masks=random_masks(model))
    optimizer = cls(model.parameters(), **kwargs)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    for _ in range(2):
        model(torch.ones(2, 4)).sum().backward()
    assert bool(model.weight.grad.all())


def test_names_without_what_wraps_them():
    assert bare_name("module.base_model.model.h.0.attn.base_layer.weight") == "h.0.attn.weight"
    assert bare_name("_orig_mod.h.0.attn.weight") == "h.0.attn.weight"
    inner = nn.Sequential(nn.Linear(2, 2))
    masks = {"0.weight": torch.ones(2, 2, dtype=torch.bool), "0.bias": torch.ones(2, dtype=torch.bool)}
    assert list(masks_by_parameter(torch.compile(inner), masks, "x")) == ["0.weight", "0.bias"]
    wrapped = {f"base_model.model.{name}": mask for name, mask in masks.items()}
    assert list(masks_by_parameter(inner, wrapped, "x")) == ["0.weight", "0.bias"]
    both = wrapped | {"0.base_layer.weight": masks["0.weight"]}
    with pytest.raises(ValueError, match=r"must name 0.weight as the model does, got .* cannot be told"):
        masks_by_parameter(inner, both, "x")
    with pytest.raises(ValueError, match=r"masks\['0.bias'\] must be given"):
        masks_by_parameter(inner, {"0.weight": masks["0.weight"]}, "x")


def test_bad_input(tmp_path):
    model = make("Llama")
    masks = random_masks(model)
    with pytest.raises(ValueError, match="weight_decay must be that of TrainingArguments"):
        ux.hf.masked_adamw(model, lr=LR, weight_decay=0.1)
    with pytest.raises(ValueError, match="clip_free must be positive"):
        ux.hf.masked_sgd(model, lr=LR, clip_free=0.0)
    other = ux.hf.masked_adamw(make("Llama"), lr=LR, masks=masks)
    with pytest.raises(ValueError, match="pass the model that is trained"):
        train(tmp_path, model, trainer={"optimizer_cls_and_kwargs": other})
    first = next(iter(masks))
    for wrong, error, message in (
        ({}, ValueError, "masks.* must be given"),
        ({first: torch.ones(3, dtype=torch.bool)}, ValueError, "must be bool"),
        ({first: torch.ones(3)}, TypeError, "must be bool"),
    ):
        given = (masks | wrong) if wrong else {}
        before = values_of(model)
        with pytest.raises(error, match=message):
            train(tmp_path, model, callbacks=[ux.hf.mask_callback(given)])
        optimizer = ux.hf.masked_adamw(model, lr=LR, masks=given)
        with pytest.raises(error, match=message):
            train(tmp_path, model, trainer={"optimizer_cls_and_kwargs": optimizer})
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
