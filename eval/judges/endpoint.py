"""A judge behind an OpenAI-compatible server (LM Studio, Ollama, llama.cpp, mlx_lm.server, vLLM, a paid API).

The two labels' log-probs give a soft verdict where the server sends them; otherwise the answer must be a label and
nothing else, or the verdict is invalid. The key is read from $MLXDPO_JUDGE_KEY and goes nowhere but into the request,
over https or to this machine: redirects are refused, because they would carry it to another host. A server that sends a
byte now and then, or never stops, is cut off: one deadline holds for the whole answer, and one bound for its size.
"""

from __future__ import annotations

import http.client
import json
import math
import os
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

import numpy as np

from mlxdpo import UserError
from mlxdpo.inner import is_loopback
from mlxdpo_eval.judges.protocol import LABELS, WORDING, Judge, Question, Verdict, certain, invalid, judge_prompt

KEY = "MLXDPO_JUDGE_KEY"
TRY_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
REFUSED = frozenset({301, 302, 303, 307, 308, 400, 401, 403, 404, 405, 422})  # the same for every question
ROUNDING = 1e-2  # a log-prob may be above 0 by rounding, not by more
LARGEST_ANSWER = 4_000_000  # bytes; one token with its log-probs has a few thousand
BELOW = 2.0  # a label missing from the top list is at least this unlikely against the least of the list, logits


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Follow none: the redirect itself becomes the error."""
        return None


OPENER = urllib.request.build_opener(_NoRedirect)


def read_answer(request: urllib.request.Request, seconds: float) -> bytes:
    """What a server answers, whole.

    Raises `TimeoutError` when it is not there in so many seconds, `ValueError` when it is larger than any answer, and
    what urllib raises. urllib's own limit is for each read: a name server, a handshake or a server that sends a byte
    now and then would outlast it. So it reads in a thread that nobody waits for any longer than that.
    """
    came: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
    threading.Thread(target=_fetch, args=(request, seconds, came), daemon=True).start()
    try:
        found = came.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(found, Exception):
        raise found
    return found


def _fetch(request: urllib.request.Request, seconds: float, came: queue.SimpleQueue[bytes | Exception]) -> None:
    until, body = time.monotonic() + seconds, bytearray()
    try:
        with OPENER.open(request, timeout=seconds) as response:
            while (part := response.read1(1 << 16)) and time.monotonic() < until:
                body += part
                if len(body) > LARGEST_ANSWER:
                    raise ValueError(f"more than {LARGEST_ANSWER:,} bytes")
            if response.length:
                raise http.client.IncompleteRead(bytes(body), response.length)
        came.put(bytes(body))
    except Exception as error:  # it belongs to who asked
        came.put(error)


@dataclass(frozen=True)
class EndpointJudge:
    """`tries` requests at most per question, each of at most `timeout` seconds; waits double from `pause` seconds."""

    name: str
    identity: Mapping[str, Any]
    url: str
    model: str
    timeout: float = 60.0
    tries: int = 4
    pause: float = 1.0
    together: int = 4
    cached: bool = True

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """All questions, a few at a time. Raises `UserError` when the server refuses the request itself."""
        with ThreadPoolExecutor(self.together) as pool:
            return list(pool.map(self._one, questions))

    def _one(self, question: Question) -> Verdict:
        reason = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                return parse_completion(self._post(judge_prompt(question)))
            except urllib.error.HTTPError as error:
                error.close()
                if error.code in REFUSED:
                    raise UserError(_refusal(self.name, error.code)) from None
                reason = f"HTTP {error.code}"
                if error.code not in TRY_AGAIN:
                    break
            except TimeoutError:
                reason = "timeout"
            except ValueError as error:
                return invalid(f"the reply has {error}")
            except (OSError, http.client.HTTPException) as error:
                timed_out = isinstance(getattr(error, "reason", None), TimeoutError)
                reason = "timeout" if timed_out else "no connection"
        return invalid(reason)

    def _post(self, text: str) -> bytes:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 20,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(f"{self.url}/chat/completions", json.dumps(body).encode(), headers)
        return read_answer(request, self.timeout)


def _refusal(name: str, status: int) -> str:
    hint = {401: f"put the key into ${KEY}", 403: f"put the key into ${KEY}", 404: "check the URL, it ends in /v1"}
    return f"--judge {name}: the server refuses the request (HTTP {status}); {hint.get(status, 'check model and URL')}"


def parse_completion(body: bytes) -> Verdict:
    """The verdict in a chat completion: from the labels' log-probs, else from the text."""
    try:
        choice = json.loads(body)["choices"][0]
        text = choice["message"]["content"] or ""
        top = ((choice.get("logprobs") or {}).get("content") or [{}])[0].get("top_logprobs") or []
        logps = [(str(t["token"]).strip(), float(t["logprob"])) for t in top]
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError):
        return invalid("the reply is no chat completion")
    if not isinstance(text, str):
        return invalid("the reply is no chat completion")
    return _soft_verdict([(token, p) for token, p in logps if math.isfinite(p) and p < ROUNDING]) or _hard_verdict(text)


def _soft_verdict(logps: list[tuple[str, float]]) -> Verdict | None:
    """Log-odds of the labels; one that is not in the list lies below its least member."""
    first, second = ([p for token, p in logps if token == label] for label in LABELS)
    if not first and not second:
        return None
    least = min(p for _, p in logps) - BELOW
    a, b = (float(np.logaddexp.reduce(found)) if found else least for found in (first, second))
    return Verdict(a - b)


def _hard_verdict(text: str) -> Verdict:
    said = text.strip().strip(".:*()[]\"'").upper()
    if said not in LABELS:
        return invalid("the answer is no label")
    return certain(1.0 if said == LABELS[0] else -1.0)


def _split_url(url: str) -> SplitResult | None:
    """An address in its parts; None for what is none."""
    try:
        parts = urlsplit(url)
        return parts if parts.port != 0 else None
    except ValueError:  # a port that is no number, a bracket that is not closed
        return None


def endpoint_judge(rest: str) -> Judge:
    """Open `endpoint:MODEL@URL`. Raises `UserError` when it is not of that form."""
    model, _, url = rest.rpartition("@")
    parts = _split_url(url)
    if not model or parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"--judge endpoint:{rest}: expected endpoint:MODEL@URL, such as endpoint:qwen3@http://localhost:8080/v1"
        )
    if parts.username or parts.password or parts.query:
        raise UserError(f"--judge endpoint:{model}@...: no key in the URL, it would be saved; put it into ${KEY}")
    if os.environ.get(KEY) and parts.scheme == "http" and not is_loopback(parts.hostname):
        raise UserError(
            f"--judge endpoint:{rest}: ${KEY} would go to {parts.hostname} in the clear; use https, or unset {KEY}"
        )
    url = url.rstrip("/")
    identity = {"kind": "endpoint", "model": model, "url": url, "wording": WORDING}
    return EndpointJudge(f"endpoint:{model}", identity, url, model)
