"""An OpenAI-compatible server as a source of answers (LM Studio, Ollama, mlx_lm.server, llama.cpp, vLLM, a paid API).

How a request travels is the caller's: `Complete` takes the body of a chat completion and gives the bytes of the
answer, or raises `RequestRefused` or `NoAnswer`. Servers differ in what they take: a parameter that one refuses by name
is left out or called by its other name from then on.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from mlxdpo.online.collect.rows import EMPTY
from mlxdpo.online.contrast.sources import AnswerSource, ShouldStop, SourceAnswer
from mlxdpo.online.prompts import Asked
from mlxdpo.types import UserError

Complete = Callable[[Mapping[str, Any]], bytes]
GIVE_UP = 8
"""Requests in a row without an answer after which the server counts as gone."""
CHUNK = 8
"""Times the requests at once: prompts of a chunk."""
TOOL_CALL = "a tool call instead of text"
NO_COMPLETION = "the reply is not a chat completion"
THOUGHT = re.compile(r"\s*<(think|thinking|reasoning)>.*?(?:</\1>\s*|\Z)", re.DOTALL)
OPTIONAL = ("max_completion_tokens", "max_tokens", "temperature", "top_p", "seed", "tools")
RENAMED = {"max_tokens": "max_completion_tokens"}


class RequestRefused(Exception):
    """The server understood and will not: its HTTP `status` and its own words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status, self.words = status, words


class NoAnswer(Exception):
    """No whole answer came, in words."""


def server_answers(name: str, made: Mapping[str, Any], complete: Complete, model: str, how: Any) -> AnswerSource:
    """A server as a source; `how` are `AnswerSettings`, `name` is what messages call it, `made` what rows say of it."""
    asking = _Asking(name, complete, {"model": model, **_sampling(how)})

    def answer(chunk: Sequence[Asked], should_stop: ShouldStop) -> Iterator[tuple[Asked, SourceAnswer]]:
        """Asked a few at a time; those on their way when asked to stop are waited for."""
        pool = ThreadPoolExecutor(how.requests)
        try:
            waiting = {pool.submit(asking.one, one): one for one in chunk}
            for future in as_completed(waiting):
                yield waiting.pop(future), future.result()
                if should_stop():  # a cancelled future never comes out of `as_completed`
                    running = [one for one in waiting if not one.cancel()]
                    yield from ((waiting[one], one.result()) for one in running)
                    return
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return AnswerSource(made, CHUNK * how.requests, False, answer)


def _sampling(how: Any) -> dict[str, Any]:
    return {name: getattr(how, name) for name in ("max_tokens", "temperature", "top_p", "seed")}


class _Asking:
    """What is sent with every prompt, less what the server refused; how many requests in a row had no answer."""

    def __init__(self, name: str, complete: Complete, body: dict[str, Any]) -> None:
        self.name, self.complete, self.body = name, complete, body
        self.lock, self.silent = threading.Lock(), 0

    def one(self, asked: Asked) -> SourceAnswer:
        """The answer to one prompt. Raises `UserError` when the server refuses whatever is asked, or is gone."""
        prompt = asked.prompt
        turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [t.as_dict() for t in prompt]
        extra: dict[str, Any] = {"tools": [dict(tool) for tool in asked.tools]} if asked.tools else {}
        while True:
            body = {**self.body, "messages": turns, **extra}
            try:
                found = read_chat_answer(self.complete(body))
            except NoAnswer as error:
                return self._failed(f"no answer ({error})", str(error))
            except RequestRefused as refused:
                if refused.status in (400, 422) and self._adapted(body, refused.words):
                    continue
                words = f"HTTP {refused.status}" + (f": {refused.words}" if refused.words else "")
                if refused.status not in (400, 413, 422):
                    raise UserError(
                        f"{self.name}: the server refuses the request ({words}); {hint_for(refused.status)}"
                    ) from None
                return self._failed(f"refused by the server (HTTP {refused.status})", words)
            if found.failed:
                return self._failed(found.left_out, found.left_out)
            with self.lock:
                self.silent = 0
            return found

    def _failed(self, why: str, words: str) -> SourceAnswer:
        with self.lock:
            self.silent += 1
            gone = self.silent >= GIVE_UP
        if gone:
            raise UserError(
                f"{self.name}: {GIVE_UP} prompts in a row had no answer ({words}); fix the server, then rerun the same "
                f"command: what was answered is kept"
            )
        return SourceAnswer(left_out=why, failed=True)

    def _adapted(self, body: Mapping[str, Any], words: str) -> bool:
        """Leave out or rename the first parameter that a refusal names; False where it names none of ours."""
        named = [name for name in OPTIONAL if name in body and re.search(rf"\b{name}\b", words)]
        with self.lock:
            if named and named[0] not in self.body:
                return named[0] != "tools"  # another thread was faster
            if not named:
                return False
            value = self.body.pop(named[0])
            if (other := RENAMED.get(named[0])) is not None:
                self.body[other] = value
        return True


def hint_for(status: int) -> str:
    """What to do about a refusal."""
    if status in (401, 403):
        return "put the key into $MLXDPO_CHOSEN_KEY or $MLXDPO_REJECTED_KEY"
    return "check the model's name and the URL, which usually ends in /v1"


def read_chat_answer(body: bytes) -> SourceAnswer:
    """The answer in a chat completion, without reasoning before it; tokens as the server counts them."""
    try:
        reply = json.loads(body)
        choice = reply["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text = message.get("content") or message.get("refusal") or ""
        usage = reply.get("usage") or {}
        tokens, prompt_tokens = (_count(usage.get(name)) for name in ("completion_tokens", "prompt_tokens"))
        called = bool(message.get("tool_calls"))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return SourceAnswer(left_out=NO_COMPLETION, failed=True)
    if not isinstance(text, str):
        return SourceAnswer(left_out=NO_COMPLETION, failed=True)
    text = THOUGHT.sub("", text, count=1) if THOUGHT.match(text) else text
    why = TOOL_CALL if called else "" if text.strip() else EMPTY
    known = finish if finish in ("stop", "length") else ""
    if known == "length":
        why = ""  # cut off inside its reasoning, perhaps: unfinished says more than empty
    return SourceAnswer(text.strip(), known, tokens, prompt_tokens, why)


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
