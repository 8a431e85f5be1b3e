"""How a language model behind a server is asked: a ladder of methods, and which rung a server stands on.

    log-probs of the labels   one token; the odds of A against B are a soft verdict
    structured output         an object that the server forces to have a verdict
    free text                 a few sentences that end in a verdict, which is parsed

Servers differ in what they take: newer OpenAI models refuse `max_tokens`, `temperature` and log-probs; some ignore what
they do not know; reasoning models spend tokens before they answer, in a field or between <think> and </think>. So a
test question climbs down the ladder: what a server refuses by name is left out or renamed, a method without a verdict
gives way to the next, and a model that reasons gets tokens enough to come to an end. Its reasoning is cut off before
the answer is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np

from mlxdpo_eval.judges.protocol import LABELS, ONE_LETTER, Verdict, certain, invalid
from mlxdpo_eval.judges.server import Refused

ROUNDING = 1e-2  # a log-prob may be above 0 by rounding, not by more
BELOW = 2.0  # a label missing from the top list is at least this unlikely against the least of the list, logits
LEAST_SHARE = 0.1  # of the probability on the labels: a model that begins otherwise has not been asked for its verdict
MANY_TOKENS = 16_384  # for a model that reasons first
FEWEST_TOKENS = 1_024  # below it a budget that a server finds too large is left out instead
NO_COMPLETION = "the reply is not a chat completion"


class Reply(NamedTuple):
    """A chat completion: its text after any reasoning, log-probs at its first token, how it ended."""

    text: str
    logps: list[tuple[str, float]]
    reasoned: bool
    cut_off: bool


class ReadAnswer(Protocol):
    """What a method reads from a reply; `reason` says why there is none."""

    @property
    def reason(self) -> str:
        """Why there is no answer, or ""."""
        ...


A = TypeVar("A", bound=ReadAnswer, covariant=True)


@dataclass(frozen=True)
class Method(Generic[A]):
    """A rung: `ending` closes the question, `tokens` is the budget of the reply, `body` what the request adds."""

    name: str
    ending: str
    tokens: int
    body: Mapping[str, Any]
    read: Callable[[Reply], A]


@dataclass(frozen=True)
class Dialect:
    """What a server takes, learned from its refusals. `budget` is the name of the parameter, "" for none."""

    budget: str = "max_tokens"
    temperature: bool = True
    alternatives: int = 20
    tokens: int = 0
    reasoning: bool = False


def read_reply(body: bytes) -> Reply | None:
    """A chat completion taken apart; None for what is none."""
    try:
        choice = json.loads(body)["choices"][0]
        message = choice["message"]
        content = message["content"] or message.get("refusal") or ""
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        usage = json.loads(body).get("usage") or {}
        spent = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
        first = ((choice.get("logprobs") or {}).get("content") or [{}])[0]
        top = [(str(t["token"]).strip(" \n\t▁Ġ"), float(t["logprob"])) for t in first.get("top_logprobs") or []]
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return None
    if not isinstance(content, str):
        return None
    text, tagged, open_ended = _without_reasoning(content)
    logps = [(token, p) for token, p in top if math.isfinite(p) and p < ROUNDING]
    return Reply(text, logps, bool(thought or spent or tagged), choice.get("finish_reason") == "length" or open_ended)


def _without_reasoning(text: str) -> tuple[str, bool, bool]:
    """(what follows the reasoning, whether there was any, whether it has no end)."""
    found = re.split(r"</(?:think|thinking|reasoning)>", text)
    if len(found) > 1:
        return found[-1].strip(), True, False
    opened = re.match(r"\s*<(?:think|thinking|reasoning)>", text)
    return ("", True, True) if opened else (text.strip(), False, False)


def read_label_odds(reply: Reply) -> Verdict:
    """Log-odds of the labels; one that is not in the list lies below its least member. A bare label does as well."""
    found = [[p for token, p in reply.logps if token == label] for label in LABELS]
    if not any(found):
        return _bare_label(reply.text) or invalid(_why_no_label(reply, "the answer is not a label"))
    most, least = max(p for _, p in reply.logps), min(p for _, p in reply.logps) - BELOW
    if np.logaddexp.reduce([p for one in found for p in one]) < min(most, 0.0) + math.log(LEAST_SHARE):
        return invalid("the labels are improbable")
    a, b = (float(np.logaddexp.reduce(one)) if one else least for one in found)
    return Verdict(a - b)


def _bare_label(text: str) -> Verdict | None:
    said = text.strip().strip(".:*()[]\"'").upper()
    return certain(1.0 if said == LABELS[0] else -1.0) if said in LABELS else None


def _why_no_label(reply: Reply, otherwise: str) -> str:
    if reply.cut_off and not reply.text:
        return "its reasoning was cut off" if reply.reasoned else "the answer was cut off"
    return "the answer was cut off" if reply.cut_off else otherwise


def read_object(reply: Reply) -> Mapping[str, Any] | None:
    """The last JSON object of a text, in a fence or not; None where there is none."""
    for found in (reply.text, *re.findall(r"\{[^{}]*\}", reply.text)[::-1]):
        try:
            value = json.loads(found)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, Mapping):
            return value
    return None


def read_structured_verdict(reply: Reply) -> Verdict:
    """The verdict of an object, or a bare label."""
    found = read_object(reply)
    label = None if found is None else _bare_label(str(found.get("verdict")))
    return label or _bare_label(reply.text) or invalid(_why_no_label(reply, "the answer has no verdict"))


VERDICT = re.compile(r"(?:verdict|final answer)\W{0,12}(?:answer\W{0,4})?([AB])\b(?!\s*(?:/|or\b))", re.IGNORECASE)
BRACKETED = re.compile(r"\[\[([AB])\]\]")


def read_text_verdict(reply: Reply) -> Verdict:
    """The last verdict that a text names; its words before that are the reasons."""
    named = VERDICT.findall(reply.text) or BRACKETED.findall(reply.text)
    verdict = (_bare_label(named[-1]) if named else _bare_label(reply.text)) or read_structured_verdict(reply)
    if verdict.logit is None:
        return verdict
    return verdict._replace(note=reply.text if named else "")


def object_format(name: str, properties: Mapping[str, Any]) -> dict[str, Any]:
    """`response_format` of an object that has exactly these properties."""
    schema = {
        "type": "object",
        "properties": dict(properties),
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"response_format": {"type": "json_schema", "json_schema": {"name": name, "strict": True, "schema": schema}}}


COMPARING: tuple[Method[Verdict], ...] = (
    Method("log-probs of the labels", ONE_LETTER, 1, {"logprobs": True, "top_logprobs": 20}, read_label_odds),
    Method(
        "structured output",
        'Reply with an object: {"verdict": "A"} or {"verdict": "B"}.',
        64,
        object_format("verdict", {"verdict": {"type": "string", "enum": list(LABELS)}}),
        read_structured_verdict,
    ),
    Method(
        "free text",
        'Give your reasons in at most three sentences, then end with a line "Verdict: A" or "Verdict: B".',
        1_024,
        {},
        read_text_verdict,
    ),
)
"""The ladder of judges that compare, most informative first."""


class Rung(NamedTuple, Generic[A]):
    """The method and dialect that a server answered in."""

    method: Method[A]
    dialect: Dialect

    @property
    def name(self) -> str:
        """What reports call it."""
        return self.method.name + (", after reasoning" if self.dialect.reasoning else "")

    def request(self, model: str, text: str) -> dict[str, Any]:
        """The chat completion that asks `text`."""
        body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}], **self.method.body}
        if "top_logprobs" in body:
            body["top_logprobs"] = self.dialect.alternatives
        if self.dialect.temperature:
            body["temperature"] = 0
        if self.dialect.budget:
            body[self.dialect.budget] = max(self.method.tokens, self.dialect.tokens)
        return body


class NoRung(Exception):
    """No method brought an answer; the message says of each what the server did."""


def find_rung(
    ladder: Sequence[Method[A]], complete: Callable[[dict[str, Any]], bytes], model: str, ask: Callable[[str], str]
) -> tuple[Rung[A], A]:
    """The first method that answers, with its answer. `ask` puts a method's ending to the test question.

    Raises `NoRung`, what `complete` raises for an answer that does not come, and `Refused` with a status of 401, 404 or
    a redirect, which no other request would change.
    """
    dialect, words = Dialect(), list[str]()
    for method in ladder:
        while True:
            rung = Rung(method, dialect)
            body = rung.request(model, ask(method.ending))
            try:
                reply = read_reply(complete(body))
            except Refused as refused:
                if refused.status not in (400, 422) and not (refused.status == 403 and named_parameters(body, refused)):
                    raise
                changed = adapt_dialect(dialect, body, refused, method is ladder[-1])
                why = refused.words or f"HTTP {refused.status}"
            else:
                answer = None if reply is None else method.read(reply)
                if answer is not None and not answer.reason:
                    return rung, answer
                changed = None if reply is None else _more_tokens(rung, reply)
                why = NO_COMPLETION if answer is None else answer.reason
            if changed is None:
                words.append(f"{method.name}: {why}")
                break
            dialect = changed
    reasons = dict.fromkeys(line.split(": ", 1)[1] for line in words)
    raise NoRung("; ".join(reasons) if len(reasons) == 1 else "; ".join(words))


def _more_tokens(rung: Rung[Any], reply: Reply) -> Dialect | None:
    """The same with room for reasoning, where a reply ended before its answer."""
    if not reply.cut_off or rung.method.tokens == 1 or rung.dialect.tokens or not rung.dialect.budget:
        return None
    reasons = reply.reasoned or not reply.text
    return replace(rung.dialect, tokens=MANY_TOKENS, reasoning=reasons) if reasons or rung.method.tokens > 64 else None


UNKNOWN = re.compile(
    r"unsupported|not support|unknown|unrecogni[sz]ed|not allowed|not permitted|extra|unexpected", re.I
)


def adapt_dialect(dialect: Dialect, body: Mapping[str, Any], refused: Refused, last: bool) -> Dialect | None:
    """What to ask instead of a refused request; None where another method is to be tried.

    A parameter counts as named when the refusal says so, or its words contain it. Where none is named, the temperature
    is left out, and at the `last` method the budget as well.
    """
    words, unknown = refused.words.lower(), bool(UNKNOWN.search(refused.words))
    named = named_parameters(body, refused)
    first = named[0] if named else ""
    if first in ("top_logprobs", "logprobs"):
        fewer = {20: 10, 10: 5}.get(dialect.alternatives)
        return None if unknown or fewer is None else replace(dialect, alternatives=fewer)
    if first == "response_format":
        return None
    if first and first == dialect.budget:
        return _other_budget(dialect, unknown or "max_completion_tokens" in words)
    if dialect.temperature and (first == "temperature" or not named):
        return replace(dialect, temperature=False)
    return replace(dialect, budget="") if last and not named and dialect.budget else None


OPTIONAL = ("top_logprobs", "logprobs", "response_format", "temperature", "max_completion_tokens", "max_tokens")


def named_parameters(body: Mapping[str, Any], refused: Refused) -> list[str]:
    """Parameters of the request that a refusal names, by its field or in its words."""
    sent = [name for name in OPTIONAL if name in body]
    words = refused.words.lower()
    return [refused.parameter] if refused.parameter in sent else [name for name in sent if name in words]


def _other_budget(dialect: Dialect, rename: bool) -> Dialect:
    """Fewer tokens where a budget is too large, its other name where that is refused, none where both are."""
    if not rename and dialect.tokens // 4 >= FEWEST_TOKENS:
        return replace(dialect, tokens=dialect.tokens // 4)
    return replace(dialect, budget="max_completion_tokens" if dialect.budget == "max_tokens" else "")
