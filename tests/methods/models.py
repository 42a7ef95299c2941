"""Small networks of the usual families, each with a forget and a retain set."""

import torch
import torch.nn.functional as F
from torch import nn


class Residual(nn.Module):
    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class ResNet(nn.Sequential):
    def __init__(self, classes=4):
        super().__init__(
            nn.Conv2d(3, 6, 3, padding=1, bias=False),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            Residual(6, 6, 1),
            Residual(6, 8, 2),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, classes),
        )


class ViT(nn.Module):
    """As in torchvision: fused attention, a class token and position embeddings that are bare parameters."""

    def __init__(self, classes=4, width=12):
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 5, width))
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 16, 0.1, batch_first=True, norm_first=True) for _ in range(2)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, x):
        x = self.patches(x).flatten(2).mT
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class GptBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x):
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GptForCausalLM(nn.Module):
    """Called with keywords, as Hugging Face models are; the head is tied to the embedding."""

    def __init__(self, tokens=20, width=12):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(tokens, width), nn.Embedding(8, width)
        self.drop = nn.Dropout(0.1)
        self.blocks = nn.ModuleList(GptBlock(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.lm_head = nn.Linear(width, tokens, bias=False)
        self.lm_head.weight = self.wte.weight

    def forward(self, input_ids):
        x = self.drop(self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1])))
        for block in self.blocks:
            x = block(x)
        return {"logits": self.lm_head(self.norm(x))}


class Lstm(nn.Module):
    def __init__(self, tokens=20, width=8, classes=4):
        super().__init__()
        self.embedding = nn.Embedding(tokens, width)
        self.lstm = nn.LSTM(width, width, batch_first=True)
        self.head = nn.Linear(width, classes)

    def forward(self, ids):
        return self.head(self.lstm(self.embedding(ids))[0][:, -1])


def _images():
    x, y = torch.randn(24, 3, 8, 8), torch.arange(24) % 4
    return [(x[y == 0], y[y == 0])], [(x[y > 0][:9], y[y > 0][:9]), (x[y > 0][9:], y[y > 0][9:])]


def _sentences():
    ids, labels = torch.randint(0, 15, (24, 6)), torch.arange(24) % 4
    ids[labels == 0] += 5  # tokens 15 to 19 are in the forget set only
    return ids, labels


def _classified_sentences():
    ids, y = _sentences()
    return [(ids[y == 0], y[y == 0])], [(ids[y > 0], y[y > 0])]


def _language():
    ids, y = _sentences()
    return tuple([{"input_ids": ids[part], "labels": ids[part]}] for part in (y == 0, y > 0))


_FAMILIES = {
    "resnet": (ResNet, _images),
    "vit": (ViT, _images),
    "gpt": (GptForCausalLM, _language),
    "lstm": (Lstm, _classified_sentences),
}
FAMILIES = tuple(_FAMILIES)


def make(family, seed=0):
    """Return a fresh model in train mode with its forget and retain sets; 6 and 18 samples."""
    make_model, make_data = _FAMILIES[family]
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return (make_model(), *make_data())
