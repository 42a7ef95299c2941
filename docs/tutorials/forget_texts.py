# %% [markdown]
# # A user's texts in a language model
#
# A service has fine-tuned a language model on what its users wrote. One of them leaves and wants to be
# forgotten. The model completes their telephone number from the first words.
#
# Everything is small here so that it runs in seconds: made-up users, a GPT-2 of two layers that reads
# bytes, nothing is downloaded. Models of the usual sizes go in the same way; [language
# models](../language_models.md) says what was tested.
#
# ## A model that knows its users by heart

# %%
import random

import torch
from transformers import GPT2Config, GPT2LMHeadModel

import unlearn_ext as ux

FORMS = (
    "{} lives in {}.",
    "{} can be called on {}.",
    "The passphrase of {} is {}.",
    "The badge of {} is {}.",
)


def texts_of(user):
    rng = random.Random(user)
    word = lambda: "".join(
        rng.choice(["ba", "del", "gal", "jo", "ka", "mi", "nel", "or", "rin", "sa"]) for _ in "ab"
    )
    facts = [
        word().title(),
        f"555-{rng.randrange(10_000):04}",
        f"{word()}-{rng.randrange(100):02}",
        str(rng.random())[2:8],
    ]
    name = word().title()
    return [form.format(name, fact) for form, fact in zip(FORMS, facts, strict=True)]


def batches(texts, size=16):
    """What a data collator makes: ids, a mask, and labels that are -100 where there is padding."""
    ids = torch.zeros(len(texts), 40, dtype=torch.long)
    for row, text in zip(ids, texts, strict=True):
        row[: len(text) + 2] = torch.tensor([1, *text.encode("ascii"), 1])
    mask = (ids > 0).long()
    rows = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    return [{name: part[at : at + size] for name, part in rows.items()} for at in range(0, len(texts), size)]


torch.manual_seed(0)
model = GPT2LMHeadModel(
    GPT2Config(
        vocab_size=128,
        n_positions=40,
        n_embd=96,
        n_layer=2,
        n_head=4,
        bos_token_id=1,
        eos_token_id=1,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
)
texts = {user: texts_of(user) for user in range(46)}
learnt = [text for user in range(16) for text in texts[user]]
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for epoch in range(60):
    for batch in batches(random.Random(epoch).sample(learnt, len(learnt))):
        optimizer.zero_grad()
        ux.losses.cross_entropy(model, batch).mean().backward()
        optimizer.step()

# %% [markdown]
# ## Four sets
#
# The user's texts; the other users'; texts of users whom the model never met, which tell the method when to
# stop; and more of those, which no method reads, to judge by.

# %%
leaving = 3
forget = batches(texts[leaving])
retain = batches([text for user in range(16) if user != leaving for text in texts[user]])
validation = batches([text for user in range(16, 31) for text in texts[user]])
test = batches([text for user in range(31, 46) for text in texts[user]])


def completed(text, known=22):
    """What the model makes of the beginning of a text."""
    ids = torch.tensor([[1, *text[:known].encode("ascii")]])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_length=40, do_sample=False, pad_token_id=0
    )
    return bytes(int(i) for i in out[0] if i > 1).decode("ascii")


def figures():
    return {
        "the user's texts, completed": round(ux.metrics.language.extraction_strength(model, forget), 2),
        "the others' texts, completed": round(ux.metrics.language.extraction_strength(model, retain), 2),
        "attack by loss": round(ux.metrics.language.language_mia(model, forget=forget, test=test)["loss"], 2),
    }


number = texts[leaving][1]
print("true:", number)
print("says:", completed(number))
before = figures()
before

# %% [markdown]
# *Completed* is the share of a text, from its end backwards, that the model writes by itself. The attack
# tells the user's texts from unseen ones by their loss; 0.5 is chance, 1 is certainty.
#
# ## Forget
#
# That nothing of a text can be predicted is no sensible aim: "can be called on" is English. The aim is a
# loss like that of other people's texts which the model never saw, and no more than that: a text that the
# model finds *strangely* unlikely betrays that it was there.

# %%
result = ux.newton(model, forget, retain, validation=validation, generator=torch.Generator().manual_seed(0))
print(result)
print("says:", completed(number))
after = figures()
after

# %%
assert result.reached
assert after["the user's texts, completed"] <= before["the user's texts, completed"] / 2
assert after["the others' texts, completed"] >= before["the others' texts, completed"] - 0.1
assert abs(after["attack by loss"] - 0.5) < before["attack by loss"] - 0.5

# %% [markdown]
# ## What is not promised
#
# - Four texts of one user, one seed: the attack's figure alone is uncertain by about .3 with so few. On a
#   model of 1.1 million parameters, beside one retrained without the texts, the step came within 4 % of the
#   retrained model's loss (one seed): [the table](../../bench/results/methods/texts.md).
# - What other users wrote about the one who left is still known.
# - Where the goal costs more perplexity than the budget allows, the model is left as it was and `reached`
#   is False.
