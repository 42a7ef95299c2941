"""Unlearn handwritten digits with every method and compare with retraining.

A small convolutional network learns scikit-learn's digits. Then copies of it forget a class, and 50 random
training samples, each method with its default settings. A network retrained without them shows what there was
to reach, and a random mask of neurons what choosing them is worth. Needs scikit-learn. Writes one page per
request, and the record of one run.
"""

from __future__ import annotations

import copy
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from unlearn_ext._internal.digests import weights_digest
from unlearn_ext._internal.undo import Undone
from unlearn_ext.evaluation import page
from unlearn_ext.evaluation.compare import Methods, compare
from unlearn_ext.evaluation.comparison import Comparison
from unlearn_ext.evaluation.evidence import Evidence, evidence
from unlearn_ext.evaluation.metrics.accuracy import accuracy
from unlearn_ext.evaluation.metrics.attacks import mia
from unlearn_ext.evaluation.metrics.registry import metric
from unlearn_ext.fisher.diagonal import fisher_diagonal
from unlearn_ext.fisher.importance import Importance
from unlearn_ext.methods import METHODS
from unlearn_ext.methods.ssd import ssd
from unlearn_ext.results import NOTICE
from unlearn_ext.tasks.losses import log_odds
from unlearn_ext.tasks.split import split

Samples = Dataset[tuple[Tensor, ...]]

FORGET_CLASS = 3
N_RANDOM = 50
EPOCHS = 10
BATCH_SIZE = 64
SHOWN = ("ssd", "unsir", "pgu", "gradient_masking")


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
    *,
    methods: Sequence[str],
    epochs: int,
    seed: int,
    label: int = FORGET_CLASS,
) -> Comparison:
    """Forget every sample of one class.

    Args:
        train_set: What the original was trained on.
        test_set: Samples it has not seen.
        original: The trained network; left as it is.
        methods: Names of ``METHODS``.
        epochs: For retraining.
        seed: For retraining and for the methods.
        label: The class.

    Returns:
        The comparison.
    """
    forget, retain = split(train_set, classes=label)
    return _compare(forget, retain, test_set, original, methods, epochs, seed)


def forget_samples(
    train_set: TensorDataset,
    test_set: TensorDataset,
    original: nn.Module,
    *,
    methods: Sequence[str],
    epochs: int,
    seed: int,
    count: int = N_RANDOM,
) -> Comparison:
    """Forget training samples drawn at random.

    PGU needs a validation set to know when random samples are forgotten; it gets a third of the test set,
    and the figures are those of the rest.

    Args:
        train_set: What the original was trained on.
        test_set: Samples it has not seen.
        original: The trained network; left as it is.
        methods: Names of ``METHODS``.
        epochs: For retraining.
        seed: For retraining, for the methods and for the draw.
        count: How many.

    Returns:
        The comparison.
    """
    order = torch.randperm(len(train_set), generator=torch.Generator().manual_seed(seed))
    forget, retain = split(train_set, ids=order[:count])
    validation, unseen = split(test_set, ids=range(len(test_set) // 3))
    stopping = {"pgu": {"validation": DataLoader(validation, 256)}}
    chosen = {name: (name, stopping.get(name, {})) for name in methods}
    return _compare(forget, retain, unseen, original, chosen, epochs, seed)


def _compare(
    forget: Samples,
    retain: Samples,
    test_set: Samples,
    original: nn.Module,
    methods: Methods,
    epochs: int,
    seed: int,
) -> Comparison:
    return compare(
        original,
        DataLoader(forget, BATCH_SIZE),
        DataLoader(retain, BATCH_SIZE, shuffle=True),
        DataLoader(test_set, 256),
        methods=methods,
        make_model=lambda: make_model(seed),
        train=lambda _, __: train(retain, epochs=epochs, seed=seed)[0],
        seeds=(seed,),
        progress=sys.stderr.isatty(),
    )


def each_class(
    train_set: TensorDataset, test_set: TensorDataset, original: nn.Module, *, full: Importance
) -> str:
    """Forget every class in turn with SSD, each time from the original: one class's luck is not the rule.

    Args:
        train_set: What the original was trained on.
        test_set: Samples it has not seen.
        original: The trained network; left as it is.
        full: Importances on the training set, stored once: SSD then reads the forget set only.

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
        "SSD on each of the ten classes in turn: test accuracy on the forgotten class "
        f"{sum(still_known) / 10:.1%} on average, {max(still_known):.1%} at worst; retain accuracy lost "
        f"{100 * max(lost):.1f} points at worst."
    )


_CLASS_NOTE = "The forgotten class should drop to 0 %, as after retraining, and the rest should stay."
_SAMPLES_NOTE = (
    "Random samples resemble those that stay: the retrained network gets most of them right without having "
    "seen them, so there is little to forget, and approximate unlearning often changes little. Accuracy "
    "alone cannot tell whether such samples have been forgotten."
)
_SHORT = {
    "retain": "retain",
    "forget": "forget",
    "test": "test",
    "test_retained": "test, kept",
    "test_forgotten": "test, forgotten",
    "gap": "gap, points",
    "changed": "changed",
    "seconds": "seconds",
}


def table(title: str, comparison: Comparison, note: str) -> str:
    """Lay out the main figures of a comparison as text; the page has all of them.

    Args:
        title: What is forgotten.
        comparison: The comparison.
        note: What the figures mean.

    Returns:
        Title, one line per network, the errors of methods that did not run, note.
    """
    names = [name for name in _SHORT if name in comparison.columns]
    lines, failures = [], []
    for row in comparison.rows:
        cells = []
        for name in names:
            measure, unit = row.measures.get(name), metric(name).unit
            known = measure is not None and measure.value is not None
            cells.append(page.figure({"value": measure.value}, unit) if measure and known else "-")
        lines.append([row.label, *cells])
        if row.why is not None:
            failures.append(row.why if row.why.startswith(row.label) else f"{row.label}: {row.why}")
    heads = ["network", *(_SHORT[name] for name in names)]
    widths = [max(len(cell) for cell in column) for column in zip(heads, *lines, strict=True)]
    text = [
        "  ".join(
            cell.ljust(width) if position == 0 else cell.rjust(width)
            for position, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in [heads, ["-" * width for width in widths], *lines]
    ]
    told = [part for failure in [*failures, note] for part in textwrap.wrap(failure, 100)]
    return "\n".join([title, "", *text, "", *told])


def run(
    out: Path,
    *,
    methods: Sequence[str] | None = None,
    epochs: int = EPOCHS,
    seed: int = 0,
    say: Callable[[str], object] = print,
) -> list[Comparison]:
    """Run the demo.

    Args:
        out: Folder for the pages and the record, made if it is not there.
        methods: Names of ``METHODS``; SSD, UNSIR, PGU and gradient masking by default.
        epochs: Passes over the training set, for each of the three trainings.
        seed: Decides initial weights, the order of the samples, which random ones are forgotten, and every
            draw of the methods.
        say: What to do with the text as it comes.

    Returns:
        The two comparisons.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If there is no such method.
    """
    chosen = [name for name in SHOWN if name in METHODS] if methods is None else list(methods)
    for name in chosen:
        if name not in METHODS:
            raise ValueError(f"methods must be among {', '.join(METHODS)}, got {name!r}")
    out.mkdir(parents=True, exist_ok=True)
    with _one_thread():
        comparisons = _run(out, chosen, epochs, seed, say)
    say("\n".join(textwrap.wrap(NOTICE, 100)))
    return comparisons


def _run(
    out: Path, methods: Sequence[str], epochs: int, seed: int, say: Callable[[str], object]
) -> list[Comparison]:
    train_set, test_set = load_digits()
    original, seconds = train(train_set, epochs=epochs, seed=seed)
    say(
        f"Trained a network of {sum(p.numel() for p in original.parameters()):,} parameters on "
        f"{len(train_set):,} digits in {seconds:.1f} s.\n"
    )
    by_class = forget_class(train_set, test_set, original, methods=methods, epochs=epochs, seed=seed)
    say(table(f"Forget class {FORGET_CLASS}", by_class, _CLASS_NOTE))
    if "ssd" in methods:
        # What an owner would store after training, so that the retain set need not be read again.
        full = fisher_diagonal(original, DataLoader(train_set, BATCH_SIZE), loss_fn=log_odds)
        say("\n".join(textwrap.wrap(each_class(train_set, test_set, original, full=full), 100)))
        _record(train_set, test_set, original, full, seed).to_json(out / "digits_class_ssd.json")
    by_samples = forget_samples(train_set, test_set, original, methods=methods, epochs=epochs, seed=seed)
    say("\n" + table(f"Forget {N_RANDOM} random samples", by_samples, _SAMPLES_NOTE))
    by_class.to_html(out / "digits_class.html", title=f"Handwritten digits: forget class {FORGET_CLASS}")
    by_samples.to_html(
        out / "digits_samples.html", title=f"Handwritten digits: forget {N_RANDOM} random samples"
    )
    names = "digits_class.html, digits_samples.html"
    say(f"\nPages, and the record of the run with SSD: {out}/ ({names}, digits_class_ssd.json)")
    return [by_class, by_samples]


def _record(
    train_set: TensorDataset, test_set: TensorDataset, original: nn.Module, full: Importance, seed: int
) -> Evidence:
    forget, retain = split(train_set, classes=FORGET_CLASS)
    unseen, _ = split(test_set, classes=FORGET_CLASS)
    unlearned = copy.deepcopy(original)
    before = weights_digest(unlearned)
    result = ssd(unlearned, DataLoader(forget, BATCH_SIZE), importance=full)
    sets = [DataLoader(part, 256) for part in (retain, forget, unseen)]
    return evidence(
        result,
        model=unlearned,
        before=before,
        forget_ids=forget.indices,
        seeds=(seed,),
        metrics={
            "retain": accuracy(unlearned, sets[0]),
            "forget": accuracy(unlearned, sets[1]),
            "mia": mia(unlearned, forget=sets[1], retain=sets[0], test=sets[2]),
        },
    )


@contextmanager
def _one_thread() -> Iterator[None]:
    # The layers are too small to share out, and a sum that is not split comes out the same on any computer.
    n_threads = torch.get_num_threads()
    with Undone(lambda: torch.set_num_threads(n_threads)):
        torch.set_num_threads(1)
        yield
