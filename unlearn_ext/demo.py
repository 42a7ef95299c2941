"""Unlearn handwritten digits with selective synaptic dampening and compare with retraining.

A small convolutional network learns scikit-learn's digits. Then it forgets a class and, starting again from
the trained network, 50 random training samples, with default settings; a network retrained without them shows
what there was to reach. Needs scikit-learn; with matplotlib there is a picture.
"""

from __future__ import annotations

import copy
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from unlearn_ext.data import split
from unlearn_ext.importance import Importance, fisher_diagonal
from unlearn_ext.methods.ssd import ssd
from unlearn_ext.metrics import accuracy
from unlearn_ext.report import NOTICE

Samples = Dataset[tuple[Tensor, ...]]

FORGET_CLASS = 3
N_RANDOM = 50
EPOCHS = 10
BATCH_SIZE = 64


@dataclass(frozen=True, slots=True)
class Row:
    """What one network knows.

    Attributes:
        network: ``"original"``, ``"SSD"`` or ``"retrained"``.
        accuracies: Measure to accuracy in [0, 1].
        changed: Share of the parameters changed; None where the network was trained from scratch.
        seconds: What it took to get there: training, unlearning, training again.
    """

    network: str
    accuracies: dict[str, float]
    changed: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class Case:
    """One request to forget, and the networks before and after.

    Attributes:
        title: What is forgotten.
        rows: Original, SSD, retrained.
        note: What the figures mean.
    """

    title: str
    rows: tuple[Row, ...]
    note: str


def load_digits() -> tuple[TensorDataset, TensorDataset]:
    """Read the 1,797 digits that come with scikit-learn, shuffled, three quarters for training.

    Returns:
        Training and test set: images ``[1, 8, 8]`` in [0, 1] and labels 0 to 9.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError("the demo needs scikit-learn: pip install 'unlearn_ext[demo]'") from error
    digits = datasets.load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    n_train = len(labels) * 3 // 4
    return (
        TensorDataset(images[:n_train], labels[:n_train]),
        TensorDataset(images[n_train:], labels[n_train:]),
    )


def make_model(seed: int) -> nn.Sequential:
    """Build the network: three convolutions with BatchNorm, two linear layers, 110,922 parameters.

    Args:
        seed: Decides the initial weights; the global random state stays as it is.

    Returns:
        The network, untrained.
    """

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        return nn.Sequential(
            *block(1, 32),
            *block(32, 64),
            nn.MaxPool2d(2),
            *block(64, 128),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(128, 128),
            nn.ReLU(),
            nn.Linear(128, 10),
        )


def train(dataset: Samples, *, epochs: int, seed: int) -> tuple[nn.Sequential, float]:
    """Train a fresh network.

    Args:
        dataset: Training samples.
        epochs: Passes over them.
        seed: Decides initial weights and the order of the samples.

    Returns:
        The network in eval mode, and the seconds that training took.
    """
    started = time.perf_counter()
    model = make_model(seed)
    generator = torch.Generator().manual_seed(seed)
    loader = DataLoader(dataset, BATCH_SIZE, shuffle=True, generator=generator)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * len(loader))
    for _ in range(epochs):
        for images, labels in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
    return model.eval(), time.perf_counter() - started


def forget_class(
    train_set: TensorDataset,
    test_set: TensorDataset,
    original: nn.Module,
    seconds: float,
    *,
    full: Importance,
    epochs: int,
    seed: int,
    label: int = FORGET_CLASS,
) -> Case:
    """Forget every sample of one class.

    Args:
        train_set: What the original was trained on.
        test_set: Samples it has not seen.
        original: The trained network; left as it is.
        seconds: What its training took.
        full: Importances on the training set.
        epochs: For retraining.
        seed: For retraining.
        label: The class.

    Returns:
        The comparison.
    """
    forget, retain = split(train_set, classes=label)
    test_forget, test_retain = split(test_set, classes=label)
    measures = {
        "retain": retain,
        "forget": forget,
        "test, other classes": test_retain,
        f"test, class {label}": test_forget,
    }
    return _compare(f"Forget class {label}", original, seconds, measures, full, epochs, seed, _CLASS_NOTE)


def each_class(
    train_set: TensorDataset, test_set: TensorDataset, original: nn.Module, *, full: Importance
) -> str:
    """Forget every class in turn, each time from the original, to tell one class's luck from the rule.

    Args:
        train_set: What the original was trained on.
        test_set: Samples it has not seen.
        original: The trained network; left as it is.
        full: Importances on the training set.

    Returns:
        The worst figures over the ten classes, as a sentence.
    """
    still_known, lost = [], []
    for label in range(10):
        forget, retain = split(train_set, classes=label)
        test_forget, _ = split(test_set, classes=label)
        unlearned = copy.deepcopy(original)
        ssd(unlearned, DataLoader(forget, BATCH_SIZE), importance=full)
        loader = DataLoader(retain, 256)
        lost.append(accuracy(original, loader) - accuracy(unlearned, loader))
        still_known.append(accuracy(unlearned, DataLoader(test_forget, 256)))
    return (
        f"Each of the ten classes in turn: test accuracy on the forgotten class {sum(still_known) / 10:.1%} "
        f"on average, {max(still_known):.1%} at worst; retain accuracy lost {100 * max(lost):.1f} points at "
        "worst."
    )


def forget_samples(
    train_set: TensorDataset,
    test_set: TensorDataset,
    original: nn.Module,
    seconds: float,
    *,
    full: Importance,
    epochs: int,
    seed: int,
    count: int = N_RANDOM,
) -> Case:
    """Forget training samples drawn at random.

    Args:
        train_set: What the original was trained on.
        test_set: Samples it has not seen.
        original: The trained network; left as it is.
        seconds: What its training took.
        full: Importances on the training set.
        epochs: For retraining.
        seed: For retraining and for the draw.
        count: How many.

    Returns:
        The comparison.
    """
    order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(seed))
    forget, retain = split(train_set, ids=order[:count])
    measures = {"retain": retain, "forget": forget, "test": test_set}
    title = f"Forget {count} random samples"
    return _compare(title, original, seconds, measures, full, epochs, seed, _SAMPLES_NOTE)


_CLASS_NOTE = "The forgotten class should drop to 0 %, as after retraining, and the rest should stay."
_SAMPLES_NOTE = (
    "Random samples resemble those that stay: the retrained network gets most of them right without having "
    "seen them, so there is little to forget, and approximate unlearning often changes little. Accuracy "
    "alone cannot tell whether such samples have been forgotten."
)


def _compare(
    title: str,
    original: nn.Module,
    seconds: float,
    measures: Mapping[str, Samples],
    full: Importance,
    epochs: int,
    seed: int,
    note: str,
) -> Case:
    def measured(model: nn.Module) -> dict[str, float]:
        return {name: accuracy(model, DataLoader(data, 256)) for name, data in measures.items()}

    unlearned = copy.deepcopy(original)
    result = ssd(unlearned, DataLoader(measures["forget"], BATCH_SIZE), importance=full)
    retrained, seconds_again = train(measures["retain"], epochs=epochs, seed=seed)
    rows = (
        Row("original", measured(original), None, seconds),
        Row("SSD", measured(unlearned), result.changed, sum(result.seconds.values())),
        Row("retrained", measured(retrained), None, seconds_again),
    )
    return Case(title, rows, note)


def table(case: Case) -> str:
    """Lay out a comparison as text.

    Args:
        case: The comparison.

    Returns:
        Title, one line per network, note.
    """
    names = list(case.rows[0].accuracies)
    heads = ["network", *names, "parameters changed", "seconds"]
    body = [
        [
            row.network,
            *(f"{row.accuracies[name]:.1%}" for name in names),
            "-" if row.changed is None else f"{row.changed:.2%}",
            f"{row.seconds:.2f}",
        ]
        for row in case.rows
    ]
    widths = [max(len(cell) for cell in column) for column in zip(heads, *body, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if position == 0 else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [heads, ["-" * width for width in widths], *body]
    ]
    return "\n".join([case.title, "", *lines, "", *textwrap.wrap(case.note, 100)])


_COLORS = {"original": "#8d99ae", "SSD": "#1f6feb", "retrained": "#e9a23b"}


def picture(cases: Sequence[Case], path: Path) -> None:
    """Draw the comparisons as bars, one panel each.

    Args:
        cases: The comparisons.
        path: PNG file to write.

    Raises:
        ImportError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError("the picture needs matplotlib: pip install 'unlearn_ext[demo]'") from error
    ratios = [len(case.rows[0].accuracies) for case in cases]
    figure = Figure(figsize=(12.5, 5.2), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.12))
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, len(cases), width_ratios=ratios, sharey=True, squeeze=False)
    for axes, case in zip(panels[0], cases, strict=True):
        names = list(case.rows[0].accuracies)
        for offset, row in zip((-0.27, 0.0, 0.27), case.rows, strict=True):
            heights = [100 * row.accuracies[name] for name in names]
            bars = axes.bar(
                [position + offset for position in range(len(names))],
                heights,
                width=0.25,
                color=_COLORS[row.network],
                label=row.network,
                zorder=2,
            )
            labels = [f"{height:.0f}" if height in (0, 100) else f"{height:.1f}" for height in heights]
            axes.bar_label(bars, labels, padding=2, fontsize=8, color="#333333")
        unlearned = case.rows[1]
        axes.set_title(case.title, fontsize=13, fontweight="bold", loc="left", pad=38)
        subtitle = axes.text(
            0,
            1.03,
            f"SSD, with stored importances, changed {unlearned.changed:.1%} of the parameters\n"
            f"in {unlearned.seconds:.2f} s; retraining took {case.rows[2].seconds:.1f} s",
            transform=axes.transAxes,
            fontsize=9,
            color="#555555",
        )
        subtitle.set_in_layout(False)  # the panels share the width by their bars, not by their text
        axes.set_xticks(range(len(names)), [name.replace(", ", ",\n") for name in names], fontsize=10)
        axes.tick_params(axis="both", length=0)
        axes.grid(axis="y", color="#e5e7eb", zorder=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.set_ylim(0, 108)
        axes.set_yticks(range(0, 101, 20))
    panels[0][0].set_ylabel("accuracy, %")
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize=10)
    figure.savefig(path, dpi=150, facecolor="white")


def run(
    out: Path, *, epochs: int = EPOCHS, seed: int = 0, say: Callable[[str], object] = print
) -> list[Case]:
    """Run the demo.

    Args:
        out: Folder for the picture, made if it is not there.
        epochs: Passes over the training set, for each of the three trainings.
        seed: Decides initial weights, the order of the samples and which random ones are forgotten.
        say: What to do with the text as it comes.

    Returns:
        The two comparisons.

    Raises:
        ImportError: If scikit-learn is not installed.
    """
    out.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        cases = _cases(epochs, seed, say)
    path = out / "digits.png"
    try:
        picture(cases, path)
    except ImportError as error:
        say(f"No picture: {error}")
    else:
        say(f"Picture: {path}")
    say("\n".join(textwrap.wrap(NOTICE, 100)))
    return cases


def _cases(epochs: int, seed: int, say: Callable[[str], object]) -> list[Case]:
    train_set, test_set = load_digits()
    original, seconds = train(train_set, epochs=epochs, seed=seed)
    say(
        f"Trained a network of {sum(p.numel() for p in original.parameters()):,} parameters on "
        f"{len(train_set):,} digits in {seconds:.1f} s."
    )
    # What an owner of the network would have stored after training: SSD below does not read the retain set.
    started = time.perf_counter()
    full = fisher_diagonal(original, DataLoader(train_set, BATCH_SIZE))
    say(f"Stored its importances on the training set in {time.perf_counter() - started:.2f} s.\n")
    by_class = forget_class(train_set, test_set, original, seconds, full=full, epochs=epochs, seed=seed)
    sentence = each_class(train_set, test_set, original, full=full)
    say("\n".join([table(by_class), *textwrap.wrap(sentence, 100), ""]))
    by_samples = forget_samples(train_set, test_set, original, seconds, full=full, epochs=epochs, seed=seed)
    say(f"{table(by_samples)}\n")
    return [by_class, by_samples]


@contextmanager
def _one_thread() -> Iterator[None]:
    # The layers are too small to share out, and a sum that is not split comes out the same on any computer.
    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(n_threads)
