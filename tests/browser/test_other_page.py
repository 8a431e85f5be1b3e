"""A page on another port of this machine, in a real Chromium: it reads nothing of the app and changes nothing."""

import http.server
import json
import threading

import pytest
from chromium import BROWSER
from tiny_desk import finished_run

from mlxdpo.ui.server import start_app

pytest.importorskip("gradio", reason="the app's tests need gradio: pip install 'mlxdpo[app]'")

pytestmark = BROWSER

SPY = """async (app) => {
    const got = {}
    const paths = ["/", "/config", "/gradio_api/info", "/gradio_api/queue/data?session_hash=x", "/theme.css"]
    for (const path of paths) for (const more of [{}, {credentials: "include"}]) {
        const key = path + JSON.stringify(more)
        try { got[key] = (await (await fetch(app + path, more)).text()).length } catch (error) { got[key] = "refused" }
    }
    const body = JSON.stringify({data: ["one"], fn_index: 0, session_hash: "x"})
    for (const type of ["application/json", "text/plain"]) {
        try {
            const options = {method: "POST", body, credentials: "include", headers: {"Content-Type": type}}
            got[type] = (await fetch(app + "/gradio_api/queue/join", options)).status
        } catch (error) { got[type] = "refused" }
    }
    got.stream = await new Promise(done => {
        const stream = new EventSource(app + "/gradio_api/queue/data?session_hash=x", {withCredentials: true})
        stream.onmessage = event => done(event.data)
        stream.onerror = () => done("refused")
    })
    got.script = await new Promise(done => {
        const script = document.createElement("script")
        script.onload = () => done("loaded")
        script.onerror = () => done("refused")
        script.src = app + "/config"
        document.head.append(script)
    })
    got.frame = await new Promise(done => {
        const frame = document.createElement("iframe")
        frame.onload = () => { try { done(frame.contentDocument.body.innerHTML) } catch (error) { done("refused") } }
        frame.src = app + "/"
        document.body.append(frame)
    })
    return got
}"""


class Other(http.server.BaseHTTPRequestHandler):
    """The other page."""

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<!doctype html><title>other</title><body></body>")

    def log_message(self, *args):
        pass


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_a_page_on_another_local_port_reads_nothing(tmp_path, chromium, name):
    finished_run(tmp_path)
    app = start_app(tmp_path / "runs", "one")
    other = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=other.serve_forever, daemon=True).start()
    try:
        context = chromium.new_context()
        page = context.new_page()
        page.goto(app.url)  # the user has the app open, with its cookie
        page.locator("#compare-run").wait_for(timeout=180_000)
        spy = context.new_page()
        spy.goto(f"http://{name}:{other.server_port}/")
        got = spy.evaluate(SPY, app.url.rstrip("/"))
        context.close()
    finally:
        other.shutdown()
        other.server_close()
        app.page.close()
    assert set(got.values()) == {"refused"}, json.dumps(got, indent=1)
    assert not (tmp_path / "runs/one/votes.jsonl").exists()
