"""Users' texts, forgotten by a language model that knows them by heart, beside one retrained without them.

``python -m bench.texts`` writes ``bench/results/methods/texts.md`` and ``texts.json``. A Llama of 1.1
million parameters learns 12 texts of each of 20 made-up users, and public sentences
(``bench/user_texts.py``), byte by byte. Three requests:

    user    all texts of one user; unseen texts are those of other users
    users   the same of five users
    ten     ten texts of ten users; unseen texts are other sentences about the 20 users

Methods run with their defaults. What is kept under ``build/texts`` is not measured again.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import platform
import random
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from bench.text_models import KEPT, RECIPE, learnt
from bench.user_texts import Texts, batches, decoded, make_texts
from unlearn_ext import METHODS
from unlearn_ext.methods.until import measure, perplexity_rise
from unlearn_ext.metrics import language

RESULT = Path(__file__).parent / "results" / "methods" / "texts"
REQUESTS = {
    "user": "All texts of one user",
    "users": "All texts of five users",
    "ten": "Ten texts of ten users",
}
SHOWN = (
    "newton",
    "ssd",
    "gradient_masking",
    "npo",
    "simnpo",
    "gradient_difference",
    "rmu",
    "salun",
    "gradient_ascent",
)
SETTINGS: dict[str, dict[str, object]] = {"rmu": {"layer": "model.layers.1"}}
NEEDS_VALIDATION = {"newton", "ssd"}
RETRAINED, FLOOR = 100, 200  # added to a seed: seeds of the models that a request is held against
# The bars: forget loss of the retrained model's, retain perplexity of the original's, the attacks.
NEAR, KEPT_WITHIN, CHANCE = 0.05, 0.02, (0.45, 0.55)
Sets = dict[str, list[str]]


def sets_of(texts: Texts, request: str, seed: int) -> Sets:
    """Split everybody's texts by a request."""
    rng = random.Random(f"{request} {seed}")
    users = range(len(texts.known))
    if request == "ten":
        gone = {(user, rng.randrange(len(texts.known[user]))) for user in rng.sample(users, 10)}
        unseen = rng.sample([text for own in texts.more for text in own], sum(map(len, texts.more)))
    else:
        leaving = rng.sample(users, 1 if request == "user" else 5)
        gone = {(user, index) for user in leaving for index in range(len(texts.known[user]))}
        unseen = [text for own in texts.unseen for text in own]
    places = [(user, index) for user in users for index in range(len(texts.known[user]))]
    half = len(unseen) // 2
    return {
        "forget": [texts.known[user][index] for user, index in places if (user, index) in gone],
        "others": [texts.known[user][index] for user, index in places if (user, index) not in gone],
        "public": texts.public,
        "validation": unseen[:half],
        "unseen": unseen[half:],
        "public unseen": texts.public_unseen,
    }


def figures(model: nn.Module, sets: Sets) -> dict[str, float]:
    """Losses in nats per byte, accuracies, what is still told of the forgotten texts, and the attacks."""
    found: dict[str, float] = {}
    for name in ("forget", "others", "public", "unseen", "public unseen"):
        seen = measure(model, batches(sets[name]))
        found |= {f"{name} loss": seen.loss, f"{name} accuracy": 100 * seen.accuracy}
    weights = {name: len(sets[name]) for name in ("others", "public")}
    found["retain loss"] = sum(found[f"{name} loss"] * n for name, n in weights.items()) / sum(
        weights.values()
    )
    forget, unseen = batches(sets["forget"]), batches(sets["unseen"])
    attacks = language.language_mia(model, forget=forget, test=unseen, decode=decoded)
    found |= {f"auc {name}": value for name, value in attacks.items()}
    found["extraction"] = language.extraction_strength(model, forget)
    return found


def held_against(found: dict[str, float], original: dict[str, float], aim: dict[str, float]) -> dict:
    """What the bars are about."""
    rise = perplexity_rise(original["retain loss"], found["retain loss"])
    off = found["forget loss"] / aim["forget loss"] - 1
    low, high = CHANCE
    attacked = {name: low <= found[f"auc {name}"] <= high for name in ("loss", "min_k")}
    return {
        "forget loss off": 100 * off,
        "retain perplexity rise": 100 * rise,
        "near": abs(off) <= NEAR,
        "kept": rise <= KEPT_WITHIN,
        "attack by loss at chance": attacked["loss"],
        "attack by min_k at chance": attacked["min_k"],
    }


def run_method(name: str, original: nn.Module, sets: Sets, seed: int) -> tuple[nn.Module, dict]:
    """One method with its defaults on a copy: the copy, its seconds, and whether it says it got there."""
    model = copy.deepcopy(original)
    settings = dict(SETTINGS.get(name, {}))
    if name in NEEDS_VALIDATION:
        settings["validation"] = batches(sets["validation"])
    # Texts of others and public ones mixed, so that every batch holds both.
    rng = random.Random(seed)
    kept = sets["others"] + sets["public"]
    kept = rng.sample(kept, len(kept))
    start = time.perf_counter()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            generator = torch.Generator().manual_seed(seed)
            result = METHODS[name](
                model, batches(sets["forget"]), batches(kept), generator=generator, **settings
            )
        except (ValueError, NotImplementedError, FloatingPointError) as error:
            note = f"{type(error).__name__}: {error}"
            return copy.deepcopy(original), {"seconds": time.perf_counter() - start, "note": note}
    note = "; ".join(str(entry.message) for entry in told)
    return model, {"seconds": time.perf_counter() - start, "reached": result.reached, "note": note}


def remembered(name: str, take: Callable[[], dict]) -> dict:
    """A result of an earlier, perhaps interrupted run, or a new one."""
    path = KEPT / f"{name.replace(' ', '-')}.json"
    if not path.exists():
        found = take()
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(found))
        draft.replace(path)
    found = json.loads(path.read_text())
    shown = {key: round(value, 3) for key, value in found.items() if isinstance(value, float)}
    print(name, shown, found.get("note", ""), flush=True)
    return found


def request(texts: Texts, kind: str, seed: int, methods: Iterable[str], *, floor: bool) -> list[dict]:
    """Forget with every method, and retrain."""
    sets = sets_of(texts, kind, seed)
    everything = [text for own in texts.known for text in own] + texts.public
    kept = sets["others"] + sets["public"]

    def trained(data: list[str], own: int) -> dict:
        model, seconds = learnt(data, own)
        return {**figures(model, sets), "seconds": seconds}

    name = f"{kind} {seed}"
    before = remembered(f"{name} original", functools.partial(trained, everything, seed))
    aim = remembered(f"{name} retrained", functools.partial(trained, kept, seed + RETRAINED))
    rows = [{"method": "original", **before}, {"method": "retrained", **aim}]
    if floor:
        other = remembered(f"{name} floor", functools.partial(trained, kept, seed + FLOOR))
        rows.append({"method": "retrained, another seed", **other})

    def row(method: str) -> dict:
        original, _ = learnt(everything, seed)
        model, facts = run_method(method, original, sets, seed)
        return {**figures(model, sets), **facts}

    rows += [
        {"method": method, **remembered(f"{name} {method}", functools.partial(row, method))}
        for method in methods
    ]
    return [{"request": kind, "seed": seed, **row, **held_against(row, before, aim)} for row in rows]


COLUMNS: dict[str, tuple[str, str]] = {
    "forget loss": ("forget loss", ".2f"),
    "off, %": ("forget loss off", "+.1f"),
    "forget acc.": ("forget accuracy", ".1f"),
    "retain ppl., %": ("retain perplexity rise", "+.1f"),
    "unseen loss": ("unseen loss", ".2f"),
    "AUC loss": ("auc loss", ".2f"),
    "zlib": ("auc zlib", ".2f"),
    "Min-K": ("auc min_k", ".2f"),
    "Min-K++": ("auc min_k++", ".2f"),
    "extraction": ("extraction", ".2f"),
    "seconds": ("seconds", ".0f"),
}


def page(record: dict) -> str:
    """The results as Markdown."""
    lines = [
        "## Users' texts, forgotten by a language model",
        "",
        "A Llama of 1.1 million parameters knows 240 texts of 20 made-up users and 120 public sentences by",
        "heart, byte by byte. Methods run with their defaults (newton and SSD get validation texts, RMU its",
        "layer). *Off*: forget loss (nats per byte) against the model retrained without the texts; *retain",
        "ppl.*: by how much the perplexity on all retained texts rises over the original's; *AUC*: telling",
        "forgotten from unseen texts of their kind by loss, loss over zlib, Min-K% and Min-K%++ (k = 0.2);",
        "0.5 is chance. *Extraction*: share of a text that is completed from what precedes it.",
        "*Passes*: forget loss within 5 %, retain perplexity within 2 %, AUC by loss and by Min-K% in .45 to",
        ".55; a bar that the retrained model itself misses (by the luck of few texts) is shown all the same.",
        "Means over seeds; seconds are of a busy machine.",
        "",
        *(f"- {name}: {value}" for name, value in record["facts"].items()),
    ]
    for kind, title in REQUESTS.items():
        rows = [row for row in record["rows"] if row["request"] == kind]
        if not rows:
            continue
        seeds = sorted({row["seed"] for row in rows})
        lines += ["", f"### {title} (seeds {', '.join(map(str, seeds))})", ""]
        head = ["method", *COLUMNS, "passes"]
        lines += [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
        for method in dict.fromkeys(row["method"] for row in rows):
            own = [row for row in rows if row["method"] == method]
            cells = [method, *(_mean(own, key, form) for key, form in COLUMNS.values()), _passes(own)]
            lines.append(f"| {' | '.join(cells)} |")
        notes = {row["method"]: row["note"] for row in rows if row.get("reached") is False or _failed(row)}
        lines += ["", *(f"- {method}: {note}" for method, note in notes.items())] if notes else []
    return "\n".join([*lines, ""])


def _failed(row: dict) -> bool:
    return row.get("note", "").split(":")[0].endswith("Error")


def _mean(rows: list[dict], key: str, form: str) -> str:
    values = [row[key] for row in rows if key in row]
    return format(statistics.fmean(values), form) if values else ""


def _passes(rows: list[dict]) -> str:
    if rows[0]["method"] == "original":
        return ""
    told = []
    for row in rows:
        missed = [
            what
            for what, key in (
                ("forget loss", "near"),
                ("retain", "kept"),
                ("AUC loss", "attack by loss at chance"),
                ("AUC Min-K", "attack by min_k at chance"),
            )
            if not row[key]
        ]
        if row.get("reached") is False or _failed(row):
            told.append("refused")
        else:
            told.append("yes" if not missed else f"no: {', '.join(missed)}")
    return "; ".join(told)


def main() -> None:
    """Run, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.texts", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--requests", nargs="+", default=list(REQUESTS), choices=REQUESTS)
    parser.add_argument("--methods", nargs="+", default=list(SHOWN))
    parser.add_argument("--floor", action="store_true", help="retrain with another seed too")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts = make_texts()
    commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    record: dict = {
        "facts": {
            "commit": commit.stdout.strip() or "unknown",
            "torch": torch.__version__,
            "device": f"CPU, {options.threads} thread",
            "python (public sentences)": platform.python_version(),
            "training": ", ".join(f"{name} {value}" for name, value in RECIPE.items()),
            "command": f"`python -m bench.texts {' '.join(sys.argv[1:])}`",
        },
        "rows": [],
    }
    for kind in options.requests:
        for seed in options.seeds:
            record["rows"] += request(texts, kind, seed, options.methods, floor=options.floor)
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    RESULT.with_suffix(".md").write_text(page(record), encoding="utf-8")
    print(page(record))


if __name__ == "__main__":
    main()
