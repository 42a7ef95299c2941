"""Make a causal language model forget the sequences of one user.

    python examples/forget_user_sequences.py

A small GPT-2 of Hugging Face's transformers, built from a configuration (nothing is downloaded), learns
sequences of several users. Every user has habits of their own: which token follows which. Then one user asks
to be forgotten. Batches are mappings with ``input_ids`` and ``labels``, as a data collator makes them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import unlearn_ext as ux

N_USERS, N_TOKENS, LENGTH = 4, 24, 16
Batch = dict[str, Tensor]


def make_model() -> nn.Module:
    """Build the language model.

    Returns:
        A GPT-2 of two layers.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=N_USERS + N_TOKENS,
        n_positions=LENGTH,
        n_embd=64,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def sequences(user: int, count: int, generator: torch.Generator) -> Batch:
    """Write sequences as a user would: their own token first, then token after token by their habits.

    Args:
        user: Number of the user.
        count: How many.
        generator: Decides where each begins.

    Returns:
        ``input_ids`` and ``labels``, ``[count, LENGTH]``. The first two tokens cannot be known and have no
        label.
    """
    habits = torch.randperm(N_TOKENS, generator=torch.Generator().manual_seed(100 + user))
    tokens = [torch.randint(N_TOKENS, (count,), generator=generator)]
    while len(tokens) < LENGTH - 1:
        tokens.append(habits[tokens[-1]])
    ids = torch.stack([torch.full((count,), user), *[t + N_USERS for t in tokens]], dim=1)
    labels = ids.clone()
    labels[:, :2] = -100
    return {"input_ids": ids, "labels": labels}


def main(steps: int = 350) -> dict[str, float]:
    """Train, forget, measure.

    Args:
        steps: Of the training.

    Returns:
        Accuracy of the next token by name.
    """
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    data = {user: [sequences(user, 16, generator) for _ in range(4)] for user in range(N_USERS)}
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    everything = [batch for batches in data.values() for batch in batches]
    for step in range(steps):
        optimizer.zero_grad()
        ux.losses.cross_entropy(model, everything[step % len(everything)]).mean().backward()
        optimizer.step()

    leaving = 2
    forget = data[leaving]
    retain = [batch for user, batches in data.items() if user != leaving for batch in batches]
    figures = {
        "the user, before": ux.metrics.accuracy(model, forget),
        "the others, before": ux.metrics.accuracy(model, retain),
    }
    # Half of the weights, those with the largest gradients on the user's sequences, learn random tokens in
    # their place, and the others' sequences as they are.
    result = ux.salun(model, forget, retain, generator=torch.Generator().manual_seed(0))
    figures |= {
        "the user, after": ux.metrics.accuracy(model, forget),
        "the others, after": ux.metrics.accuracy(model, retain),
    }
    print(result)
    for name, value in figures.items():
        print(f"{name:<20} {value:6.1%}")
    return figures


if __name__ == "__main__":
    main()
