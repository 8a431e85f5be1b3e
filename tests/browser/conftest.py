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


@pytest.fixture
def page_of_a_run(tmp_path, cache, monkeypatch, chromium):
    """The app over a folder with one finished run, at 1280 pixels, and patient."""
    from tiny_desk import finished_run

    from mlxdpo.ui.server import start_app

    monkeypatch.chdir(tmp_path)
    finished_run(tmp_path)
    running = start_app(tmp_path / "runs", "one")
    opened = chromium.new_context(viewport={"width": 1280, "height": 900}).new_page()
    opened.set_default_timeout(240_000)  # milliseconds: processes are waited for
    opened.goto(running.url)
    yield opened
    opened.context.close()
    running.page.close()
