"""Networks of other libraries' kinds: dense blocks, inverted residuals, a switch with a capacity."""

import pytest
import torch
import torch.nn.functional as F
from oracle import assert_exact, assert_right, errors, one_by_one
from torch import nn

from unlearn_ext import fisher_diagonal

CLASSES = 3


def labels(n):
    return torch.randint(CLASSES, (n,))


def norms_as_if_trained(model):
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.eval()


class DenseLayer(nn.Module):
    def __init__(self, inputs, growth):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, maps):
        bottleneck = self.conv1(F.relu(self.norm1(torch.cat(maps, 1))))
        return self.conv2(F.relu(self.norm2(bottleneck)))


class DenseNet(nn.Module):
    """Every layer of a block sees all before it, in lists that are concatenated again and again."""

    def __init__(self, blocks=(3, 6, 4), growth=8):
        super().__init__()
        width = 2 * growth
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, 1),
        )  # fmt: skip
        self.blocks, self.transitions = nn.ModuleList(), nn.ModuleList()
        for index, depth in enumerate(blocks):
            self.blocks.append(nn.ModuleList(DenseLayer(width + i * growth, growth) for i in range(depth)))
            width += depth * growth
            if index + 1 < len(blocks):
                conv = nn.Conv2d(width, width // 2, 1, bias=False)
                self.transitions.append(
                    nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(inplace=True), conv, nn.AvgPool2d(2))
                )
                width //= 2
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        for index, block in enumerate(self.blocks):
            maps = [x]
            for layer in block:
                maps.append(layer(maps))
            x = torch.cat(maps, 1)
            if index < len(self.transitions):
                x = self.transitions[index](x)
        x = F.relu(self.norm(x), inplace=True)
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float64, 1e-11)])
def test_dense_blocks(dtype, tolerance):
    torch.manual_seed(0)
    model = norms_as_if_trained(DenseNet()).to(dtype)
    batches = [(torch.randn(2, 3, 32, 32, dtype=dtype), labels(2)) for _ in range(2)]
    assert_right(model, batches, tolerance=tolerance, fused=True)


class InvertedResidual(nn.Module):
    def __init__(self, inputs, outputs, stride, expansion):
        super().__init__()
        hidden = inputs * expansion
        self.is_residual = stride == 1 and inputs == outputs
        self.body = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden), nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs),
        )  # fmt: skip

    def forward(self, x):
        return x + self.body(x) if self.is_residual else self.body(x)


def test_inverted_residuals():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(inplace=True),
        InvertedResidual(8, 8, 1, 2), InvertedResidual(8, 12, 2, 4), InvertedResidual(12, 12, 1, 4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(12, CLASSES),
    )  # fmt: skip
    assert_exact(norms_as_if_trained(model), (torch.randn(6, 3, 16, 16), labels(6)), size=3)


@pytest.mark.parametrize("capacity", [64, 3])
def test_switch_transformers(capacity):
    """Tokens of all samples compete for the experts' room; only a small capacity shows it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.SwitchTransformersConfig(
        vocab_size=32, d_model=8, d_kv=4, d_ff=16, num_heads=2, num_experts=3, expert_capacity=capacity,
        num_layers=2, num_sparse_encoder_layers=1, router_jitter_noise=0.0, dropout_rate=0.0,
    )  # fmt: skip

    class Classifier(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = transformers.SwitchTransformersEncoderModel(config)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, tokens):
            return self.head(self.encoder(input_ids=tokens).last_hidden_state.mean(1))

    model = Classifier().double().eval()
    # Initialised as for training from scratch, all experts say nearly nothing.
    for name, parameter in model.named_parameters():
        if "norm" not in name:
            nn.init.normal_(parameter, std=0.5)
    batches = [(torch.randint(32, (4, 5)), labels(4)) for _ in range(3)]
    parts = [one_by_one(model, batch) for batch in batches]
    expected = {name: sum(part[name] for part in parts) / 3 for name in parts[0]}
    found = fisher_diagonal(model, batches)
    assert max(errors(found, expected).values()) <= 1e-9, found.coverage
