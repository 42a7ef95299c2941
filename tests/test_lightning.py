"""Masks in Lightning's Trainer, and methods on its modules."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import unlearn_ext as ux

lightning = pytest.importorskip("lightning.pytorch")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*"),
]

OPTIMIZERS = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1, fused=True),
    "sgd": lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9, weight_decay=0.1),
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=0.1, max_iter=3),
}


class Module(lightning.LightningModule):
    def __init__(self, optimizer="adamw"):
        super().__init__()
        self.kind = optimizer
        self.net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return OPTIMIZERS[self.kind](self.parameters())


class Manual(Module):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        first, second = self.optimizers()
        for optimizer in (first, second):
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self(batch[0]), batch[1]))
            self.clip_gradients(optimizer, 0.1, "norm")
            optimizer.step()

    def configure_optimizers(self):
        halves = self.net[0].parameters(), self.net[2].parameters()
        return [torch.optim.AdamW(half, lr=0.01, weight_decay=0.1) for half in halves], []


def data(n=24):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(n, 6, generator=generator)
    return torch.utils.data.TensorDataset(x, torch.randint(3, (n,), generator=generator))


def loader(size=4):
    return torch.utils.data.DataLoader(data(), size)


def masks_of(model, density=0.4):
    generator = torch.Generator().manual_seed(1)
    return {n: torch.rand(p.shape, generator=generator) < density for n, p in model.named_parameters()}


def made(kind=Module, *args):
    torch.manual_seed(0)
    model = kind(*args)
    return model, {n: p.detach().clone() for n, p in model.named_parameters()}, masks_of(model)


def fit(folder, model, masks=None, resume=None, callbacks=(), size=4, **settings):
    own = [] if masks is None else [ux.integrations.lightning.mask_callback(masks)]
    arguments = {"max_epochs": 2, "accelerator": "cpu", "logger": False, "enable_checkpointing": False}
    arguments |= {"enable_progress_bar": False, "enable_model_summary": False, **settings}
    trainer = lightning.Trainer(default_root_dir=folder, callbacks=[*own, *callbacks], **arguments)
    trainer.fit(model, loader(size), ckpt_path=resume)
    return trainer


def assert_kept(model, before, masks):
    for name, p in model.named_parameters():
        same = p.detach().view(torch.int32) == before[name].view(torch.int32)
        assert bool(same[~masks[name]].all()), name
        assert not bool(same[masks[name]].all()), name


SETTINGS = {
    "plain": {},
    "accumulated": {"accumulate_grad_batches": 3},
    "clipped": {"gradient_clip_val": 0.05},
    "bf16": {"precision": "bf16-mixed"},
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_masked_scalars_keep_their_bits_under_any_optimizer(tmp_path, optimizer):
    model, before, masks = made(Module, optimizer)
    trainer = fit(tmp_path, model, {n: ux.ops.pack_mask(m) for n, m in masks.items()})
    assert_kept(model, before, masks)
    for name, p in model.named_parameters():
        for value in trainer.optimizers[0].state[p].values():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape == p.shape:
                assert not bool(value[~masks[name]].any())
    fit(tmp_path, model)  # without the callback: nothing of it is left behind
    assert all(not torch.equal(p[~masks[n]], before[n][~masks[n]]) for n, p in model.named_parameters())


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_the_free_scalars_are_trained_as_by_the_masked_optimizer(tmp_path, settings):
    model, before, masks = made()
    fit(tmp_path, model, masks, **settings)
    assert_kept(model, before, masks)
    other, _, _ = made()
    optimizer = ux.optim.MaskedAdamW(other.named_parameters(), lr=0.01, weight_decay=0.1, masks=masks)
    every = settings.get("accumulate_grad_batches", 1)
    for _ in range(2):
        for index, (x, y) in enumerate(loader()):
            with torch.autocast("cpu", torch.bfloat16, enabled="precision" in settings, cache_enabled=False):
                loss = F.cross_entropy(other.net(x), y) / every
            loss.backward()
            if (index + 1) % every == 0:
                if "gradient_clip_val" in settings:
                    ux.optim.clip_grad_norm_(other.named_parameters(), 0.05, masks)
                optimizer.step()
                optimizer.zero_grad()
    for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6, msg=name)


def test_manual_optimization_with_two_optimizers(tmp_path):
    model, before, masks = made(Manual)
    fit(tmp_path, model, masks)
    assert_kept(model, before, masks)


def test_masks_of_a_part_of_the_module(tmp_path):
    model, before, masks = made()
    of_net = {name.removeprefix("net."): mask for name, mask in masks.items()}
    fit(tmp_path, model, callbacks=[ux.integrations.lightning.mask_callback(of_net, module="net")])
    assert_kept(model, before, masks)
    with pytest.raises(ValueError, match=r"masks\['net.0.weight'\] must be given"):
        fit(tmp_path, model, of_net)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole, _, masks = made()
    fit(tmp_path, whole, masks, max_epochs=4)
    model, before, _ = made()
    fit(tmp_path, model, masks, max_epochs=2).save_checkpoint(tmp_path / "half.ckpt")
    again, _, _ = made()
    packed = {name: ux.ops.pack_mask(mask) for name, mask in masks.items()}
    fit(tmp_path, again, packed, resume=tmp_path / "half.ckpt", max_epochs=4)
    assert_kept(again, before, masks)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), whole.parameters(), strict=True))
    others = {name: ~mask for name, mask in masks.items()}
    with pytest.raises(ValueError, match="masks must be those of the run that is resumed"):
        fit(tmp_path, made()[0], others, resume=tmp_path / "half.ckpt", max_epochs=4)


def test_a_failed_run_leaves_nothing_behind(tmp_path):
    class Stop(lightning.Callback):
        def on_train_batch_end(self, *_):
            raise ZeroDivisionError

    model, _, masks = made()
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, model, masks, callbacks=[Stop()])
    model.zero_grad()
    F.cross_entropy(model(data()[:][0]), data()[:][1]).backward()
    assert all(bool(p.grad[~masks[name]].any()) for name, p in model.named_parameters())


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda masks: masks.pop("net.0.bias"), ValueError, r"masks\['net.0.bias'\] must be given"),
        (lambda masks: masks.update({"net.0.bias": torch.ones(3) > 0}), ValueError, r"must be bool \[8\]"),
        (lambda masks: masks.update({"net.0.bias": torch.ones(8)}), TypeError, r"must be bool \[8\]"),
    ],
)
def test_bad_masks(tmp_path, change, error, message):
    model, before, masks = made()
    change(masks)
    with pytest.raises(error, match=message):
        fit(tmp_path, model, masks)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_strategies_that_shard_are_refused():
    class Trainer:
        strategy = object.__new__(lightning.strategies.FSDPStrategy)

    model, _, masks = made()
    with pytest.raises(NotImplementedError, match="must leave parameters whole, got FSDPStrategy"):
        ux.integrations.lightning.mask_callback(masks).on_fit_start(Trainer(), model)


class Unfreezing(lightning.callbacks.BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.net[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.net[0], optimizer, lr=0.01)


class Trainable(Module):
    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)


def test_parameters_that_are_unfrozen_on_the_way(tmp_path):
    model, before, masks = made(Trainable)
    fit(tmp_path, model, masks, callbacks=[Unfreezing()], max_epochs=3)
    assert_kept(model, before, masks)
    model, before, masks = made(Trainable)
    masks.pop("net.0.weight")
    with pytest.raises(ValueError, match=r"masks\['net.0.weight'\] must be given"):
        fit(tmp_path, model, masks, callbacks=[Unfreezing()], max_epochs=3)
    assert torch.equal(model.net[0].weight, before["net.0.weight"])


def test_averages_of_weights(tmp_path):
    model, before, masks = made()
    averaging = lightning.callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1)
    fit(tmp_path, model, masks, callbacks=[averaging], max_epochs=3)
    assert_kept(model, before, masks)

    class WeightAveraging(lightning.Callback):
        """In the place of Lightning's own, which older versions lack."""

    model, before, masks = made()
    with pytest.raises(NotImplementedError, match=r"weights must not be averaged .* got WeightAveraging"):
        fit(tmp_path, model, masks, callbacks=[WeightAveraging()])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


class Quiet(Module):
    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])  # what is compiled may not log, whoever trains it


def test_a_compiled_module(tmp_path):
    model, before, masks = made(Quiet)
    fit(tmp_path, torch.compile(model, backend="aot_eager"), masks)
    assert_kept(model, before, masks)


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_two_processes(tmp_path):
    script = f"""
        import sys, torch
        sys.path[:0] = [{str(Path(__file__).parent)!r}]
        torch.set_num_threads(1)
        from test_lightning import made, fit, assert_kept, lightning
        model, before, masks = made()
        strategy = lightning.strategies.DDPStrategy(start_method="fork", process_group_backend="gloo")
        many = {{"strategy": strategy, "devices": 2, "max_epochs": 5, "size": 12}}
        fit({str(tmp_path)!r}, model, masks, gradient_clip_val=0.05, **many)
        assert_kept(model, before, masks)
        torch.save(dict(model.named_parameters()), {str(tmp_path / "two.pt")!r})
    """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    found = torch.load(tmp_path / "two.pt", weights_only=False)
    other, _, masks = made()
    optimizer = ux.optim.MaskedAdamW(other.named_parameters(), lr=0.01, weight_decay=0.1, masks=masks)
    x, y = data()[:]
    for _ in range(5):  # twelve of each rank, in whatever order: all
        optimizer.zero_grad()
        F.cross_entropy(other.net(x), y).backward()
        ux.optim.clip_grad_norm_(other.named_parameters(), 0.05, masks)
        optimizer.step()
    for name, p in other.named_parameters():
        torch.testing.assert_close(found[name], p, rtol=1e-5, atol=1e-6, msg=name)


# Methods on modules.


def single_powers(model, batch):
    total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for x, y in zip(*batch, strict=True):
        grads = torch.autograd.grad(F.cross_entropy(model.net(x[None]), y[None]), list(model.parameters()))
        for name, grad in zip(total, grads, strict=True):
            total[name] += grad.square() / len(batch[0])
    return total


@pytest.mark.parametrize("task", [None, ux.tasks.Classification()], ids=["step alone", "classification"])
@pytest.mark.parametrize("is_fitted", [False, True])
def test_the_loss_of_training_step(tmp_path, task, is_fitted):
    model, _, _ = made()
    if is_fitted:
        fit(tmp_path, model)
    batch = data()[:]
    found = ux.fisher_diagonal(model, [batch], task=ux.integrations.lightning.training_step_task(task))
    for name, expected in single_powers(model, batch).items():
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=1e-7)
    assert "log" not in vars(model)


def test_a_module_forgets_as_its_network_does():
    def parts():
        x, y = data(60)[:]
        return [(x[y == 0], y[y == 0])], [(x[y != 0], y[y != 0])]

    model, _, _ = made()
    forget, retain = parts()
    task = ux.integrations.lightning.training_step_task(ux.tasks.Classification())
    other, _, _ = made()
    by_step = ux.ssd(model, forget, retain, alpha=1.0, task=task)
    by_network = ux.ssd(other.net, forget, retain, alpha=1.0)
    assert by_step.changed == by_network.changed > 0
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


class NoLoss(Module):
    def training_step(self, batch, batch_idx):
        return None


class PerSample(Module):
    def training_step(self, batch):
        return {"loss": self(batch[0])}


class Normalised(Module):
    def __init__(self):
        super().__init__()
        self.net.append(nn.BatchNorm1d(3))


@pytest.mark.parametrize(
    "kind, error, message",
    [
        (nn.Identity, TypeError, "LightningModule with training_step, got Identity"),
        (Manual, ValueError, "automatic_optimization=False"),
        (NoLoss, ValueError, "must return one loss, got NoneType"),
        (PerSample, ValueError, r"must return one loss, got a tensor \[1, 3\]"),
        (Normalised, ValueError, "batch normalisation must be in eval mode"),
    ],
)
def test_modules_whose_step_gives_no_losses(kind, error, message):
    task = ux.integrations.lightning.training_step_task()
    with pytest.raises(error, match=message):
        task.loss(kind(), data()[:])
