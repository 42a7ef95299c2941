"""Correct mislabelled training samples: only the neurons that answer for them are trained again.

    python examples/correct_labels.py

Some samples of one class of scikit-learn's digits get the label of another before training, as a careless
annotator would have given it. Later the labels are corrected. Gradient masking finds the neurons that matter
for the corrected samples and trains them alone; every other weight keeps its bits.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import unlearn_ext as ux

RIGHT, WRONG = 7, 1


def train(model: nn.Module, data: DataLoader[tuple[Tensor, ...]], epochs: int) -> None:
    """Train in place.

    Args:
        model: The network.
        data: Batches of pixels and labels.
        epochs: Passes over them.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for pixels, labels in data:
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()


def main(epochs: int = 20) -> dict[str, float]:
    """Train on wrong labels, correct, measure.

    Args:
        epochs: Of the first training.

    Returns:
        Accuracies by name.
    """
    torch.manual_seed(0)
    digits = datasets.load_digits()
    pixels = torch.tensor(digits.data, dtype=torch.float32) / 16
    truth = torch.tensor(digits.target)
    train_x, train_y, test_x, test_y = pixels[:1200], truth[:1200], pixels[1200:], truth[1200:]

    # Two thirds of the sevens were labelled as ones.
    sevens = (train_y == RIGHT).nonzero().flatten()
    mislabelled = sevens[: 2 * len(sevens) // 3]
    labels = train_y.clone()
    labels[mislabelled] = WRONG
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    train(model, DataLoader(TensorDataset(train_x, labels), 64, shuffle=True), epochs)

    # The correction: the samples in question with the labels they should have had.
    corrected = DataLoader(TensorDataset(train_x[mislabelled], train_y[mislabelled]), 32)
    kept = torch.ones(len(train_y), dtype=torch.bool)
    kept[mislabelled] = False
    retain = DataLoader(TensorDataset(train_x[kept], train_y[kept]), 64)
    is_seven = test_y == RIGHT
    tests = {
        "unseen sevens": [(test_x[is_seven], test_y[is_seven])],
        "unseen others": [(test_x[~is_seven], test_y[~is_seven])],
    }
    figures = {f"{name}, before": ux.metrics.accuracy(model, data) for name, data in tests.items()}
    before = copy.deepcopy(model)
    result = ux.gradient_masking(
        model,
        corrected,
        retain,
        objective="relabel",
        score="grad_abs",
        density=0.2,
        generator=torch.Generator().manual_seed(0),
    )
    figures |= {f"{name}, after": ux.metrics.accuracy(model, data) for name, data in tests.items()}
    figures["changed"] = result.changed
    for name, value in figures.items():
        print(f"{name:<22} {value:6.1%}")
    moved = ux.metrics.layer_distance(model, before)
    print("moved:", ", ".join(f"{name} {distance:.1%}" for name, distance in moved.items()))
    return figures


if __name__ == "__main__":
    main()
