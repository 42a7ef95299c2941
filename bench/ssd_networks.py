"""How far SSD's settings carry: every class of digits forgotten in networks of many kinds.

``python -m bench.ssd_networks`` (minutes on one core) writes ``bench/results/methods/ssd-networks.md``. A
request passes if the class's test accuracy falls to 5 % or less and no more than 3 points of accuracy on the
retained training samples are lost.
"""

import argparse
import copy
import functools
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from unlearn_ext import metrics
from unlearn_ext.demo import load_digits, make_model
from unlearn_ext.fisher.diagonal import fisher_diagonal
from unlearn_ext.fisher.importance import Importance
from unlearn_ext.importance import LossFn
from unlearn_ext.methods import plan_ssd
from unlearn_ext.tasks import losses

RESULT = Path(__file__).parent / "results" / "methods" / "ssd-networks.md"
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


# Network -> how to make it, and epochs of training.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "demo": (lambda: make_model(0), 10),
    "VGG-like": (_vgg, 10),
    "GroupNorm CNN": (_group_norm, 20),
    "ResNet": (_resnet, 10),
    "ViT": (_Transformer, 20),
    "tanh MLP": (_tanh, 30),
}

# Setting -> loss of the importances, estimator, and what plan_ssd is told.
SETTINGS: dict[str, tuple[LossFn, str, dict[str, object]]] = {
    "defaults": (losses.cross_entropy, "per_sample", {}),
    "lambda 1": (losses.cross_entropy, "per_sample", {"lambda_": 1.0}),
    "`losses.log_odds`": (losses.log_odds, "per_sample", {}),
    "`losses.log_odds`, lambda 1": (losses.log_odds, "per_sample", {"lambda_": 1.0}),
    f"batches of {BATCH}, alpha 10, lambda 1 (published)": (
        losses.cross_entropy,
        "batch",
        {"alpha": 10.0, "lambda_": 1.0, "estimator": "batch"},
    ),
    f"batches of {BATCH}, lambda 1": (
        losses.cross_entropy,
        "batch",
        {"lambda_": 1.0, "estimator": "batch"},
    ),
}


def trained(name: str, seed: int, data: TensorDataset) -> nn.Module:
    """Train a network on all of digits' training samples."""
    make, epochs = NETWORKS[name]
    torch.manual_seed(seed)
    model = make()
    loader = DataLoader(data, BATCH, shuffle=True, generator=torch.Generator().manual_seed(seed))
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=1e-2)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def outcomes(
    model: nn.Module, train: TensorDataset, test: TensorDataset
) -> dict[str, list[tuple[float, float]]]:
    """Forget every class with every setting: test accuracy left on it, and points of retain accuracy lost."""

    def batches(data: TensorDataset, keep: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
        x, y = (tensor[keep(data.tensors[1])] for tensor in data.tensors)
        return list(zip(x.split(BATCH), y.split(BATCH), strict=True))

    found: dict[str, list[tuple[float, float]]] = {name: [] for name in SETTINGS}
    for digit in range(10):
        forget, retain = batches(train, lambda y, c=digit: y == c), batches(train, lambda y, c=digit: y != c)
        unseen = batches(test, lambda y, c=digit: y == c)
        before = metrics.accuracy(model, retain)
        known: dict[tuple[LossFn, str], tuple[Importance, Importance]] = {}
        for name, (loss_fn, estimator, settings) in SETTINGS.items():
            key = (loss_fn, estimator)
            if key not in known:
                measure = functools.partial(fisher_diagonal, model, loss_fn=loss_fn, estimator=estimator)
                known[key] = measure(forget), measure(retain)
            own = copy.deepcopy(model)
            plan_ssd(own, *known[key], **settings).apply()
            lost = before - metrics.accuracy(own, retain)
            found[name].append((metrics.accuracy(own, unseen), 100 * lost))
    return found


def table(found: dict[str, dict[str, list[tuple[float, float]]]]) -> str:
    """Count the requests that pass, per setting and network."""

    def passed(results: list[tuple[float, float]]) -> int:
        return sum(left <= 0.05 and lost <= 3 for left, lost in results)

    rows = [["importances and settings", *found, "all", "forgot", "kept", "worst loss, points"]]
    rows.append(["---"] * len(rows[0]))
    for name in SETTINGS:
        every = [result for network in found.values() for result in network[name]]
        rows.append(
            [
                name,
                *(f"{passed(network[name])} / {len(network[name])}" for network in found.values()),
                f"{passed(every)} / {len(every)}",
                str(sum(left <= 0.05 for left, _ in every)),
                str(sum(lost <= 3 for _, lost in every)),
                f"{max(lost for _, lost in every):.1f}",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Run, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.ssd_networks", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, test = load_digits()
    found: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for name in NETWORKS:
        found[name] = {setting: [] for setting in SETTINGS}
        for seed in options.seeds:
            for setting, results in outcomes(trained(name, seed, train), train, test).items():
                found[name][setting] += results
        print(table(found), flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    seeds = ", ".join(map(str, options.seeds))
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    page = [
        "## SSD over networks of many kinds",
        "",
        "Every class of digits forgotten in every network. A request passes if test accuracy on the class is",
        "5 % or less and at most 3 points of retain accuracy are lost; *forgot* and *kept* count the halves.",
        "",
        f"- commit {commit.stdout.strip() or 'unknown'}, torch {torch.__version__}, CPU, seeds {seeds}",
        f"- reproduce with `python -m bench.ssd_networks --seeds {seeds.replace(',', '')}`",
        "",
        table(found),
        "",
    ]
    RESULT.write_text("\n".join(page), encoding="utf-8")
    print(f"wrote {RESULT}")


if __name__ == "__main__":
    main()
