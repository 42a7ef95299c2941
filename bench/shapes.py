"""Parameter shapes of three networks, without the networks: what an op over lists of tensors sees of them."""

import math

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


MODELS = {"resnet18": resnet18, "vit_b16": vit_b16, "transformer_1b": transformer_1b}


def scalars(shapes: list[Shape]) -> int:
    """Count the scalars of all shapes together."""
    return sum(math.prod(shape) for shape in shapes)
