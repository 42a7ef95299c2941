"""Make a language model with LoRA adapters forget the texts of one user.

    python examples/forget_user_lora.py

``main`` is the job: the lines that a user writes. What a user has already is made above it: a small GPT-2 of
Hugging Face's transformers, built from a configuration and trained on the texts of some made-up people, and
PEFT's LoRA adapters on it that have learnt those of others by heart. Only adapters change; the base model
keeps every bit.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import peft
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

import unlearn_ext as ux

LENGTH = 32  # bytes of a text, those around it included
SENTENCES = ("{} lives in {}.", "{} calls {}.", "{} likes {}.", "{} meets {}.")
Batch = dict[str, Tensor]


def batches(users: Iterable[int], size: int = 16) -> list[Batch]:
    """Write four sentences about each user, who exists in no other place, and encode them byte by byte.

    Args:
        users: Their numbers, which decide everything.
        size: Texts of a batch.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``; padding has no label.
    """
    texts = []
    for user in users:
        rng = random.Random(user)
        name, *facts = ("".join(map(rng.choice, ("bdgklmnrst", "aeiou") * 3)) for _ in range(5))
        facts[1] = f"{rng.randrange(10_000):04}"
        texts += [
            sentence.format(name.title(), fact) for sentence, fact in zip(SENTENCES, facts, strict=True)
        ]
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text) + 2] = torch.tensor([1, *text.encode("ascii"), 1])
    mask = (ids > 0).long()
    rows = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    starts = range(0, len(texts), size)
    return [{name: tensor[start : start + size] for name, tensor in rows.items()} for start in starts]


def learn(model: nn.Module, data: list[Batch], epochs: int, lr: float) -> None:
    """Train whatever is trainable.

    Args:
        model: Trained in place.
        data: Batches.
        epochs: Passes over them.
        lr: Learning rate.
    """
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for epoch in range(epochs):
        for batch in random.Random(epoch).sample(data, len(data)):
            optimizer.zero_grad()
            model(**batch).loss.backward()
            optimizer.step()


def trained(epochs: int) -> nn.Module:
    """Train the base model, then adapters on it.

    Args:
        epochs: Of the adapters, on the texts of users 0 to 11.

    Returns:
        A model of PEFT.
    """
    ends, drops = (
        dict.fromkeys(("bos_token_id", "eos_token_id"), 1),
        ("resid_pdrop", "embd_pdrop", "attn_pdrop"),
    )
    sizes = {"vocab_size": 128, "n_positions": LENGTH, "n_embd": 64, "n_layer": 2, "n_head": 4}
    base = GPT2LMHeadModel(GPT2Config(**sizes, **ends, **dict.fromkeys(drops, 0.0)))
    learn(base, batches(range(100, 140)), 25, 3e-3)
    targets = ["c_attn", "c_fc", "c_proj"]
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules=targets, fan_in_fan_out=True)
    model: nn.Module = peft.get_peft_model(base, config)
    learn(model, batches(range(12)), epochs, 5e-3)
    return model


def main(leaving: int = 3, epochs: int = 40) -> dict[str, float]:
    """Forget one of twelve users.

    Args:
        leaving: Which.
        epochs: Of the adapters' training before.

    Returns:
        Figures by name.
    """
    torch.manual_seed(0)
    model, language = trained(epochs), ux.metrics.language
    forget, retain = batches([leaving]), batches(user for user in range(12) if user != leaving)
    validation, other = batches(range(20, 40)), batches(range(40, 60))  # of users whom the model never saw
    figures = {}
    for when in ("before", "after"):
        if when == "after":
            result = ux.newton(model, forget, retain, validation=validation, params="adapters", budget=0.05)
        figures[f"completed of the user's texts, {when}"] = language.extraction_strength(model, forget)
        figures[f"completed of the others', {when}"] = language.extraction_strength(model, retain)
        attack = language.language_mia(model, forget=forget, test=other)
        figures[f"attack by loss (0.5 is chance), {when}"] = attack["loss"]
    print("\n".join(f"{name:<40} {value:.2f}" for name, value in figures.items()))
    print("reached" if result.reached else "refused: the model is as it was")
    return {**figures, "reached": bool(result.reached)}


if __name__ == "__main__":
    main()
