"""The page: valid, self-contained, and saying what the numbers say."""

import copy
import csv
import io
import itertools
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
from browser import chromium, new_page, watched

from unlearn_ext.evaluation import page
from unlearn_ext.evaluation.comparison import Comparison
from unlearn_ext.evaluation.evidence import NOTICE
from unlearn_ext.evaluation.metrics.measures import Measure
from unlearn_ext.evaluation.page import charts, content
from unlearn_ext.evaluation.rows import LOSS_EDGES, Row

VOID = {"meta", "br", "wbr", "img", "hr", "link", "input"}
COLUMNS = (
    "retain",
    "forget",
    "test_retained",
    "test_forgotten",
    "mia_auc",
    "js",
    "gap",
    "changed",
    "seconds",
)
FACTS = {
    "samples": {"forget": 1371, "retain": 12104, "test": 450},
    "forget_classes": [3],
    "model": "mine.Net",
    "parameters": 110922,
    "layers": {"first": "Conv2d", "last": "Linear"},
    "weights": "0" * 64,
    "reference": "retrained without the forget set, once per seed",
    "environment": {"torch": "2.13", "device": "cpu"},
    "seeds": [0],
}


def counts(at):
    return [10 if index == at else 0 for index in range(len(LOSS_EDGES) - 1)]


def row(label, kind, values, *, why=None, seed=0, **changes):
    measures = dict(zip(COLUMNS, (Measure(value) for value in values), strict=True)) if why is None else {}
    fields = {
        "phases": {"importance": 1.0, "dampening": 0.5} if kind == "method" else {},
        "layers": {"first": 0.25, "last": 0.0} if kind == "method" and why is None else {},
        "loss_counts": {"forget": counts(8), "test": counts(20)} if why is None else {},
        **changes,
    }
    return Row(label, kind, "ssd" if kind == "method" else "", {}, seed, why, measures, **fields)


@pytest.fixture
def table():
    rows = (
        row("original", "original", [1.0, 0.99, 0.98, 0.97, 0.6, 0.5, 0.4, 0.0, 0.0]),
        row("retrained", "reference", [0.99, 0.0, 0.98, 0.0, 0.5, 0.0, 0.0, 1.0, 30.0]),
        row("ssd", "method", [0.975, 0.0125, 0.96, 0.0, 0.52, 0.031, 0.0123, 0.02, 1.5]),
        row('<b>&"x_y', "method", [], why="RuntimeError: <script>alert(1)</script>"),
        row("random mask", "control", [0.9, 0.8, 0.9, 0.8, 0.55, 0.4, 0.3, 0.01, 1.0]),
    )
    return Comparison(rows, COLUMNS, FACTS)


class Checker(HTMLParser):
    """Every element closed in its order, ids unique, and nothing that loads or runs anything."""

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.ids, self.text, self.attributes, self.tags = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def checked(html):
    checker = Checker()
    checker.feed(html)
    checker.close()
    assert checker.open == []
    assert len(set(checker.ids)) == len(checker.ids)
    return checker


def words(html):
    return " ".join("".join(checked(html).text).split())


def test_it_parses_strictly(table):
    html5lib = pytest.importorskip("html5lib")
    html5lib.HTMLParser(strict=True).parse(table.to_html())


def test_elements_are_nested_and_ids_unique(table):
    html = table.to_html()
    assert html.startswith("<!DOCTYPE html>")
    checker = checked(html)
    assert {"html", "head", "title", "main", "h1", "table", "svg", "figure"} <= set(checker.tags)


def test_nothing_is_loaded_and_nothing_runs(table):
    html = table.to_html()
    checker = checked(html)
    assert not {"script", "link", "img", "iframe", "object", "embed", "video", "audio"} & set(checker.tags)
    links = [value for _, name, value in checker.attributes if name in ("src", "href", "srcset")]
    assert len(links) == 1
    assert links[0].startswith("data:text/csv;")  # a file to keep, of what stands on the page
    assert not [name for _, name, _ in checker.attributes if name.startswith("on")]
    assert not re.search(r"https?://|//\w+\.|@import|url\(|@font-face", html)


def test_names_and_errors_cannot_bring_markup(table):
    html = table.to_html(title="<i>title</i> & more")
    assert "<script" not in html
    assert '<b>&"x' not in html
    text = words(html)
    assert '<b>&"x_y' in text
    assert "not run: RuntimeError: <script>alert(1)</script>" in text
    assert "<i>title</i> & more" in text


def test_pictures_have_words_for_those_who_do_not_see_them(table):
    checker = checked(table.to_html())
    described = {name for tag, name, value in checker.attributes if name in ("aria-label", "aria-labelledby")}
    assert described
    n_pictures = sum(1 for _, name, value in checker.attributes if (name, value) == ("role", "img"))
    labels = [value for _, name, value in checker.attributes if name == "aria-label"]
    assert "ssd: retain 97.5 %, forget 1.2 %, test, kept classes 96.0 %" in " ".join(labels)
    assert "ssd: 1.5 seconds: importance 1.0 s, dampening 0.5 s" in labels
    referred = {value for _, name, value in checker.attributes if name == "aria-labelledby"}
    assert referred <= set(checker.ids)
    assert n_pictures == 4 + 4 + 2  # bars, histograms and times of those that ran


def test_every_figure_stands_in_the_table(table):
    text = words(table.to_html())
    for value in ("97.5", "1.2", "0.520", "0.031", "1.5"):
        assert value in text
    assert NOTICE in text
    assert "1,371 training samples to forget, all of class 3" in text
    assert "ssd came closest to retraining: 1.2 points away on average, in 1.5 s instead of 30.0 s" in text
    assert "20.0 times faster here" in text
    assert "For comparison: original 40.0, random mask 30.0 points." in text


def test_light_and_dark_wide_and_narrow(table):
    html = table.to_html()
    assert "prefers-color-scheme: dark" in html
    assert "max-width: 40rem" in html
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in html
    declared = set(re.findall(r"(--[\w-]+):", html))
    assert set(re.findall(r"var\((--[\w-]+)\)", html)) <= declared


def test_ticks_of_a_histogram_stand_where_losses_of_their_size_are_counted():
    sets = {"forget": charts.shares(counts(8)), "test": charts.shares(counts(20))}
    drawn = charts.histogram(sets, [])
    left, right = drawn["left"], drawn["right"]
    named = [tick for tick in drawn["ticks"] if tick["text"] != "loss"]
    assert [tick["text"] for tick in named] == ["0.001", "0.1", "10"]
    for tick in named:
        before = [index for index, edge in enumerate(LOSS_EDGES) if math.isclose(edge, float(tick["text"]))]
        where = left + (right - left) * before[0] / (len(LOSS_EDGES) - 1)
        assert float(tick["x"]) == pytest.approx(where, abs=0.51)


def test_layers_show_how_far_they_moved_and_nothing_where_it_is_not_known(table):
    rows = list(table.rows)
    rows[4] = replace(rows[4], layers={"first": 0.5, "last": None})
    layers = content._layers(replace(table, rows=tuple(rows)).to_dict())
    assert layers["labels"] == ["ssd", "random mask"]
    cells = {line["layer"]: line["cells"] for line in layers["lines"]}
    assert [cell and cell["text"] for cell in cells["first"]] == ["25.0", "50.0"]
    assert [cell and cell["text"] for cell in cells["last"]] == ["0", None]
    shades = [float(cell["shade"]) for cell in cells["first"]]
    assert 0 < shades[0] < shades[1]


def test_rows_without_losses_have_no_histogram(table):
    rows = list(table.rows)
    rows[2] = replace(rows[2], loss_counts={})
    drawn = content._losses(replace(table, rows=tuple(rows)).to_dict())
    assert "ssd" not in str(drawn)
    (panel,) = [each for each in content._losses(table.to_dict())["panels"] if each["label"] == "ssd"]
    edges = {"forget": LOSS_EDGES[8:10], "test": LOSS_EDGES[20:22]}
    assert panel["medians"] == {name: f"{low:.2g} to {high:.2g}" for name, (low, high) in edges.items()}


def test_bars_stay_inside_their_track(table):
    wild = copy.deepcopy(table.to_dict())
    wild["table"][2]["measures"]["retain"]["value"] = 7.0
    wild["table"][2]["measures"]["forget"]["value"] = -1.0
    widths = [float(width) for width in re.findall(r"width:([-\d.]+)%", page.render(wild))]
    assert widths
    assert all(0 <= width <= 100 for width in widths)


def test_a_comparison_of_little_has_a_page_too(table):
    bare = Comparison(table.rows[3:4], ("retain", "seconds"), {**FACTS, "forget_classes": None})
    text = words(bare.to_html())
    assert "not run" in text
    assert "Losses" not in text
    assert "Where the weights changed" not in text


def test_missing_figures_say_why_in_their_cell(table):
    original = table.rows[0]
    gone = {**original.measures, "js": Measure(None, "there is no retrained model")}
    rows = (Row("original", "original", "", {}, 0, None, gone), *table.rows[1:])
    html = Comparison(rows, COLUMNS, FACTS).to_html()
    assert '<td class="missing">n/a<small>there is no retrained model</small></td>' in html
    assert "[1] there is no retrained model" in Comparison(rows, COLUMNS, FACTS).to_markdown()


def test_seeds_show_their_spread(table):
    rows = [row("ssd", "method", [0.9 + 0.02 * seed, *[0.0] * 8], seed=seed) for seed in (0, 1)]
    text = words(Comparison(tuple(rows), COLUMNS, {**FACTS, "seeds": [0, 1]}).to_html())
    assert "91.0± 1.4" in text
    assert "over 2 seeds" in text


@pytest.mark.parametrize(
    "measure, unit, shown",
    [
        ({"value": 0.5}, "percent", "50.0"),
        ({"value": 0.00004}, "percent", "0.004"),
        ({"value": 0.0}, "percent", "0.0"),
        ({"value": 0.0123}, "points", "1.2"),
        ({"value": -1e-20}, "number", "0.000"),
        ({"value": 0.5, "low": 0.25, "high": 0.75}, "number", "0.500 [0.250, 0.750]"),
        ({"value": 123.4}, "seconds", "123"),
        ({"value": 12.34}, "seconds", "12.3"),
        ({"value": 0.1234}, "seconds", "0.12"),
        ({"value": None}, "number", "n/a"),
    ],
)
def test_figures(measure, unit, shown):
    assert page.figure(measure, unit) == shown


# ---- what became of each method


def test_a_sentence_per_method_says_whether_it_was_reached(table):
    original, retrained, ssd, broken, control = table.rows
    methods = [
        replace(ssd, reached=True),
        replace(ssd, label="newton", reached=False),
        replace(ssd, label="unsir", reached=None),
        broken,
        replace(ssd, label="pgu", reached=True),
        replace(ssd, label="pgu", seed=1, reached=False),
        replace(ssd, label="npo", reached=True),
        replace(ssd, label="npo", seed=1, why="RuntimeError: gone", measures={}),
    ]
    html = Comparison((original, retrained, *methods, control), COLUMNS, {**FACTS, "seeds": [0, 1]}).to_html()
    text = words(html)
    figures = "1.2 % of the forget set right, 97.5 % of the retain set, 1.2 points from retraining."
    for sentence in (
        f"ssd reached its goal within its budget: {figures}",
        f"newton did not reach its goal within its budget, and left the model as it was: {figures}",
        f"unsir ran without a goal, so nothing says whether it was reached: {figures}",
        '<b>&"x_y did not run: RuntimeError: <script>alert(1)</script>.',
        f"pgu reached its goal with 1 of 2 seeds; with the others the model is as it was: {figures}",
        f"npo reached its goal within its budget (1 of 2 seeds did not run): {figures}",
    ):
        assert sentence in text
    kinds = re.findall(r'<li class="(\w+)">', html)
    assert kinds == ["reached", "missed", "open", "failed", "partly", "reached"]
    assert "newton came closest" not in text


def test_a_method_that_left_the_model_as_it_was_did_not_come_closest(table):
    original, retrained, ssd, _, control = table.rows
    refused = replace(ssd, label="newton", reached=False)
    near = {**ssd.measures, "gap": Measure(0.001)}
    text = words(
        Comparison(
            (original, retrained, ssd, replace(refused, measures=near), control), COLUMNS, FACTS
        ).to_html()
    )
    assert "ssd came closest to retraining: 1.2 points" in text
    text = words(Comparison((original, retrained, refused, control), COLUMNS, FACTS).to_html())
    assert "came closest" not in text


def test_a_refusal_is_told_without_the_name_twice(table):
    failed = row("unsir", "method", [], why="unsir: whole classes only")
    (verdict,) = page.verdicts(Comparison((failed,), COLUMNS, FACTS).to_dict())
    assert verdict == {"label": "unsir", "kind": "failed", "text": "did not run: whole classes only."}


# ---- the figures to keep


def downloaded(html):
    (url,) = re.findall(r'<a download="figures.csv" href="data:text/csv;charset=utf-8,([^"]*)"', html)
    text = unquote(url, errors="strict")
    assert text.startswith("\ufeff")
    return list(csv.DictReader(io.StringIO(text.removeprefix("\ufeff"), newline="")))


def test_the_download_holds_the_figures_of_the_page(table):
    rows = downloaded(table.to_html())
    assert [line["label"] for line in rows] == list(table.labels)
    assert [line["kind"] for line in rows] == ["original", "reference", "method", "method", "control"]
    for line in rows:
        for name, measure in table.measures(line["label"]).items():
            found = line[name]
            assert (float(found) if found else None) == measure.value  # every digit
            assert line[f"{name}_why"] == (measure.why or "")
    assert "retain_spread" not in rows[0]


def test_the_download_quotes_what_has_to_be_and_computes_nothing(table):
    names = ['comma, "quote"\nand line', "=SUM(A1:A9)", "@home", "-1", "grüße, 重み", "plain"]
    rows = [replace(table.rows[2], label=name) for name in names]
    note = Measure(0.5, low=0.25, high=0.75, note="like, the reference")
    rows[0] = replace(rows[0], measures={**rows[0].measures, "mia_auc": note}, reached=True)
    found = downloaded(Comparison(tuple(rows), COLUMNS, FACTS).to_html())
    assert [line["label"] for line in found] == [names[0], "'=SUM(A1:A9)", "'@home", "'-1", *names[4:]]
    assert [found[0][f"mia_auc{part}"] for part in ("", "_low", "_high", "_note")] == [
        "0.5",
        "0.25",
        "0.75",
        "like, the reference",
    ]
    assert [line["seeds_reached"] for line in found] == ["1 of 1", "", "", "", "", ""]
    assert [line["mia_auc_note"] for line in found[1:]] == [""] * 5


def test_the_download_has_the_spread_over_seeds(table):
    rows = [row("ssd", "method", [0.9 + 0.02 * seed, *[0.0] * 8], seed=seed) for seed in (0, 1)]
    (line,) = downloaded(Comparison(tuple(rows), COLUMNS, {**FACTS, "seeds": [0, 1]}).to_html())
    assert float(line["retain"]) == pytest.approx(0.91)
    assert float(line["retain_spread"]) == pytest.approx(0.02 / 2**0.5)


# ---- colours


def themes():
    """The colours that the style sheet declares, by name, light and dark."""
    style = (Path(page.__file__).parent / "page.css").read_text(encoding="utf-8")
    light, dark = re.findall(r":root \{([^}]*)\}", style)
    found = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", part)) for part in (light, light + dark)]
    assert set(found[0]) == set(found[1])
    return {"light": found[0], "dark": found[1]}


def linear(colour):
    """Red, green and blue as shares of light, of ``#rrggbb`` as screens have it."""
    values = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def blended(over, under, opacity):
    mixed = [
        round(opacity * int(over[at : at + 2], 16) + (1 - opacity) * int(under[at : at + 2], 16))
        for at in (1, 3, 5)
    ]
    return "#" + "".join(f"{value:02x}" for value in mixed)


def contrast(one, other):
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05), L the relative luminance."""
    darker, lighter = sorted(
        sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), linear(c), strict=True)) for c in (one, other)
    )
    return (lighter + 0.05) / (darker + 0.05)


def test_contrast_is_computed_as_wcag_has_it():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out(theme):
    colours = themes()[theme]
    darkest = float(charts.shade(1.0, 1.0))  # of the heat map, under its figures
    grounds = [colours["paper"], colours["card"], blended(colours["heat"], colours["card"], darkest)]
    for text, behind in [(text, ground) for text in ("ink", "soft") for ground in grounds[:2]]:
        assert contrast(colours[text], behind) >= 4.5, (text, behind)
    assert contrast(colours["ink"], grounds[2]) >= 4.5
    for shape in ("retain", "forget", "gap", "other", "aim"):
        assert contrast(colours[shape], colours["card"]) >= 3, shape


# Machado, Oliveira & Fernandes 2009: what is seen without one kind of cones, in linear light.
CONES = {
    "red": (
        (0.152286, 1.052583, -0.204868),
        (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "green": (
        (0.367322, 0.860646, -0.227968),
        (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "blue": (
        (1.255528, -0.076749, -0.178779),
        (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}
TO_XYZ = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))


def product(matrix, vector):
    return [sum(a * b for a, b in zip(line, vector, strict=True)) for line in matrix]


def lab(light):
    scaled = [v / w for v, w in zip(product(TO_XYZ, light), (0.9505, 1.0, 1.089), strict=True)]
    x, y, z = (v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in scaled)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("lacking", CONES)
def test_bars_can_be_told_apart_by_those_who_see_fewer_colours(theme, lacking):
    colours = themes()[theme]
    seen = {
        name: lab([min(1.0, max(0.0, v)) for v in product(CONES[lacking], linear(colours[name]))])
        for name in ("retain", "forget", "gap")
    }
    for one, other in itertools.combinations(seen, 2):
        assert math.dist(seen[one], seen[other]) >= 15, (one, other)


# ---- in notebooks and data frames


def test_a_notebook_shows_the_table_alone(table):
    html = table._repr_html_()
    checker = checked(html)
    assert {"table", "th", "td"} <= set(checker.tags)
    # Nothing that could reach beyond it: no style sheet, no document of its own.
    assert not {"style", "script", "link", "html", "body", "title"} & set(checker.tags)
    assert checker.ids == []
    text = words(html)
    for part in ("97.5", "retain, %", "not run: RuntimeError", "before", "the aim", NOTICE):
        assert part in text
    assert "<script" not in html


def test_the_repr_is_a_line(table):
    assert repr(table) == (
        'Comparison(5 models, 9 figures, 1 seed: original, retrained, ssd, <b>&"x_y, random mask)'
    )


def test_a_data_frame_holds_the_figures(table):
    pandas = pytest.importorskip("pandas")
    frame = table.to_pandas()
    assert isinstance(frame, pandas.DataFrame)
    assert frame.index.name == "label"
    assert list(frame.index) == list(table.labels)
    assert list(frame.columns) == list(COLUMNS)
    assert frame.loc["ssd", "retain"] == 0.975
    assert frame.loc['<b>&"x_y'].isna().all()
    assert frame.attrs["why"]['<b>&"x_y', "js"] == "RuntimeError: <script>alert(1)</script>"
    rows = [row("ssd", "method", [0.9 + 0.02 * seed, *[0.0] * 8], seed=seed) for seed in (0, 1)]
    spread = Comparison(tuple(rows), COLUMNS, {**FACTS, "seeds": [0, 1]}).to_pandas()
    assert spread.loc["ssd", "retain"] == pytest.approx(0.91)
    assert spread.loc["ssd", "retain_spread"] == pytest.approx(0.02 / 2**0.5)


def test_without_pandas_the_error_says_what_to_install(table, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'unlearn_ext\[pandas\]'"):
        table.to_pandas()


def test_a_task_is_told_among_the_circumstances(table):
    told = Comparison(table.rows, COLUMNS, {**FACTS, "task": "Segmentation(ignore_index=255)"}).to_html()
    assert '<th scope="row">Task</th><td>Segmentation(ignore_index=255)</td>' in told


def test_templates_and_style_are_package_data():
    root = Path(page.__file__).parents[3]
    if not (root / "pyproject.toml").exists():
        pytest.skip("no source tree")
    declared = pytest.importorskip("tomllib").loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = declared["tool"]["setuptools"]["package-data"]["unlearn_ext.evaluation.page"]
    folder = Path(page.__file__).parent
    covered = {path for pattern in patterns for path in folder.glob(pattern)}
    wanted = {path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert wanted == covered
    assert {"page.css", "page.html"} <= {path.name for path in covered}


# ---- as a reader sees it


def as_in_the_demo(table):
    """The columns that the demo has, wide figures in each."""
    wide = Measure(0.5421, low=0.4401, high=0.6432, note="over-unlearned")
    names = (*COLUMNS[:4], "mia_auc", "mia_tpr", "js", "activation_distance", *COLUMNS[6:])
    rows = []
    for entry in table.rows:
        measures = {**entry.measures, "mia_auc": wide, "mia_tpr": wide, "activation_distance": Measure(0.123)}
        rows.append(replace(entry, measures=measures if entry.why is None else {}))
    rows.append(replace(rows[2], label="gradient_masking", reached=False))
    return Comparison(tuple(rows), names, FACTS)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_the_screen_in_light_and_dark(table, scheme, tmp_path):
    path = tmp_path / "page.html"
    shown = as_in_the_demo(table)
    shown.to_html(path)
    with chromium() as browser:
        for width in (1200, 400):
            page = new_page(browser, viewport={"width": width, "height": 900}, color_scheme=scheme)
            errors, foreign = watched(page)
            page.goto(path.as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            sizes = "e => [e.scrollWidth, e.clientWidth]"
            needed, there = page.locator(".scroller[aria-label=Results]").evaluate(sizes)
            assert width < 1200 or needed <= there  # on a telephone the table scrolls by itself
            ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
            paper = themes()[scheme]["paper"]
            assert ground == f"rgb({', '.join(str(int(paper[at : at + 2], 16)) for at in (1, 3, 5))})"
            picture = page.screenshot(path=tmp_path / f"{scheme}-{width}.png", full_page=True)
            assert len(picture) > 20_000
            assert not errors
            assert not foreign
            page.close()


def test_the_download_downloads(table, tmp_path):
    path = tmp_path / "page.html"
    table.to_html(path)
    with chromium() as browser:
        page = new_page(browser, accept_downloads=True)
        page.goto(path.as_uri())
        with page.expect_download() as download:
            page.locator("a[download]").click()
        assert download.value.suggested_filename == "figures.csv"
        download.value.save_as(tmp_path / "figures.csv")
    with open(tmp_path / "figures.csv", encoding="utf-8-sig", newline="") as file:
        assert [line["label"] for line in csv.DictReader(file)] == list(table.labels)
