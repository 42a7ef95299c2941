"""Make a causal language model forget the texts of one user.

    python examples/forget_user_sequences.py

A small GPT-2 of Hugging Face's transformers, built from a configuration (nothing is downloaded), learns texts
of made-up users by heart, byte by byte: where they live, their telephone number, their passphrase. Then one
of them asks to be forgotten. What the model says to texts that it never saw, of users that it never saw, is
what it should say to theirs afterwards.
"""

from __future__ import annotations

import random

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
LENGTH = 40  # bytes of a text, those around it included
SYLLABLES = (
    "ba",
    "bor",
    "da",
    "del",
    "fa",
    "gal",
    "ha",
    "jo",
    "ka",
    "len",
    "mi",
    "nel",
    "or",
    "rin",
    "sa",
    "ul",
)
Batch = dict[str, Tensor]


def texts_of(seed: int) -> list[str]:
    """Write what there is to know of a user, who exists in no other place.

    Args:
        seed: Decides everything.

    Returns:
        Six sentences.
    """
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choice(SYLLABLES) for _ in range(2))

    facts = [word().title(), f"555-{rng.randrange(10_000):04}", f"{word()}-{rng.randrange(100):02}"]
    facts += [word().title(), f"{word()}@{word()}", f"{rng.randrange(100_000):05}"]
    name = word().title()
    return [sentence.format(name, fact) for sentence, fact in zip(SENTENCES, facts, strict=True)]


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


def make_model() -> nn.Module:
    """Build the language model.

    Returns:
        A GPT-2 of two layers.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=128,
        n_positions=LENGTH,
        n_embd=96,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=1,
        eos_token_id=1,
    )
    return GPT2LMHeadModel(config)


def learn(model: nn.Module, texts: list[str], epochs: int) -> None:
    """Train until the texts are known by heart.

    Args:
        model: Trained in place.
        texts: The texts.
        epochs: Passes over them.
    """
    rng = random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for batch in batches(rng.sample(texts, len(texts))):
            optimizer.zero_grad()
            ux.losses.cross_entropy(model, batch).mean().backward()
            optimizer.step()


def main(epochs: int = 50) -> dict[str, float]:
    """Train, forget, measure.

    Args:
        epochs: Of the training.

    Returns:
        Figures by name.
    """
    torch.manual_seed(0)
    texts = {user: texts_of(user) for user in range(32)}
    model = make_model()
    learn(model, [text for user in range(16) for text in texts[user]], epochs)

    # From here on it is what a service would do.
    leaving = 3
    forget = batches(texts[leaving])
    retain = batches([text for user in range(16) if user != leaving for text in texts[user]])
    unseen, other = (
        batches([t for user in users for t in texts[user]]) for users in (range(16, 24), range(24, 32))
    )

    def told(when: str) -> dict[str, float]:
        attacks = ux.metrics.language.language_mia(model, forget=forget, test=other)
        return {
            f"the user's texts completed, {when}": ux.metrics.language.extraction_strength(model, forget),
            f"the others' texts completed, {when}": ux.metrics.language.extraction_strength(model, retain),
            f"attack by loss (0.5 is chance), {when}": attacks["loss"],
        }

    figures = told("before")
    result = ux.newton(model, forget, retain, validation=unseen, generator=torch.Generator().manual_seed(0))
    figures |= told("after")
    print(result)
    for name, value in figures.items():
        print(f"{name:<50} {value:6.2f}")
    return {**figures, "reached": bool(result.reached)}


if __name__ == "__main__":
    main()
