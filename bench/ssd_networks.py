"""How far SSD carries: classes of digits forgotten in networks of many kinds, in one shot and in closed loop.

``python -m bench.ssd_networks`` (minutes on one core) writes ``bench/results/methods/ssd-networks.md`` and
``.json``. A request passes if test accuracy on its classes falls to 5 % or less and no more than 3 points of
accuracy on the retained training samples are lost. It fails silently if it does not pass and nothing said so.
"""

import argparse
import copy
import functools
import json
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from bench.digit_networks import BATCH, NETWORKS, UNTUNED, trained
from unlearn_ext import metrics
from unlearn_ext.demo import load_digits
from unlearn_ext.fisher.diagonal import fisher_diagonal
from unlearn_ext.fisher.importance import Importance
from unlearn_ext.importance import LossFn
from unlearn_ext.methods import plan_ssd, ssd
from unlearn_ext.tasks import losses

RESULT = Path(__file__).parent / "results" / "methods" / "ssd-networks"

# One-shot setting -> loss of the importances, estimator, and what plan_ssd is told.
ONE_SHOT: dict[str, tuple[LossFn, str, dict[str, object]]] = {
    "one shot, cross entropy": (losses.cross_entropy, "per_sample", {"alpha": "adaptive"}),
    "one shot, cross entropy, lambda 1": (
        losses.cross_entropy,
        "per_sample",
        {"alpha": "adaptive", "lambda_": 1.0},
    ),
    "one shot, `losses.log_odds`": (losses.log_odds, "per_sample", {"alpha": "adaptive"}),
    f"one shot, batches of {BATCH}, alpha 10, lambda 1 (published)": (
        losses.cross_entropy,
        "batch",
        {"alpha": 10.0, "lambda_": 1.0, "estimator": "batch"},
    ),
    f"one shot, batches of {BATCH}, lambda 1": (
        losses.cross_entropy,
        "batch",
        {"alpha": "adaptive", "lambda_": 1.0, "estimator": "batch"},
    ),
}
CLOSED = "closed loop (defaults)"
SETTINGS = [*ONE_SHOT, CLOSED]
FEWER = ["one shot, `losses.log_odds`", CLOSED]

Record = dict[str, object]


def _batches(data: TensorDataset, keep: Callable[[Tensor], Tensor]) -> list[tuple[Tensor, Tensor]]:
    x, y = (tensor[keep(data.tensors[1])] for tensor in data.tensors)
    return list(zip(x.split(BATCH), y.split(BATCH), strict=True))


def forgotten(
    model: nn.Module, train: TensorDataset, test: TensorDataset, classes: list[int], settings: list[str]
) -> Iterator[Record]:
    """Forget some classes with every setting, each on a copy of the model, and look at the test set."""
    mine = torch.tensor(classes)
    forget = _batches(train, lambda y: torch.isin(y, mine))
    retain = _batches(train, lambda y: ~torch.isin(y, mine))
    unseen = _batches(test, lambda y: torch.isin(y, mine))
    before = metrics.accuracy(model, retain)
    known: dict[tuple[LossFn, str], tuple[Importance, Importance]] = {}
    for name in settings:
        own = copy.deepcopy(model)
        started = time.perf_counter()
        found: Record = {}
        if name == CLOSED:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = ssd(own, forget, retain)
            found = {"reached": result.reached, "passes": result.passes}
            found["rounds"] = max(
                (e["round"] for e in result.history if e["phase"] == "candidate"), default=0
            )
        else:
            loss_fn, estimator, settings_of = ONE_SHOT[name]
            key = (loss_fn, estimator)
            if key not in known:
                measure = functools.partial(fisher_diagonal, model, loss_fn=loss_fn, estimator=estimator)
                known[key] = measure(forget), measure(retain)
            plan_ssd(own, *known[key], **settings_of).apply()
        seconds = time.perf_counter() - started
        left, lost = metrics.accuracy(own, unseen), before - metrics.accuracy(own, retain)
        passed = left <= 0.05 and lost <= 0.03
        found |= {
            "setting": name,
            "classes": classes,
            "test_accuracy_left": left,
            "retain_points_lost": 100 * lost,
            "passed": passed,
            "failed_silently": not passed and found.get("reached", True) is True,
            "seconds": seconds,
        }
        yield found


def every_class(names: dict[str, object], seeds: list[int], data: list[TensorDataset]) -> Iterator[Record]:
    """Forget each class, one by one."""
    for name in names:
        for seed in seeds:
            model = trained(name, seed, data[0])
            for digit in range(10):
                settings = SETTINGS if name in NETWORKS else FEWER
                for found in forgotten(model, *data, [digit], settings):
                    yield {"network": name, "seed": seed, **found}


def several_classes(seeds: list[int], data: list[TensorDataset]) -> Iterator[Record]:
    """Forget 2, 3 and 5 classes at once: two draws for each network."""
    draws = torch.Generator().manual_seed(0)
    for name in NETWORKS:
        for seed in seeds:
            model = trained(name, seed, data[0])
            for n in (2, 3, 5):
                for _ in range(2):
                    classes = sorted(torch.randperm(10, generator=draws)[:n].tolist())
                    for found in forgotten(model, *data, classes, FEWER):
                        yield {"network": name, "seed": seed, **found}


def quarter_classes(seeds: list[int], data: list[TensorDataset]) -> Iterator[Record]:
    """Forget classes of which the network was given a quarter of the samples: 1, 4, 7 and 9."""
    x, y = data[0].tensors
    cut = (1, 4, 7, 9)
    kept = torch.ones(len(y), dtype=torch.bool)
    for digit in cut:
        kept[(y == digit).nonzero().flatten()[(y == digit).sum() // 4 :]] = False
    train = TensorDataset(x[kept], y[kept])
    for name in NETWORKS:
        model = trained(name, seeds[0], train)
        for digit in cut:
            for found in forgotten(model, train, data[1], [digit], FEWER):
                yield {"network": name, "seed": seeds[0], **found}


def table(records: list[Record], by: Callable[[Record], str], title: str) -> str:
    """Count the requests that pass, per setting and column."""
    columns = list(dict.fromkeys(by(found) for found in records))
    heads = [title, *columns, "all", "failed silently", "mean loss, points", "worst loss", "mean passes"]
    rows = [heads, ["---"] * len(heads)]

    def passed(mine: list[Record]) -> str:
        return f"{sum(bool(found['passed']) for found in mine)} / {len(mine)}"

    for setting in dict.fromkeys(str(found["setting"]) for found in records):
        mine = [found for found in records if found["setting"] == setting]
        lost = [float(found["retain_points_lost"]) for found in mine]
        passes = [float(found["passes"]) for found in mine if "passes" in found]
        rows.append(
            [
                setting,
                *(passed([found for found in mine if by(found) == column]) for column in columns),
                passed(mine),
                str(sum(bool(found["failed_silently"]) for found in mine)),
                f"{sum(lost) / len(lost):.2f}",
                f"{max(lost):.1f}",
                f"{sum(passes) / len(passes):.2f}" if passes else "",
            ]
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Run, and write the page and the records."""
    parser = argparse.ArgumentParser(prog="python -m bench.ssd_networks", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    data = list(load_digits())

    def network(found: Record) -> str:
        return str(found["network"])

    parts = {
        "Every class": (every_class(NETWORKS, options.seeds, data), network),
        "Networks on which nothing was tuned": (every_class(UNTUNED, options.seeds, data), network),
        "Several classes at once": (
            several_classes(options.seeds, data),
            lambda found: f"{len(found['classes'])} classes",
        ),
        "Classes cut to a quarter in training": (quarter_classes(options.seeds, data), network),
    }
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    facts = {
        "commit": commit.stdout.strip() or "unknown",
        "torch": torch.__version__,
        "device": "CPU",
        "threads": options.threads,
        "seeds": options.seeds,
        "command": f"python -m bench.ssd_networks --seeds {' '.join(map(str, options.seeds))}",
    }
    records: dict[str, list[Record]] = {}
    page = [
        "## SSD over networks of many kinds",
        "",
        "A request passes if test accuracy on what was to be forgotten is 5 % or less and at most 3 points",
        "of accuracy on the retained training samples are lost; it *failed silently* if it does not and",
        "`reached` does not say so (one shot never says). Losses are points of retain accuracy. *Passes*:",
        "forward passes over all the data beyond those that measure the importances.",
        "",
        f"- commit {facts['commit']}, torch {facts['torch']}, CPU, {options.threads} thread(s)",
        f"- reproduce with `{facts['command']}`",
    ]
    for title, (stream, by) in parts.items():
        records[title] = list(stream)
        page += ["", f"### {title}", "", table(records[title], by, "setting")]
        print("\n".join(page[-3:]), flush=True)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.with_suffix(".md").write_text("\n".join([*page, ""]), encoding="utf-8")
    RESULT.with_suffix(".json").write_text(
        json.dumps({**facts, "records": records}, indent=1) + "\n", "utf-8"
    )
    print(f"wrote {RESULT}.md and .json")


if __name__ == "__main__":
    main()
