"""An OpenAI-compatible server (LM Studio, Ollama, llama.cpp, mlx_lm.server, vLLM, a paid API), asked with care.

The `openai` client builds requests and repeats them: rate limits as long as the server asks (two minutes at most), lost
connections and overload with doubling waits. Below it lies `BoundedTransport`. The key is read from $MLXDPO_JUDGE_KEY
and goes nowhere but into the request, over https or to this machine: redirects are refused, because they would carry it
to another host, and no header that the client takes from its own environment variables is sent.
"""

from __future__ import annotations

import json
import os
import queue
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any
from urllib.parse import SplitResult, urlsplit

from mlxdpo import UserError
from mlxdpo.inner import is_loopback

KEY = "MLXDPO_JUDGE_KEY"
PRICE = "MLXDPO_JUDGE_PRICE"
LARGEST_ANSWER = 4_000_000  # bytes; a long answer with its log-probs has a hundredth of it
SENT = {"host", "content-type", "content-length", "accept", "user-agent", "x-stainless-retry-count"}
OVERLOADED = frozenset({408, 409, 425, 429, *range(500, 600)})
GIVE_UP = 8  # questions in a row without any answer: the server is gone, the rest is not sent
LONGEST_WORDS = 300  # characters of what a server says


class Refused(Exception):
    """The server understood and will not: `status` and its own words. `parameter` is what it names, if anything."""

    def __init__(self, status: int, words: str, parameter: str = "") -> None:
        super().__init__(words)
        self.status, self.words, self.parameter = status, words, parameter


class Unanswered(Exception):
    """No whole answer came: a time-out, no connection, an overloaded server, an answer without end."""


@dataclass
class Usage:
    """What was used so far. Dollars only where the server or $MLXDPO_JUDGE_PRICE says them."""

    requests: int = 0
    retries: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    dollars: float | None = None
    _lock: Any = field(default_factory=threading.Lock, repr=False)

    def count(self, body: bytes, retries: int, price: tuple[float, float] | None) -> None:
        """Add one answer; `price` is dollars per million tokens of (prompt, completion)."""
        try:
            found = json.loads(body)["usage"]
            prompt, completion = (_whole(found.get(name)) for name in ("prompt_tokens", "completion_tokens"))
            details = found.get("completion_tokens_details") or {}
            reasoning, cost = _whole(details.get("reasoning_tokens")), found.get("cost")
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            prompt = completion = reasoning = 0
            cost = None
        if price is not None:
            cost = (price[0] * prompt + price[1] * completion) / 1e6
        with self._lock:
            self.requests += 1
            self.retries += retries
            self.prompt_tokens += prompt
            self.completion_tokens += completion
            self.reasoning_tokens += reasoning
            if isinstance(cost, int | float) and not isinstance(cost, bool):
                self.dollars = (self.dollars or 0.0) + float(cost)

    def count_failure(self) -> None:
        """Add a question that got no answer."""
        with self._lock:
            self.failed += 1

    def numbers(self) -> dict[str, Any]:
        """The counts by name."""
        return {name: value for name, value in vars(self).items() if not name.startswith("_")}


def _whole(value: Any) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def read_price(model: str) -> tuple[float, float] | None:
    """Dollars per million tokens of prompt and completion from $MLXDPO_JUDGE_PRICE; None where it is not set.

    "0.15,0.60" is the price of every model, "gpt-5-mini=0.25,2 other=1,4" those of the models named. Raises
    `UserError` for anything else.
    """
    text = os.environ.get(PRICE, "").strip()
    for entry in text.split():
        name, _, numbers = entry.rpartition("=")
        found = re.fullmatch(r"(\d+(?:\.\d+)?),(\d+(?:\.\d+)?)", numbers)
        if not found:
            raise UserError(
                f"${PRICE} is {text!r}; expected dollars per million tokens of prompt and completion, such as "
                '"0.15,0.60", or "MODEL=0.15,0.60" for each model'
            )
        if name in ("", model):
            return float(found[1]), float(found[2])
    return None


@dataclass
class Server:
    """One model on one server. `timeout`: seconds for a whole answer, each try; `retries` follow the first one.

    `key` is the environment variable that the key is read from.
    """

    model: str
    url: str
    timeout: float = 120.0
    retries: int = 3
    usage: Usage = field(default_factory=Usage)
    key: str = KEY
    down: str = ""
    _in_a_row: int = 0
    _client: Any = field(default=None, repr=False)

    def complete(self, body: Mapping[str, Any]) -> bytes:
        """The answer to one chat completion, as it came. Raises `Refused` and `Unanswered`."""
        import openai

        if self.down:
            raise Unanswered(f"not sent: {self.down}")
        try:
            raw = self._connected().chat.completions.with_raw_response.create(**body)
            content, retries = raw.http_response.content, raw.retries_taken
        except openai.APIStatusError as error:
            refused = _refusal(error, self.key)
            self._note_failure(f"HTTP {refused.status}", alive=refused.status in (400, 413, 422))
            if refused.status in OVERLOADED:
                raise Unanswered(": ".join(filter(None, (f"HTTP {refused.status}", refused.words)))) from None
            raise refused from None
        except openai.APITimeoutError:
            self._note_failure("timeout")
            raise Unanswered("timeout") from None
        except openai.APIConnectionError:
            self._note_failure("no connection")
            raise Unanswered("no connection") from None
        except openai.OpenAIError as error:  # `BoundedTransport` raises it itself
            raise Unanswered(str(error)) from None
        self._in_a_row = 0
        self.usage.count(content, retries, read_price(self.model))
        return content

    def _note_failure(self, what: str, alive: bool = False) -> None:
        self.usage.count_failure()
        self._in_a_row = 0 if alive else self._in_a_row + 1
        if self._in_a_row >= GIVE_UP:
            self.down = f"{GIVE_UP} questions in a row had no answer ({what})"

    def models(self) -> list[str]:
        """The names of the models that the server lists; none where it lists none."""
        import openai

        try:
            return [str(model.id) for model in self._connected().with_options(max_retries=0).models.list().data]
        except (openai.OpenAIError, AttributeError, TypeError, ValueError):
            return []

    def _connected(self) -> Any:
        if self._client is None:
            self._client = _open_client(self.url, self.key)
        return self._client.with_options(timeout=self.timeout, max_retries=self.retries)

    def patient(self, seconds: float) -> Server:
        """The same server with another deadline, counting into the same usage."""
        self._connected()
        return replace(self, timeout=seconds)


def _open_client(url: str, variable: str) -> Any:
    import httpx2
    from openai import OpenAI

    key, parts = os.environ.get(variable), urlsplit(url)
    bounded: Any = BoundedTransport(bool(key), is_loopback(parts.hostname), parts.scheme == "https")
    return OpenAI(
        api_key=key or "none",
        base_url=url,
        http_client=httpx2.Client(transport=bounded, follow_redirects=False, trust_env=False),
    )


class BoundedTransport:
    """What the client sends through: one deadline for a whole answer, one bound for its size, no foreign headers.

    A client's own time-out is for each read: a name server, a handshake or a server that sends a byte now and then
    would outlast it. So each answer is read in a thread that nobody waits for any longer than the request's time-out.
    """

    def __init__(self, keyed: bool, loopback: bool, https: bool) -> None:
        import httpx2

        self.sent = SENT | ({"authorization"} if keyed else set())
        # A proxy from the environment would get what is meant for this machine. Certificates are only read for https.
        self.inner = httpx2.Client(follow_redirects=False, trust_env=not loopback, verify=https)

    def handle_request(self, request: Any) -> Any:
        """The whole response. Raises what the transport raises, `ReadTimeout`, and `OpenAIError` for one too large."""
        import httpx2

        seconds = request.extensions["timeout"]["read"]
        came: queue.SimpleQueue[Any] = queue.SimpleQueue()
        threading.Thread(target=self._fetch, args=(request, seconds, came), daemon=True).start()
        try:
            found = came.get(timeout=seconds)
        except queue.Empty:
            raise httpx2.ReadTimeout(f"no complete answer within {seconds:g} s", request=request) from None
        if isinstance(found, Exception):
            raise found
        return found

    def _fetch(self, request: Any, seconds: float, came: queue.SimpleQueue[Any]) -> None:
        try:
            came.put(self._read(request, time.monotonic() + seconds))
        except Exception as error:  # it belongs to who asked
            came.put(error)

    def _read(self, request: Any, until: float) -> Any:
        import httpx2
        from openai import OpenAIError

        # Bytes are counted as they come, so an answer that grows when unpacked is not asked for.
        kept = [(k, v) for k, v in request.headers.items() if k.lower() in self.sent] + [
            ("accept-encoding", "identity")
        ]
        bare = httpx2.Request(
            request.method, request.url, headers=kept, content=request.read(), extensions=request.extensions
        )
        response, body = self.inner.send(bare, stream=True), bytearray()
        try:
            if response.headers.get("content-encoding", "identity") != "identity":
                raise OpenAIError("the reply is compressed, which was not requested")
            for part in response.iter_raw():
                body += part
                if len(body) > LARGEST_ANSWER:
                    raise OpenAIError(f"the reply has more than {LARGEST_ANSWER:,} bytes")
                if time.monotonic() > until:
                    raise httpx2.ReadTimeout("no longer needed", request=request)
        finally:
            response.close()
        return httpx2.Response(response.status_code, headers=response.headers, content=bytes(body), request=request)

    def close(self) -> None:
        """Close connections."""
        self.inner.close()


def _refusal(error: Any, variable: str) -> Refused:
    """A refusal with the server's own words, wherever this server puts them."""
    body = error.body
    if isinstance(body, Mapping) and "error" in body:
        body = body["error"]
    parameter = body.get("param") if isinstance(body, Mapping) else None
    words = _words_in(body, os.environ.get(variable))
    if 300 <= error.status_code < 400:
        where = f"it redirects to {error.response.headers.get('location', 'elsewhere')}"
        words = f"{where}; {words}" if words else where
    return Refused(error.status_code, words, parameter if isinstance(parameter, str) else "")


def _words_in(body: Any, key: str | None) -> str:
    if isinstance(body, Mapping):
        body = next((body[name] for name in ("message", "detail", "error", "msg") if body.get(name)), body)
    text = body if isinstance(body, str) else "" if body is None else json.dumps(body)
    text = text.replace(key, "***") if key else text
    text = re.sub(r"(?i)\b(sk|key)-[\w*-]{4,}", r"\1-***", text)  # some repeat a key, half of it struck out
    return " ".join(re.sub(r"<[^>]*>", " ", text).split())[:LONGEST_WORDS]


def _split_url(url: str) -> SplitResult | None:
    """An address in its parts; None for what is none."""
    try:
        parts = urlsplit(url)
        return parts if parts.port != 0 else None
    except ValueError:  # a port that is no number, a bracket that is not closed
        return None


def parse_address(kind: str, rest: str) -> tuple[str, str]:
    """(model, URL) of `MODEL@URL`. Raises `UserError` when it is not of that form, or the key would go in the clear."""
    model, _, url = rest.rpartition("@")
    parts = _split_url(url)
    if not model or parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise UserError(
            f"--judge {kind}:{rest}: expected {kind}:MODEL@URL, such as {kind}:qwen3@http://localhost:8080/v1"
        )
    if parts.username or parts.password or parts.query:
        raise UserError(
            f"--judge {kind}:{model}@...: do not put the key in the URL, because the URL is saved; set ${KEY}"
        )
    if os.environ.get(KEY) and parts.scheme == "http" and not is_loopback(parts.hostname):
        raise UserError(
            f"--judge {kind}:{rest}: ${KEY} would be sent to {parts.hostname} unencrypted; use https, or unset {KEY}"
        )
    return model, url.rstrip("/")


def open_server(kind: str, rest: str) -> Server:
    """The server of `MODEL@URL`; nothing is sent yet. Raises `UserError` as `parse_address`, and without the client."""
    import importlib.util

    model, url = parse_address(kind, rest)
    if importlib.util.find_spec("openai") is None:
        raise UserError(f"--judge {kind}:... needs the openai client; install it: pip install 'mlxdpo[judges]'")
    read_price(model)
    return Server(model, url)
