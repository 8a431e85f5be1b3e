"""A judge of every kind, small enough to open in a test: its name, what it must refuse, what it must know."""

import contextlib
import http.server
import json
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from tiny_models import write_model
from tiny_runs import finish, recipe
from tiny_tokenizers import chatml_tokenizer

from mlxdpo_eval.judges import Question

ASKED = [
    Question("Is it day?", "The sun is up.", "I like trains."),
    Question("Is it day?", "No idea.", "It is night."),
    Question("Why?", "Because of {braces}.", "x"),
]


class Specimen(NamedTuple):
    """`spec` opens the judge, `refused` is a spec of its kind that must be refused in a sentence.

    `better`: which answer to `ASKED[0]` wins in either order, where the judge knows that.
    """

    spec: str
    refused: str
    better: str = ""


def local(folder: Path, stack: ExitStack) -> Specimen:
    """A tiny random model: its verdicts mean nothing, but they are verdicts."""
    write_model(folder / "judge", chatml_tokenizer())
    return Specimen(f"local:{folder / 'judge'}", f"local:{folder / 'nothing'}")


class Server(http.server.BaseHTTPRequestHandler):
    """Says A where the first answer speaks of the sun, else B; no log-probs."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"]
        first = "sun" in text and ("trains" not in text or text.index("sun") < text.index("trains"))
        reply = {"choices": [{"message": {"content": "A" if first else "B"}}]}
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *args):
        pass


def endpoint(folder: Path, stack: ExitStack) -> Specimen:
    """A server on the loopback."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    stack.callback(thread.join)
    stack.callback(server.server_close)
    stack.callback(server.shutdown)
    return Specimen(f"endpoint:m@http://127.0.0.1:{server.server_port}/v1", "endpoint:no-url", "The sun is up.")


def reward(folder: Path, stack: ExitStack) -> Specimen:
    """A reward model after a few steps."""
    finish(recipe(folder, stage="reward", train={"steps": 2}))
    return Specimen(f"reward:{folder / 'run'}", f"reward:{folder / 'nothing'}")


def votes(folder: Path, stack: ExitStack) -> Specimen:
    """A file with one vote."""
    vote = {"prompt": ASKED[0].prompt, "a": ASKED[0].second, "b": ASKED[0].first, "winner": "b"}
    (folder / "votes.jsonl").write_text(json.dumps(vote) + "\n")
    return Specimen(f"votes:{folder / 'votes.jsonl'}", f"votes:{folder / 'nothing.jsonl'}", "The sun is up.")


SPECIMENS: dict[str, Callable[[Path, ExitStack], Specimen]] = {
    "local": local,
    "endpoint": endpoint,
    "reward": reward,
    "votes": votes,
}


@contextlib.contextmanager
def specimen(kind: str, folder: Path):
    """The specimen of a kind, with whatever it needs running."""
    with ExitStack() as stack:
        yield SPECIMENS[kind](folder, stack)
