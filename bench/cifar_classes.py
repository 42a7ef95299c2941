"""A ResNet-18 of half the width on CIFAR-10, and each of its ten classes forgotten by SSD.

``python -m bench.cifar_classes --data cifar10_jpeg.npz`` trains the network (half an hour on a core
with AVX512_BF16; an interrupted run goes on), measures importances on all training images once, and writes
``bench/results/methods/cifar10-classes.md`` and ``.json``. Forgetting needs no retraining, so every class is
forgotten, on a copy, by ``ux.ssd`` with its defaults, which gets those importances and 5,000 retained images
to watch; with ``--published`` by the published settings too.
"""

import argparse
import copy
import hashlib
import json
import statistics
import subprocess
import time
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bench import cifar
from unlearn_ext import fisher_diagonal, ssd
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


@torch.no_grad()
def right(model: nn.Module, data: TensorDataset) -> Tensor:
    """Which samples are answered rightly."""
    x, y = data.tensors
    return torch.cat([model(part).argmax(1) for part in x.split(250)]) == y


def forgotten(
    model: nn.Module, train: TensorDataset, test: TensorDataset, label: int, setting: str, full: Importance
) -> dict[str, object]:
    """Forget a class on a copy of the network, and look at the test set."""
    labels = train.tensors[1]
    others = (labels != label).nonzero().flatten()
    others = others[torch.randperm(len(others), generator=torch.Generator().manual_seed(label))]
    forget, watched = batches(train, labels == label), batches(train, others[:WATCHED])
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
    found = right(own, test)
    row["forgotten"] = 100 * float(found[test.tensors[1] == label].float().mean())
    row["kept"] = 100 * float(found[test.tensors[1] != label].float().mean())
    return row


def page(facts: dict[str, object], before: Tensor, labels: Tensor, rows: list[dict[str, object]]) -> str:
    """The results as Markdown."""
    lines = [
        "## Every class of CIFAR-10 by SSD",
        "",
        "Accuracies in %. *Kept*: test accuracy on the nine other classes, and points of it that were lost.",
        f"`ux.ssd` was given importances measured once on all training images, the class, and {WATCHED:,}",
        "retained training images to watch. *Passes*: forward passes over these, beyond the importances.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    for setting in dict.fromkeys(str(row["setting"]) for row in rows):
        mine = [row for row in rows if row["setting"] == setting]
        head = ["class", "forgotten: before", "after", "kept", "lost", "changed", "passes"]
        lines += ["", f"### {setting}", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        lost = []
        for row in mine:
            own = labels == row["class"]
            was, kept = (100 * float(before[chosen].float().mean()) for chosen in (own, ~own))
            lost.append(kept - row["kept"])
            cells = [CLASSES[row["class"]], f"{was:.1f}", f"{row['forgotten']:.1f}", f"{row['kept']:.1f}"]
            cells += [
                f"{lost[-1]:.2f}",
                f"{row['changed']:.2%}",
                f"{row['passes']:.2f}" if row["passes"] else "",
            ]
            if row["reached"] is False:
                cells[-1] += " (says: not reached)"
            lines.append(f"| {' | '.join(cells)} |")
        good = sum(row["forgotten"] <= 1 and points <= 1 for row, points in zip(mine, lost, strict=True))
        kept_now = [row["kept"] for row in mine]
        spread = (
            f"{statistics.fmean(kept_now):.1f} ± {statistics.pstdev(kept_now):.1f}, worst {min(kept_now):.1f}"
        )
        lines += ["", f"At most 1 % left and 1 point lost: {good} of {len(mine)}. Kept: {spread}."]
    return "\n".join([*lines, ""])


def main() -> None:
    """Run, and write the page and the records."""
    parser = argparse.ArgumentParser(prog="python -m bench.cifar_classes", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as cifar10_jpeg.npz")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--published", action="store_true", help="also forget with the published settings")
    parser.add_argument("--epochs", type=int, default=cifar.HALF.epochs, help="of the network")
    parser.add_argument("--batch-size", type=int, default=cifar.HALF.batch_size, help="in training it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    train, test = cifar.load(options.data)
    recipe = replace(cifar.HALF, epochs=options.epochs, batch_size=options.batch_size)
    model, seconds = cifar.trained(train, recipe, 0, say=lambda line: print(line, flush=True))
    everything = batches(train, torch.arange(len(train)))
    kept = kept_for(model)
    settings: dict[str, tuple[str, dict[str, object]]] = {CLOSED: ("log-odds", {"loss_fn": losses.log_odds})}
    if options.published:
        settings[PUBLISHED] = ("batch-64", {"estimator": "batch"})
    rows = []
    for setting, (name, how) in settings.items():
        importance = measured(kept / f"{name}.safetensors", model, everything, **how)
        for label in range(len(CLASSES)):
            path = kept / f"{name}-{label}.json"
            if not path.exists():
                draft = path.with_suffix(".draft")
                draft.write_text(json.dumps(forgotten(model, train, test, label, setting, importance)))
                draft.replace(path)
            rows.append(json.loads(path.read_text()))
            row = rows[-1]
            print(CLASSES[label], setting, row["forgotten"], row["kept"], row["passes"], flush=True)
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    before = right(model, test)
    whole = 100 * float(before.float().mean())
    facts: dict[str, object] = {
        "network": f"ResNet-18 of half the width, {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{recipe.epochs} epochs in batches of {recipe.batch_size}, {whole:.2f} % of the test set; trained "
        f"in {seconds / 60:.0f} minutes",
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "device": f"CPU, {options.threads} thread(s)",
        "command": "python -m bench.cifar_classes --data cifar10_jpeg.npz"
        + f" --batch-size {recipe.batch_size}" * (recipe.batch_size != cifar.HALF.batch_size)
        + " --published" * options.published,
    }
    RESULT.with_suffix(".json").write_text(json.dumps({"facts": facts, "rows": rows}, indent=1) + "\n")
    RESULT.with_suffix(".md").write_text(page(facts, before, test.tensors[1], rows))
    print(page(facts, before, test.tensors[1], rows))


if __name__ == "__main__":
    main()
