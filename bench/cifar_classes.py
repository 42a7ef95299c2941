"""A ResNet-18 of half the width on CIFAR-10, and each of its ten classes forgotten by SSD.

``python -m bench.cifar_classes --data cifar10_jpeg.npz`` trains the network (an hour of one core with AMX; an
interrupted run goes on), measures importances on all training images once, and writes
``bench/results/methods/cifar10-classes.md`` and ``.json``. Forgetting needs no retraining, so every class is
forgotten twice, each time on a copy: by ``ux.ssd`` with its defaults, which gets those importances and 5,000
retained images to watch, and once with the published settings.
"""

import argparse
import copy
import hashlib
import json
import statistics
import subprocess
import time
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bench import cifar
from unlearn_ext import fisher_diagonal, metrics, ssd
from unlearn_ext.importance import Importance
from unlearn_ext.tasks import losses

RESULT = Path(__file__).parent / "results" / "methods" / "cifar10-classes"
KEPT = Path(__file__).parents[1] / "build" / "cifar-classes"  # results as they come: delete to measure anew
BATCH = 64  # also that of the published setting, whose importances depend on it
WATCHED = 5000
CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CLOSED, PUBLISHED = "`ux.ssd`, defaults", "published setting (batches of 64, alpha 10, lambda 1)"

Batches = list[tuple[Tensor, Tensor]]


def batches(data: TensorDataset, chosen: Tensor) -> Batches:
    x, y = (tensor[chosen] for tensor in data.tensors)
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def kept_for(model: nn.Module) -> Path:
    """The folder for results of these weights."""
    weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    folder = KEPT / hashlib.sha256(weights).hexdigest()[:12]
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def measured(path: Path, model: nn.Module, data: Batches, **settings: object) -> Importance:
    """Importances on all training images, or those of an earlier run."""
    if not path.exists():
        start = time.perf_counter()
        fisher_diagonal(model, data, **settings).save(path)
        print(f"importances, {path.stem}: {time.perf_counter() - start:.0f} s", flush=True)
    return Importance.load(path)


def forgotten(
    model: nn.Module, train: TensorDataset, test: TensorDataset, label: int, setting: str, full: Importance
) -> dict[str, object]:
    """Forget a class on a copy of the network, and look at all of the test set."""
    labels, unseen = train.tensors[1], test.tensors[1]
    others = (labels != label).nonzero().flatten()
    others = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(label))]
    forget, watched = batches(train, labels == label), batches(train, others[:WATCHED])
    judged = {
        "test forget": batches(test, unseen == label),
        "test retain": batches(test, unseen != label),
        "retain": batches(train, others[-WATCHED:]),  # which the method has not seen
    }
    own = copy.deepcopy(model)
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if setting == CLOSED:
            result = ssd(own, forget, watched, importance=full)
        else:
            result = ssd(own, forget, importance=full, alpha=10.0, lambda_=1.0, estimator="batch")
    seconds = time.perf_counter() - start
    row: dict[str, object] = {"class": label, "setting": setting, "seconds": seconds, "passes": result.passes}
    row |= {"reached": result.reached, "changed": result.changed, "told": [str(w.message) for w in told]}
    for name, data in judged.items():
        row[name] = [100 * metrics.accuracy(network, data) for network in (model, own)]
    return row


def page(facts: dict[str, object], rows: list[dict[str, object]]) -> str:
    """The results as Markdown."""
    lines = [
        "## Every class of CIFAR-10 by SSD",
        "",
        "Accuracies in %. *Kept*: test accuracy on the nine other classes, and points of it that were lost.",
        f"`ux.ssd` was given importances measured once on all training images, the class, and {WATCHED:,}",
        f"retained images to watch; *train kept* is measured on {WATCHED:,} others.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    for setting in dict.fromkeys(str(row["setting"]) for row in rows):
        mine = [row for row in rows if row["setting"] == setting]
        head = ["class", "forgotten: before", "after", "kept", "lost", "train kept", "changed", "passes"]
        lines += ["", f"### {setting}", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        lost = [row["test retain"][0] - row["test retain"][1] for row in mine]
        for row, points in zip(mine, lost, strict=True):
            cells = [CLASSES[row["class"]], *(f"{value:.1f}" for value in row["test forget"])]
            cells += [f"{row['test retain'][1]:.1f}", f"{points:.2f}", f"{row['retain'][1]:.1f}"]
            cells += [f"{row['changed']:.2%}", f"{row['passes']:.2f}" if row["passes"] else ""]
            if row["reached"] is False:
                cells[-1] += " (says: not reached)"
            lines.append(f"| {' | '.join(cells)} |")
        good = sum(row["test forget"][1] <= 1 and points <= 1 for row, points in zip(mine, lost, strict=True))
        kept = [row["test retain"][1] for row in mine]
        spread = f"{statistics.fmean(kept):.1f} ± {statistics.pstdev(kept):.1f}, worst {min(kept):.1f}"
        lines += ["", f"At most 1 % left and 1 point lost: {good} of {len(mine)}. Kept: {spread}."]
    return "\n".join([*lines, ""])


def main() -> None:
    """Run, and write the page and the records."""
    parser = argparse.ArgumentParser(prog="python -m bench.cifar_classes", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as cifar10_jpeg.npz")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--epochs", type=int, default=cifar.HALF.epochs, help="of the network")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, test = cifar.load(options.data)
    recipe = cifar.Recipe(network=cifar.HALF.network, epochs=options.epochs)
    model, seconds = cifar.trained(train, recipe, 0, say=lambda line: print(line, flush=True))
    everything = torch.arange(len(train))
    kept = kept_for(model)
    full = {
        CLOSED: measured(
            kept / "log-odds.safetensors", model, batches(train, everything), loss_fn=losses.log_odds
        ),
        PUBLISHED: measured(
            kept / "batch-64.safetensors", model, batches(train, everything), estimator="batch"
        ),
    }
    rows = []
    for setting, importance in full.items():
        for label in range(len(CLASSES)):
            path = kept / f"{'closed' if setting == CLOSED else 'published'}-{label}.json"
            if not path.exists():
                draft = path.with_suffix(".draft")
                draft.write_text(json.dumps(forgotten(model, train, test, label, setting, importance)))
                draft.replace(path)
            rows.append(json.loads(path.read_text()))
            row = rows[-1]
            print(CLASSES[label], setting, row["test forget"], row["test retain"], row["passes"], flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    whole = 100 * metrics.accuracy(model, batches(test, torch.arange(len(test))))
    facts: dict[str, object] = {
        "network": f"ResNet-18 of half the width, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{recipe.epochs} epochs, {whole:.2f} % of the test set; trained in {seconds / 60:.0f} minutes",
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "device": f"CPU, {options.threads} thread(s)",
        "command": "python -m bench.cifar_classes --data cifar10_jpeg.npz",
    }
    RESULT.with_suffix(".json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(page(facts, rows))
    print(page(facts, rows))


if __name__ == "__main__":
    main()
