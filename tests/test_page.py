"""The page: valid, self-contained, and saying what the numbers say."""

import copy
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from unlearn_ext.evaluation import page
from unlearn_ext.evaluation.comparison import Comparison
from unlearn_ext.evaluation.evidence import NOTICE
from unlearn_ext.evaluation.metrics.measures import Measure
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
    assert not [
        entry for entry in checker.attributes if entry[1] in ("src", "href", "srcset") or entry[1][:2] == "on"
    ]
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
