"""Answers that grow together: the variants take turns, a token each, from the same seed and settings.

And what tuning did to an answer: log pi / pi_ref of every token, implicit reward, KL. Both run on the MLX thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import mlx.core as mx
import numpy as np
from pydantic import Field, ValidationError

from mlxdpo.config import Section, explain
from mlxdpo.data.encode import encode_prompt
from mlxdpo.data.template import probe, unwrap
from mlxdpo.inference.conversation import asked_after
from mlxdpo.inference.generate import stepwise
from mlxdpo.model.ends import turn_end
from mlxdpo.types import Text, UserError
from mlxdpo.ui.variants import RunVariants, Variant
from mlxdpo_eval.metrics.drift import sequence_kl

LONGEST_PROMPT = 20_000  # characters
Finish = Literal["", "stop", "length", "stopped"]


class Settings(Section):
    """How answers are drawn, the same for every variant."""

    temperature: float = Field(default=0.7, ge=0, le=5)
    """0 takes the likeliest token; 1 samples from the model itself."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Sample from the most likely tokens that sum to this probability."""
    max_tokens: int = Field(default=128, ge=1, le=2048)
    """Maximum answer length, tokens."""
    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Noise of sampling; the same seed meets the same noise before and after tuning."""


def settings_from(**values: Any) -> Settings:
    """Settings that a page sent. Raises `UserError` naming the one that is out of range."""
    try:
        return Settings(**values)
    except ValidationError as error:
        raise UserError(*explain(error, "settings", Settings)) from None


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
    return asked_after(before, text, loaded.chat, system)


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


class TokenPiece(NamedTuple):
    """The text of a token, or of the tokens of one character; `ratio` is their summed log pi / pi_ref, nats."""

    text: str
    ratio: float
    logp: float


class Score(NamedTuple):
    """Of one answer under one policy: `reward` is beta times the summed log-ratio (arXiv 2305.18290, eq. 5 without
    the partition function, which cancels between two answers to one prompt); `kl` the KL divergence of policy from
    reference summed over the answer's steps, nats; `end` the log-ratio of the end-of-turn token, if there is one."""

    pieces: tuple[TokenPiece, ...]
    reward: float
    ratio: float
    kl: float
    end: float | None


def _end_of(loaded: RunVariants) -> list[int]:
    """The token that training scored at the end of an answer: the turn's, else the text's."""
    writer = probe(loaded.policy.tokenizer, loaded.config.data, loaded.policy.eos_ids)
    turn = turn_end(unwrap(loaded.policy.tokenizer)) if loaded.chat else None
    return [token for token in (turn if turn is not None else writer.eos,) if token is not None]


def score(loaded: RunVariants, policy: Variant, answer: Answer) -> Score | None:
    """The score of an answer, its end-of-turn token included when it came to one; None for an empty answer."""
    ends = _end_of(loaded) if answer.finish == "stop" else []
    targets = [*answer.tokens, *ends]
    if not targets:
        return None
    rows, first = mx.array([[*answer.prompt, *targets[:-1]]]), len(answer.prompt) - 1
    own, base = (_logits(side, rows, first) for side in (policy.enter, loaded.reference))
    logps = np.stack([_chosen(logits, targets) for logits in (own, base)])
    mask = mx.ones((1, len(targets)))
    kl = float(sequence_kl(lambda at: own[:, at], lambda at: base[:, at], mask).item())
    mx.clear_cache()
    ratios = logps[0] - logps[1]
    pieces = token_pieces(loaded.policy.tokenizer, answer.tokens, ratios, logps[0])
    total = float(ratios.sum())
    return Score(pieces, loaded.config.loss.beta * total, total, kl, float(ratios[-1]) if ends else None)


def _logits(enter: Any, rows: mx.array, first: int) -> mx.array:
    with enter() as model:
        logits = model(rows)[:, first:].astype(mx.float32)
        mx.eval(logits)
    return logits


def _chosen(logits: mx.array, targets: list[int]) -> np.ndarray:
    """(1, T, V) logits -> (T,) log-probs of the targets."""
    picked = mx.take_along_axis(logits, mx.array(targets)[None, :, None], axis=-1)[..., 0]
    return np.array(picked - mx.logsumexp(logits, axis=-1))[0].astype(np.float64)


def token_pieces(
    tokenizer: Any, tokens: tuple[int, ...], ratios: np.ndarray, logps: np.ndarray
) -> tuple[TokenPiece, ...]:
    """Tokens as text, with `ratios` and `logps` (T,), nats.

    One that ends inside a character, or adds no text (a special token, a first blank that decoding drops), is joined
    with the next: nobody could see or click it alone.
    """
    pieces, done, start = [], "", 0
    for i in range(len(tokens)):
        text = tokenizer.decode(list(tokens[: i + 1]))
        if (text == done or text.endswith("\N{REPLACEMENT CHARACTER}")) and i + 1 < len(tokens):
            continue
        part = slice(start, i + 1)
        pieces.append(TokenPiece(text[len(done) :], float(ratios[part].sum()), float(logps[part].sum())))
        done, start = text, i + 1
    return tuple(pieces)
