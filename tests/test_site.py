"""The built site: every link leads somewhere, nothing comes from elsewhere, and a browser can search it."""

import re
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import pytest
from browser import chromium, new_page, served, watched

ROOT = Path(__file__).parents[1]
SITE = ROOT / "build" / "site"
# Elements that make a browser fetch what they name; a link is fetched when somebody follows it.
LOADS = {("img", "src"), ("script", "src"), ("link", "href"), ("iframe", "src"), ("source", "src")}


class Page(HTMLParser):
    """The links of a page, what it loads, and the names of its places."""

    def __init__(self, path):
        super().__init__()
        self.links, self.loaded, self.places = [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.places |= {given[name] for name in ("id", "name") if given.get(name)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        self.loaded += [given[name] for kind, name in LOADS if kind == tag and given.get(name)]


@pytest.fixture(scope="module")
def site():
    built = SITE / "index.html"
    if not built.exists():
        pytest.skip("there is no site: make docs")
    sources = [ROOT / "mkdocs.yml", ROOT / "README.md", *(ROOT / "docs").rglob("*.*")]
    newer = [path.name for path in sources if path.stat().st_mtime > built.stat().st_mtime]
    newer = [name for name in newer if not name.endswith(".pyc")]
    if newer:
        pytest.skip(f"the site is older than {newer[0]}: make docs")
    return {path.relative_to(SITE).as_posix(): Page(path) for path in SITE.rglob("*.html")}


def followed(at, link):
    """The file of the site that a link on a page leads to, and the place in it."""
    address, place = urldefrag(urljoin(f"http://site/{at}", link).removeprefix("http://site/"))
    address = unquote(urlsplit(address).path) if link.split("#")[0] else at
    return address, unquote(place)


def test_every_internal_link_leads_somewhere(site):
    assert len(site) >= 30
    broken, n_links = [], 0
    for at, page in site.items():
        for link in [*page.links, *page.loaded]:
            if re.match(r"[a-z]+:", link) or (at == "404.html" and link.startswith("/")):
                continue
            n_links += 1
            address, place = followed(at, link)
            if not (SITE / address).is_file():
                broken.append(f"{at}: {link}")
            elif place and address.endswith(".html") and place not in site[address].places:
                broken.append(f"{at}: {link} (no such place)")
    assert not broken
    assert n_links >= 1000


def test_nothing_is_loaded_from_elsewhere(site):
    foreign = {
        link for page in site.values() for link in page.loaded if re.match(r"(?!data:)[a-z]+:|//", link)
    }
    assert not foreign
    styles = "".join(path.read_text(encoding="utf-8") for path in SITE.rglob("*.css"))
    assert not re.search(r"url\(['\"]?(https?:)?//|@import", styles)


def test_a_link_check_that_can_fail(tmp_path):
    (tmp_path / "a.html").write_text('<a href="b.html#x">b</a><img src="c.png"><h2 id="y">y</h2>', "utf-8")
    page = Page(tmp_path / "a.html")
    assert (page.links, page.loaded, page.places) == (["b.html#x"], ["c.png"], {"y"})
    assert followed("in/a.html", "../b.html#x") == ("b.html", "x")
    assert followed("in/a.html", "#y") == ("in/a.html", "y")
    assert followed("a.html", "in/c%20d.png") == ("in/c d.png", "")


def test_a_browser_opens_pages_without_an_error_and_search_finds_a_word(site):
    with chromium() as browser, served(SITE) as address:
        page = new_page(browser, viewport={"width": 1200, "height": 900})
        errors, foreign = watched(page)
        for name in ("index.html", "choosing.html", "tutorials/forget_class.html", "reference/methods.html"):
            page.goto(f"{address}/{name}", wait_until="networkidle")
            assert page.locator("h1").first.is_visible()
            width = page.evaluate("document.documentElement.scrollWidth")
            assert width <= 1200, f"{name} is {width} pixels wide"
        page.goto(f"{address}/index.html", wait_until="networkidle")
        page.locator("input.md-search__input").click()
        page.keyboard.type("Kronecker")
        found = page.locator(".md-search-result__link[href*='h=kronecker' i]")
        found.first.wait_for()
        assert any("Kronecker" in text for text in found.all_inner_texts())
        found.first.click()
        page.wait_for_url(re.compile(r"\?h=kronecker"))
        # Marks are put in when the page has loaded.
        page.locator("mark").first.wait_for(state="attached")
        assert not errors
        assert not foreign


def test_pages_open_from_the_disk_as_well(site):
    with chromium() as browser:
        page = new_page(browser, viewport={"width": 400, "height": 800})
        page.goto((SITE / "ten_minutes.html").as_uri())
        page.locator("article a", has_text="Choose a method").click()
        page.wait_for_url((SITE / "choosing.html").as_uri())  # a click does not wait for it
        assert page.locator("h1").first.inner_text().startswith("Choose a method")
