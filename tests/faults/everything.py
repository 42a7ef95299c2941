"""Faults at every place of every call: ``python tests/faults/everything.py`` prints what they left.

``--how call`` puts an error, an interrupt and an out-of-memory in turn into every call of the user's code
(model, loss, backward pass, batch, file); ``operator`` into every operator of torch, as a failing allocator
does; ``line`` interrupts at every line of the package that is run. ``--sample N`` tries N places of each.
"""

import argparse
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import disturb
import fault_models
import torch
from subjects import SUBJECTS


def places_of(how, subject, kind, sample, seed):
    """Places, and which error strikes there; a string where the subject refuses the model."""
    found = disturb.count(subject, kind, how, Path(tempfile.mkdtemp()))
    if isinstance(found, str):
        return found, []
    chosen = found.all
    if sample and sample < len(chosen):
        chosen = random.Random(f"{seed} {how} {subject} {kind.__name__}").sample(chosen, sample)
    errors = ["interrupt"] if how == "line" else list(disturb.ERRORS)
    return found, [(place, errors[number % len(errors)]) for number, place in enumerate(chosen)]


def main():
    """Run, print, and fail if something was left behind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--how", nargs="+", choices=disturb.WATCHERS, default=["call", "operator", "line"])
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    parser.add_argument("--sample", type=int, default=0, help="places of each call on each model; 0: all")
    parser.add_argument("--seed", default="0")
    options = parser.parse_args()
    torch.set_num_threads(1)
    tried, wrong = Counter(), Counter()
    for how in options.how:
        for subject in options.subjects:
            for kind in fault_models.KINDS:
                found, chosen = places_of(how, subject, kind, options.sample, options.seed)
                for place, error in chosen:
                    with tempfile.TemporaryDirectory() as folder:
                        outcome = disturb.disturb(subject, kind, how, found, place, error, Path(folder))
                    tried[how] += 1
                    if not outcome.is_right:
                        wrong[how] += 1
                        print("WRONG", outcome, flush=True)
            print(f"{how}: {subject}: {tried[how]} so far, {wrong[how]} wrong", flush=True)
    for how in options.how:
        print(f"| {how} | {tried[how]} | {wrong[how]} |")
    return int(bool(wrong))


if __name__ == "__main__":
    raise SystemExit(main())
