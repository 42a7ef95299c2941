"""Users' texts, forgotten by a language model that knows them by heart, beside one retrained without them.

``python -m bench.texts`` writes ``bench/results/methods/texts.md`` and ``texts.json``. A Llama of 1.1
million parameters learns 12 texts of each of 20 made-up users, and public sentences
(``bench/user_texts.py``), byte by byte. Three requests:

    user    all texts of one user; unseen texts are those of other users
    users   the same of five users
    ten     ten texts of ten users; unseen texts are other sentences about the 20 users

Methods run with their defaults. Every cell (request, seed, method) is kept under ``build/texts`` as soon as
it is measured, by what it is of: texts, recipe, settings, version of PyTorch. The same command goes on where
an interrupted run was, and ``--kept`` writes the pages of what there is.

    python -m bench.texts --seeds 0 1 2           # all of it: 12 networks, 81 runs of methods
    python -m bench.texts --seeds 0 1 2 --kept    # the pages, after several processes have shared the cells
"""

from __future__ import annotations

import argparse
import copy
import functools
import hashlib
import json
import os
import platform
import random
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from bench import table, text_models
from bench.text_models import RECIPE, learnt
from bench.texts_page import REQUESTS, page
from bench.user_texts import Texts, batches, decoded, make_texts
from unlearn_ext import METHODS
from unlearn_ext.methods.until import measure, perplexity_rise
from unlearn_ext.metrics import language

RESULT = Path(__file__).parent / "results" / "methods" / "texts"
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
    return {
        "forget": [texts.known[user][index] for user, index in places if (user, index) in gone],
        "others": [texts.known[user][index] for user, index in places if (user, index) not in gone],
        "public": texts.public,
        # Every other one, so that neither half has users to itself: texts of some are harder than of others.
        "validation": unseen[::2],
        "unseen": unseen[1::2],
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
        "auc loss off": found["auc loss"] - aim["auc loss"],
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
        except (TypeError, ValueError, RuntimeError, FloatingPointError) as error:
            # The other cells of a long run are not to be lost by one: the page shows it, and why.
            note = f"{type(error).__name__}: {error}"
            return copy.deepcopy(original), {"seconds": time.perf_counter() - start, "note": note}
    note = "; ".join(str(entry.message) for entry in told)
    return model, {"seconds": time.perf_counter() - start, "reached": result.reached, "note": note}


class Kept:
    """Results of earlier, perhaps interrupted runs.

    Args:
        only: Measure nothing: what is not kept is left out.
    """

    def __init__(self, *, only: bool = False) -> None:
        self._only = only
        self._commit = _commit()

    def get(self, name: str, of: object, take: Callable[[], dict]) -> dict | None:
        """Return a cell's result: kept, or measured and kept now.

        Args:
            name: Of the cell.
            of: All that it depends on, but for the package: a change of that is told by the cell's commit.
            take: Measures it.

        Returns:
            The result; None where it is not kept and nothing is to be measured.
        """
        key = hashlib.sha256(json.dumps([RECIPE, torch.__version__, of]).encode()).hexdigest()[:12]
        path = text_models.KEPT / f"{name.replace(' ', '-')}-{key}.json"
        if not path.exists():
            if self._only:
                return None
            found = {**take(), "commit": self._commit}
            path.parent.mkdir(parents=True, exist_ok=True)
            draft = path.with_suffix(".draft")
            draft.write_text(json.dumps(found))
            draft.replace(path)
        found = json.loads(path.read_text())
        shown = {key: round(value, 3) for key, value in found.items() if isinstance(value, float)}
        print(name, shown, found.get("note", ""), flush=True)
        return found


def _commit() -> str:
    def git(*words: str) -> str:
        told = subprocess.run(["git", *words], capture_output=True, text=True, cwd=Path(__file__).parent)
        return told.stdout.strip()

    changed = git("status", "--porcelain", "--", "../unlearn_ext", "*.py")
    return (git("rev-parse", "--short=12", "HEAD") or "unknown") + (" with changes" if changed else "")


def request(
    texts: Texts, kind: str, seed: int, methods: Iterable[str], kept: Kept, *, floor: bool
) -> list[dict]:
    """Forget with every method, and retrain."""
    sets = sets_of(texts, kind, seed)
    everything = [text for own in texts.known for text in own] + texts.public
    retained = sets["others"] + sets["public"]

    def trained(name: str, data: list[str], own: int) -> dict | None:
        def take() -> dict:
            model, seconds = learnt(data, own)
            return {**figures(model, sets), "seconds": seconds}

        return kept.get(f"{kind} {seed} {name}", [sets, data, own], take)

    def row(method: str) -> dict:
        original, _ = learnt(everything, seed)
        model, facts = run_method(method, original, sets, seed)
        return {**figures(model, sets), **facts}

    before = trained("original", everything, seed)
    aim = trained("retrained", retained, seed + RETRAINED)
    if before is None or aim is None:
        return []
    rows = {"original": before, "retrained": aim}
    if floor:
        rows["retrained, another seed"] = trained("floor", retained, seed + FLOOR)
    for method in methods:
        settings = [sets, seed, SETTINGS.get(method, {})]
        rows[method] = kept.get(f"{kind} {seed} {method}", settings, functools.partial(row, method))
    return [
        {"request": kind, "seed": seed, "method": method, **found, **held_against(found, before, aim)}
        for method, found in rows.items()
        if found is not None
    ]


def write(record: dict) -> None:
    """Write the pages: a draft first, so that interrupted runs, and several at once, leave whole ones."""
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    for suffix, text in ((".json", json.dumps(record, indent=1) + "\n"), (".md", page(record))):
        draft = RESULT.with_suffix(f".draft-{os.getpid()}")
        draft.write_text(text, encoding="utf-8")
        draft.replace(RESULT.with_suffix(suffix))
    table.write_results()


def main() -> None:
    """Run, and write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.texts", description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--requests", nargs="+", default=list(REQUESTS), choices=REQUESTS)
    parser.add_argument("--methods", nargs="+", default=list(SHOWN))
    parser.add_argument("--floor", action="store_true", help="retrain with another seed too")
    parser.add_argument("--kept", action="store_true", help="measure nothing, show what is kept")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    texts, kept = make_texts(), Kept(only=options.kept)
    record: dict = {
        "facts": {
            "torch": torch.__version__,
            "device": f"CPU, {options.threads} thread",
            "python (public sentences)": platform.python_version(),
            "training": ", ".join(f"{name} {value}" for name, value in RECIPE.items()),
            "command": f"`python -m bench.texts {' '.join(sys.argv[1:])}`",
        },
        "rows": [],
    }
    # Every request with one seed before any with the next: what an interrupted run leaves is whole tables.
    for seed in options.seeds:
        for kind in options.requests:
            record["rows"] += request(texts, kind, seed, options.methods, kept, floor=options.floor)
            if record["rows"]:
                write(record)
    print(page(record))


if __name__ == "__main__":
    main()
