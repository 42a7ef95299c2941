# %% [markdown]
# # Forget a class
#
# A network reads handwritten digits. One day the threes have to go: the licence of those images has ended,
# say. Training again without them would be the exact answer. Here it takes seconds; with your own model it
# may take weeks. So we change the trained network instead, and hold the result against one that really was
# trained again.
#
# ## A network that knows ten digits

# %%
import copy

import torch
from torch import nn
from torch.utils.data import DataLoader

import unlearn_ext as ux
from unlearn_ext.demo import load_digits

train_set, test_set = load_digits()  # the 1,797 images of scikit-learn


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)
    )


def train(model, loader, epochs=20):
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    return model


model = train(make_model(), DataLoader(train_set, 64, shuffle=True))

# %% [markdown]
# ## What goes, what stays
#
# `ux.data.split` cuts a data set in two: what is to be forgotten and what is to be kept. The test set,
# which no method may read, is cut likewise, to look at both sides afterwards.

# %%
forget_set, retain_set = ux.data.split(train_set, classes=[3])
forget, retain = DataLoader(forget_set, 64), DataLoader(retain_set, 64, shuffle=True)
unseen = {
    name: DataLoader(part, 256)
    for name, part in zip(
        ("unseen threes", "other unseen digits"), ux.data.split(test_set, classes=[3]), strict=True
    )
}


def accuracies(network):
    return {name: round(ux.metrics.accuracy(network, data), 3) for name, data in unseen.items()}


before = accuracies(model)
before

# %% [markdown]
# ## Forget
#
# Selective Synaptic Dampening (SSD) asks of every weight how much it matters for the threes, and how much
# for all digits: the diagonal of the Fisher information, sample by sample. Weights that matter far more for
# the threes are shrunk. How far one has to go differs from network to network, so the package tries
# candidates, mildest first, measures each on the data it was given, and keeps the first that forgets within
# the budget. A plan changes nothing before it is applied, and can be taken back to the last bit.

# %%
original = copy.deepcopy(model)
plan = ux.plan_ssd(model, forget, retain)
print(plan.summary())
result = plan.apply()
print(result)

# %%
after = accuracies(model)
after

# %% [markdown]
# The result says whether the goal was reached. Where no candidate forgets within the budget, `reached` is
# False, the model is as it was, and a warning says what was tried. Read it; do not assume it.

# %%
assert result.reached
assert after["unseen threes"] <= 0.05
assert after["other unseen digits"] >= before["other unseen digits"] - 0.02

# %% [markdown]
# ## Is it like never having seen them?
#
# Accuracy on the threes alone says little: a network that answers "three" never, but is wrecked otherwise,
# has 0 % too. `ux.compare` runs methods on copies of the original, trains a network again without the
# threes, and measures all alike. *Gap* is the mean distance of the accuracies to the retrained network's;
# the attack (MIA) guesses from the answers who was a member of the training set, and 0.5 is a guess.

# %%
table = ux.compare(
    original,
    forget,
    retain,
    DataLoader(test_set, 256),
    methods=["ssd", "gradient_masking"],
    make_model=make_model,
    train=lambda fresh, data: train(fresh, data),
    metrics=["retain", "forget", "test", "mia", "gap"],
)
table

# %% [markdown]
# The last row is a control: the same training of as many neurons, drawn by lot. Where it does as well as
# the chosen mask, choosing was worth nothing here.
#
# ## What is not promised
#
# The figures say what was changed and what was measured. They do not say that nothing of the threes is left
# in the weights: somebody who has the weights may learn more than somebody who asks for answers, and shapes
# that threes share with eights were never forgotten at all. If a law asks for erasure, retraining is the
# only full answer; this is what can be done meanwhile, with [a record](../audit.md) of what was done.

# %%
plan.revert()  # for the curious: every bit as before
assert all(
    torch.equal(a, b)
    for a, b in zip(model.state_dict().values(), original.state_dict().values(), strict=True)
)
