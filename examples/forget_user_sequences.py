"""Make a causal language model forget the texts of one user.

    python examples/forget_user_sequences.py

The model (a small GPT-2 of Hugging Face's transformers, see ``tiny_language_model.py``) knows the texts of
sixteen users by heart. Then one of them asks to be forgotten. What the model says to texts of users that it
never saw is what it should say to theirs afterwards.
"""

from __future__ import annotations

import math
from typing import Any

from tiny_language_model import batches, learnt, texts_of

import unlearn_ext as ux
from unlearn_ext.metrics import language


def main(epochs: int = 50) -> dict[str, Any]:
    """Train, forget, measure.

    Args:
        epochs: Of the training.

    Returns:
        Whether the goal was reached, and the figures before and after.
    """
    model = learnt(texts_of(range(16)), epochs)

    # From here on it is what a service would do.
    leaving = 3
    forget = batches(texts_of([leaving]))
    retain = batches(texts_of(user for user in range(16) if user != leaving))
    validation, test = batches(texts_of(range(16, 25))), batches(texts_of(range(25, 32)))

    def told() -> dict[str, float]:
        sets = {"user": forget, "others": retain, "unseen": test}
        seen = {name: language.membership_scores(model, data)["loss"].mean() for name, data in sets.items()}
        attack = language.language_mia(model, forget=forget, test=test)
        return {
            "loss on the user's texts": -float(seen["user"]),
            "loss on texts that it never saw": -float(seen["unseen"]),
            "perplexity on the others' texts": math.exp(-seen["others"]),
            "attack by loss, AUC (0.5 is chance)": attack["loss"],
        }

    before = told()
    result = ux.newton(model, forget, retain, validation=validation)
    after = told()

    print(result)
    print(f"{'':<40} before   after")
    for name, value in before.items():
        print(f"{name:<40} {value:6.2f}  {after[name]:6.2f}")
    return {"reached": bool(result.reached), "before": before, "after": after}


if __name__ == "__main__":
    main()
