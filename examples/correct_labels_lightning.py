"""Correct wrong labels in a Lightning module: only the neurons that answer for them are trained again.

    python examples/correct_labels_lightning.py

``main`` is the job: the lines that a user writes. What a user has already is made above it: a
``LightningModule`` that was fitted on scikit-learn's digits while two thirds of the sevens were labelled as
ones. Later the labels are corrected. The module's own optimizer and ``training_step`` learn them; a callback
holds every weight that does not answer for them, bit by bit.
"""

from __future__ import annotations

import lightning.pytorch as pl
import torch
import torch.nn.functional as F
from sklearn import datasets
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, TensorDataset

import unlearn_ext as ux

RIGHT, WRONG = 7, 1


class Digits(pl.LightningModule):
    """Tells digits apart."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *[nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)]
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Compute logits.

        Args:
            pixels: ``[N, 64]``.

        Returns:
            ``[N, 10]``.
        """
        logits: Tensor = self.net(pixels)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Compute the loss.

        Args:
            batch: Pixels and labels.
            batch_idx: Not used.

        Returns:
            The mean cross entropy.
        """
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Make the optimizer.

        Returns:
            AdamW, with weight decay.
        """
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


def trainer(epochs: int, *callbacks: pl.Callback) -> pl.Trainer:
    """Make a trainer that says nothing and keeps nothing.

    Args:
        epochs: Passes over the data.
        *callbacks: What else it is to call.

    Returns:
        The trainer.
    """
    quiet = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    return pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **quiet)


def fitted(epochs: int) -> tuple[Digits, TensorDataset, TensorDataset, TensorDataset, TensorDataset]:
    """Fit a module on wrong labels.

    Args:
        epochs: Passes over the data.

    Returns:
        The module; the mislabelled samples with the right labels; the other training samples; unseen sevens;
        other unseen samples.
    """
    digits = datasets.load_digits()
    pixels, labels = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    is_seven, is_training = labels == RIGHT, torch.arange(len(labels)) < 1200
    sevens = (is_seven & is_training).nonzero().flatten()
    is_wrong = torch.zeros_like(is_seven).index_fill(0, sevens[: 2 * len(sevens) // 3], True)
    noisy = torch.where(is_wrong, WRONG, labels)[is_training]
    module = Digits()
    trainer(epochs).fit(module, DataLoader(TensorDataset(pixels[is_training], noisy), 64, shuffle=True))
    choices = (is_wrong, is_training & ~is_wrong, ~is_training & is_seven, ~is_training & ~is_seven)
    corrected, kept, unseen_sevens, unseen_others = (TensorDataset(pixels[at], labels[at]) for at in choices)
    return module, corrected, kept, unseen_sevens, unseen_others


def main(epochs: int = 12) -> dict[str, float]:
    """Correct the labels.

    Args:
        epochs: Of the training before.

    Returns:
        Accuracies by name, and the share of the weights that changed.
    """
    pl.seed_everything(0, verbose=False)
    module, corrected, kept, sevens, others = fitted(epochs)
    tests = {"unseen sevens": DataLoader(sevens, 64), "unseen others": DataLoader(others, 64)}
    figures = {f"{name}, before": ux.metrics.accuracy(module, data) for name, data in tests.items()}
    before = [p.detach().clone() for p in module.parameters()]
    scores = ux.saliency(module, DataLoader(corrected, 64), score="grad_abs")
    masks = ux.select_mask(scores, 0.2, granularity="neuron")
    callback = ux.integrations.lightning.mask_callback(masks)
    trainer(5, callback).fit(module, DataLoader(ConcatDataset([corrected, kept]), 64, shuffle=True))
    figures |= {f"{name}, after": ux.metrics.accuracy(module, data) for name, data in tests.items()}
    moved = sum(int((p != old).sum()) for p, old in zip(module.parameters(), before, strict=True))
    figures["changed"] = moved / sum(p.numel() for p in before)
    print("\n".join(f"{name:<22} {value:6.1%}" for name, value in figures.items()))
    return figures


if __name__ == "__main__":
    main()
