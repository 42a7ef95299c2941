"""The Chromium of this machine, for tests that look at pages as readers do."""

import contextlib
import functools
import http.server
import shutil
import threading

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")


@contextlib.contextmanager
def chromium():
    """A browser; where there is none the test is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: the extra `browser`")
    with playwright.sync_playwright() as driver:
        own = driver.chromium.executable_path
        path = next(filter(None, map(shutil.which, (*NAMES, own))), None)
        if path is None:
            pytest.skip("needs Chromium: apt-get install chromium")
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


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
    page.on("requestfailed", lambda request: errors.append(f"{request.url}: {request.failure}"))

    def note(request):
        if not request.url.startswith(("http://127.0.0.1", "file:", "data:", "blob:")):
            foreign.append(request.url)

    page.on("request", note)
    return errors, foreign
