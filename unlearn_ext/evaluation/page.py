"""A comparison as one HTML page: style, figures and pictures in the file, no script, nothing loaded.

Every picture is drawn from numbers that also stand in a table beside it, for screen readers, for copying and
for whoever would rather read them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

_ACCURACIES = ("retain", "forget", "test", "test_retained", "test_forgotten")

_NO_BREAK = "\N{NO-BREAK SPACE}"

_KINDS = {"original": "before", "reference": "the aim", "control": "control"}


def render(document: Mapping[str, Any], *, title: str = "Unlearning compared") -> str:
    """Draw a comparison.

    Args:
        document: What ``Comparison.to_dict()`` returns.
        title: Title of the page.

    Returns:
        An HTML document.
    """
    sections = [
        _section("results", "Results", _results(document)),
        _section("accuracy", "Accuracy, and the gap to retraining", _bars(document)),
        _section("losses", "Losses of forget and unseen samples", _histograms(document)),
        _section("layers", "Where the weights changed", _layers(document)),
        _section("time", "Time", _times(document)),
        _section("method", "How to read this", _method(document)),
    ]
    return _PAGE.format(
        title=escape(title),
        style=_STYLE,
        lead=_lead(document),
        notice=escape(document["notice"]),
        sections="\n".join(filter(None, sections)),
    )


def figure(measure: Mapping[str, Any], unit: str) -> str:
    """Write a measure with its spread over the seeds, or its interval.

    Args:
        measure: The fields of a ``Measure``, with a value.
        unit: ``"percent"``, ``"points"``, ``"seconds"`` or ``"number"``.

    Returns:
        Text.

    Example:
        >>> figure({"value": 0.9753, "spread": 0.01}, "percent")
        '97.5 ± 1.0'
    """
    if measure["value"] is None:
        return "n/a"
    text = _number(measure["value"], unit)
    if measure.get("spread") is not None:
        return f"{text} ± {_number(measure['spread'], unit)}"
    if measure.get("low") is not None and measure.get("high") is not None:
        return f"{text} [{_number(measure['low'], unit)}, {_number(measure['high'], unit)}]"
    return text


def _number(value: float, unit: str) -> str:
    if unit in ("percent", "points"):
        hundredfold = 100 * value
        return f"{hundredfold:.1f}" if abs(hundredfold) >= 0.1 or hundredfold == 0 else f"{hundredfold:.1g}"
    if unit == "seconds":
        return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 1 else f"{value:.1f}"
    return f"{value + 0.0:.3f}".replace("-0.000", "0.000")


def _section(anchor: str, title: str, body: str) -> str:
    if not body:
        return ""
    heading = f'<h2 id="{anchor}">{escape(title)}</h2>'
    return f'<section aria-labelledby="{anchor}">\n{heading}\n{body}\n</section>'


def _value(entry: Mapping[str, Any], name: str) -> float | None:
    value = entry["measures"].get(name, {}).get("value")
    return None if value is None else float(value)


def _entry(document: Mapping[str, Any], kind: str) -> Mapping[str, Any] | None:
    return next((entry for entry in document["table"] if entry["kind"] == kind), None)


def _lead(document: Mapping[str, Any]) -> str:
    facts = document["facts"]
    samples = facts["samples"]
    classes = facts["forget_classes"]
    named = ""
    if classes is not None:
        named = f", all of class{'es' if len(classes) > 1 else ''} {', '.join(map(str, classes))}"
    task = (
        f"{samples['forget']:,} training samples to forget{named}; {samples['retain']:,} to keep; "
        f"{samples['test']:,} unseen. {facts['model'].rpartition('.')[2]} with {facts['parameters']:,} "
        "parameters."
    )
    ranked = sorted(
        (gap, entry)
        for entry in document["table"]
        if entry["kind"] == "method" and (gap := _value(entry, "gap")) is not None
        for entry in [_Ordered(entry)]
    )
    lines = [f'<p class="task">{escape(task)}</p>']
    reference = _entry(document, "reference")
    if ranked and reference is not None:
        gap, best = ranked[0][0], ranked[0][1].entry
        text = (
            f"<strong>{escape(best['label'])}</strong> came closest to retraining: "
            f"{_number(gap, 'points')} points away on average"
        )
        ours, theirs = _value(best, "seconds"), _value(reference, "seconds")
        if ours and theirs:
            ratio = theirs / ours
            speed = f"{ratio:.1f} times faster" if ratio >= 1 else f"{1 / ratio:.1f} times slower"
            text += (
                f", in {_number(ours, 'seconds')} s instead of {_number(theirs, 'seconds')} s ({speed} here)"
            )
        lines.append(f"<p>{text}.{_control(document)}</p>")
    return "\n".join(lines)


def _control(document: Mapping[str, Any]) -> str:
    # What the best method is worth shows beside doing nothing, and beside a choice by lot.
    told = [
        f"{escape(entry['label'])} {_number(gap, 'points')}"
        for entry in document["table"]
        if entry["kind"] in ("original", "control") and (gap := _value(entry, "gap")) is not None
    ]
    return f" For comparison: {', '.join(told)} points." if told else ""


class _Ordered:
    """Lets a sort by gap go on where two gaps are equal."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        self.entry = entry

    def __lt__(self, other: _Ordered) -> bool:
        return False


def _results(document: Mapping[str, Any]) -> str:
    columns = document["columns"]
    heads = "".join(f'<th scope="col">{escape(column["title"])}</th>' for column in columns)
    lines = []
    for entry in document["table"]:
        whys = {entry["measures"][column["name"]]["why"] for column in columns}
        kind = _KINDS.get(entry["kind"], "")
        name = f'<th scope="row">{_name(entry["label"])}{_small(kind)}</th>'
        (why, *others) = whys
        if why is not None and not others:
            cells = f'<td colspan="{len(columns)}" class="missing"><span>not run: {escape(why)}</span></td>'
        else:
            cells = "".join(_cell(entry["measures"][column["name"]], column["unit"]) for column in columns)
        lines.append(f'<tr class="{entry["kind"]}">{name}{cells}</tr>')
    seeds = document["facts"]["seeds"]
    runs = f"Mean ± standard deviation over {len(seeds)} seeds"
    if len(seeds) == 1:
        runs = f"One run, seed {seeds[0]}"
    note = f'<p class="note">{runs}. Brackets: 95 % interval of one run.</p>'
    return _scroller("Results", _table(heads, lines)) + note


def _cell(measure: Mapping[str, Any], unit: str) -> str:
    if measure["value"] is None:
        return f'<td class="missing">n/a{_small(measure["why"])}</td>'
    text = figure(measure, unit)
    number, _, rest = text.partition(" ")
    note = f'<small class="verdict">{escape(measure["note"])}</small>' if measure["note"] else ""
    return f"<td>{number}{_small(rest.replace(' ', _NO_BREAK))}{note}</td>"


def _name(label: str) -> str:
    return escape(label).replace("_", "_<wbr>")


def _small(text: str | None) -> str:
    return f"<small>{escape(text)}</small>" if text else ""


def _bars(document: Mapping[str, Any]) -> str:
    titles = {column["name"]: column["title"].removesuffix(", %") for column in document["columns"]}
    names = [name for name in _ACCURACIES if name in titles]
    if not names:
        return ""
    reference = _entry(document, "reference")
    blocks = []
    for entry in document["table"]:
        bars, told = [], []
        for name in [*names, "gap"]:
            value = _value(entry, name)
            if value is None or name not in titles or (name == "gap" and entry is reference):
                continue
            aim = _value(reference, name) if reference is not None and name != "gap" else None
            title = "gap" if name == "gap" else titles[name]
            told.append(f"{title} {_number(value, 'percent')}{'' if name == 'gap' else ' %'}")
            bars.append(_bar(name, title, value, aim))
        if bars:
            label = escape(f"{entry['label']}: {', '.join(told)}", quote=True)
            blocks.append(
                f'<div class="block {entry["kind"]}"><h3>{_name(entry["label"])}</h3>'
                f'<div class="bars" role="img" aria-label="{label}">{"".join(bars)}</div></div>'
            )
    key = (
        '<p class="note"><span class="swatch retain"></span>kept data '
        '<span class="swatch forget"></span>forgotten data '
        '<span class="swatch gap"></span>mean gap to retraining, points'
        + (' <span class="swatch aim"></span>the retrained model' if reference is not None else "")
        + "</p>"
    )
    return f'{key}<div class="blocks">{_lines(blocks)}</div>'


def _bar(name: str, title: str, value: float, aim: float | None) -> str:
    kind = "gap" if name == "gap" else "forget" if name in ("forget", "test_forgotten") else "retain"
    tick = f'<i style="left:{_percent(aim)}"></i>' if aim is not None else ""
    return (
        f'<span class="name">{escape(title)}</span>'
        f'<span class="track"><b class="{kind}" style="width:{_percent(value)}"></b>{tick}</span>'
        f'<span class="value">{_number(value, "percent")}</span>'
    )


def _percent(value: float) -> str:
    return f"{100 * min(1.0, max(0.0, value)):.2f}%"


_WIDTH, _HEIGHT, _LEFT, _FLOOR = 300, 120, 8, 100


def _histograms(document: Mapping[str, Any]) -> str:
    edges = document["loss_edges"]
    counts = {
        entry["label"]: {name: _summed(document, entry["label"], name) for name in ("forget", "test")}
        for entry in document["table"]
    }
    counts = {label: sets for label, sets in counts.items() if sets["forget"]}
    if not counts:
        return ""
    shares = {label: {name: _shares(c) for name, c in sets.items()} for label, sets in counts.items()}
    original = _entry(document, "original")
    before = shares.get(original["label"], {}).get("forget", []) if original is not None else []
    panels, lines = [], []
    for number, (label, sets) in enumerate(shares.items()):
        medians = {name: _median(counts[label][name], edges) for name in sets}
        panels.append(_panel(number, label, sets, before, medians))
        cells = "".join(f"<td>{medians[name]}</td>" for name in ("forget", "test"))
        lines.append(f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>')
    unseen = "unseen samples"
    if document["facts"]["forget_classes"] is not None:
        unseen = "unseen samples of the forgotten classes"
    return (
        '<p class="note"><span class="swatch forget"></span>forget set '
        f'<span class="swatch test"></span>{unseen} <span class="swatch before"></span>forget set before. '
        "Where the two differ as they do not after retraining, the samples can be told apart.</p>"
        f'<div class="panels">{_lines(panels)}</div>'
        "<details><summary>Median losses as a table</summary><table><thead><tr><td></td>"
        f'<th scope="col">forget set</th><th scope="col">{unseen}</th></tr></thead>'
        f"<tbody>{_lines(lines)}</tbody></table></details>"
    )


def _summed(document: Mapping[str, Any], label: str, name: str) -> list[int]:
    counts = [row["loss_counts"].get(name) for row in document["rows"] if row["label"] == label]
    return [sum(bars) for bars in zip(*filter(None, counts), strict=True)]


def _shares(counts: Sequence[int]) -> list[float]:
    total = sum(counts)
    return [count / total for count in counts] if total else []


def _median(counts: Sequence[int], edges: Sequence[float]) -> str:
    seen = 0
    for count, low, high in zip(counts, edges[:-1], edges[1:], strict=True):
        seen += count
        if 2 * seen >= sum(counts) > 0:
            return f"{low:.2g} to {high:.2g}"
    return "none"


def _panel(
    number: int,
    label: str,
    sets: Mapping[str, Sequence[float]],
    before: Sequence[float],
    medians: Mapping[str, str],
) -> str:
    n_bars = len(sets["forget"])
    step = (_WIDTH - 2 * _LEFT) / n_bars
    top = max([*sets["forget"], *sets["test"], *before])

    def outline(shares: Sequence[float], *, closed: bool) -> str:
        points = [f"M{_LEFT} {_FLOOR}"]
        for index, share in enumerate(shares):
            height = _FLOOR - 84 * share / top
            points.append(f"V{height:.1f}H{_LEFT + (index + 1) * step:.1f}")
        return "".join(points) + f"V{_FLOOR}" + ("Z" if closed else "")

    paths = [f'<path class="forget" d="{outline(sets["forget"], closed=True)}"/>']
    if sets["test"]:
        paths.append(f'<path class="test" d="{outline(sets["test"], closed=False)}"/>')
    if before and before != sets["forget"]:
        paths.append(f'<path class="before" d="{outline(before, closed=False)}"/>')
    ticks = [(0.0, "loss"), (2 / 7, "0.001"), (4 / 7, "0.1"), (6 / 7, "10")]
    axis = "".join(
        f'<text x="{_LEFT + (_WIDTH - 2 * _LEFT) * at:.0f}" y="114" '
        f'text-anchor="{"middle" if at else "start"}">{name}</text>'
        for at, name in ticks
    )
    told = f"{label}: median loss {medians['forget']} on the forget set, {medians['test']} on unseen samples"
    return (
        f'<figure><figcaption>{escape(label)}</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-labelledby="loss{number}"><title id="loss{number}">{escape(told)}</title>'
        f'<line x1="{_LEFT}" y1="{_FLOOR}" x2="{_WIDTH - _LEFT}" y2="{_FLOOR}"/>{"".join(paths)}{axis}'
        "</svg></figure>"
    )


def _layers(document: Mapping[str, Any]) -> str:
    labels = [entry["label"] for entry in document["table"] if entry["kind"] in ("method", "control")]
    moved: dict[str, dict[str, float | None]] = {}
    for label in labels:
        rows = [row["layers"] for row in document["rows"] if row["label"] == label and row["layers"]]
        for layer in rows[0] if rows else ():
            values = [row[layer] for row in rows if row.get(layer) is not None]
            moved.setdefault(layer, {})[label] = sum(values) / len(values) if values else None
    labels = [label for label in labels if any(label in values for values in moved.values())]
    if not moved:
        return ""
    top = max((value or 0.0 for values in moved.values() for value in values.values()), default=0.0)
    heads = "".join(f'<th scope="col">{_name(label)}</th>' for label in labels)
    kinds = document["facts"]["layers"]
    lines = []
    for layer, by_label in moved.items():
        cells = "".join(_heat(by_label.get(label), top) for label in labels)
        name = f"<code>{escape(layer)}</code>{_small(kinds.get(layer))}"
        lines.append(f'<tr><th scope="row">{name}</th>{cells}</tr>')
    return (
        '<p class="note">How far each layer has moved: distance of its weights from the original ones, in '
        "per cent of their norm. From the first layer to the last.</p>"
        + _scroller("Change per layer", _table(heads, lines), "tall")
    )


def _heat(value: float | None, top: float) -> str:
    if value is None:
        return '<td class="missing">n/a<small>was zero</small></td>'
    shade = 0.6 * (value / top) ** 0.5 if top else 0.0
    text = "0" if value == 0 else _number(value, "percent")
    return f'<td class="heat"><i style="opacity:{shade:.2f}"></i><span>{text}</span></td>'


def _times(document: Mapping[str, Any]) -> str:
    entries = [entry for entry in document["table"] if entry["kind"] in ("method", "control")]
    totals = {entry["label"]: _value(entry, "seconds") for entry in entries}
    longest = max((seconds for seconds in totals.values() if seconds), default=0.0)
    if not longest:
        return ""
    blocks = []
    for label, total in totals.items():
        if total is None:
            continue
        phases = _phases(document, label, total)
        told = ", ".join(f"{name} {_number(seconds, 'seconds')} s" for name, seconds in phases)
        parts = "".join(
            f'<b class="phase{index % 4}" style="width:{_percent(seconds / longest)}"></b>'
            for index, (_, seconds) in enumerate(phases)
        )
        aria = escape(f"{label}: {_number(total, 'seconds')} seconds: {told}", quote=True)
        legend = " ".join(
            f'<span class="swatch phase{index % 4}"></span>{escape(name)} {_number(seconds, "seconds")} s'
            for index, (name, seconds) in enumerate(phases)
        )
        blocks.append(
            f'<div class="block"><h3>{_name(label)}</h3><div>'
            f'<div class="bars" role="img" aria-label="{aria}">'
            f'<span class="track wide">{parts}</span><span class="value">{_number(total, "seconds")} s</span>'
            f'</div><p class="note">{legend}</p></div></div>'
        )
    reference = _entry(document, "reference")
    retrained = None if reference is None else _value(reference, "seconds")
    line = f"<p>Retraining took {_number(retrained, 'seconds')} s.</p>" if retrained else ""
    return f'{line}<div class="blocks">{_lines(blocks)}</div>'


def _phases(document: Mapping[str, Any], label: str, total: float) -> list[tuple[str, float]]:
    rows = [row["phases"] for row in document["rows"] if row["label"] == label and row["why"] is None]
    names = dict.fromkeys(name for phases in rows for name in phases)
    means = [(name, sum(phases.get(name, 0.0) for phases in rows) / len(rows)) for name in names]
    rest = total - sum(seconds for _, seconds in means)
    return [*means, ("other", rest)] if rest > 0.02 * total or not means else means


def _method(document: Mapping[str, Any]) -> str:
    meanings = "\n".join(
        f"<dt>{escape(column['title'])}</dt><dd>{escape(column['meaning'])}</dd>"
        for column in document["columns"]
    )
    facts = document["facts"]
    told = {
        "Reference": facts["reference"],
        "Seeds": ", ".join(map(str, facts["seeds"])),
        "SHA-256 of the original weights": facts["weights"],
        **{name: value for name, value in facts["environment"].items()},
    }
    lines = [
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(str(value))}</td></tr>'
        for name, value in told.items()
    ]
    settings = [
        f'<tr><th scope="row">{escape(row["label"])}</th><td>'
        f"{escape(', '.join(f'{k} = {v}' for k, v in row['settings'].items()) or 'defaults')}</td></tr>"
        for row in {row["label"]: row for row in document["rows"] if row["method"]}.values()
    ]
    return (
        f"<dl>\n{meanings}\n</dl>\n<h3>Settings</h3>\n"
        + _scroller("Settings", f"<table><tbody>\n{_lines(settings)}\n</tbody></table>")
        + "\n<h3>Circumstances</h3>\n"
        + _scroller("Circumstances", f"<table><tbody>\n{_lines(lines)}\n</tbody></table>")
    )


def _scroller(name: str, table: str, kind: str = "") -> str:
    # Focusable, so that what does not fit can be reached from the keyboard.
    label = escape(name, quote=True)
    return f'<div class="scroller {kind}" role="region" aria-label="{label}" tabindex="0">{table}</div>'


def _table(heads: str, lines: Iterable[str]) -> str:
    return f"<table><thead><tr><td></td>{heads}</tr></thead>\n<tbody>\n{_lines(lines)}\n</tbody></table>"


def _lines(parts: Iterable[str]) -> str:
    return "\n".join(parts)


_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fbfbf9; --card: #ffffff; --ink: #1d232b; --soft: #5a6472; --line: #dfe3e8; --track: #eceff2;
  --retain: #2f6fb3; --forget: #c65a11; --gap: #7a8391; --aim: #1d232b; --heat: #c65a11;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171b; --card: #1b1f25; --ink: #e8ebef; --soft: #a3adba; --line: #343b45; --track: #2a3038;
    --retain: #6ba6e6; --forget: #ef9a55; --gap: #8b95a3; --aim: #ffffff; --heat: #ef9a55;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
header, main, footer { max-width: 80rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.5rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .75rem; letter-spacing: -.01em; }
h2 { font-size: 1.2rem; margin: 0 0 .75rem; }
h3 { font-size: 1rem; margin: 0; overflow-wrap: anywhere; }
dl + h3, .scroller + h3 { margin: 1.25rem 0 .5rem; }
p { margin: 0 0 .75rem; max-width: 46rem; }
header p { font-size: 1.05rem; }
.task, .note, small, dd { color: var(--soft); }
.note { font-size: .85rem; }
.caution { border-left: 4px solid var(--forget); padding: .1rem 0 .1rem .9rem; }
section {
  background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: 1.25rem; margin: 1.25rem 0;
}
.scroller { overflow: auto; margin-bottom: .75rem; }
.scroller.tall { max-height: 32rem; }
.scroller:focus-visible { outline: 2px solid var(--retain); outline-offset: 2px; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td {
  padding: .45rem .6rem; text-align: right; vertical-align: top; border-bottom: 1px solid var(--line);
}
thead th { font-weight: 600; vertical-align: bottom; min-width: 4.6rem; line-height: 1.25; }
tbody th { text-align: left; font-weight: 600; overflow-wrap: anywhere; min-width: 6.5rem; }
.scroller tbody th, .scroller thead td {
  position: sticky; left: 0; background: var(--card); z-index: 1;
}
#method ~ .scroller td, #method ~ .scroller th { text-align: left; overflow-wrap: anywhere; }
.tall thead th, .scroller.tall thead td { position: sticky; top: 0; background: var(--card); z-index: 2; }
small { display: block; font-size: .78rem; font-weight: 400; line-height: 1.3; }
.missing { color: var(--soft); text-align: left; }
td[colspan] span { position: sticky; left: 9rem; display: inline-block; max-width: min(40rem, 50vw); }
td.missing small { min-width: 7rem; }
td .verdict { min-width: 8.5rem; }
tr.reference th, tr.reference td { border-bottom-width: 2px; border-bottom-color: var(--soft); }
.blocks { display: grid; gap: 1rem; }
.block { display: grid; grid-template-columns: 10rem 1fr; gap: .25rem 1.25rem; align-items: start; }
.block + .block { border-top: 1px solid var(--line); padding-top: 1rem; }
.block .note { margin: .25rem 0 0; }
.bars {
  display: grid; grid-template-columns: minmax(6rem, 11rem) 1fr 3.6rem; gap: .3rem .75rem;
  align-items: center; font-size: .85rem; font-variant-numeric: tabular-nums;
}
.bars .name { color: var(--soft); }
.bars .value { text-align: right; }
.track { position: relative; display: flex; height: .8rem; background: var(--track); border-radius: 2px; }
.track.wide { grid-column: span 2; height: 1rem; }
.track b { display: block; height: 100%; border-radius: 2px; }
.track i {
  position: absolute; top: -.2rem; bottom: -.2rem; width: 3px; margin-left: -1.5px; background: var(--aim);
  box-shadow: 0 0 0 1px var(--card);
}
.swatch { display: inline-block; width: .8rem; height: .8rem; margin: 0 .35rem 0 .6rem; border-radius: 2px;
  vertical-align: -.08rem; }
.swatch:first-child { margin-left: 0; }
b.retain, .swatch.retain { background: var(--retain); }
b.forget, .swatch.forget { background: var(--forget); }
b.gap, .swatch.gap { background: var(--gap); }
.swatch.aim { width: 3px; background: var(--aim); }
.swatch.test { background: none; border: 2px solid var(--retain); }
.swatch.before { background: none; border: 2px dashed var(--soft); }
.phase0 { background: var(--retain); }
.phase1 { background: var(--forget); }
.phase2 { background: var(--gap); }
.phase3 { background: var(--line); border: 1px solid var(--soft); }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(16rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { font-weight: 600; font-size: .9rem; overflow-wrap: anywhere; }
svg { display: block; width: 100%; height: auto; }
svg line { stroke: var(--line); stroke-width: 1; }
svg text { fill: var(--soft); font-size: 11px; }
path.forget { fill: var(--forget); fill-opacity: .55; }
path.test { fill: none; stroke: var(--retain); stroke-width: 2; }
path.before { fill: none; stroke: var(--soft); stroke-width: 1.5; stroke-dasharray: 4 3; }
details { margin-top: 1rem; font-size: .9rem; }
summary { cursor: pointer; }
td.heat { position: relative; }
td.heat i { position: absolute; inset: 0; background: var(--heat); }
td.heat span { position: relative; }
dl {
  display: grid; grid-template-columns: minmax(8rem, 14rem) 1fr; gap: .5rem 1.25rem;
  margin: 0; font-size: .9rem;
}
dt { font-weight: 600; }
dd { margin: 0; }
footer { padding-bottom: 3rem; color: var(--soft); font-size: .9rem; }
@media (max-width: 40rem) {
  header, main, footer { padding-left: .75rem; padding-right: .75rem; }
  section { padding: 1rem .75rem; }
  h1 { font-size: 1.5rem; }
  .block, dl { grid-template-columns: 1fr; }
  dd { margin-bottom: .5rem; }
  .bars { grid-template-columns: 6rem 1fr 3.2rem; gap: .35rem .5rem; }
  .scroller tbody th { max-width: 9rem; }
}
@media print { section { break-inside: avoid; } .scroller { overflow: visible; max-height: none; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{lead}
<p class="caution">{notice}</p>
</header>
<main>
{sections}
</main>
<footer>
<p>Made by unlearn_ext. This file loads nothing and runs no script.</p>
</footer>
</body>
</html>
"""
