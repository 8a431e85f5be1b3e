"""A word of an answer clicked in Chromium: its pairs are listed, one is dropped, and the new file is written."""

import pytest
from chromium import BROWSER

pytest.importorskip("gradio", reason="the app's tests need gradio: pip install 'mlxdpo[app]'")

pytestmark = [*BROWSER, pytest.mark.xdist_group("browser"), pytest.mark.processes]


def test_a_clicked_word_shows_its_pairs_and_one_is_dropped(page_of_a_run, tmp_path):
    page = page_of_a_run
    page.locator("#compare-prompt textarea").fill("q3 red:")
    page.locator("#compare-send").click()
    words = page.locator("#columns .voice.tuned .tok")
    words.first.wait_for()
    word = next(one for one in words.all() if one.inner_text().strip())
    word.click()
    listed = page.locator("#compare-taught tr[data-row]")
    listed.first.wait_for()
    first = listed.first.get_attribute("data-row")
    assert word.inner_text().strip() in page.locator("#compare-taught caption").first.inner_text()
    drop = listed.first.get_by_role("button", name="Drop row")
    drop.click()
    page.locator(f'#compare-taught tr[data-row="{first}"] [data-act=drop][aria-pressed=true]').wait_for()
    page.locator("#compare-influence-write").click()
    page.locator("#compare-influence", has_text="1 row dropped").wait_for()
    before, after = ((tmp_path / name).read_text().splitlines() for name in ("pairs.jsonl", "pairs.audited.jsonl"))
    assert len(after) == len(before) - 1
    assert before[int(first.rsplit(":", 1)[1]) - 1] not in after


def test_enter_on_a_word_asks_too(page_of_a_run):
    page = page_of_a_run
    page.locator("#compare-prompt textarea").fill("q3 red:")
    page.locator("#compare-send").click()
    page.locator("#columns .voice.tuned .tok").first.wait_for()
    word = next(one for one in page.locator("#columns .voice.tuned .tok").all() if one.inner_text().strip())
    word.focus()
    page.keyboard.press("Enter")
    page.locator("#compare-taught tr[data-row]").first.wait_for()
