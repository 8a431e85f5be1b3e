"""The app's own API with payloads that no page would send: an answer or a message, and no traceback."""

import asyncio
import functools
import inspect
import json
import random

import pytest
from counting import TALLY, case, fuzzed
from hypothesis import strategies as st
from mutating import ODD_VALUES, SEEDS, mutate_bytes
from tiny_desk import finished_run

from mlxdpo.types import UserError
from mlxdpo.ui.guard import Gate

pytestmark = pytest.mark.fuzz
pytest.importorskip("gradio", reason="the app's tests need gradio: pip install 'mlxdpo[app]'")

HEADER = st.sampled_from(["host", "origin", "cookie", "content-length", "content-type", "x-forwarded-host", "referer"])
RAW = st.binary(max_size=30) | st.sampled_from(
    [b"127.0.0.1:7860", b"http://127.0.0.1:7860", b"mlxdpo_page_1=n", b"-1", b"9" * 400, b"\xb2", b"[::1", b";="]
)  # fmt: skip
SCOPE = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["http", "websocket", "lifespan"]),
        "method": st.sampled_from(["GET", "POST", "HEAD", "PUT", ""]),
        "path": st.sampled_from(["/", "/gradio_api/queue/join", "//", "/\0", ""]),
        "headers": st.lists(st.tuples(HEADER.map(str.encode), RAW), max_size=5),
        "server": st.sampled_from([("127.0.0.1", 1), None]),
    }
)


@fuzzed(60, 1_000, scope=SCOPE, chunks=st.lists(st.binary(max_size=20), max_size=3))
def test_the_gate(scope, chunks):
    """Whatever headers come, it answers or passes on."""
    seen = []

    async def behind(scope, receive, send):
        while (await receive())["type"] == "http.request":
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def go():
        left = iter([*({"type": "http.request", "body": chunk} for chunk in chunks), {"type": "http.disconnect"}])

        async def receive():
            return next(left, {"type": "http.disconnect"})

        async def send(message):
            seen.append(message)

        await Gate(behind, nonce="n", hosts=("127.0.0.1",))(scope, receive, send)

    case("app: gate", lambda: asyncio.run(go()))
    assert seen


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The app over one tiny run; nothing is trained, and what a handler raises is kept."""
    import gradio as gr

    from mlxdpo.ui.server import start_app
    from mlxdpo.ui.train import process, tab

    folder = tmp_path_factory.mktemp("app")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder / "cache"))
        patch.chdir(folder)

        def refuse(*_, **__):
            raise UserError("nothing is started in this test")

        finished_run(folder)
        patch.setattr(process, "_spawn", refuse)
        patch.setattr(tab.subprocess, "run", refuse)
        app = start_app(folder / "runs", "one")
        broken = []
        for block in app.page.fns.values():
            if block.fn is not None:
                block.fn = kept(block.fn, broken, gr.Error)
        yield app, broken
        app.page.close()


def kept(function, broken, allowed):
    """The handler, what it raises remembered."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def handler(*args, **kwargs):
            try:
                yield from function(*args, **kwargs)
            except allowed as error:
                broken.append(UserError(str(error)))
                raise
            except Exception as error:
                broken.append(error)
                raise

        return handler

    @functools.wraps(function)
    def handler(*args, **kwargs):
        try:
            return function(*args, **kwargs)
        except allowed as error:
            broken.append(UserError(str(error)))
            raise
        except Exception as error:
            broken.append(error)
            raise

    return handler


NAMES = ["one", "../one", "one/../one", "heldout", "own", "train", "all", "any column", "smollm2", "pairs.jsonl"]
MILD = [value for value in ODD_VALUES if not (isinstance(value, int) and abs(value) > 100)]
SENT = st.sampled_from([*MILD, *NAMES, ["one"], {"path": "/etc/passwd"}, {"__type__": "update", "value": 1}])


@fuzzed(25, 300, which=SEEDS, data=st.lists(SENT, max_size=6), as_wanted=st.booleans())
def test_handlers(served, which, data, as_wanted):
    """Any handler by its number, with values of any kind; half of the time as many as it takes."""
    from browser_client import Browser

    app, broken = served
    browser = Browser(app, session=f"s{which}")
    known = browser.config()["dependencies"]
    one = known[which % len(known)]
    if as_wanted:
        data = (data + [None] * len(one["inputs"]))[: len(one["inputs"])]

    def press():
        broken.clear()
        answer = post(browser, {"data": data, "fn_index": one["id"], "session_hash": browser.session})
        if broken:
            raise broken[0]
        return answer

    case("app: handlers", press)


def post(browser, body):
    """Send a body to the queue and wait for what comes of it."""
    joined = browser.http.post(
        "/gradio_api/queue/join",
        content=body if isinstance(body, bytes) else json.dumps(body),
        headers={"Content-Type": "application/json"},
    )
    assert joined.status_code < 600
    if joined.status_code != 200:
        return joined.status_code
    with browser.http.stream("GET", f"/gradio_api/queue/data?session_hash={browser.session}") as stream:
        raw = b""
        for chunk in stream.iter_bytes():
            raw += chunk
            if any(word in raw for word in (b"process_completed", b"close_stream", b"unexpected_error")):
                return 200
    return 200


@fuzzed(10, 200, seed=SEEDS)
def test_bodies(served, seed):
    """Broken JSON, and JSON of another form, at the addresses of gradio's own API."""
    from browser_client import Browser

    app, broken = served
    browser, rng = Browser(app, session=f"b{seed}"), random.Random(seed)
    body = mutate_bytes(
        rng, json.dumps({"data": ["one"], "fn_index": rng.randrange(40), "session_hash": browser.session}).encode()
    )
    path = rng.choice(
        [
            "/gradio_api/queue/join",
            "/gradio_api/run/predict",
            "/gradio_api/call/x",
            "/gradio_api/cancel",
            "/gradio_api/upload",
        ]
    )

    def send():
        broken.clear()
        answer = browser.http.post(path, content=body, headers={"Content-Type": "application/json"})
        if broken:
            raise broken[0]
        assert b"Traceback" not in answer.content
        TALLY["app: bodies"][f"status {answer.status_code}"] += 1

    case("app: bodies", send)
