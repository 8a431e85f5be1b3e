"""A judge of every kind, small enough to open in a test: its name, what it must refuse, what it must know."""

import contextlib
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from judge_servers import MODEL, openai_chat, serving
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


def sun(body):
    """Answers like an older chat model; the answer that speaks of the sun is the better one."""
    text = body["messages"][0]["content"].replace("The sun is up.", "good")
    return openai_chat(body | {"messages": [{"role": "user", "content": text}]})


def endpoint(folder: Path, stack: ExitStack) -> Specimen:
    """A server on the loopback."""
    server = stack.enter_context(serving(sun))
    return Specimen(f"endpoint:{MODEL}@{server.url}", "endpoint:no-url", "The sun is up.")


def rubric(folder: Path, stack: ExitStack) -> Specimen:
    """The same, grading."""
    server = stack.enter_context(serving(sun))
    return Specimen(f"rubric:{MODEL}@{server.url}", f"rubric:absent@{server.url}", "The sun is up.")


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
    "rubric": rubric,
    "reward": reward,
    "votes": votes,
}


@contextlib.contextmanager
def specimen(kind: str, folder: Path):
    """The specimen of a kind, with whatever it needs running."""
    with ExitStack() as stack:
        yield SPECIMENS[kind](folder, stack)
