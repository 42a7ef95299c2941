"""Networks of many kinds that learn digits in seconds, for benchmarks that run over all of them."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from unlearn_ext.demo import make_model

BATCH = 64


def _convolution(inputs: int, outputs: int, norm: Callable[[int], nn.Module]) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), norm(outputs), nn.ReLU()]


class _Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return F.relu(inner + self.shortcut(x))


class _Transformer(nn.Module):
    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.positions = nn.Parameter(torch.randn(16, width) * 0.1)
        layer = nn.TransformerEncoderLayer(
            width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, 2, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.positions
        return self.head(self.blocks(tokens).mean(1))


def _vgg() -> nn.Module:
    block = functools.partial(_convolution, norm=nn.BatchNorm2d)
    features = [*block(1, 16), *block(16, 32), nn.MaxPool2d(2), *block(32, 64), nn.MaxPool2d(2)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 10))


def _group_norm() -> nn.Module:
    block = functools.partial(_convolution, norm=functools.partial(nn.GroupNorm, 4))
    features = [*block(1, 24), nn.MaxPool2d(2), *block(24, 48), nn.AdaptiveAvgPool2d(1)]
    return nn.Sequential(*features, nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10))


def _tanh() -> nn.Module:
    layers = [nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10)]
    return nn.Sequential(nn.Flatten(), *layers)


def _resnet() -> nn.Module:
    stem = _convolution(1, 16, nn.BatchNorm2d)
    body = [_Residual(16, 32), _Residual(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*stem, *body)


class _RowLstm(nn.Module):
    """Reads an image row by row."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x[:, 0])[0][:, -1])


class _MixerBlock(nn.Module):
    def __init__(self, tokens: int, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.across = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.within = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.across(self.norm1(x).mT).mT
        return x + self.within(self.norm2(x))


class _Mixer(nn.Module):
    """MLP-Mixer over patches of 2 x 2."""

    def __init__(self, width: int = 48) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, 2)
        self.blocks = nn.Sequential(_MixerBlock(16, width), _MixerBlock(16, width))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(self.patches(x).flatten(2).mT)).mean(1))


def _depthwise() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        return [depthwise, nn.BatchNorm2d(inputs), nn.SiLU(), pointwise, nn.BatchNorm2d(outputs), nn.SiLU()]

    stem = [nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.SiLU()]
    body = [*block(24, 48), nn.MaxPool2d(2), *block(48, 96), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*stem, *body, nn.Linear(96, 10))


def _dropout() -> nn.Module:
    hidden = [nn.Linear(64, 512), nn.ReLU(), nn.Dropout(0.3), nn.Linear(512, 128), nn.ReLU(), nn.Dropout(0.3)]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(128, 10))


class Recipe(NamedTuple):
    """How a network is made and trained.

    Attributes:
        make: Makes it.
        epochs: Of training.
        smoothing: Label smoothing.
    """

    make: Callable[[], nn.Module]
    epochs: int
    smoothing: float = 0.0


NETWORKS: dict[str, Recipe] = {
    "demo": Recipe(lambda: make_model(0), 10),
    "VGG-like": Recipe(_vgg, 10),
    "GroupNorm CNN": Recipe(_group_norm, 20),
    "ResNet": Recipe(_resnet, 10),
    "ViT": Recipe(_Transformer, 20),
    "tanh MLP": Recipe(_tanh, 30),
}

# No setting of any method was ever chosen by a look at these.
UNTUNED: dict[str, Recipe] = {
    "row LSTM": Recipe(_RowLstm, 30),
    "MLP-Mixer": Recipe(_Mixer, 20),
    "depthwise CNN, label smoothing": Recipe(_depthwise, 15, 0.1),
    "MLP with dropout": Recipe(_dropout, 30),
}


def trained(name: str, seed: int, data: TensorDataset) -> nn.Module:
    """Train a network; the model is in eval mode then."""
    make, epochs, smoothing = (NETWORKS | UNTUNED)[name]
    torch.manual_seed(seed)
    model = make()
    loader = DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y, label_smoothing=smoothing).backward()
            optimizer.step()
            schedule.step()
    return model.eval()
