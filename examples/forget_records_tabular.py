"""Make a classifier of table rows forget single records.

    python examples/forget_records_tabular.py

``main`` is the job: the lines that a user writes. What a user has already, a trained model and its data, is
made above it: a network that says from ten measurements of scikit-learn's breast cancer data (the columns of
standard errors, from which unseen patients are told wrongly now and then) whether a tumour is benign, and
that knows its training records by heart. Forgotten records are answered like those of unseen patients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from sklearn import datasets, preprocessing
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import unlearn_ext as ux


def patients() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Load the table.

    Returns:
        340 records for training, 100 for validation and 129 for tests: ten columns, and 0 or 1.
    """
    table = datasets.load_breast_cancer()
    columns = preprocessing.StandardScaler().fit_transform(table.data[:, 10:20])
    order = torch.randperm(len(columns))
    rows, labels = torch.tensor(columns).float()[order], torch.tensor(table.target).float()[order]
    parts = (slice(0, 340), slice(340, 440), slice(440, None))
    train, validation, test = (TensorDataset(rows[part], labels[part]) for part in parts)
    return train, validation, test


def trained(train: TensorDataset, epochs: int) -> nn.Module:
    """Train a network with one logit.

    Args:
        train: The records.
        epochs: Passes over them.

    Returns:
        The network.
    """
    model = nn.Sequential(
        *[nn.Linear(10, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 1)],
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for rows, labels in DataLoader(train, 64, shuffle=True):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(model(rows)[:, 0], labels).backward()
            optimizer.step()
    return model


def main(n: int = 40, epochs: int = 200) -> dict[str, float]:
    """Forget the records of some patients.

    Args:
        n: How many.
        epochs: Of the training before.

    Returns:
        Accuracies by name.
    """
    torch.manual_seed(0)
    train, validation, test = patients()
    model, task = trained(train, epochs), ux.tasks.Binary()
    forget, retain = (DataLoader(part, 64) for part in ux.data.split(train, ids=range(n)))
    sets = {"forgotten": forget, "kept": retain, "unseen": DataLoader(test, 64)}
    figures = {f"{name}, before": ux.metrics.accuracy(model, sets[name], task=task) for name in sets}
    result = ux.newton(model, forget, retain, validation=DataLoader(validation, 64), task=task)
    figures |= {f"{name}, after": ux.metrics.accuracy(model, sets[name], task=task) for name in sets}
    for name, value in figures.items():
        print(f"{name:<18} {value:.1%}")
    print("reached" if result.reached else "refused: the model is as it was")
    return {**figures, "reached": bool(result.reached)}


if __name__ == "__main__":
    main()
