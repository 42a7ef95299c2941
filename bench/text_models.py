"""The language model that learns users' texts by heart, and its training, kept from run to run."""

from __future__ import annotations

import hashlib
import json
import random
import time
from pathlib import Path

import torch
from torch import nn

from bench.user_texts import LENGTH, VOCABULARY, batches

KEPT = Path(__file__).parents[1] / "build" / "texts"  # trained networks and results: delete to measure anew
RECIPE = {"epochs": 30, "batch": 16, "lr": 2e-3, "weight_decay": 0.01, "warm_up": 0.1}


def network(seed: int) -> nn.Module:
    """Build a Llama of 1.1 million parameters.

    Args:
        seed: Of its first weights.

    Returns:
        The model.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=VOCABULARY,
                hidden_size=160,
                intermediate_size=512,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=LENGTH,
                pad_token_id=0,
                bos_token_id=2,
                eos_token_id=2,
                tie_word_embeddings=False,
            )
        )


def train(model: nn.Module, texts: list[str], seed: int) -> nn.Module:
    """Train on texts until they are known by heart: AdamW and one cycle of the learning rate.

    Args:
        model: Trained in place.
        texts: The texts; an epoch's batches are of random ones.
        seed: Decides their order.

    Returns:
        The model, in eval mode.
    """
    rng = random.Random(seed)
    epochs, size = int(RECIPE["epochs"]), int(RECIPE["batch"])
    optimizer = torch.optim.AdamW(model.parameters(), RECIPE["lr"], weight_decay=RECIPE["weight_decay"])
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, RECIPE["lr"], total_steps=epochs * -(-len(texts) // size), pct_start=RECIPE["warm_up"]
    )
    model.train()
    for _ in range(epochs):
        shuffled = rng.sample(texts, len(texts))
        for start in range(0, len(texts), size):
            optimizer.zero_grad()
            # Texts of like length together: the same mean over the batch's bytes, with less padding.
            parts = batches(sorted(shuffled[start : start + size], key=len), -(-size // 2))
            counts = [int((part["labels"][:, 1:] >= 0).sum()) for part in parts]
            for part, count in zip(parts, counts, strict=True):
                (model(**part).loss * (count / sum(counts))).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def learnt(texts: list[str], seed: int) -> tuple[nn.Module, float]:
    """Train a network on texts, or take the one of an earlier run.

    Args:
        texts: The texts.
        seed: Of first weights and order.

    Returns:
        The network in eval mode, and the seconds its training took.
    """
    key = hashlib.sha256(json.dumps([RECIPE, seed, texts, torch.__version__]).encode()).hexdigest()[:12]
    path = KEPT / f"llama-{seed}-{key}.pt"
    model = network(seed)
    if not path.exists():
        start = time.perf_counter()
        train(model, texts, seed)
        KEPT.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        torch.save({"state": model.state_dict(), "seconds": time.perf_counter() - start}, draft)
        draft.replace(path)
    kept = torch.load(path)
    model.load_state_dict(kept["state"])
    return model.eval(), kept["seconds"]
