"""The model's own answers while it trains: a few greedy ones to training prompts, and what they are like.

Held-out prompts are left alone: `eval` scores them. Greedy answers draw no noise, and nothing of the run's state is
touched, so a run is the same to the bit whether its answers are watched or not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.config import TrainConfig
from mlxdpo.forward.next_token import logits_at
from mlxdpo.model.policy import Policy
from mlxdpo.types import Example

PROMPTS, LONGEST, SHORTEST = 4, 32, 6  # prompts; most and fewest tokens of an answer that is worth a look
PROMPT_TOKENS = 1024  # longer prompts are left out
LOOKS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)  # of all steps: early, where a run that breaks breaks
SHARE = 0.1  # of the tokens that a run trains on; a token that is only read costs about a third of a trained one
LIKELIEST = 256  # tokens of the start's distribution that are told apart; the rest counts as one

Generate = Callable[..., Sequence[tuple[list[int], str]]]
"""`inference.generate.generate`: (tokens, "stop" or "length") of each prompt."""


class AnswerStats(NamedTuple):
    """Of greedy answers: mean tokens, share that was cut off, mean share of repeated 3-grams, and nats a token.

    `kl` is KL(start || policy), along the answers of the model as it was before the first step.
    """

    length: float
    clipped: float
    repetition: float
    kl: float

    def metrics(self) -> dict[str, float]:
        """By TRL's names where it has them (GRPO)."""
        names = ("mean_length", "clipped_ratio", "repetition", "kl")
        return {f"completions/{name}": value for name, value in zip(names, self, strict=True)}


@dataclass(frozen=True)
class WatchedAnswers:
    """What is asked, and what the untrained model answered: `rows` (R, T) token ids of prompt and answer, `mask`
    (R, T), 1 where the next token is the answer's; at each of those N positions the `ids` (N, K) of the likeliest
    tokens and their log-probs (N, K), nats. `chosen` is the mean length of the chosen answers, tokens.
    """

    ask: Callable[[], Sequence[tuple[list[int], str]]]
    rows: mx.array
    mask: np.ndarray
    ids: mx.array
    logps: mx.array
    start: AnswerStats
    chosen: float


def looks(train: TrainConfig, steps: int) -> set[int]:
    """The steps after which answers are watched."""
    if train.sample_every != "auto":
        return set(range(train.sample_every, steps + 1, train.sample_every)) if train.sample_every else set()
    return {math.ceil(steps * share) for share in LOOKS}


def unasked_note(train: TrainConfig, generate: Generate | None) -> str:
    """What to say where a recipe asks for looks that nothing can answer; empty otherwise."""
    if generate is not None or train.sample_every in ("auto", 0):
        return ""
    return (
        f"train.sample_every {train.sample_every}: no answers are looked at without "
        f"train(..., generate=mlxdpo.inference.generate.generate)"
    )


def watch_answers(
    generate: Generate | None, policy: Policy, examples: Sequence[Example], trained: int, steps: int, train: TrainConfig
) -> WatchedAnswers | None:
    """The answers of a model that is not trained yet; None where the run is too short to pay for them, or none asked.

    `trained` is the number of tokens that the run trains on. With `train.sample_every` a number all are paid for.
    """
    times, longest = len(looks(train, steps)), LONGEST
    pairs = _distinct_examples(examples)
    if generate is None or not times or not pairs:
        return None
    prompts = [list(map(int, pair.prompt)) for pair in pairs]
    if train.sample_every == "auto":  # a look reads the prompts twice, writes answers and reads the first ones
        paid = SHARE * trained / (times + 1) - 2 * sum(map(len, prompts))
        longest = min(LONGEST, int(paid / (2 * len(prompts))))
    if longest < SHORTEST:
        return None

    def ask() -> Sequence[tuple[list[int], str]]:
        """Greedy answers of the weights of now."""
        return generate(policy.model, prompts, max_tokens=longest, eos_ids=policy.eos_ids, temperature=0.0)

    answers = ask()
    rows, mask = _laid_out(prompts, answers)
    logps = _answer_logps(policy.model, rows, mask)
    most = min(LIKELIEST, logps.shape[-1])
    ids = mx.argpartition(-logps, most - 1, axis=-1)[:, :most]
    best = mx.take_along_axis(logps, ids, -1)
    mx.eval(ids, best)
    chosen = float(np.mean([pair.scored[0] for pair in pairs]))
    return WatchedAnswers(ask, rows, mask, ids, best, _stats(answers, 0.0), chosen)


def answer_stats(watched: WatchedAnswers, model: nn.Module) -> AnswerStats:
    """What the answers are like now."""
    logps = mx.take_along_axis(_answer_logps(model, watched.rows, watched.mask), watched.ids, -1)
    return _stats(watched.ask(), coarse_kl(np.array(watched.logps, np.float64), np.array(logps, np.float64)))


def coarse_kl(first: np.ndarray, second: np.ndarray) -> float:
    """Mean over positions of KL(first || second), nats, all tokens but K taken for one: (N, K) log-probs of the same K.

    At most the KL of the whole distributions, by the data processing inequality.
    """
    rest = [np.log(np.maximum(1e-12, 1 - np.exp(logps).sum(-1, keepdims=True))) for logps in (first, second)]
    p, q = (np.concatenate(parts, -1) for parts in ((first, rest[0]), (second, rest[1])))
    return max(0.0, float((np.exp(p) * (p - q)).sum(-1).mean())) if len(p) else 0.0


def repeated_share(tokens: Sequence[int]) -> float:
    """Share of the 3-grams that a text has had before (seq-rep-3 of arXiv 1908.04319); 0 for fewer than 3 tokens."""
    grams = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _distinct_examples(examples: Sequence[Example]) -> list[Example]:
    """Examples with distinct prompts, not too long, from all over the pairs."""
    found: dict[tuple[int, ...], Example] = {}
    for i in dict.fromkeys(np.linspace(0, len(examples) - 1, 4 * PROMPTS).astype(int).tolist() if examples else ()):
        if 0 < len(examples[i].prompt) <= PROMPT_TOKENS and len(found) < PROMPTS:
            found.setdefault(tuple(map(int, examples[i].prompt)), examples[i])
    return list(found.values())


def _stats(answers: Sequence[tuple[list[int], str]], kl: float) -> AnswerStats:
    tokens = [answer for answer, _ in answers]
    return AnswerStats(
        float(np.mean([len(answer) for answer in tokens])),
        float(np.mean([finish == "length" for _, finish in answers])),
        float(np.mean([repeated_share(answer) for answer in tokens])),
        kl,
    )


def _laid_out(prompts: Sequence[list[int]], answers: Sequence[tuple[list[int], str]]) -> tuple[mx.array, np.ndarray]:
    whole = [prompt + answer for prompt, (answer, _) in zip(prompts, answers, strict=True)]
    rows, mask = (np.zeros((len(whole), max(map(len, whole))), kind) for kind in (np.int32, bool))
    for row, (prompt, ids) in enumerate(zip(prompts, whole, strict=True)):
        rows[row, : len(ids)] = ids
        mask[row, len(prompt) - 1 : len(ids)] = True  # the position after the last token as well: where it may end
    return mx.array(rows), mask


def _answer_logps(model: nn.Module, rows: mx.array, mask: np.ndarray) -> mx.array:
    """(N, V) float32 log-probs at the masked positions: of a long prompt's rows only these meet the head."""
    row, column = (mx.array(places) for places in np.nonzero(mask))
    logits = logits_at(model, rows, row, column)()
    return logits - mx.logsumexp(logits, axis=-1, keepdims=True)
