"""Published accuracies of the methods on CIFAR-10, beside those of ``bench.bench_methods``."""

import json
import statistics
from collections.abc import Iterator
from pathlib import Path

_RESULTS = Path(__file__).parent / "results" / "methods"
_MINE, _LARGER = _RESULTS / "cifar10-resnet8.json", _RESULTS / "cifar10-resnet18-half.json"

KODGE = "Kodge et al."
SALUN = "SalUn, table 1"
CARDS = "model cards"

# Test accuracy on the other classes and on the class, means over the ten classes.
CLASS = [
    ("original", 94.89, 94.89, KODGE),
    ("retrain", 94.81, 0.0, KODGE),
    ("ssd", 85.76, 4.37, KODGE),
    ("ssd", 76.9, 0.0, CARDS),
    ("unsir", 92.20, 10.89, KODGE),
    ("scrub", 94.79, 0.0, KODGE),
    ("gradient_ascent", 69.89, 0.02, KODGE),
    ("neg_grad_plus", 89.91, 0.94, KODGE),
    ("salun", 89.6, 1.9, CARDS),
]

# Accuracy on the retain set, on the forget set and on the test set.
RANDOM = [
    ("retrain", 100.0, 94.76, 94.26, SALUN),
    ("finetune", 99.88, 99.37, 94.06, SALUN),
    ("random_label", 99.67, 92.39, 92.83, SALUN),
    ("gradient_ascent", 99.50, 99.31, 94.01, SALUN),
    ("salun", 99.62, 97.15, 93.93, SALUN),
]

_TEXT = """\
## Published accuracies on CIFAR-10

The published networks are ResNet-18 (11 M parameters) trained to the end, 94 to 95 % of the test set; ours
are the ResNet of the tables above, with 0.6 M parameters and a few epochs of training, and, for classes 0 and
5, a tenth of the training set and one seed, a ResNet-18 of half the width (*half*, 20 epochs; methods but SSD
had 5,000 retained images). So the levels cannot agree. What can be compared is what a method costs and
what it leaves, against the original and the retrained network of the same source. Settings are the published
ones there and the package's defaults here.

- {kodge}: "Deep Unlearning: Fast and Efficient Gradient-free Class Forgetting", TMLR 2024, table 1, as cited
  by later work: each of the ten classes, with that paper's settings for every method.
- {cards}: of public ResNet-18 checkpoints, means over the ten classes: SSD with alpha 10 and lambda 1 (from
  12.5 to 95.4 % on the others), SalUn with a mask of 10 %, 8 epochs and learning rate 0.01.
- {salun}: Fan et al., ICLR 2024, 10 % of the training set forgotten at random, as in *half*. *Ours*: 250
  of 2,500 images learnt by heart, without augmentation, so that others are known far less than there.
- PGU, and masks of neurons, have no published table that could be had.
"""


def section() -> str:
    """Write the page.

    Returns:
        Markdown; empty where there are no results on CIFAR-10.
    """
    if not _MINE.exists():
        return ""
    rows = json.loads(_MINE.read_text(encoding="utf-8"))["rows"]
    larger = json.loads(_LARGER.read_text(encoding="utf-8"))["rows"] if _LARGER.exists() else []
    text = _TEXT.format(kodge=KODGE, cards=CARDS, salun=SALUN)
    one_class = _table({"ours": rows, "ours, half": larger}, "class", ("test retain", "test forget"), CLASS)
    samples = _table({"ours": rows, "ours, half": larger}, "random", ("retain", "forget", "test"), RANDOM)
    return "\n\n".join([text.strip(), one_class, samples])


def _table(mine: dict[str, list[dict]], kind: str, names: tuple[str, ...], published: list[tuple]) -> str:
    header = ["method", *(f"{name}: {whose}" for whose in ("published", *mine) for name in names)]
    lines = [f"Forgetting {'a class' if kind == 'class' else 'random samples'}, in %:", ""]
    lines += _line([*header, "source"]), _line(["---"] * (len(header) + 1))
    for method, *theirs, source in published:
        ours = [cell for rows in mine.values() for cell in _mine(rows, kind, method, names)]
        lines.append(_line([method, *(f"{value:.1f}" for value in theirs), *ours, source]))
    return "\n".join(lines)


def _mine(rows: list[dict], kind: str, method: str, names: tuple[str, ...]) -> Iterator[str]:
    runs = [row["accuracies"] for row in rows if (row["kind"], row["method"]) == (kind, method)]
    runs = [accuracies for accuracies in runs if accuracies]
    for name in names:
        yield f"{100 * statistics.fmean(run[name] for run in runs):.1f}" if runs else ""


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
