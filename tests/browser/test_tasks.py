"""Evaluate, Dial and Export of a finished run, clicked in Chromium: each is seen to end with what it found."""

import pytest
from chromium import BROWSER

from mlxdpo.exporters import read_record

pytest.importorskip("gradio", reason="the app's tests need gradio: pip install 'mlxdpo[app]'")

pytestmark = [*BROWSER, pytest.mark.xdist_group("browser"), pytest.mark.processes]


@pytest.fixture
def page(page_of_a_run):
    """The Runs tab with one run, finished and chosen."""
    page_of_a_run.get_by_role("tab", name="Runs", exact=True).click()
    page_of_a_run.wait_for_selector("#runs-curves svg")
    return page_of_a_run


def ended(page, name: str, button: str) -> str:
    """Click a task's button; the words of its status once the process has ended."""
    page.locator(f"#runs-{name}").click()
    page.locator(f"#runs-{name}-status", has_text=f"{button}: at work").wait_for()
    done = "document.querySelector('#runs-{0}-status').innerText.match(/{1}: (finished|ended|stopped)/)"
    page.wait_for_function(done.format(name, button))
    return page.locator(f"#runs-{name}-status").inner_text()


def test_evaluate_dial_and_export_end_with_what_they_found(page, tmp_path):
    run = tmp_path / "runs" / "one"
    page.get_by_role("tab", name="Evaluation", exact=True).click()
    assert "Not evaluated yet" in page.locator("#runs-eval-result").inner_text()
    page.get_by_label("Judge of the answers").first.click()
    page.get_by_role("option", name="longest: the longer answer").first.click()
    page.get_by_label("Prompts to answer").first.fill("4")
    assert "Evaluate: finished" in ended(page, "eval", "Evaluate")
    report = page.frame_locator("#runs-eval-result iframe")
    report.locator("h1").first.wait_for()
    assert "longest" in report.locator("body").inner_text() and (run / "report.html").exists()
    page.locator("#runs-status", has_text="finished").wait_for()

    page.get_by_role("tab", name="Dial", exact=True).click()
    assert "Dial: finished" in ended(page, "dial", "Dial")
    page.locator("#runs-dial-result", has_text="Take strength").wait_for()
    assert page.locator("#runs-dial-result tr.chosen").count() == 1

    page.get_by_role("tab", name="Export", exact=True).click()
    page.get_by_label("PEFT adapter, for torch").check()
    assert "Export: finished" in ended(page, "export", "Export")
    page.locator("#runs-export-result", has_text="passed").first.wait_for()
    assert set(read_record(run / "export").targets) == {"mlx", "peft"}
    shown = page.locator("#runs-export-result").inner_text()
    assert shown.count("passed") == 2 and "failed" not in shown

    for name in ("Evaluation", "Dial", "Export"):
        page.set_viewport_size({"width": 1280, "height": 900})
        page.get_by_role("tab", name=name, exact=True).click()
        page.set_viewport_size({"width": 360, "height": 740})
        page.wait_for_function("innerWidth === 360 && document.documentElement.scrollWidth <= 360")
