"""Every tab at three widths and in both colour schemes: as wide as the page, nothing beside it, nothing axe objects to.

Also what a click on a row or on a vote does at once. On a tiny run, so that no model is needed.
"""

import json
import os

import pytest
from chromium import BROWSER
from tiny_desk import finished_run

from mlxdpo.io.json_file import read_lines
from mlxdpo.ui.server import start_app

pytest.importorskip("gradio", reason="the app's tests need gradio: pip install 'mlxdpo[app]'")

pytestmark = [*BROWSER, pytest.mark.xdist_group("browser")]
TABS = ("Compare", "Blind vote", "Runs", "Data", "Train", "Constitution")
PATIENCE = 180_000  # milliseconds
FACTS = """() => {
    const width = (node) => node.getBoundingClientRect().width;
    const shown = (node) => node.checkVisibility({opacityProperty: true, visibilityProperty: true}) && width(node);
    const seen = [...document.querySelectorAll('.gradio-container *')].filter(shown);
    const panel = [...document.querySelectorAll('[role=tabpanel]')].find(e => e.checkVisibility());
    const fields = [...panel.querySelectorAll('button, input, textarea, table, iframe, svg')].filter(
        e => shown(e) > 2 && e.tabIndex >= 0);  // Gradio measures its tabs on copies that nobody reaches
    const outside = fields.filter(e => e.getBoundingClientRect().right > innerWidth + 1);
    const buttons = fields.filter(e => e.tagName === 'BUTTON' && !e.closest('.lines')).map(
        e => [e, e.getBoundingClientRect()]);
    const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 1 && b.top < a.bottom - 1;
    const over = buttons.flatMap(([e, a], i) => buttons.slice(i + 1).filter(
        ([f, b]) => !e.contains(f) && !f.contains(e) && meet(a, b)).map(([f]) => e.innerText + ' | ' + f.innerText));
    return {scroll: document.documentElement.scrollWidth, panel: Math.round(width(panel)), over,
            outside: outside.map(e => e.outerHTML.slice(0, 120)),
            errors: seen.filter(e => !e.closest('[role=alert], .toast-body') && !e.children.length &&
                e.textContent.trim() === 'Error').length};
}"""


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder, old = tmp_path_factory.mktemp("layout"), os.getcwd()
    os.chdir(folder)
    finished_run(folder)
    found = {"similar_to": None, "contradicted_by": None}
    lines = [
        found | {"where": f"pairs.jsonl:{n}", "probability": n / 20, "flags": ["flip"] * (n < 4)} for n in range(1, 9)
    ]
    (folder / "pairs.audit.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    running = start_app(folder / "runs", "one")
    yield running.url, folder
    running.page.close()
    os.chdir(old)


def visit(chromium, url, **options):
    page = chromium.new_context(**options).new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(url)
    page.locator("#compare-prompt textarea").wait_for()
    return page


def show(page, name):
    """Open a tab, from the menu where the row of tabs has no room for it, with a data file in the Data tab."""
    tab = page.get_by_role("tab", name=name, exact=True)
    if tab.count() and tab.first.is_visible():
        tab.first.click()
    else:
        page.locator(".overflow-menu button").first.click()
        page.locator(".overflow-dropdown button", has_text=name).click()
    page.wait_for_function(
        "(name) => [...document.querySelectorAll('[role=tab][aria-selected=true]')].some(e => e.innerText === name)",
        arg=name,
    )
    if name == "Data":
        page.locator("#data-file input").click()
        page.get_by_role("option", name="pairs.jsonl", exact=True).click()
        page.wait_for_selector("#data-rows tr[data-row]")
    if name == "Runs":
        page.wait_for_selector("#runs-curves svg")


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_every_tab_has_the_width_of_the_page_and_nothing_beside_it(app, chromium, width):
    page = visit(chromium, app[0], viewport={"width": width, "height": 900})
    found = {}
    for name in TABS:
        show(page, name)
        found[name] = page.evaluate(FACTS)
    page.context.close()
    assert [name for name, facts in found.items() if facts["scroll"] > width] == []
    assert len({facts["panel"] for facts in found.values()}) == 1, found
    assert next(iter(found.values()))["panel"] >= min(width - 80, 1100)
    for name, facts in found.items():
        assert (facts["outside"], facts["over"], facts["errors"]) == ([], [], 0), (name, facts)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious_on_any_tab(app, chromium, scheme):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="pip install 'mlxdpo[browser]'").Axe()
    page = visit(chromium, app[0], viewport={"width": 1280, "height": 900}, color_scheme=scheme)
    found = []
    for name in TABS:
        show(page, name)
        page.wait_for_timeout(400)  # colours of a tab fade in
        for one in axe.run(page).response["violations"]:
            if one["impact"] in ("serious", "critical"):
                found.append((name, one["id"], [node["html"][:120] for node in one["nodes"][:3]]))
    page.context.close()
    assert found == []


def test_a_row_opens_by_a_click_and_a_decision_is_kept(app, chromium):
    page = visit(chromium, app[0])
    show(page, "Data")
    page.locator("#data-rows tr[data-row='3'] td").first.click()
    page.wait_for_function("document.querySelector('#data-field-0 textarea')?.value.startsWith('q2')")
    page.get_by_role("tab", name="Audit", exact=True).click()
    page.get_by_label("Drop row 2").click()
    page.wait_for_selector("[aria-label='Drop row 2'][aria-pressed=true]")
    page.locator("#data-audit-write").click()
    page.wait_for_selector("#data-audit-written [role=status]")
    page.context.close()
    lines = (app[1] / "pairs.jsonl").read_text().splitlines()
    assert (app[1] / "pairs.audited.jsonl").read_text().splitlines() == lines[:1] + lines[2:]


def test_a_vote_is_acknowledged_by_the_click_itself_and_counts_once(app, chromium):
    page = visit(chromium, app[0])
    show(page, "Blind vote")
    page.locator("#vote-next").click()
    page.wait_for_selector("#vote-a:not([disabled])")
    page.evaluate("""() => {
        window.acknowledged = new Promise(done => {
            const said = document.getElementById('vote-said'), began = performance.now(), times = {};
            new MutationObserver(() => {
                if (said.innerText.includes('Saving')) times.taken ??= performance.now() - began;
                if (said.innerText.includes('is saved')) { times.saved = performance.now() - began; done(times); }
            }).observe(said, {subtree: true, childList: true, characterData: true});
            for (const id of ['vote-a', 'vote-b', 'vote-a']) document.getElementById(id).click();
        });
    }""")
    times = page.evaluate("window.acknowledged")
    print("click to acknowledgement, ms:", times)
    assert "taken" in times, "the page waits for the server before it says anything"
    page.wait_for_selector("#vote-board .tok")
    page.wait_for_function("[...document.querySelectorAll('#vote-a, #vote-b')].every(e => e.disabled)")
    page.context.close()
    assert len(list(read_lines(app[1] / "runs/one/votes.jsonl"))) == 1


def test_a_refusal_is_a_sentence_and_no_bare_error(app, chromium):
    page = visit(chromium, app[0])
    show(page, "Train")
    page.locator("#train-start").click()
    page.get_by_text("choose preference data first").last.wait_for()
    assert page.evaluate(FACTS)["errors"] == 0
    page.context.close()
