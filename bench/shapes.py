"""Shapes of networks, without the networks: their parameters, and single layers with their inputs."""

import math
from dataclasses import dataclass

Shape = tuple[int, ...]


def resnet18(classes: int = 10) -> list[Shape]:
    """ResNet-18 with the 3x3 stem for 32x32 images: 62 tensors, 11.17 M scalars."""
    shapes: list[Shape] = [(64, 3, 3, 3), (64,), (64,)]
    channels = 64
    for width in (64, 128, 256, 512):
        for _ in range(2):
            shapes += [(width, channels, 3, 3), (width,), (width,), (width, width, 3, 3), (width,), (width,)]
            if channels != width:
                shapes += [(width, channels, 1, 1), (width,), (width,)]
            channels = width
    return [*shapes, (classes, 512), (classes,)]


def vit_b16(classes: int = 1000) -> list[Shape]:
    """ViT-B/16 for 224x224 images: 152 tensors, 86.57 M scalars."""
    width, hidden = 768, 3072
    block: list[Shape] = [
        *[(width,), (width,)],
        *[(3 * width, width), (3 * width,), (width, width), (width,)],
        *[(width,), (width,)],
        *[(hidden, width), (hidden,), (width, hidden), (width,)],
    ]
    stem: list[Shape] = [(1, 1, width), (width, 3, 16, 16), (width,), (1, 197, width)]
    return [*stem, *block * 12, (width,), (width,), (classes, width), (classes,)]


def transformer_1b() -> list[Shape]:
    """A decoder of 16 blocks with grouped queries and tied embeddings: 146 tensors, 1.24 G scalars."""
    width, hidden, keys = 2048, 8192, 512
    block: list[Shape] = [
        *[(width, width), (keys, width), (keys, width), (width, width)],
        *[(hidden, width), (hidden, width), (width, hidden)],
        *[(width,), (width,)],
    ]
    return [(128256, width), *block * 16, (width,)]


def tiny() -> list[Shape]:
    """A few tensors, for going through the benchmarks without measuring: 38 thousand scalars."""
    return [(64, 32, 3, 3), (64,), (64,), (10, 2000), (10,)]


MODELS = {"resnet18": resnet18, "vit_b16": vit_b16, "transformer_1b": transformer_1b, "tiny": tiny}


def scalars(shapes: list[Shape]) -> int:
    """Count the scalars of all shapes together."""
    return sum(math.prod(shape) for shape in shapes)


@dataclass(frozen=True)
class Layer:
    """A linear layer, or a convolution with as much padding and stride along both sides of an image.

    Attributes:
        name: In the tables.
        samples: Batch size.
        size: Positions of a sample, or its image's height and width.
        weight: Shape of the weight.
        stride: Of a convolution.
        padding: Of a convolution.
        half: Whether it is also of interest in bfloat16.
    """

    name: str
    samples: int
    size: tuple[int, ...]
    weight: Shape
    stride: int = 1
    padding: int = 0
    half: bool = False

    @property
    def kernel(self) -> Shape:
        """Size of the kernel; empty for a linear layer."""
        return self.weight[2:]

    @property
    def inputs(self) -> Shape:
        """Shape of the input."""
        width = self.weight[1]
        return (self.samples, width, *self.size) if self.kernel else (self.samples, *self.size, width)

    @property
    def outputs(self) -> Shape:
        """Shape of the output."""
        if not self.kernel:
            return (self.samples, *self.size, self.weight[0])
        moves = [
            (s + 2 * self.padding - k) // self.stride for s, k in zip(self.size, self.kernel, strict=True)
        ]
        return (self.samples, self.weight[0], *[n + 1 for n in moves])

    @property
    def positions(self) -> int:
        """Positions of the output per sample."""
        return math.prod(self.outputs) // (self.samples * self.weight[0])

    @property
    def scalars(self) -> int:
        """Count the scalars of the weight."""
        return math.prod(self.weight)

    @property
    def operations(self) -> int:
        """Count the multiplications and additions of the weight gradient."""
        return 2 * self.samples * self.positions * self.scalars


def _resnet18_layers() -> list[Layer]:
    """One of each kind in ResNet-18 for 32x32 images, with 32 of them."""
    layers = [Layer("resnet18 stem", 32, (32, 32), (64, 3, 3, 3), padding=1)]
    channels, side = 64, 32
    for width in (64, 128, 256, 512):
        if channels != width:
            common = {"samples": 32, "size": (side, side), "stride": 2}
            layers += [
                Layer(
                    f"resnet18 {channels} to {width}, 3x3",
                    weight=(width, channels, 3, 3),
                    padding=1,
                    **common,
                ),
                Layer(f"resnet18 {channels} to {width}, 1x1", weight=(width, channels, 1, 1), **common),
            ]
            channels, side = width, side // 2
        name = f"resnet18 {width}, 3x3"
        layers.append(Layer(name, 32, (side, side), (width, width, 3, 3), padding=1, half=width == 128))
    return [*layers, Layer("resnet18 head", 32, (1,), (10, 512))]


def _transformer_layers(name: str, samples: int, positions: int) -> list[Layer]:
    """The four linear layers of a block of width 768."""
    shapes = {"qkv": (2304, 768), "projection": (768, 768), "mlp up": (3072, 768), "mlp down": (768, 3072)}
    return [
        Layer(f"{name} {part}", samples, (positions,), shape, half=part == "mlp up")
        for part, shape in shapes.items()
    ]


LAYERS = [
    # At most 4096 rows and 256 samples.
    *[
        Layer(f"768x768, T = {t}", min(256, 4096 // t), (t,), (768, 768), half=t == 64)
        for t in (1, 4, 16, 64, 256, 1024)
    ],
    *_resnet18_layers(),
    Layer("vit_b16 patches", 4, (224, 224), (768, 3, 16, 16), stride=16),
    *_transformer_layers("vit_b16", 4, 197),
    *_transformer_layers("gpt2", 2, 512),
]
