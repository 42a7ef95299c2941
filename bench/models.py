"""Six networks in full, each with a batch maker: what the per-sample engine is raced and tested on."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp(hidden: int = 1024, inputs: int = 784, classes: int = 10) -> nn.Module:
    """Build a perceptron with two hidden layers."""
    return nn.Sequential(
        nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes)
    )


def cnn(width: int = 32, classes: int = 10) -> nn.Module:
    """Build a network of four convolutions and two linear layers for 3x32x32 images."""
    return nn.Sequential(
        *[nn.Conv2d(3, width, 3, padding=1), nn.ReLU()],
        *[nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU()],
        *[nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Flatten(), nn.Linear(128 * width, 8 * width), nn.ReLU(), nn.Linear(8 * width, classes)],
    )


class BasicBlock(nn.Module):
    """Two 3x3 convolutions around which the input passes by."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = (
            nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), nn.BatchNorm2d(width))
            if stride > 1 or channels != width
            else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


def resnet18(width: int = 64, classes: int = 10) -> nn.Module:
    """Build ResNet-18 with the 3x3 stem for 3x32x32 images; the norms hold statistics as after training."""
    blocks: list[nn.Module] = []
    channels = width
    for stage in range(4):
        for block in range(2):
            blocks.append(BasicBlock(channels, width << stage, 2 if stage and not block else 1))
            channels = width << stage
    model = nn.Sequential(
        *[nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True)],
        *blocks,
        *[nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes)],
    )
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


class InvertedResidual(nn.Module):
    """MobileNet-v2's block: a wide depthwise convolution between two narrow layers."""

    def __init__(self, channels: int, width: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.layers = nn.Sequential(
            *[nn.Conv2d(channels, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.ReLU6(inplace=True)],
            nn.Conv2d(inner, inner, 3, stride, 1, groups=inner, bias=False),
            *[nn.BatchNorm2d(inner), nn.ReLU6(inplace=True)],
            *[nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)],
        )
        self.passes_by = stride == 1 and channels == width

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.passes_by else self.layers(x)


def mobilenet(classes: int = 10) -> nn.Module:
    """Build MobileNet-v2: many parameters that are small, in layers that have little to do."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6(True)]
    channels = 32
    stages = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2)]
    for expansion, width, blocks, stride in [*stages, (6, 320, 1, 1)]:
        for block in range(blocks):
            layers.append(InvertedResidual(channels, width, 1 if block else stride, expansion))
            channels = width
    head = [nn.Conv2d(channels, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6(True)]
    return nn.Sequential(*layers, *head, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, classes))


class Attention(nn.Module):
    """Self-attention with one projection for queries, keys and values."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.heads, self.causal = heads, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A vision transformer whose class token and positions are parameters of no layer."""

    def __init__(
        self,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        patch: int = 4,
        size: int = 32,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        self.positions = nn.Parameter(torch.randn(1, 1 + (size // patch) ** 2, width) * 0.02)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=False) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        return self.head(self.norm(self.blocks(x))[:, 0])


class GPTLMHeadModel(nn.Module):
    """A decoder whose output head shares the weight of its token embedding."""

    def __init__(
        self, width: int = 256, depth: int = 4, heads: int = 4, length: int = 128, vocabulary: int = 2048
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(length, width)
        self.blocks = nn.Sequential(*(Block(width, heads, causal=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.tokens.weight, std=0.02)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.blocks(x)))


def _images(n: int, size: tuple[int, ...], classes: int = 10) -> tuple[Tensor, Tensor]:
    return torch.randn(n, *size), torch.randint(classes, (n,))


def _texts(n: int, length: int = 128, vocabulary: int = 2048) -> tuple[Tensor, Tensor]:
    text = torch.randint(vocabulary, (n, length + 1))
    return text[:, :-1], text[:, 1:]


@dataclass(frozen=True)
class Model:
    """A network and its batches.

    Attributes:
        build: Makes the network; keyword arguments make a smaller one.
        batch: Makes ``(inputs, targets)`` for a number of samples.
    """

    build: Callable[..., nn.Module]
    batch: Callable[..., tuple[Tensor, Tensor]]


MODELS = {
    "mlp": Model(mlp, lambda n, inputs=784: _images(n, (inputs,))),
    "cnn": Model(cnn, lambda n: _images(n, (3, 32, 32))),
    "resnet18": Model(resnet18, lambda n: _images(n, (3, 32, 32))),
    "mobilenet": Model(mobilenet, lambda n, size=64: _images(n, (3, size, size))),
    "vit": Model(ViT, lambda n, size=32: _images(n, (3, size, size))),
    "gpt": Model(GPTLMHeadModel, _texts),
}
