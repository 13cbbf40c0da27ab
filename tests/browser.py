"""A headless Chromium for tests of pages: Debian's, or whichever lies on the path; Playwright only drives it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, _NAMES)), None)
IS_NEEDED = "RESTRIKE_NEEDS_BROWSER" in os.environ  # continuous integration sets it: there a skip would hide a defect
_ARGUMENTS = [
    "--no-sandbox", "--disable-dev-shm-usage", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--use-angle=swiftshader", "--enable-unsafe-swiftshader",
]  # fmt: skip

needs_browser = pytest.mark.skipif(
    BROWSER is None and not IS_NEEDED,
    reason="no Chromium or Chrome here, so the page is not tried in a browser (apt-get install chromium)",
)


@contextmanager
def launched_browser() -> Iterator[Any]:
    """A `playwright.sync_api.Browser`; one at a time, as Playwright has the thread's event loop meanwhile."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=_ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()
