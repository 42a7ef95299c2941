"""CIFAR-10 from a file of JPEGs, and networks that learn it in minutes on two CPU cores.

The file holds ``train_jpeg`` and ``test_jpeg`` (all images back to back), ``*_offsets``, ``*_labels`` and
``classes``. Decoding needs Pillow once; the pixels, and every trained network, are kept under ``build/``.
"""

import functools
import hashlib
import io
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

CACHE = Path(__file__).parents[1] / "build" / "cifar"
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


@dataclass(frozen=True)
class Recipe:
    """What decides a training beside the data and the seed."""

    network: str = "resnet8"
    epochs: int = 16
    batch_size: int = 128
    lr: float = 0.2
    momentum: float = 0.9
    weight_decay: float = 5e-4
    smoothing: float = 0.0
    crop: int = 4
    flip: bool = True
    bf16: bool = True


CPU = Recipe()  # 84.9 % of the test set with seed 0; six minutes of one core's time
# 30 epochs of a ResNet-18: a minute or two on a GPU.
GPU = Recipe(network="resnet18", epochs=30, batch_size=512, lr=0.4)
HALF = Recipe(network="resnet18 half", epochs=20, batch_size=256)  # half an hour on a core with AVX512_BF16


def load(path: Path) -> tuple[TensorDataset, TensorDataset]:
    """Read the training and the test set.

    Args:
        path: The file of JPEGs.

    Returns:
        Images ``[3, 32, 32]``, normalised with the channels' means and deviations, and labels 0 to 9.
    """
    train, test = (_decoded(path, part) for part in ("train", "test"))
    return _normalised(*train), _normalised(*test)


def _decoded(path: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns} {part}".encode()).hexdigest()
    kept = CACHE / f"pixels-{part}-{key[:12]}.npz"
    if not kept.exists():
        with np.load(path) as archive:
            jpeg, offsets = archive[f"{part}_jpeg"].tobytes(), archive[f"{part}_offsets"]
            labels = archive[f"{part}_labels"].astype(np.int64)
        pixels = np.stack(
            [
                _image(jpeg[start:stop])
                for start, stop in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
            ]
        )
        _write(kept, lambda scratch: np.savez(scratch, pixels=pixels, labels=labels))
    with np.load(kept) as archive:
        return archive["pixels"], archive["labels"]


def _image(jpeg: bytes) -> np.ndarray:
    from PIL import Image

    with Image.open(io.BytesIO(jpeg)) as image:
        return np.asarray(image.convert("RGB"))


def _normalised(pixels: np.ndarray, labels: np.ndarray) -> TensorDataset:
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float().div_(255)
    images.sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))
    return TensorDataset(images.contiguous(), torch.from_numpy(labels))


def _write(path: Path, save: Callable[[Path], object]) -> None:
    # Renamed into place: an interrupted run leaves no half a file behind.
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{os.getpid()}-{path.name}")
    try:
        save(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def _conv(inputs: int, outputs: int, stride: int = 1, size: int = 3) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, size // 2, bias=False), nn.BatchNorm2d(outputs)
    )


class Block(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv(inputs, outputs, stride), nn.ReLU(), _conv(outputs, outputs))
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else _conv(inputs, outputs, stride, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.body(x) + self.shortcut(x))


def resnet8(width: int = 32) -> nn.Sequential:
    """Three blocks at 16x16, 8x8 and 4x4 behind a stem, 0.6 M parameters, 12 M multiplications an image."""
    return nn.Sequential(
        _conv(3, width // 2),
        nn.ReLU(),
        Block(width // 2, width, 2),
        Block(width, 2 * width, 2),
        Block(2 * width, 4 * width, 2),
        Block(4 * width, 4 * width),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def resnet18(width: int = 64) -> nn.Sequential:
    """ResNet-18 with a 3x3 stem: 11.2 M parameters, 2.8 M at half the width."""
    blocks, inputs = [], width
    for outputs, stride in ((width, 1), (2 * width, 2), (4 * width, 2), (8 * width, 2)):
        blocks += [Block(inputs, outputs, stride), Block(outputs, outputs)]
        inputs = outputs
    return nn.Sequential(
        _conv(3, width), nn.ReLU(), *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)
    )


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet8": resnet8,
    "resnet18": resnet18,
    "resnet18 half": functools.partial(resnet18, 32),
}


def make(network: str, seed: int) -> nn.Module:
    """Build a network; the global random state stays as it is."""
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return NETWORKS[network]()


def _crops(images: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    # One gather for a batch: every image's own window of the padded batch, mirrored or not.
    if pad == 0 and not flip:
        return images
    n, channels, height, width = images.shape
    rows = torch.randint(2 * pad + 1, (n, 1), generator=generator) + torch.arange(height)
    columns = torch.randint(2 * pad + 1, (n, 1), generator=generator) + torch.arange(width)
    if flip:
        mirrored = torch.rand(n, 1, generator=generator) < 0.5
        columns = torch.where(mirrored, columns.flip(1), columns)
    rows, columns = rows.to(images.device), columns.to(images.device)
    padded = F.pad(images, (pad,) * 4, mode="reflect")
    index = (rows[:, :, None] * (width + 2 * pad) + columns[:, None, :]).view(n, 1, -1)
    return padded.flatten(2).gather(2, index.expand(-1, channels, -1)).view(images.shape)


def _batches(
    data: TensorDataset, recipe: Recipe, generator: torch.Generator
) -> Iterator[tuple[Tensor, Tensor]]:
    images, labels = data.tensors
    order = torch.randperm(len(labels), generator=generator).to(images.device)
    for index in order.split(recipe.batch_size):
        if len(index) > 1:
            yield _crops(images[index], recipe.crop, recipe.flip, generator), labels[index]


def train(
    data: TensorDataset,
    recipe: Recipe,
    seed: int,
    *,
    say: Callable[[str], object] | None = None,
    progress: Path | None = None,
) -> nn.Module:
    """Train from scratch: SGD with Nesterov momentum, one cycle, crops and flips.

    Args:
        data: Training samples, on the device to train on.
        recipe: What decides the training.
        seed: Decides weights, order, crops and flips.
        say: What to do with a line per epoch.
        progress: Where every epoch's state goes; training continues from there, with the same bits.

    Returns:
        The network in eval mode.
    """
    device = data.tensors[0].device
    model = make(recipe.network, seed).to(device, memory_format=torch.channels_last).train()
    generator = torch.Generator().manual_seed(seed)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, recipe.lr, recipe.momentum, nesterov=True)
    steps = recipe.epochs * -(-len(data) // recipe.batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        recipe.lr,
        total_steps=steps,
        pct_start=0.25,
        anneal_strategy="linear",
        cycle_momentum=False,
    )
    start, first = time.perf_counter(), 0
    stateful = {"model": model, "optimizer": optimizer, "schedule": schedule}
    if progress is not None and progress.exists():
        kept = torch.load(progress, map_location=device)
        for name, part in stateful.items():
            part.load_state_dict(kept[name])
        generator.set_state(kept["generator"].cpu())
        first = kept["epochs"]
    for epoch in range(first, recipe.epochs):
        losses = []
        for images, labels in _batches(data, recipe, generator):
            optimizer.zero_grad()
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.bf16):
                scores = model(images.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(scores.float(), labels, label_smoothing=recipe.smoothing)
            loss.backward()
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        if say is not None:
            mean = float(torch.stack(losses).mean())
            say(f"epoch {epoch + 1}: loss {mean:.3f}, {time.perf_counter() - start:.0f} s")
        if progress is not None:
            state = {name: part.state_dict() for name, part in stateful.items()}
            state |= {"generator": generator.get_state(), "epochs": epoch + 1}
            _write(progress, functools.partial(torch.save, state))
    return model.to(memory_format=torch.contiguous_format).eval()


def trained(
    data: TensorDataset, recipe: Recipe, seed: int, *, say: Callable[[str], object] | None = None
) -> tuple[nn.Module, float]:
    """Train, or take the network that an earlier run has trained.

    Args:
        data: Training samples.
        recipe: What decides the training.
        seed: Likewise.
        say: What to do with a line per epoch.

    Returns:
        The network in eval mode on the data's device, channels last, and the seconds its training took.
    """
    name, facts = f"{recipe.network}-{seed}", asdict(recipe)
    progress = _kept_at(name, facts, data).with_suffix(".progress")
    network, seconds = checkpoint(
        name,
        facts,
        data,
        lambda: make(recipe.network, seed),
        lambda: train(data, recipe, seed, say=say, progress=progress),
    )
    progress.unlink(missing_ok=True)
    return network.to(memory_format=torch.channels_last), seconds


def _kept_at(name: str, facts: dict[str, object], data: TensorDataset) -> Path:
    images, labels = data.tensors
    key = hashlib.sha256(json.dumps([name, facts, list(images.shape)], sort_keys=True).encode())
    key.update(labels.cpu().numpy().tobytes())
    # One pixel of each image tells any two selections or orders of them apart.
    key.update(images[:, 0, images.shape[2] // 2, images.shape[3] // 2].cpu().numpy().tobytes())
    return CACHE / f"{name}-{key.hexdigest()[:12]}.pt".replace(" ", "-")


def checkpoint(
    name: str,
    facts: dict[str, object],
    data: TensorDataset,
    build: Callable[[], nn.Module],
    learn: Callable[[], nn.Module],
) -> tuple[nn.Module, float]:
    """Take what ``learn`` returned in an earlier run, or call it.

    Args:
        name: Beginning of the file's name: what was trained, and its seed.
        facts: What else decided the training.
        data: What it was trained on; samples and labels are part of the key.
        build: Makes a network of the same shape.
        learn: Makes a network and trains it.

    Returns:
        The network in eval mode on the data's device, and the seconds its training took.
    """
    path = _kept_at(name, facts, data)
    if not path.exists():
        start = time.perf_counter()
        state = learn().state_dict()
        seconds = time.perf_counter() - start
        _write(path, lambda scratch: torch.save({"state": state, "seconds": seconds}, scratch))
    kept = torch.load(path, map_location=data.tensors[0].device)
    model = build().to(data.tensors[0].device)
    model.load_state_dict(kept["state"])
    return model.eval(), kept["seconds"]
