"""The page about users' texts: tables of what ``bench.texts`` has measured."""

from __future__ import annotations

import statistics

REQUESTS = {
    "user": "All texts of one user",
    "users": "All texts of five users",
    "ten": "Ten texts of ten users",
}
# Title, key and format; with spread the deviation over seeds is shown too.
COLUMNS: tuple[tuple[str, str, str, bool], ...] = (
    ("forget loss", "forget loss", ".2f", False),
    ("off, %", "forget loss off", "+.1f", True),
    ("forget acc.", "forget accuracy", ".1f", False),
    ("retain ppl., %", "retain perplexity rise", "+.1f", True),
    ("unseen loss", "unseen loss", ".2f", False),
    ("AUC loss", "auc loss", ".2f", True),
    ("off retrained's", "auc loss off", "+.2f", True),
    ("zlib", "auc zlib", ".2f", False),
    ("Min-K", "auc min_k", ".2f", False),
    ("Min-K++", "auc min_k++", ".2f", False),
    ("extraction", "extraction", ".2f", False),
    ("seconds", "seconds", ".0f", False),
)
BARS = {
    "near": "forget loss",
    "kept": "retain",
    "attack by loss at chance": "AUC loss",
    "attack by min_k at chance": "AUC Min-K",
}
_HEAD = """\
## Users' texts, forgotten by a language model

A Llama of 1.1 million parameters knows 240 texts of 20 made-up users and 120 public sentences by
heart, byte by byte. Methods run with their defaults (newton and SSD get validation texts, RMU its
layer). *Off*: forget loss (nats per byte) against the model retrained without the texts; *retain
ppl.*: by how much the perplexity on all retained texts rises over the original's; *AUC*: telling
forgotten from unseen texts of their kind by loss, loss over zlib, Min-K% and Min-K%++ (k = 0.2);
0.5 is chance, and *off retrained's* is beside the retrained model's own. *Extraction*: share of a text
that is completed from what precedes it. *Passes*: forget loss within 5 %, retain perplexity within
2 %, AUC by loss and by Min-K% in .45 to .55, of how many seeds, and which bars the others miss; a bar
that the retrained model itself misses (by the luck of few texts) is shown all the same. Means over
seeds, with the deviation from seed to seed; seconds are of a busy machine."""


def page(record: dict) -> str:
    """Write the results as Markdown.

    Args:
        record: ``facts`` by name, and ``rows``, one per request, seed and method.

    Returns:
        The page.
    """
    facts = dict(record["facts"])
    if commits := sorted({row["commit"] for row in record["rows"] if "commit" in row}):
        facts = {"measured at": ", ".join(commits), **facts}
    lines = [_HEAD, "", *(f"- {name}: {value}" for name, value in facts.items())]
    for kind, title in REQUESTS.items():
        rows = [row for row in record["rows"] if row["request"] == kind]
        if rows:
            lines += ["", f"### {title}", "", *_table(rows)]
    return "\n".join([*lines, ""])


def _table(rows: list[dict]) -> list[str]:
    by_method: dict[str, list[dict]] = {}
    for row in rows:
        by_method.setdefault(row["method"], []).append(row)
    head = ["method", "seeds", *(title for title, *_ in COLUMNS), "passes"]
    lines = [f"| {' | '.join(head)} |", "| --- " * len(head) + "|"]
    for method, own in by_method.items():
        cells = [_mean(own, key, form, spread=spread) for _, key, form, spread in COLUMNS]
        seeds = ", ".join(str(row["seed"]) for row in own)
        lines.append(f"| {' | '.join([method, seeds, *cells, _passes(own)])} |")
    notes = [row for row in rows if _gave_up(row)]
    return [*lines, "", *(f"- {row['method']}, seed {row['seed']}: {row['note']}" for row in notes)][
        : None if notes else len(lines)
    ]


def _gave_up(row: dict) -> str:
    # "refused" by the method itself, "failed" by anything else; empty where it ran to its end.
    kind = row.get("note", "").split(":")[0]
    if row.get("reached") is False or kind in ("ValueError", "NotImplementedError"):
        return "refused"
    return "failed" if kind.endswith("Error") else ""


def _mean(rows: list[dict], key: str, form: str, *, spread: bool) -> str:
    values = [row[key] for row in rows if key in row]
    if not values:
        return ""
    mean = format(statistics.fmean(values), form)
    if not spread or len(values) == 1:
        return mean
    return f"{mean} ± {format(statistics.stdev(values), form.lstrip('+'))}"


def _passes(rows: list[dict]) -> str:
    if rows[0]["method"] == "original":
        return ""
    counts: dict[str, int] = {}
    passed = 0
    for row in rows:
        gave_up = _gave_up(row)
        missed = [gave_up] if gave_up else [what for key, what in BARS.items() if not row[key]]
        passed += not missed
        for what in missed:
            counts[what] = counts.get(what, 0) + 1
    told = [f"{passed} of {len(rows)}"]
    told += [what if count == len(rows) else f"{what} ({count})" for what, count in counts.items()]
    return "; ".join([told[0], ", ".join(told[1:])]) if counts else told[0]
