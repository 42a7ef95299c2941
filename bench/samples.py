"""Random samples learnt by heart, forgotten by every method, held against networks retrained without them.

``python -m bench.samples --data cifar10_jpeg.npz`` writes ``bench/results/methods/samples.md`` and
``samples.json``. Two problems:

    cifar    200 of the first 2,000 training images of CIFAR-10, at 16 x 16; 500 more are validation
    labels   150 of the 1,347 training digits, a fifth of all labels wrong; 150 of the rest are validation

``--more SEED ...`` looks at the second problem and ``newton`` alone, a network and a request for every seed,
and writes ``samples-newton.md`` and ``.json``.

Networks are trained until they know their training set by heart. A second network retrained with another seed
shows how near to a retrained network anything can come.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bench import cifar
from unlearn_ext import METHODS, demo, kfac_factors, metrics, newton

RESULTS = Path(__file__).parent / "results" / "methods"
KEPT = Path(__file__).parents[1] / "build" / "samples"  # every result as it comes: delete to measure anew
SHOWN = (
    "newton",
    "finetune",
    "random_label",
    "salun",
    "scrub",
    "neg_grad_plus",
    "ssd",
    "msg",
    "gradient_masking",
    "bad_teacher",
    "gradient_ascent",
)
BATCH = 64
RETRAINED, FLOOR = 100, 200  # added to a request's seed: seeds of the networks it is held against


def network(channels: int) -> nn.Sequential:
    """Three convolutions with BatchNorm and two linear layers, for images of 8 x 8 or more."""

    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(channels, 32),
        *block(32, 64),
        nn.MaxPool2d(2),
        *block(64, 128),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


@dataclass(frozen=True)
class Problem:
    """What is learnt, and by what.

    Attributes:
        name: Its name.
        train: The training set.
        validation: Samples for methods to compare with; never trained on.
        test: Samples to judge by.
        n_forget: How many samples are forgotten.
        epochs: Until the training set is known by heart.
        make: Builds a network.
    """

    name: str
    train: TensorDataset
    validation: TensorDataset
    test: TensorDataset
    n_forget: int
    epochs: int
    make: Callable[[], nn.Module]

    def forgotten(self, seed: int) -> Tensor:
        """Mark the samples that a request forgets."""
        n = len(self.train)
        chosen = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[: self.n_forget]
        return torch.zeros(n, dtype=torch.bool).index_fill_(0, chosen, True)

    def learnt(self, data: TensorDataset, seed: int) -> tuple[nn.Module, float]:
        """Train a network on some of the samples, or take the one of an earlier run, with its seconds."""

        def build() -> nn.Module:
            with torch.random.fork_rng([]):
                torch.manual_seed(seed)
                return self.make()

        return cifar.checkpoint(
            f"samples-{self.name}-{seed}",
            {"epochs": self.epochs, "batch": BATCH, "seed": seed},
            data,
            build,
            lambda: train(build(), data, self.epochs, seed),
        )


def train(model: nn.Module, data: TensorDataset, epochs: int, seed: int) -> nn.Module:
    """AdamW and one learning-rate cycle, without augmentation."""
    generator = torch.Generator().manual_seed(seed)
    x, y = data.tensors
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=0.01)
    steps = -(-len(x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=epochs * steps)
    model.train()
    for _ in range(epochs):
        for index in torch.randperm(len(x), generator=generator).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(model(x[index]), y[index]).backward()
            optimizer.step()
            schedule.step()
    return model.eval()


def subset_of_cifar(path: Path) -> Problem:
    """The first images of CIFAR-10, every 2 x 2 pixels averaged."""
    known, unseen = cifar.load(path)

    def part(data: TensorDataset, start: int, stop: int) -> TensorDataset:
        x, y = (tensor[start:stop] for tensor in data.tensors)
        return TensorDataset(F.avg_pool2d(x, 2), y)

    sets = part(known, 0, 2000), part(known, 2000, 2500), part(unseen, 0, 2000)
    return Problem("cifar", *sets, n_forget=200, epochs=30, make=functools.partial(network, 3))


def wrong_labels() -> Problem:
    """Digits, a fifth of the labels of every set replaced by wrong ones."""
    known, unseen = demo.load_digits()

    def noisy(data: TensorDataset, seed: int) -> TensorDataset:
        x, y = data.tensors
        generator = torch.Generator().manual_seed(seed)
        wrong = torch.randperm(len(y), generator=generator)[: len(y) // 5]
        y = y.clone()
        y[wrong] = (y[wrong] + torch.randint(1, 10, (len(wrong),), generator=generator)) % 10
        return TensorDataset(x, y)

    held = noisy(unseen, 1001).tensors
    sets = (TensorDataset(*(t[:150] for t in held)), TensorDataset(*(t[150:] for t in held)))
    return Problem(
        "labels", noisy(known, 1000), *sets, n_forget=150, epochs=40, make=functools.partial(network, 1)
    )


Set = tuple[Tensor, ...]


def batches(data: Set, size: int = BATCH) -> list[Set]:
    return list(zip(*(tensor.split(size) for tensor in data), strict=True))


def accuracy(model: nn.Module, data: Set) -> float:
    return 100 * metrics.accuracy(model, batches(data, 500))


@torch.no_grad()
def margins(model: nn.Module, data: Set) -> np.ndarray:
    """Log-odds of the label, per sample."""
    x, y = data
    z = torch.cat([model(part) for part in x.split(500)]).double()
    others = z.scatter(1, y[:, None], -torch.inf).logsumexp(1)
    return (z.gather(1, y[:, None]).squeeze(1) - others).numpy()


def area(members: np.ndarray, others: np.ndarray) -> float:
    """AUC of telling members by their log-odds (the same as by their loss)."""
    ordered = np.sort(others)
    below, upto = (np.searchsorted(ordered, members, side=side) for side in ("left", "right"))
    return float((below + upto).mean() / (2 * len(others)))


def kolmogorov_smirnov(a: np.ndarray, b: np.ndarray) -> float:
    """The largest distance of two empirical distribution functions."""
    grid = np.concatenate([a, b])
    shares = [np.searchsorted(np.sort(values), grid, side="right") / len(values) for values in (a, b)]
    return float(np.abs(shares[0] - shares[1]).max())


def figures(model: nn.Module, sets: dict[str, Set], retrained: dict[str, float] | None) -> dict[str, float]:
    """Accuracies, attack, log-odds of forgotten against unseen samples, gap to a retrained network."""
    found = {name: accuracy(model, sets[name]) for name in ("retain", "forget", "test")}
    forgotten, unseen = margins(model, sets["forget"]), margins(model, sets["test"])
    against = found if retrained is None else retrained
    gap = statistics.fmean(abs(found[name] - against[name]) for name in ("retain", "forget", "test"))
    return {**found, "auc": area(forgotten, unseen), "ks": kolmogorov_smirnov(forgotten, unseen), "gap": gap}


def kept_at(name: str) -> Path:
    return KEPT / f"{name.replace(' ', '-')}.json"


def remembered(name: str, measure: Callable[[], dict]) -> dict:
    """A result of an earlier, perhaps interrupted run, or a new one."""
    path = kept_at(name)
    if not path.exists():
        found = measure()
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(found))
        draft.replace(path)
    found = json.loads(path.read_text())
    print(
        name, {key: round(value, 3) for key, value in found.items() if isinstance(value, float)}, flush=True
    )
    return found


def sets_of(problem: Problem, forgotten: Tensor) -> dict[str, Set]:
    known = problem.train.tensors
    return {
        "forget": tuple(tensor[forgotten] for tensor in known),
        "retain": tuple(tensor[~forgotten] for tensor in known),
        "validation": problem.validation.tensors,
        "test": problem.test.tensors,
    }


def run_method(name: str, original: nn.Module, sets: dict[str, Set], seed: int) -> tuple[nn.Module, dict]:
    """One method with its defaults on a copy: the copy, its seconds, and whether it says it got there."""
    model = copy.deepcopy(original)
    settings = {"validation": batches(sets["validation"])} if name == "newton" else {}
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            generator = torch.Generator().manual_seed(seed)
            result = METHODS[name](
                model, batches(sets["forget"]), batches(sets["retain"]), generator=generator, **settings
            )
        except (ValueError, FloatingPointError) as error:
            return copy.deepcopy(original), {"seconds": time.perf_counter() - start, "note": str(error)}
    note = "; ".join(str(entry.message) for entry in told)
    return model, {"seconds": time.perf_counter() - start, "reached": result.reached, "note": note}


def request(problem: Problem, seed: int, methods: Iterable[str]) -> list[dict]:
    """Forget random samples with every method."""
    sets = sets_of(problem, problem.forgotten(seed))
    kept = TensorDataset(*sets["retain"])
    original, _ = problem.learnt(problem.train, seed)
    retrained, seconds = problem.learnt(kept, seed + RETRAINED)
    aim = figures(retrained, sets, None)
    rows = [{"method": "retrained", **aim, "seconds": seconds}]
    floor, seconds = problem.learnt(kept, seed + FLOOR)
    rows.append({"method": "retrained, another seed", **figures(floor, sets, aim), "seconds": seconds})
    rows.append({"method": "original", **figures(original, sets, aim)})

    def row(name: str) -> dict:
        model, facts = run_method(name, original, sets, seed)
        return {"method": name, **figures(model, sets, aim), **facts}

    rows += [remembered(f"{problem.name} {seed} {name}", functools.partial(row, name)) for name in methods]
    return [{"problem": problem.name, "seed": seed, **row} for row in rows]


def half_of_class(problem: Problem, seed: int, label: int) -> dict:
    """Forget every second sample of a class: accuracies of that class before and after."""
    original, _ = problem.learnt(problem.train, seed)
    y = problem.train.tensors[1]
    members = torch.where(y == label)[0]
    sets = sets_of(problem, torch.zeros(len(y), dtype=torch.bool).index_fill_(0, members[::2], True))
    model, facts = run_method("newton", original, sets, seed)
    row = {"problem": problem.name, "seed": seed, "class": label, "reached": facts.get("reached")}
    row["note"] = facts.get("note", "")
    for part in ("forget", "validation", "test"):
        own = tuple(tensor[sets[part][1] == label] for tensor in sets[part])
        row[part] = [accuracy(network, own) for network in (original, model)]
    return row


def cost(problem: Problem, seed: int, laps: int = 3) -> dict[str, float]:
    """Seconds of the step with and without stored factors, and of one training epoch on the retain set."""
    sets = sets_of(problem, problem.forgotten(seed))
    original, _ = problem.learnt(problem.train, seed)
    retain, forget, validation = (batches(sets[name]) for name in ("retain", "forget", "validation"))
    factors = kfac_factors(original, retain)

    def epoch() -> None:
        train(copy.deepcopy(original), TensorDataset(*sets["retain"]), 1, seed)

    def step(**given: object) -> Callable[[], object]:
        return lambda: newton(copy.deepcopy(original), forget, validation=validation, **given)

    cases = {
        "epoch": epoch,
        "newton": step(retain=retain),
        "newton, stored factors": step(factors=factors),
        "newton, stored factors and retain set": step(factors=factors, retain=retain),
    }
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(laps):
            for name, call in cases.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def page(record: dict) -> str:
    """The results as Markdown."""
    lines = [
        "## Random samples learnt by heart",
        "",
        "Means over seeds. *MIA AUC*: forget against test samples by log-odds, 0.5 is chance; *KS*: the",
        "largest distance between the distributions of their log-odds; *gap*: mean absolute difference to",
        "the retrained network's retain, forget and test accuracy; *refused*: seeds for which the method",
        "said that it could not and left the network alone, of those run. Seconds are of a busy machine.",
        "",
        *(f"- {name}: {value}" for name, value in record["facts"].items()),
    ]
    titles = {
        "cifar": "CIFAR-10, 200 of 2,000",
        "labels": "Digits, 150 of 1,347, a fifth of the labels wrong",
    }
    for problem in dict.fromkeys(row["problem"] for row in record["rows"]):
        rows = [row for row in record["rows"] if row["problem"] == problem]
        head = [
            "method",
            "retain",
            "forget",
            "test",
            "MIA AUC",
            "KS",
            "gap",
            "worst gap",
            "seconds",
            "refused",
        ]
        lines += ["", f"### {titles[problem]}", "", f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        for name in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == name]

            def mean(key: str, form: str, own: list[dict] = own) -> str:
                values = [row[key] for row in own if key in row]
                return format(statistics.fmean(values), form) if values else ""

            refused = sum(row.get("reached") is False for row in own)
            cells = [name, *(mean(key, ".1f") for key in ("retain", "forget", "test"))]
            cells += [mean("auc", ".3f"), mean("ks", ".3f"), mean("gap", ".1f")]
            cells += [
                f"{max(row['gap'] for row in own):.1f}",
                mean("seconds", ".1f"),
                f"{refused} of {len(own)}",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    if record["half"]:
        lines += ["", "### Half of a class by `newton`", ""]
        done = [row for row in record["half"] if row["reached"]]
        lines.append(f"Of {len(record['half'])} requests {len(done)} were carried out, the others refused.")
        lines += ["", "| problem | class | forget | validation, that class | test, that class |"]
        lines.append("| --- | --- | --- | --- | --- |")
        for row in done:
            pairs = [f"{a:.1f} to {b:.1f}" for a, b in (row["forget"], row["validation"], row["test"])]
            lines.append(f"| {row['problem']} | {row['class']} | {' | '.join(pairs)} |")
    lines += ["", "### Cost, in epochs of training on the retain set", "", "| problem | step | epochs |"]
    lines.append("| --- | --- | --- |")
    for problem, seconds in record["cost"].items():
        for name, value in seconds.items():
            lines.append(f"| {problem} | {name} | {value / seconds['epoch']:.1f} ({value:.2f} s) |")
    return "\n".join([*lines, ""])


# The step and its guards were settled while these seeds were looked at, in this order.
SETTLED_ON = (0, 1, 2, 10, 11, 12, 13, 14, 15)


def more(problem: Problem, seeds: Iterable[int], facts: dict) -> tuple[dict, str]:
    """Forget random samples by ``newton``, one request for every seed: the record, and the page."""
    rows = []
    for seed in seeds:
        sets = sets_of(problem, problem.forgotten(seed))
        original, _ = problem.learnt(problem.train, seed)
        retrained, _ = problem.learnt(TensorDataset(*sets["retain"]), seed + RETRAINED)
        aim = figures(retrained, sets, None)
        model, told = run_method("newton", original, sets, seed)
        row = {"seed": seed, **figures(model, sets, aim), **told}
        rows.append({**row, "gap before": figures(original, sets, aim)["gap"]})
        print({key: value for key, value in rows[-1].items() if key != "note"}, flush=True)
    heads = ["seed", "retain", "forget", "test", "MIA AUC", "KS", "gap before", "gap", "reached"]
    lines = [
        "## `newton` on wrong labels, network by network",
        "",
        "150 of 1,347 digits, a fifth of the labels wrong; columns as in samples.md. The step and its guards",
        f"were settled while seeds {', '.join(map(str, SETTLED_ON))} were looked at: development figures.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
    ]
    parts = {
        "Looked at during development": [row for row in rows if row["seed"] in SETTLED_ON],
        "Others": [row for row in rows if row["seed"] not in SETTLED_ON],
    }
    for title, own in parts.items():
        if not own:
            continue
        lines += ["", f"### {title}", "", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
        for row in own:
            cells = [str(row["seed"]), *(f"{row[name]:.1f}" for name in ("retain", "forget", "test"))]
            cells += [
                f"{row['auc']:.3f}",
                f"{row['ks']:.3f}",
                f"{row['gap before']:.1f}",
                f"{row['gap']:.1f}",
            ]
            lines.append(f"| {' | '.join([*cells, 'yes' if row['reached'] else 'no: left as it was'])} |")
        done = [row for row in own if row["reached"]]
        means = ", ".join(
            f"{name} {statistics.fmean(row[name] for row in done):.2f}" for name in ("gap", "auc")
        )
        lines += ["", f"{len(done)} of {len(own)} carried out; their means: {means}."]
    return {"facts": facts, "rows": rows}, "\n".join([*lines, ""])


def main() -> None:
    """Run, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.samples", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="CIFAR-10 as cifar10_jpeg.npz")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--others", type=int, nargs="*", default=None, help="seeds of all methods but newton")
    parser.add_argument("--classes", type=int, nargs="*", default=list(range(10)), help="to forget halves of")
    parser.add_argument(
        "--kept", action="store_true", help="measure nothing: show what earlier runs measured"
    )
    parser.add_argument(
        "--more", type=int, nargs="+", default=[], help="seeds of newton on wrong labels alone"
    )
    parser.add_argument("--methods", nargs="+", default=list(SHOWN))
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    problems = [subset_of_cifar(options.data), wrong_labels()]
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    given = " ".join(arg for arg in sys.argv[1:] if arg != "--kept").replace(
        str(options.data), "cifar10_jpeg.npz"
    )
    facts = {
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "device": f"CPU, {options.threads} thread",
        "command": f"`python -m bench.samples {given}`",
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    if options.more:
        found, text = more(problems[1], options.more, facts)
        (RESULTS / "samples-newton.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (RESULTS / "samples-newton.md").write_text(text, encoding="utf-8")
        print(text)
        return
    kept = "kept from runs of earlier commits of the day"
    record: dict = {
        "facts": {**facts, "rows": kept if options.kept else "measured now"},
        "rows": [],
        "half": [],
        "cost": {},
    }
    for problem in problems:
        for seed in options.seeds:
            alone = options.others is not None and seed not in options.others
            names = ["newton"] if alone else options.methods
            if options.kept:
                names = [name for name in names if kept_at(f"{problem.name} {seed} {name}").exists()]
            record["rows"] += request(problem, seed, names)
        for label in options.classes:
            name = f"{problem.name} {options.seeds[0]} half of {label}"
            record["half"].append(
                remembered(name, functools.partial(half_of_class, problem, options.seeds[0], label))
            )
        measure = functools.partial(cost, problem, options.seeds[0])
        record["cost"][problem.name] = remembered(f"{problem.name} cost", measure)
    (RESULTS / "samples.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "samples.md").write_text(page(record), encoding="utf-8")
    print(page(record))


if __name__ == "__main__":
    main()
