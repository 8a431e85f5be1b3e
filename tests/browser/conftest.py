"""One Chromium for the tests of a file."""

import pytest
from chromium import CHROMIUM


@pytest.fixture(scope="module")
def chromium():
    """A browser without a window; the tests that ask for it are skipped where Playwright is not installed."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright: pip install 'mlxdpo[browser]'")
    with playwright.sync_playwright() as engine:
        browser = engine.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()
