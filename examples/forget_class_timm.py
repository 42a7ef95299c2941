"""Make an image model of timm forget a class.

    python examples/forget_class_timm.py

``main`` is the job: the lines that a user writes. What a user has already, a trained model and its data, is
made above it: timm's small ``test_resnet`` on scikit-learn's digits, enlarged to 32 pixels.
"""

from __future__ import annotations

import timm
import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import unlearn_ext as ux

Images = TensorDataset


def digits() -> tuple[Images, Images]:
    """Load handwritten digits.

    Returns:
        1000 training images and 397 unseen ones, ``[1, 32, 32]``, with their classes.
    """
    found = datasets.load_digits()
    pixels = F.interpolate(torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, size=(32, 32))
    labels = torch.tensor(found.target)
    return TensorDataset(pixels[:1000], labels[:1000]), TensorDataset(pixels[1400:], labels[1400:])


def trained(train: Images, epochs: int) -> nn.Module:
    """Train a model of timm.

    Args:
        train: The images.
        epochs: Passes over them.

    Returns:
        The model.
    """
    model = timm.create_model("test_resnet", num_classes=10, in_chans=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for _ in range(epochs):
        for pixels, labels in DataLoader(train, 64, shuffle=True):
            optimizer.zero_grad()
            F.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
    return model.eval()


def main(forgotten: int = 3, epochs: int = 3) -> dict[str, float]:
    """Forget one digit.

    Args:
        forgotten: Which.
        epochs: Of the training before.

    Returns:
        Accuracies on unseen images by name.
    """
    torch.manual_seed(0)
    train, test = digits()
    model = trained(train, epochs)
    forget, retain = (DataLoader(part, 64) for part in ux.data.split(train, classes=[forgotten]))
    unseen = [DataLoader(part, 64) for part in ux.data.split(test, classes=[forgotten])]
    before = [ux.metrics.accuracy(model, part) for part in unseen]
    result = ux.ssd(model, forget, retain)
    after = [ux.metrics.accuracy(model, part) for part in unseen]
    print(f"digit {forgotten}: {before[0]:.1%} -> {after[0]:.1%}, others: {before[1]:.1%} -> {after[1]:.1%}")
    print("forgotten" if result.reached else "refused", f"by changing {result.changed:.1%} of the weights")
    return dict(zip(("before", "others, before", "after", "others, after"), before + after, strict=True))


if __name__ == "__main__":
    main()
