"""Holds what the CUDA kernels move through memory to the budgets in traffic.json, without a GPU.

    traffic.py --program PROGRAM [--update] [--arrays] [text]

The program is built from traffic_cases.cpp: it executes every kernel in the CUDA checker, which counts
each access. `text` chooses the cases whose name contains it, `--arrays` also prints the counts of every
array, and `--update` writes the figures into traffic.json, where whoever reviews a change sees them.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BUDGET = HERE / "traffic.json"
# Another version of the compiler may keep a value in a register that this one reads twice.
SLACK = 0.01

# Figures of a case: whether less of it is better. The others only describe the case.
FIGURES = {
    "memory": True,
    "moved": True,
    "efficiency": False,
    "width": False,
    "passes": True,
    "conflicts": True,
    "barriers": True,
    "mmas": True,
    "launches": True,
}
MEANING = """\
memory      32-byte sectors touched in a launch, once each, over the floor: inputs read, outputs written once
moved       the same, of every warp instruction: what the caches serve
efficiency  bytes used of the sectors moved
width       bytes per lane and instruction, 16 at most
passes      bytes of the inputs that are loaded, over their size
conflicts   wavefronts of shared memory beyond those without bank conflicts, relative to these
mmas        instructions of the tensor cores; one of half the depth counts half"""


def measure(program: str, text: str | None) -> dict[str, dict]:
    """The figures of the cases, by name."""
    command = [program, *([text] if text else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        sys.exit(
            f"FAIL {' '.join(command)}: exit status {done.returncode}, {done.stdout[-500:] or 'no case'}"
        )
    rows = [json.loads(line) for line in lines]
    return {row.pop("case"): row for row in rows}


def complaints(budget: dict[str, dict], found: dict[str, dict], whole: bool) -> list[str]:
    """What is worse than its budget, has none, or is gone."""
    bad = [f"FAIL {name}: is not in traffic.json" for name in found.keys() - budget.keys()]
    if whole:
        bad += [f"FAIL {name}: in traffic.json, but not a case" for name in budget.keys() - found.keys()]
    for name in found.keys() & budget.keys():
        for figure, less in FIGURES.items():
            got, may = found[name][figure], budget[name][figure]
            if got > may * (1 + SLACK) if less else got < may * (1 - SLACK):
                bad.append(
                    f"FAIL {name}: {figure} {got:g}, {'at most' if less else 'at least'} {may:g} budgeted"
                )
    return sorted(bad)


def improved(budget: dict[str, dict], found: dict[str, dict]) -> list[str]:
    """Cases that are better than their budget, which should then be updated."""
    return sorted(
        name
        for name in found.keys() & budget.keys()
        for figure, less in FIGURES.items()
        if (
            found[name][figure] < budget[name][figure] * (1 - SLACK)
            if less
            else found[name][figure] > budget[name][figure] * (1 + SLACK)
        )
    )


def written(budget: dict[str, dict]) -> str:
    """One line per case, so that a change of one is a change of one line."""
    rows = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in budget.items())
    return f"{{\n{rows}\n}}\n"


def table(found: dict[str, dict]) -> str:
    names = ("floor", *FIGURES)
    width = max(map(len, found))
    lines = [f"{'':{width}} " + "".join(f"{name:>11}" for name in names)]
    lines += [f"{name:{width}} " + "".join(f"{row[key]:11g}" for key in names) for name, row in found.items()]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--program", required=True)
    parser.add_argument("--update", action="store_true")
    parser.add_argument("--arrays", action="store_true")
    parser.add_argument("text", nargs="?")
    options = parser.parse_args()
    budget: dict[str, dict] = json.loads(BUDGET.read_text(encoding="utf-8")) if BUDGET.exists() else {}
    found = measure(options.program, options.text)
    print(table(found))
    print(MEANING)
    for name, row in found.items():
        arrays = row.pop("arrays")
        if options.arrays:
            print(name)
            for array, counts in arrays.items():
                print(f"  {array:24}", "  ".join(f"{key} {value}" for key, value in counts.items()))
    if options.update:
        kept = budget if options.text else {}
        BUDGET.write_text(written({**kept, **found}), encoding="utf-8")
        print(f"{len(found)} budgets written to {BUDGET.name}")
        return 0
    bad = complaints(budget, found, whole=options.text is None)
    for name in sorted(set(improved(budget, found))):
        print(f"better than its budget, which --update lowers: {name}")
    if bad:
        print("\n".join(bad))
    print(f"{len(found)} cases held to their budgets: {len(bad)} complaints")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
