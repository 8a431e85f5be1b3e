"""What tuning did to an answer: log pi / pi_ref of every token, implicit reward, KL. Runs on the MLX thread."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo.ui.compare.answers import Answer
from mlxdpo.ui.variants import RunVariants, Variant
from mlxdpo_eval.metrics.drift import sequence_kl


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


def score(loaded: RunVariants, policy: Variant, answer: Answer) -> Score | None:
    """The score of an answer, its end-of-turn token included when it came to one; None for an empty answer."""
    ends = [min(loaded.policy.eos_ids)] if answer.finish == "stop" and loaded.policy.eos_ids else []
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
    pieces = _token_pieces(loaded.policy.tokenizer, answer.tokens, ratios, logps[0])
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


def _token_pieces(
    tokenizer: Any, tokens: tuple[int, ...], ratios: np.ndarray, logps: np.ndarray
) -> tuple[TokenPiece, ...]:
    """Tokens as text. A token that ends inside a character is joined with the next: neither can be shown alone."""
    pieces, done, start = [], "", 0
    for i in range(len(tokens)):
        text = tokenizer.decode(list(tokens[: i + 1]))
        if text.endswith("\N{REPLACEMENT CHARACTER}") and i + 1 < len(tokens):
            continue
        part = slice(start, i + 1)
        pieces.append(TokenPiece(text[len(done) :], float(ratios[part].sum()), float(logps[part].sum())))
        done, start = text, i + 1
    return tuple(pieces)
