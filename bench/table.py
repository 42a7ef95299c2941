"""Turns the JSON files of ``bench/results`` into ``bench/RESULTS.md``.

``python -m bench.table file.json`` prints the tables of given files instead.
"""

import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import bench_fisher, published, roofline, traffic

FOLDER = Path(__file__).parent
OURS, FLOOR = "ours", "floor"
CURVE = re.compile(r"masked_sgd_, (?P<percent>\d+) percent by (?P<unit>\w+)")


@dataclass(frozen=True)
class Entry:
    """The times of one contender in one group, in seconds."""

    op: str
    model: str
    dtype: str
    contender: str
    median: float
    best: float
    spread: float  # interquartile range, as a share of the median
    bytes_moved: float
    samples: int = 0
    positions: int = 0
    operations: float = 0.0  # multiplications and additions; 0 where memory is the limit

    def ratio(self, other: "Entry", scale: float = 1.0) -> str:
        """Show this time as a multiple of ``scale`` times another: by medians, and by best laps."""
        return f"{_ratio(self.median / other.median / scale)} / {_ratio(self.best / other.best / scale)}"


@dataclass(frozen=True)
class Standing:
    """One group, seen from us."""

    ours: Entry
    others: tuple[Entry, ...]
    floor: Entry | None

    @property
    def floor_seconds(self) -> float | None:
        """How long our bytes take at the speed of the floor."""
        return None if self.floor is None else self.floor.median * self._share(self.floor)

    @property
    def to_floor(self) -> str:
        """Our time as a multiple of that."""
        return "" if self.floor is None else self.ours.ratio(self.floor, self._share(self.floor))

    def _share(self, floor: Entry) -> float:
        return self.ours.bytes_moved / floor.bytes_moved


def entries(document: Mapping[str, Any]) -> Iterator[Entry]:
    """Read what pytest-benchmark wrote."""
    for benchmark in document["benchmarks"]:
        op, model, dtype, _ = benchmark["group"].split("/")
        stats, extra = benchmark["stats"], benchmark["extra_info"]
        yield Entry(
            op=op,
            model=model,
            dtype=dtype,
            contender=extra["contender"],
            median=stats["median"],
            best=stats["min"],
            spread=stats["iqr"] / stats["median"],
            bytes_moved=extra["bytes_moved"],
            **{name: extra[name] for name in ("samples", "positions", "operations") if name in extra},
        )


def standings(all_entries: Iterable[Entry]) -> list[Standing]:
    """Sort the entries into groups; a group that we did not take part in is left out."""
    groups: dict[tuple[str, str, str], dict[str, Entry]] = {}
    for entry in all_entries:
        groups.setdefault((entry.op, entry.model, entry.dtype), {})[entry.contender] = entry
    return [
        Standing(
            group[OURS],
            tuple(entry for name, entry in group.items() if name not in (OURS, FLOOR)),
            group.get(FLOOR),
        )
        for group in groups.values()
        if OURS in group
    ]


_READING = """\
Times are medians. The contenders of a group take turns, lap by lap, so that whatever else the computer does
disturbs all of them alike; each has first been compared with the reference. Ratios are given twice: of the
medians, and of the best laps, which are disturbed least. Where the two differ much, the computer was busy.

- *Floor*: the time in which the bytes that the op must read and write pass at the speed of an in-place
  `torch._foreach_add_` (on a GPU: a copy) of the same tensors in the same group; *of floor*: our time as a
  multiple of it. Ops limited by arithmetic have none.
- *Spread*: the interquartile range of our laps.
- *Others*: their times as multiples of ours; above 1 is slower than ours. `direct door` is the same op called
  as `unlearn_ext._C.*`, without PyTorch's dispatcher.

Written by `python -m bench`."""


def render(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """Write the whole page.

    Args:
        documents: pytest-benchmark's JSON, by file name.

    Returns:
        Markdown.
    """
    sections = [_section(name, document) for name, document in documents.items()]
    if not any(name.startswith("cuda") for name in documents):
        sections += _gpu_pages() or ["## CUDA\n\nNot yet run on a GPU."]
    sections.append(traffic.section())
    pages = sorted((FOLDER / "results" / "methods").glob("*.md"))
    sections += [page.read_text(encoding="utf-8").strip() for page in pages]
    if theirs := published.section():
        sections.append(theirs)
    return "\n\n".join(["# Results", _READING, *sections]) + "\n"


def _gpu_pages() -> list[str]:
    """Pages that ``python -m bench.gpu`` wrote; a dry run's, which measures nothing, lie elsewhere."""
    pages = sorted((FOLDER / "results").glob("gpu-*.md"))
    return [page.read_text(encoding="utf-8").strip() for page in pages]


def _section(name: str, document: Mapping[str, Any]) -> str:
    found = [s for s in standings(entries(document)) if s.ours.op != "fisher_diagonal"]
    layers = [s for s in found if s.ours.operations]
    plain = [s for s in found if not CURVE.fullmatch(s.ours.op) and s not in layers]
    curve = [s for s in found if CURVE.fullmatch(s.ours.op)]
    parts = [f"## {_device(document)}", _environment(name, document)]
    plot = FOLDER / "results" / f"roofline-{Path(name).stem}.svg"
    if plot.exists():
        parts.append(f"![What the ops reach, and could at most](results/{plot.name})")
    if plain:
        parts.append(_table(plain))
    if curve:
        parts.append("### `masked_sgd_`: time against density")
        parts.append(
            "With momentum and weight decay. The last columns are our times as multiples of those of "
            "`torch.optim.SGD`, whose steps are dense."
        )
        parts.append(_curve_table(curve))
    if layers:
        parts.append("### Per-sample Fisher kernels")
        parts.append(
            "One layer with T output positions per sample, in a batch of N. The last columns are times as "
            "multiples of ours. The plain weight gradient is that of a training step, summed over samples: "
            "as many operations, of another result."
        )
        parts.append(_layer_table(layers))
    networks = bench_fisher.section(document["benchmarks"])
    if networks:
        parts.append("### `fisher_diagonal` of whole networks")
        parts.append(
            "Times as multiples of a plain forward and backward pass of 32 samples, by medians and by best "
            "laps; in brackets the largest error of a parameter against a float64 loop of single samples."
        )
        parts.append(networks)
    return "\n\n".join(parts)


def _device(document: Mapping[str, Any]) -> str:
    info = document["machine_info"]
    if info["device"] == "cpu":
        return f"CPU: {info['cpu']}, {info['threads']} thread(s)"
    return f"GPU: {info['device']}"


def _environment(name: str, document: Mapping[str, Any]) -> str:
    info, commit = document["machine_info"], document["commit_info"]
    build = info["build"]
    dirty = " with local changes" if commit.get("dirty") else ""
    lines = [
        f"commit {str(commit.get('id', 'unknown'))[:12]}{dirty}, {document['datetime'][:10]}, `{name}`",
        f"torch {info['torch']}, Python {info['python']}, {info['system']}",
        f"CPU {info['cpu']}, {info['threads']} thread(s), load average {info['load']} when the run began",
        f"kernels for {build['cpu_capability']}, compiled by {build['compiler']}",
        f"reproduce with `{info['command']}`",
    ]
    if info["device"] != "cpu":
        lines.insert(
            2, f"{info['device']} at up to {info['clock']}, CUDA {info['cuda']}, driver {info['driver']}"
        )
    return "\n".join(f"- {line}" for line in lines)


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def _ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"


def _markdown(header: list[str], rows: Iterable[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows])


def _table(found: list[Standing]) -> str:
    rows = [
        [
            f"`{s.ours.op}`",
            s.ours.model,
            s.ours.dtype,
            _milliseconds(s.ours.median),
            f"{s.ours.spread:.0%}",
            _milliseconds(s.floor_seconds),
            s.to_floor,
            ", ".join(
                f"{other.contender} {other.ratio(s.ours)}"
                for other in sorted(s.others, key=lambda entry: entry.median)
            ),
        ]
        for s in found
    ]
    header = "op", "tensors", "dtype", "ours, ms", "spread", "floor, ms", "of floor", "others"
    return _markdown([*header], rows)


def _curve_table(found: list[Standing]) -> str:
    peers = list(dict.fromkeys(other.contender for s in found for other in s.others))
    rows = []
    for s in found:
        match = CURVE.fullmatch(s.ours.op)
        assert match is not None
        others = {other.contender: other for other in s.others}
        rows.append(
            [
                f"{match['percent']} % by {match['unit']}",
                _milliseconds(s.ours.median),
                _milliseconds(s.floor_seconds),
                s.to_floor,
                *(s.ours.ratio(others[peer]) if peer in others else "" for peer in peers),
            ]
        )
    return _markdown(["free scalars", "ours, ms", "floor, ms", "of floor", *peers], rows)


def _layer_table(found: list[Standing]) -> str:
    peers = list(dict.fromkeys(other.contender for s in found for other in s.others))
    rows = []
    for s in found:
        others = {other.contender: other for other in s.others}
        rows.append(
            [
                s.ours.model,
                s.ours.dtype,
                str(s.ours.samples),
                str(s.ours.positions),
                _milliseconds(s.ours.median),
                f"{s.ours.operations / s.ours.median / 1e9:.3g}",
                *(others[peer].ratio(s.ours) if peer in others else "" for peer in peers),
            ]
        )
    return _markdown(["layer", "dtype", "N", "T", "ours, ms", "GFLOP/s", *peers], rows)


def load(files: Iterable[Path]) -> dict[str, Mapping[str, Any]]:
    """Read JSON files, by name."""
    return {file.name: json.loads(file.read_text(encoding="utf-8")) for file in files}


def write_results() -> Path:
    """Render every file of ``bench/results`` into ``bench/RESULTS.md``, and draw the plots."""
    page = FOLDER / "RESULTS.md"
    # Those of bench.gpu have pages of their own.
    files = [path for path in (FOLDER / "results").glob("*.json") if not path.name.startswith("gpu-")]
    documents = load(sorted(files))
    for name, document in documents.items():
        roofline.draw(document, FOLDER / "results" / f"roofline-{Path(name).stem}.svg")
    page.write_text(render(documents), encoding="utf-8")
    return page


if __name__ == "__main__":
    if sys.argv[1:]:
        print(render(load(map(Path, sys.argv[1:]))))
    else:
        print(write_results())
