"""Runs of the Trainer on small models of transformers, masks for them, and what must have stayed."""

import torch
from language_models import tokens

from unlearn_ext import ops

DATA = [{"input_ids": ids, "labels": ids.clone()} for ids in tokens(24, 8)]
LR = 1e-2


def arguments(folder, steps=4, **settings):
    import transformers

    given = {
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "learning_rate": LR,
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "logging_strategy": "no",
        **settings,
    }
    return transformers.TrainingArguments(str(folder), **given)


def train(folder, model, steps=4, trainer=None, resume=None, callbacks=(), **settings):
    import transformers

    run = transformers.Trainer(
        model,
        arguments(folder, steps, **settings),
        train_dataset=DATA,
        callbacks=list(callbacks),
        **(trainer or {}),
    )
    run.train(resume_from_checkpoint=resume)
    return run


def values_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def bits(tensor):
    return (
        tensor.detach().clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    )


def random_masks(model, density=0.3):
    generator = torch.Generator().manual_seed(1)
    return {n: torch.rand(p.shape, generator=generator) < density for n, p in model.named_parameters()}


def full_masks(model):
    return {n: torch.ones(p.shape, dtype=torch.bool) for n, p in model.named_parameters()}


def packed(masks):
    return {name: ops.pack_mask(mask) for name, mask in masks.items()}


def assert_kept(model, before, masks):
    moved = 0
    for name, p in model.named_parameters():
        same = bits(p) == bits(before[name])
        assert bool(same[~masks[name]].all()), name
        moved += int((~same)[masks[name]].sum())
    assert moved > 0.5 * sum(int(mask.sum()) for mask in masks.values())


def assert_alike(model, other, tolerance=1e-6):
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance, msg=name)
