"""A small language model that knows texts of made-up users by heart, for ``forget_user_sequences.py``.

A GPT-2 of Hugging Face's transformers, built from a configuration (nothing is downloaded), learns byte by
byte where users live, their telephone number, their passphrase. Everything of a user is drawn at random:
nobody's texts can be guessed from anybody else's.
"""

from __future__ import annotations

import random
from collections.abc import Iterable

import torch
from torch import Tensor, nn

import unlearn_ext as ux

SENTENCES = (
    "{} lives in {}.",
    "{} can be called on {}.",
    "The passphrase of {} is {}.",
    "{} meets {} today.",
    "Write to {} at {}.",
    "The badge of {} is {}.",
)
SYLLABLES = ("ba", "bor", "da", "del", "fa", "gal", "ha", "jo", "ka", "len", "mi", "nel", "or", "rin", "sa")
LENGTH = 40  # bytes of a text, those around it included
Batch = dict[str, Tensor]


def texts_of(users: Iterable[int]) -> list[str]:
    """Write what there is to know of users, who exist in no other place.

    Args:
        users: Their numbers.

    Returns:
        Six sentences of each.
    """
    texts = []
    for user in users:
        rng = random.Random(user)
        words = ["".join(rng.choices(SYLLABLES, k=2)) for _ in range(6)]
        facts = [words[0].title(), f"555-{rng.randrange(10_000):04}", f"{words[1]}-{rng.randrange(100):02}"]
        facts += [words[2].title(), f"{words[3]}@{words[4]}", f"{rng.randrange(100_000):05}"]
        name = words[5].title()
        texts += [sentence.format(name, fact) for sentence, fact in zip(SENTENCES, facts, strict=True)]
    return texts


def batches(texts: list[str], size: int = 16) -> list[Batch]:
    """Encode texts, as a data collator does.

    Args:
        texts: ASCII.
        size: Texts of a batch.

    Returns:
        ``input_ids``, ``attention_mask`` and ``labels``; padding has no label.
    """
    ids = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text) + 2] = torch.tensor([1, *text.encode("ascii"), 1])
    mask = (ids > 0).long()
    rows = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    starts = range(0, len(texts), size)
    return [{name: tensor[start : start + size] for name, tensor in rows.items()} for start in starts]


def learnt(texts: list[str], epochs: int) -> nn.Module:
    """Train a model until it knows texts by heart.

    Args:
        texts: The texts.
        epochs: Passes over them.

    Returns:
        A GPT-2 of two layers, in eval mode.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": 128, "n_positions": LENGTH, "n_embd": 96, "n_layer": 2, "n_head": 4}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **no_dropout, bos_token_id=1, eos_token_id=1))
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in batches(rng.sample(texts, len(texts))):
            optimizer.zero_grad()
            ux.losses.cross_entropy(model, batch).mean().backward()
            optimizer.step()
    return model.eval()
