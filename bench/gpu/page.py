"""Turns the record of a run into Markdown: what passed, then the figures beside their targets."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
LOOP = "single-sample loop"


def render(record: Mapping[str, Any]) -> str:
    """Write the page.

    Args:
        record: As ``bench.gpu`` writes it; stages that have not run are left out.

    Returns:
        Markdown.
    """
    found = record.get("stages", {})
    title = f"## GPU: {record['device']}"
    parts = [f"{title} (dry run: nothing here is a measurement)" if record["dry run"] else title]
    parts.append("\n".join(f"- {line}" for line in _facts(record)))
    rows = [
        [name, entry["status"], f"{entry['seconds']:.0f}", _outcome(name, entry)]
        for name, entry in found.items()
    ]
    parts.append(table(["stage", "outcome", "s", "found"], rows))
    for name, (head, body) in _SECTIONS.items():
        if rows := found.get(name, {}).get("summary", {}).get("rows"):
            parts += [head, body(rows)]
            parts += [f"- {text}" for text in _failures(rows)]
    return "\n\n".join(parts) + "\n"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def _facts(record: Mapping[str, Any]) -> list[str]:
    about = record.get("stages", {}).get("environment", {}).get("summary", {})
    lines = [f"commit {record['commit']}, {record['date'][:10]}, reproduce with `{record['command']}`"]
    if about:
        lines.append(
            f"torch {about.get('torch')}, CUDA {about.get('torch_cuda')}, nvcc {about.get('nvcc')}, "
            f"Python {about.get('python')}"
        )
    if card := about.get("card"):
        lines.append(", ".join(f"{name} {value}" for name, value in card.items()))
    return lines


def _outcome(name: str, entry: Mapping[str, Any]) -> str:
    summary, reason = entry["summary"], entry["reason"]
    rows = summary.get("rows", [])
    if name == "native" and "result" in summary:
        return summary["result"]
    if name == "tests" and "passed" in summary:
        counts = ", ".join(f"{summary[key]} {key}" for key in ("passed", "failure", "error", "skipped"))
        return "; ".join([counts, *summary.get("names of the failed", [])[:10]])
    if name == "ceilings":
        units = {"bytes/s": "TB/s", "operations/s": "TFLOP/s"}
        keys = [(key, *key.split(", ")) for key in summary]
        return ", ".join(f"{what} {summary[key] / 1e12:.3g} {units[unit]}" for key, what, unit in keys)
    if rows and "outcome" in rows[0]:
        clean = sum(row["outcome"] == "clean" for row in rows)
        return "; ".join(filter(None, [f"{clean} of {len(rows)} cases clean", reason]))
    asked = [row for row in rows if "met" in row]
    if asked:
        met = sum(row["met"] for row in asked)
        return "; ".join(filter(None, [f"{met} of {len(asked)} targets met", reason]))
    return reason


def _failures(rows: Iterable[Row]) -> list[str]:
    return [
        f"{' '.join(str(row[key]) for key in _NAMES if key in row)}: {name}: {why.splitlines()[0][:200]}"
        for row in rows
        for name, why in row.get("failures", {}).items()
        if why
    ]


_NAMES = ("op", "tensors", "layer", "network", "dtype", "precision", "method")


def _target(row: Row) -> str:
    return f"{row['target']}: {'met' if row['met'] else 'MISSED'}" if "target" in row else ""


def _others(row: Row) -> str:
    others = sorted(row.get("others", {}).items(), key=lambda item: item[1])
    return ", ".join(f"{name} {seconds / row['seconds']:.2f}" for name, seconds in others)


def _predicted(row: Row) -> str:
    # From counts and data sheets, see bench.traffic; only for cards that are known there.
    return f"{row['predicted'] * 1e6:.1f}" if row.get("predicted") else ""


def _list_ops(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        line = [f"`{row['op']}`", row["tensors"], row["dtype"]]
        if "seconds" not in row:
            lines.append([*line, "failed", *[""] * 6])
            continue
        line += [f"{row['seconds'] * 1e6:.1f}", _predicted(row)]
        if "share" in row:
            line += [f"{row['bytes'] / row['seconds'] / 1e9:.0f}", f"{row['share']:.2f}"]
            same = row.get("share of the same copy")
            line.append("" if same is None else f"{same:.2f}")
        else:
            line += [""] * 3
        passes = f"{row['passes']:.1f} passes; " if "passes" in row else ""
        lines.append([*line, passes + _target(row), _others(row)])
    header = [
        "op",
        "tensors",
        "dtype",
        "ours, µs",
        "predicted, µs",
        "GB/s",
        "of a copy",
        "of a copy of these",
        "target",
        "others",
    ]
    return table(header, lines)


def _layers(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        line = [row["layer"], row["precision"], str(row.get("samples", "")), str(row.get("positions", ""))]
        if "seconds" not in row:
            lines.append([*line, "failed", *[""] * 5])
            continue
        rate = row["operations"] / row["seconds"] / 1e12
        line += [
            f"{row['seconds'] * 1e6:.1f}",
            _predicted(row),
            f"{row['plain'] * 1e6:.1f}",
            f"{rate:.3g}",
            f"{row['share']:.2f}",
        ]
        lines.append([*line, _target(row)])
    header = [
        "layer",
        "precision",
        "N",
        "T",
        "ours, µs",
        "predicted, µs",
        "plain, µs",
        "TFLOP/s",
        "of the plain speed",
        "target",
    ]
    return table(header, lines)


def _networks(rows: Sequence[Row]) -> str:
    names: dict[str, None] = {}
    for row in rows:
        names |= dict.fromkeys(name for name in row.get("times", {}) if name not in ("ours", LOOP))
    lines = []
    for row in rows:
        times = row.get("times", {})
        line = [row["network"], row["precision"]]
        line.append(f"{times['ours'] * 1e3:.3g}" if "ours" in times else "failed")
        line += [f"{times[name] * 1e3:.3g}" if name in times else "" for name in names]
        line += [f"{times[LOOP] * 1e3:.3g} ({row['looped']} of {row['samples']})" if LOOP in times else ""]
        line += [f"{row['of a step']:.2f}" if "of a step" in row else ""]
        line += [" / ".join(f"{error:.0e}" for error in row.get("errors", {}).values()), _target(row)]
        lines.append(line)
    header = ["network", "precision", "ours, ms", *(f"{name}, ms" for name in names)]
    return table([*header, f"{LOOP}, ms (timed)", "of a step", "errors: ours / loop", "target"], lines)


def _methods(rows: Sequence[Row]) -> str:
    names = list(rows[0]["accuracies"])
    lines = []
    for row in rows:
        line = [row["method"], f"{row['seconds']:.2f}" if "seconds" in row else ""]
        line.append(", ".join(f"{name} {value:.2f}" for name, value in row.get("steps", {}).items()))
        lines.append(
            [*line, *(f"{row['accuracies'][n]:.1%}" if "accuracies" in row else "failed" for n in names)]
        )
    return table(["method", "s", "of which, s", *names], lines)


_SECTIONS: dict[str, tuple[str, Callable[[Sequence[Row]], str]]] = {
    "list-ops": (
        """### List ops

Bytes an ideal implementation reads and writes, per second, as a share of a large copy's and of a copy of the
same tensors. Others: their times as multiples of ours.""",
        _list_ops,
    ),
    "layers": (
        """### Per-sample Fisher kernels

Against the plain weight gradient of cuBLAS or cuDNN at the same precision: as many operations, of another
result.""",
        _layers,
    ),
    "networks": (
        """### `fisher_diagonal` of whole networks

A step is a plain forward and backward pass. The loop over single samples is timed on the first of them (how
many is in brackets) and extrapolated. Errors are the largest of a parameter against float64.""",
        _networks,
    ),
    "methods": (
        """### Methods on CIFAR-10

Forgetting class 0, with the methods' defaults.""",
        _methods,
    ),
    "compiled": (
        """### Against `torch.compile`

Others: their times as multiples of ours, without the time to compile.""",
        _list_ops,
    ),
}
