"""A judge behind an OpenAI-compatible server that compares two answers: `endpoint:MODEL@URL`.

When it is opened, before anything is sampled, one test question finds the best method that the server answers in
(`ladder`), or ends in the server's own words. After that nothing that a server does stops an evaluation: a question
without a verdict is invalid, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from mlxdpo import UserError
from mlxdpo_eval.judges.ladder import COMPARING, NO_COMPLETION, A, Method, NoRung, Rung, find_rung, read_reply
from mlxdpo_eval.judges.protocol import COMPARISON, TEST_QUESTION, Judge, Question, Verdict, invalid, judge_prompt
from mlxdpo_eval.judges.server import KEY, Refused, Server, Unanswered, open_server

TOGETHER = 4  # requests at a time
FIRST_ANSWER = 600.0  # seconds for the test question: a server may load its model first
REASONING = 900.0  # seconds for an answer of a model that reasons


@dataclass(frozen=True)
class EndpointJudge:
    """A model on a server, asked by the method that its test question found."""

    name: str
    identity: Mapping[str, Any]
    server: Server
    rung: Rung[Verdict]
    cached: bool = True

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """All questions, a few at a time. Whatever a server does, there is a verdict or a reason for none."""
        return ask_together(self._one, questions)

    def _one(self, question: Question) -> Verdict:
        found = ask_server(self.server, self.rung, judge_prompt(question, self.rung.method.ending))
        return invalid(found) if isinstance(found, str) else found

    def spent(self) -> Mapping[str, Any]:
        """How it is asked, requests and tokens so far."""
        return {"asked_by": self.rung.name, **self.server.usage.numbers()}


def ask_together(one: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """`one` of every item, a few at a time, in order."""
    with ThreadPoolExecutor(TOGETHER) as pool:
        return list(pool.map(one, items))


def ask_server(server: Server, rung: Rung[A], text: str) -> A | str:
    """What the rung's method reads from the answer to `text`, or why there is none."""
    try:
        reply = read_reply(server.complete(rung.request(server.model, text)))
    except Unanswered as error:
        return str(error)
    except Refused as error:
        return f"HTTP {error.status}: {error.words}" if error.words else f"HTTP {error.status}"
    return NO_COMPLETION if reply is None else rung.method.read(reply)


def probe_server(
    kind: str, server: Server, ladder: Sequence[Method[A]], ask: Callable[[str], str]
) -> tuple[Server, Rung[A]]:
    """The server with its deadline, and how to ask it. Raises `UserError` with the server's own words."""
    name = f"--judge {kind}:{server.model}@{server.url}"
    try:
        rung, _ = find_rung(ladder, server.patient(FIRST_ANSWER).complete, server.model, ask)
    except NoRung as error:
        raise UserError(
            f"{name}: no verdict for the test question ({error}); use another model{_listed(server)}"
        ) from None
    except Refused as error:
        said = f": {error.words}" if error.words else ""
        raise UserError(
            f"{name}: the server refuses the test question (HTTP {error.status}{said}); {_hint(error.status, server)}"
        ) from None
    except Unanswered as error:
        raise UserError(
            f"{name}: no answer to the test question ({error}); check that the server is running and not busy"
        ) from None
    return server.patient(REASONING if rung.dialect.reasoning else server.timeout), rung


def _hint(status: int, server: Server) -> str:
    if status in (401, 403):
        return f"put the key into ${KEY}"
    return f"check the model's name and the URL, which usually ends in /v1{_listed(server)}"


def _listed(server: Server) -> str:
    names = server.patient(10.0).models()
    return f"; the server has {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}" if names else ""


def endpoint_judge(rest: str) -> Judge:
    """Open `endpoint:MODEL@URL` with a test question. Raises `UserError` for another form, and without an answer."""
    server, rung = probe_server(
        "endpoint", open_server("endpoint", rest), COMPARING, lambda end: judge_prompt(TEST_QUESTION, end)
    )
    identity = {
        "kind": "endpoint",
        "model": server.model,
        "url": server.url,
        "asked_by": rung.name,
        "wording": COMPARISON + rung.method.ending,
    }
    return EndpointJudge(f"endpoint:{server.model}", identity, server, rung)
