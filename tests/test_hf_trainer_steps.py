"""The steps of the masked AdamW in the Trainer are torch's: 1e-6, whatever else the Trainer does.

Two oracles, for two sources of difference. In float32 and bfloat16 two runs cannot be compared: AdamW divides
by the size of the gradient, so that a gradient that is nothing but rounding moves its scalar by a full step,
in whichever direction. There every step is compared with that of torch's AdamW, in float64, on the very
gradients of the run. In float64 whole runs are compared.
"""

import copy

import pytest
import torch
from language_models import make
from torch import nn
from trainer_runs import (
    LR,
    assert_kept,
    bits,
    full_masks,
    packed,
    random_masks,
    train,
    values_of,
)

import unlearn_ext as ux

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
STEPS = 5
SETTINGS = {
    "plain": {"max_grad_norm": 0.0},
    "accumulated": {"gradient_accumulation_steps": 3, "lr_scheduler_type": "cosine", "warmup_steps": 2},
    "clipped": {"max_grad_norm": 0.05},
    "bf16": {"bf16": True},
    "compiled": {"torch_compile": True, "torch_compile_backend": "aot_eager"},
}


class Shadow(transformers.TrainerCallback):
    """Torch's AdamW of the free scalars alone, in float64, on the gradients of a run."""

    def __init__(self, masks, clip):
        self.masks, self.clip = masks, clip
        self.vectors, self.optimizer, self.steps = {}, None, 0

    def on_pre_optimizer_step(self, args, state, control, *, model, optimizer, **_):
        parameters = dict(model.named_parameters())
        if self.optimizer is None:
            names = {id(p): name for name, p in parameters.items()}
            groups = []
            for group in optimizer.param_groups:
                own = [names[id(p)] for p in group["params"]]
                self.vectors |= {
                    name: nn.Parameter(parameters[name].detach()[self.masks[name]].double()) for name in own
                }
                settings = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
                groups.append({"params": [self.vectors[name] for name in own], **settings})
            self.optimizer = torch.optim.AdamW(groups, foreach=False)
        for own, group in zip(self.optimizer.param_groups, optimizer.param_groups, strict=True):
            own["lr"] = group["lr"]
        for name, vector in self.vectors.items():
            grad = parameters[name].grad
            assert not bool(grad[~self.masks[name]].any()), name
            vector.grad = grad[self.masks[name]].double()
        if self.clip:
            nn.utils.clip_grad_norm_(self.vectors.values(), self.clip)
        self.optimizer.step()

    def on_optimizer_step(self, args, state, control, *, model, **_):
        self.steps += 1
        for name, parameter in model.named_parameters():
            found = parameter.detach()[self.masks[name]].double()
            torch.testing.assert_close(
                found, self.vectors[name].detach(), rtol=1e-6, atol=1e-6 * LR, msg=name
            )


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("masks", ["full", "random"])
def test_every_step_is_torchs_on_the_same_gradients(tmp_path, masks, settings):
    model = make("Llama")
    before, chosen = values_of(model), {"full": full_masks, "random": random_masks}[masks](model)
    # The Trainer clips before the step where it is told to; here the optimizer clips once more.
    clip = 0.02 if "max_grad_norm" in settings else 1.0
    optimizer = ux.hf.masked_adamw(model, lr=LR, masks=packed(chosen), clip_free=clip)
    shadow = Shadow(chosen, clip)
    trainer = {"optimizer_cls_and_kwargs": optimizer}
    train(tmp_path, model, STEPS, trainer, callbacks=[shadow], **settings)
    assert shadow.steps == STEPS
    assert_kept(model, before, chosen)


def assert_same_updates(model, other, before, masks=None):
    """To 1e-6 of what the largest scalar of a parameter has moved."""
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        free = ... if masks is None else masks[name]
        moved = float((theirs - before[name])[free].detach().abs().max())
        assert moved > LR, name
        off = float((mine - theirs)[free].detach().abs().max())
        assert off <= 1e-6 * moved, (name, off / moved)


WHOLE = {name: setting for name, setting in SETTINGS.items() if name != "bf16"}


@pytest.mark.parametrize("settings", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("masks", [None, "full"])
def test_whole_runs_are_torchs(tmp_path, masks, settings):
    model = make("Llama").double()
    other, before = copy.deepcopy(model), values_of(model)
    given = None if masks is None else full_masks(model)
    optimizer = ux.hf.masked_adamw(model, lr=LR, masks=given, clip_free=None)
    train(tmp_path, model, STEPS, {"optimizer_cls_and_kwargs": optimizer}, **settings)
    train(tmp_path, other, STEPS, optim="adamw_torch", **settings)
    assert_same_updates(model, other, before)


class Compacted(torch.optim.AdamW):
    """Torch's AdamW as it would train the free scalars alone: others have no gradient and are put back."""

    masks = None

    def __init__(self, params, masks, names_from, **options):
        super().__init__(params, **options)
        names = {id(p): name for name, p in names_from.named_parameters()}
        self.masks = {p: masks[names[id(p)]] for group in self.param_groups for p in group["params"]}

    def step(self, closure=None):
        for p, mask in self.masks.items():
            p.grad.masked_fill_(~mask, 0)
        vectors = [nn.Parameter(p[mask].clone()) for p, mask in self.masks.items()]
        for vector, (p, mask) in zip(vectors, self.masks.items(), strict=True):
            vector.grad = p.grad[mask]
        torch.nn.utils.clip_grad_norm_(vectors, 1.0)
        for vector, (p, mask) in zip(vectors, self.masks.items(), strict=True):
            p.grad[mask] = vector.grad
        before = {p: p.detach().clone() for p in self.masks}
        super().step()
        with torch.no_grad():
            for p, mask in self.masks.items():
                p.copy_(torch.where(mask, p, before[p]))


@pytest.mark.parametrize("resumed", [False, True], ids=["whole", "resumed"])
def test_masked_runs_are_torchs_of_the_free_scalars_alone(tmp_path, resumed):
    masks = random_masks(make("Llama"))
    settings = {"gradient_accumulation_steps": 2, "lr_scheduler_type": "linear"}

    def run(folder, seed=0, resume=None):
        model = make("Llama", seed=seed).double()
        optimizer = ux.hf.masked_adamw(model, lr=LR, masks=packed(masks))
        saved = {"save_strategy": "steps", "save_steps": 3} if resumed else {}
        trainer = {"optimizer_cls_and_kwargs": optimizer}
        ran = train(tmp_path / folder, model, 6, trainer, resume, **settings, **saved)
        return model, ran.optimizer.state

    model, state = run("first")
    if resumed:  # from other weights, which the checkpoint replaces
        again, state = run("again", seed=7, resume=str(tmp_path / "first" / "checkpoint-3"))
        assert all(
            torch.equal(bits(p), bits(q)) for p, q in zip(again.parameters(), model.parameters(), strict=True)
        )
        model = again
    other = make("Llama").double()
    before = values_of(other)
    reference = Compacted, {"lr": LR, "masks": masks, "names_from": other}
    trainer = {"optimizer_cls_and_kwargs": reference}
    train(tmp_path / "other", other, 6, trainer, **settings, max_grad_norm=0.0)
    assert_same_updates(model, other, before, masks)
    assert_kept(model, before, masks)
    assert all(not bool(state[p]["exp_avg"][~masks[name]].any()) for name, p in model.named_parameters())
