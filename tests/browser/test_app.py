"""The real page in a real Chromium, on the real SmolLM2 demo run: from the first look to the next round.

`MLXDPO_DEMO_RUN` names a finished `mlxdpo demo` run to copy; without one the demo's recipe is trained for three steps.
`MLXDPO_SHOTS` names a folder for screenshots and measured times.
"""

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from chromium import BROWSER

from mlxdpo.config import dump_config
from mlxdpo.io.atomic import write_text
from mlxdpo.io.json_file import read_lines
from mlxdpo.runs import Run

pytest.importorskip("gradio", reason="the app's tests need gradio: pip install 'mlxdpo[app]'")

pytestmark = [*BROWSER, pytest.mark.xdist_group("browser"), pytest.mark.real]
ROOT = Path(__file__).parents[2]
EVIL = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script> ${window.pwned=1} {{7*7}}"
SHOTS = os.environ.get("MLXDPO_SHOTS")
PATIENCE = 180_000  # milliseconds: a machine with other work to do takes its time
READY = "#vote-a:not([disabled])"
BOTH = "[...document.querySelectorAll('#columns .answer')]"


def demo_run(folder: Path) -> None:
    """A demo run at folder/runs/demo0, with few held-out pairs, one of which carries a script."""
    run = folder / "runs" / "demo0"
    if given := os.environ.get("MLXDPO_DEMO_RUN"):
        shutil.copytree(given, run)
        config = Run.open(run).config()  # its paths lead to where the demo was made
        data = config.data.model_copy(
            update={"path": "runs/demo0/data/pairs.jsonl", "eval": "runs/demo0/data/heldout.jsonl"}
        )
        write_text(run / "config.yaml", dump_config(config.model_copy(update={"data": data})))
    else:
        from mlxdpo.demo.material import bundled_labels, prepare_demo
        from mlxdpo.training.run import train

        config = prepare_demo(Path("runs/demo0"), 0, bundled_labels)
        list(train(config.model_copy(update={"train": config.train.model_copy(update={"steps": 3})})))
    for name in (Path("votes.jsonl"), Path("next-round/pairs.jsonl")):
        (run / name).unlink(missing_ok=True)
    rows = list(read_lines(run / "data/heldout.jsonl"))[:12]
    rows[3] |= {"prompt": EVIL + " One day", "chosen": EVIL, "rejected": "no"}
    write_text(run / "data/heldout.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


class App:
    """`python app.py` as a process of its own."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.folder, self.url = folder, f"http://127.0.0.1:{self.port}"
        self.start()

    def start(self) -> None:
        words = [sys.executable, str(ROOT / "app.py"), "runs/demo0", "--port", str(self.port)]
        env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self.process = subprocess.Popen(words, cwd=self.folder, stdout=subprocess.PIPE, text=True, env=env)
        line = self.process.stdout.readline()
        assert self.url in line, line

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    old = Path.cwd()
    os.chdir(folder)
    demo_run(folder)
    running = App(folder)
    yield running
    running.kill()
    os.chdir(old)


@pytest.fixture
def visit(app, chromium):
    """Open the page in a browser of one's own; what it asks for and complains about is kept on it."""
    contexts = []

    def opened(**options):
        contexts.append(chromium.new_context(**({"viewport": {"width": 1280, "height": 900}} | options)))
        page = contexts[-1].new_page()
        page.asked, page.errors = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("pageerror", lambda error: page.errors.append(str(error)))
        page.goto(app.url)
        page.locator("#compare-prompt textarea").wait_for()
        return page

    yield opened
    for context in contexts:
        context.close()


def shot(page, name: str) -> None:
    if SHOTS:
        page.wait_for_timeout(400)
        page.screenshot(path=Path(SHOTS) / f"{name}.png", full_page=True)


def note(**values) -> None:
    print(values)
    if SHOTS:
        with (Path(SHOTS) / "figures.jsonl").open("a") as file:
            file.write(json.dumps(values) + "\n")


def send(page, text: str) -> None:
    page.locator("#compare-prompt textarea").fill(text)
    page.locator("#compare-prompt textarea").press("Enter")


def finished(page) -> None:
    page.wait_for_selector("#columns .tok", timeout=PATIENCE)


def blind_pair(page) -> None:
    page.get_by_role("tab", name="Blind vote").click()
    page.locator("#vote-next").click()
    page.wait_for_selector(READY, timeout=PATIENCE)


def inert(page) -> None:
    assert page.evaluate("window.pwned === undefined") and page.errors == []
    assert {url.split("/")[2] for url in page.asked if url.startswith("http")} == {page.url.split("/")[2]}


def test_from_the_first_look_to_the_next_round(app, visit):
    page = visit()
    paint = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    started = time.monotonic()
    send(page, "On Tuesday I went to the zoo")
    streaming = f"document.querySelector('#columns [aria-busy=true]') && {BOTH}.length == 2"
    both = f"{streaming} && {BOTH}.every(a => a.textContent.trim()) && {BOTH}.map(a => a.textContent.length)"
    early = page.wait_for_function(both, timeout=PATIENCE).json_value()  # in one look: an answer may be short
    first = time.monotonic() - started
    finished(page)
    note(first_paint_ms=paint, first_token_s=first, answers_s=time.monotonic() - started)
    assert not SHOTS or (paint < 2000 and first < 20)  # where times are measured
    late = page.evaluate(f"{BOTH}.map(a => a.textContent.length)")
    assert all(a < b for a, b in zip(early, late, strict=True)), "both columns grew"
    assert page.locator("#columns .chip", has_text="KL").count() == 2
    shot(page, "app-compare")
    story_of_votes(app, page)


def story_of_votes(app, page) -> None:
    page.get_by_role("tab", name="Blind vote").click()
    page.get_by_label("Training prompts: votes for the next round").check()
    for key in ("1", "2"):
        page.locator("#vote-standing").click()  # away from any field
        page.keyboard.press("n")
        page.wait_for_selector(READY, timeout=PATIENCE)
        board = page.locator("#vote-board").inner_text()
        assert "Answer A" in board and "tuning" not in board and page.locator("#vote-board .chip").count() == 0
        page.keyboard.press(key)
        page.wait_for_selector("#vote-board .tok", timeout=PATIENCE)
        assert "after tuning" in page.locator("#vote-board").inner_text()
    page.get_by_label("Held-out prompts: is it better?").check()
    page.locator("#vote-next").click()
    page.wait_for_selector(READY, timeout=PATIENCE)
    page.locator("#vote-tie").click()
    page.wait_for_selector("#vote-board .tok", timeout=PATIENCE)
    shot(page, "app-vote")
    inert(page)
    app.kill()  # between vote and export
    app.start()
    page.goto(app.url)
    page.get_by_role("tab", name="Blind vote").click()
    page.locator("#vote-teach button").first.click()
    page.locator("#vote-export").click()
    page.wait_for_selector("#vote-written .standing", timeout=PATIENCE)
    assert "Pairs: 2, from 3 votes" in page.locator("#vote-written").inner_text()
    command = page.locator("#vote-command .cm-content").inner_text()
    votes = list(read_lines(app.folder / "runs/demo0/votes.jsonl"))
    assert len({vote["id"] for vote in votes}) == len(votes) == 3
    words = [sys.executable, "-m", "mlxdpo.cli", *shlex.split(command.replace("\n", " "))[1:]]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(words, cwd=app.folder, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    assert (app.folder / "runs/demo0-votes-1/adapter/adapters.safetensors").exists()


def test_what_data_and_prompts_say_stays_text(visit):
    page = visit()
    page.locator("#compare-pick input").click()
    page.keyboard.type("onerror")
    page.get_by_role("option", name="onerror").first.click()
    page.wait_for_selector("#compare-pair .voice")
    assert EVIL in page.locator("#compare-pair").inner_text()
    page.wait_for_function("document.querySelector('#compare-prompt textarea').value.length > 20")
    page.locator("#compare-send").click()
    finished(page)
    assert page.locator("#columns .said").first.inner_text().endswith(EVIL + " One day")
    send(page, EVIL)
    page.wait_for_function("document.querySelectorAll('#columns .said').length == 4")
    page.locator("#compare-stop").click()
    page.wait_for_selector("#columns [aria-busy=false]")
    page.locator("#compare-run input").fill("<img src=x onerror=window.pwned=1>")
    inert(page)


def test_two_users_at_once(visit):
    pages = [visit(), visit()]
    said = ["The train was late and", "My new neighbour is"]
    for page, text in zip(pages, said, strict=True):
        send(page, text)
    for page, mine, other in zip(pages, said, said[::-1], strict=True):
        finished(page)
        shown = page.locator("#columns").inner_text()
        assert mine in shown and other not in shown


def test_the_page_answers_while_it_streams_512_tokens_and_stops(visit):
    page = visit()
    page.locator("button", has_text="Settings").first.click()
    page.locator("#compare-tokens input[type=number]").fill("512")
    page.locator("#compare-tokens input[type=number]").press("Tab")
    send(page, "A long story about the sea:")
    page.wait_for_function(f"{BOTH}.length == 2 && {BOTH}.every(a => a.textContent.trim())", timeout=PATIENCE)
    slowest = 0.0
    for _ in range(5):
        started = time.monotonic()
        page.get_by_role("tab", name="Blind vote").click()
        page.locator("#vote-board").wait_for(state="visible")
        page.get_by_role("tab", name="Compare").click()
        page.locator("#compare-prompt textarea").fill("")
        page.locator("#compare-random").click()  # through the server
        page.wait_for_function("document.querySelector('#compare-prompt textarea').value.length > 3")
        slowest = max(slowest, time.monotonic() - started)
        page.wait_for_timeout(300)
    started = time.monotonic()
    page.locator("#compare-stop").click()
    page.wait_for_selector("#columns .tok", timeout=PATIENCE)
    note(slowest_reaction_s=slowest, stop_and_score_s=time.monotonic() - started)
    shown = page.locator("#columns").inner_text()
    assert ("you stopped it" in shown or "ended by itself" in shown) and "cut off at max tokens" not in shown


@pytest.mark.parametrize("name, options", {
    "app-phone": {"viewport": {"width": 360, "height": 740}},
    "app-dark": {"color_scheme": "dark"},
}.items())  # fmt: skip
def test_small_and_dark(visit, name, options):
    page = visit(**options)
    send(page, "On Tuesday I went to the zoo")
    finished(page)
    shot(page, name)
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    blind_pair(page)
    shot(page, name + "-vote")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_keys_alone_are_enough(visit):
    page = visit()
    page.locator("#compare-prompt textarea").focus()
    page.keyboard.type("The garden was 1 2 0 9 n")
    assert page.locator("#compare-prompt textarea").input_value() == "The garden was 1 2 0 9 n", "typing does not vote"
    page.keyboard.press("Enter")
    finished(page)
    page.locator("#columns .tok").first.focus()
    before = page.evaluate("document.activeElement.getAttribute('aria-label')")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") != before
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").endswith("than before")
