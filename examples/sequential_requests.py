"""Serve one request to forget after another, without the training set at hand.

    python examples/sequential_requests.py

After training, the importances on the full training set are stored: one number per weight. A request then
needs the data to be forgotten, and nothing else. What has been forgotten is taken out of the stored
importances, so that the next request starts from those of what is left.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader

import unlearn_ext as ux
from unlearn_ext import demo, report


def main(
    requests: tuple[int, ...] = (3, 8), epochs: int = 10, folder: Path | None = None
) -> list[dict[str, float]]:
    """Train, store, forget class after class.

    Args:
        requests: The classes in the order in which they are to be forgotten.
        epochs: Of the training.
        folder: Where importances and records are kept; a temporary one by default.

    Returns:
        Accuracies after each request.
    """
    if folder is None:
        with tempfile.TemporaryDirectory() as made:
            return main(requests, epochs, Path(made))
    train_set, test_set = demo.load_digits()
    model, _ = demo.train(train_set, epochs=epochs, seed=0)
    stored = folder / "importances.safetensors"
    # Those of the log-odds serve the closed loop of SSD best.
    ux.fisher_diagonal(model, DataLoader(train_set, 64), loss_fn=ux.losses.log_odds).save(stored)

    history = []
    labels = train_set.tensors[1]
    for number, label in enumerate(requests):
        forget, _ = ux.data.split(train_set, classes=label)
        data = DataLoader(forget, 64)
        before = report.weights_digest(model)
        full = ux.Importance.load(stored)
        full.weights_digest = None  # of the weights before the first request, which is meant here
        plan = ux.plan_ssd(model, data, importance=full)
        part = plan.importance_forget
        result = plan.apply()

        # The importances without the forgotten part, for the next request. They were measured on the weights
        # from before; measure anew now and then, where there is data to do it with.
        (full - part).save(stored)
        record = ux.report.evidence(
            result,
            model=model,
            before=before,
            forget_ids=(labels == label).nonzero().flatten(),
            derived={"importances on the forget set": dict(part)},
        )
        record.purge()
        record.to_json(folder / f"request_{number}.json")

        gone = list(requests[: number + 1])
        figures = {}
        for name, classes in (("forgotten", gone), ("kept", [c for c in range(10) if c not in gone])):
            chosen, _ = ux.data.split(test_set, classes=classes)
            figures[name] = ux.metrics.accuracy(model, DataLoader(chosen, 256))
        history.append(figures)
        print(
            f"request {number + 1}: class {label}: {result}; unseen samples of forgotten classes "
            f"{figures['forgotten']:.1%}, of kept classes {figures['kept']:.1%}"
        )
    return history


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
