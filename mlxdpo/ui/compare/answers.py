"""Answers that grow together: the variants take turns, a token each, from the same seed and settings."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import mlx.core as mx
from pydantic import Field, ValidationError

from mlxdpo.config import Section, explain
from mlxdpo.data.encode import encode_prompt
from mlxdpo.inference.generate import stepwise
from mlxdpo.types import Message, Text, UserError
from mlxdpo.ui.variants import RunVariants, Variant

LONGEST_PROMPT = 20_000  # characters
Finish = Literal["", "stop", "length", "stopped"]


class Settings(Section):
    """How answers are drawn, the same for every variant."""

    temperature: float = Field(default=0.7, ge=0, le=5)
    """0 takes the likeliest token; 1 samples from the model itself."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the likeliest tokens that hold this share of the probability."""
    max_tokens: int = Field(default=128, ge=1, le=2048)
    """Longest answer, in tokens."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Noise of sampling; the same seed meets the same noise before and after tuning."""


def settings_from(**values: Any) -> Settings:
    """Settings that a page sent. Raises `UserError` naming the one that is out of range."""
    try:
        return Settings(**values)
    except ValidationError as error:
        raise UserError(explain(error, "settings")) from None


@dataclass(frozen=True)
class Answer:
    """What a variant has written so far. `finish` is empty while it is at it; `seconds` counts its own turns alone."""

    variant: str
    prompt: tuple[int, ...]
    tokens: tuple[int, ...] = ()
    text: str = ""
    finish: Finish = ""
    seconds: float = 0.0

    @property
    def speed(self) -> float:
        """Tokens per second of its own turns."""
        return len(self.tokens) / self.seconds if self.seconds else 0.0


@dataclass
class _Growing:
    answer: Answer
    steps: Generator[int | None, None, str]
    tokens: list[int] = field(default_factory=list)


def chat_prompt(loaded: RunVariants, before: Sequence[tuple[str, str]], text: str, system: str = "") -> Text:
    """What the model is asked, after the exchanges `before`: turns for a chat model, one running text otherwise.

    Raises `UserError` for a prompt that is empty or too long.
    """
    if not text.strip():
        raise UserError("the prompt is empty; write something to answer, or pick a held-out prompt")
    if len(text) + len(system) > LONGEST_PROMPT:
        raise UserError(f"the prompt has {len(text) + len(system):,} characters; at most {LONGEST_PROMPT:,} are read")
    if not loaded.chat:
        return "".join(asked + answer for asked, answer in before) + text
    turns = [turn for asked, answer in before for turn in (Message("user", asked), Message("assistant", answer))]
    opening = [Message("system", system)] if system.strip() else []
    if not before and not opening:
        return text
    return (*opening, *turns, Message("user", text))


def ids_of(loaded: RunVariants, prompt: Text, room: int) -> tuple[int, ...]:
    """Token ids to go on from. Raises `UserError` when `room` further tokens do not fit behind them."""
    ids = tuple(encode_prompt(prompt, loaded.policy.tokenizer, loaded.config.data).tolist())
    limit = loaded.policy.config.get("max_position_embeddings")
    if isinstance(limit, int) and len(ids) + room > limit:
        raise UserError(
            f"the conversation has {len(ids):,} tokens and the answer may have {room:,}, but the model reads "
            f"{limit:,}; start a new chat or lower max tokens"
        )
    return ids


def answer_together(
    loaded: RunVariants,
    variants: Sequence[Variant],
    prompts: Sequence[Text],
    settings: Settings,
    *,
    occurrence: int = 0,
    stopped: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[Answer, ...]]:
    """All answers so far, after every round of turns; one prompt per variant. Runs on the MLX thread."""
    turns = [_start_answer(loaded, v, p, settings, occurrence) for v, p in zip(variants, prompts, strict=True)]
    decode = loaded.policy.tokenizer.decode
    while any(not turn.answer.finish for turn in turns):
        halt = stopped()
        for turn in turns:
            if not turn.answer.finish:
                turn.answer = _end_answer(turn) if halt else _next_token(turn)
            turn.answer = replace(turn.answer, text=_readable(decode(turn.tokens), bool(turn.answer.finish)))
        yield tuple(turn.answer for turn in turns)
    mx.clear_cache()


def _start_answer(loaded: RunVariants, variant: Variant, prompt: Text, settings: Settings, occurrence: int) -> _Growing:
    ids = ids_of(loaded, prompt, settings.max_tokens)
    steps = stepwise(variant.enter, ids, eos_ids=loaded.policy.eos_ids, occurrence=occurrence, **settings.model_dump())
    return _Growing(Answer(variant.name, ids), steps)


def _next_token(turn: _Growing) -> Answer:
    started, finish = time.perf_counter(), ""
    try:
        token = next(turn.steps)
        if token is not None:
            turn.tokens.append(token)
    except StopIteration as end:
        finish = end.value
    seconds = turn.answer.seconds + time.perf_counter() - started
    return replace(turn.answer, tokens=tuple(turn.tokens), seconds=seconds, finish=finish)


def _end_answer(turn: _Growing) -> Answer:
    turn.steps.close()
    return replace(turn.answer, finish="stopped")


def _readable(text: str, whole: bool) -> str:
    """Without the half of a character that ends a text whose next token brings the rest."""
    return text if whole else text.rstrip("\N{REPLACEMENT CHARACTER}")
