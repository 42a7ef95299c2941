"""The Chromium of this machine, for tests that look at pages as readers do."""

import contextlib
import functools
import http.server
import shutil
import threading

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
PATIENCE = 180_000  # milliseconds: what is slow on a busy machine is no fault


@contextlib.contextmanager
def chromium():
    """A browser; where there is none the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: the extra `browser`")
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        path = next(filter(None, map(shutil.which, (*NAMES, own))), None)
        if path is None:
            pytest.skip("needs Chromium: apt-get install chromium")
        # In containers /dev/shm is often too small for a page.
        settings = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = driver.chromium.launch(executable_path=path, args=settings, timeout=PATIENCE)
        try:
            yield browser
        finally:
            browser.close()


def new_page(browser, **settings):
    """A page that waits as long as a busy machine takes."""
    page = browser.new_page(**settings)
    page.set_default_timeout(PATIENCE)
    return page


@contextlib.contextmanager
def served(folder):
    """The address of a folder over HTTP."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=folder)
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()


def watched(page):
    """Lists that fill up as a page is used: errors of its console, and what it loads from elsewhere."""
    errors, foreign = [], []
    page.on("console", lambda said: errors.append(said.text) if said.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))

    def note_failure(request):
        # A page that is left gives up what it was still loading; what is missing is an error of the console.
        if request.failure != "net::ERR_ABORTED":
            errors.append(f"{request.url}: {request.failure}")

    page.on("requestfailed", note_failure)

    def note(request):
        if not request.url.startswith(("http://127.0.0.1", "file:", "data:", "blob:")):
            foreign.append(request.url)

    page.on("request", note)
    return errors, foreign
