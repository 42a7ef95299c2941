"""Make a residual network forget one class, and measure against a network that never saw it.

    python examples/unlearn_class_resnet.py

The network and the data (scikit-learn's digits) are small so that this runs in a minute; a torchvision
``resnet18`` and a ``DataLoader`` of yours go in the same places.
"""

from __future__ import annotations

import argparse
import copy

import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import unlearn_ext as ux


class Block(nn.Module):
    """Two convolutions with BatchNorm, and a way around them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.way = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.way = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block.

        Args:
            x: ``[N, inputs, H, W]``.

        Returns:
            ``[N, outputs, H / stride, W / stride]``.
        """
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.way(x))


def make_model() -> nn.Sequential:
    """Build the network.

    Returns:
        A ResNet of three blocks for images of 8 x 8 pixels.
    """
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, 1, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16, 16, 1),
        Block(16, 32, 2),
        Block(32, 64, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def train(model: nn.Module, data: DataLoader[tuple[Tensor, ...]], epochs: int = 8) -> None:
    """Train in place.

    Args:
        model: The network.
        data: Batches of images and labels.
        epochs: Passes over them.
    """
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for images, labels in data:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()
    model.eval()


def load() -> tuple[TensorDataset, TensorDataset]:
    """Read the digits.

    Returns:
        Training and test set.
    """
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    return TensorDataset(images[:1200], labels[:1200]), TensorDataset(images[1200:], labels[1200:])


def main(label: int = 3, epochs: int = 8, page: str | None = None) -> ux.Comparison:
    """Train, forget, retrain, compare.

    Args:
        label: The class to forget.
        epochs: For both trainings.
        page: HTML file to write.

    Returns:
        The comparison.
    """
    torch.manual_seed(0)
    train_set, test_set = load()
    model = make_model()
    train(model, DataLoader(train_set, 64, shuffle=True), epochs)

    forget, retain = ux.data.split(train_set, classes=label)
    forget_data, retain_data = DataLoader(forget, 64), DataLoader(retain, 64, shuffle=True)

    # One method, in place, on a copy that can go into production:
    unlearned = copy.deepcopy(model)
    plan = ux.plan_ssd(unlearned, forget_data, retain_data)
    print(plan.summary())
    print(plan.apply())
    plan.purge()  # importances and undo journal derive from the forget data

    # Several, beside retraining:
    comparison = ux.compare(
        model,
        forget_data,
        retain_data,
        DataLoader(test_set, 256),
        methods=["ssd", "unsir", "gradient_masking"],
        make_model=make_model,
        train=lambda fresh, data: train(fresh, data, epochs),
    )
    print(comparison.to_markdown())
    if page is not None:
        comparison.to_html(page, title=f"A residual network forgets class {label}")
    return comparison


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--label", type=int, default=3)
    parser.add_argument("--page", default="resnet.html")
    options = parser.parse_args()
    main(options.label, page=options.page)
