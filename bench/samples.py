"""Random samples learnt by heart, forgotten by every method, held against networks retrained without them.

``python -m bench.samples --data cifar10_jpeg.npz`` writes ``bench/results/methods/samples.md`` and
``samples.json``. Two problems:

    cifar    200 of the first 2,000 training images of CIFAR-10, at 16 x 16; 500 more are validation
    labels   150 of the 1,347 training digits, a fifth of all labels wrong; 150 of the rest are validation

Networks are trained until they know their training set by heart. A second network retrained with another seed
shows how near to a retrained network anything can come.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bench import cifar
from unlearn_ext import demo

BATCH = 64
RETRAINED, FLOOR = 100, 200  # added to a request's seed: seeds of the networks it is held against


def network(channels: int) -> nn.Sequential:
    """Three convolutions with BatchNorm and two linear layers, for images of 8 x 8 or more."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(channels, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


@dataclass(frozen=True)
class Problem:
    """What is learnt, and by what.

    Attributes:
        name: Its name.
        train: The training set.
        validation: Samples for methods to compare with; never trained on.
        test: Samples to judge by.
        n_forget: How many samples are forgotten.
        epochs: Until the training set is known by heart.
        make: Builds a network.
    """

    name: str
    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    n_forget: int
    epochs: int
    make: Callable[[], nn.Module]

    def forgotten(self, seed: int) -> Tensor:
        """Mark the samples that a request forgets."""
        n = len(self.train)
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: self.n_forget]
        return torch.zeros(n, dtype=torch.bool).index_fill_(0, chosen, True)

    def learnt(self, data: TensorDataset, seed: int) -> tuple[nn.Module, float]:
        """Train a network on some of the samples, or take the one of an earlier run, with its seconds."""

        def build() -> nn.Module:
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                return self.make()

        return cifar.checkpoint(
            f"samples-{self.name}-{seed}",
            {"epochs": self.epochs, "batch": BATCH, "seed": seed},
            data,
            build,
            lambda: train(build(), data, self.epochs, seed),
        )


def train(model: nn.Module, data: TensorDataset, epochs: int, seed: int) -> nn.Module:
    """AdamW and one learning-rate cycle, without augmentation."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data.tensors
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    steps = -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def subset_of_cifar(path: Path) -> Problem:
    """The first images of CIFAR-10, every 2 x 2 pixels averaged."""
    known, unseen = cifar.load(path)

    def part(data: TensorDataset, start: int, stop: int) -> TensorDataset:
        x, y = (tensor[start:stop] for tensor in data.tensors)
        return TensorDataset(F.avg_pool2d(x, 2), y)

    sets = part(known, 0, 2000), part(known, 2000, 2500), part(unseen, 0, 2000)
    return Problem("cifar", *sets, n_forget=200, epochs=30, make=functools.partial(network, 3))


def wrong_labels() -> Problem:
    """Digits, a fifth of the labels of every set replaced by wrong ones."""
    known, unseen = demo.load_digits()

    def noisy(data: TensorDataset, seed: int) -> TensorDataset:
        x, y = data.tensors
        generator = torch.Generator().manual_seed(seed)
        wrong = torch.randperm(len(y), generator=generator)[: len(y) // 5]
        y = y.clone()
        y[wrong] = (y[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
        return TensorDataset(x, y)

    held = noisy(unseen, 1001).tensors
    sets = (TensorDataset(*(t[:150] for t in held)), TensorDataset(*(t[150:] for t in held)))
    return Problem("labels", noisy(known, 1000), *sets, n_forget=150, epochs=40, make=functools.partial(network, 1))
