"""How far a tuned model has moved from its reference, and whether its text degenerates on the way.

Length blow-up and loops are the usual ways in which preference tuning fails; the sequence KL divergence is
the price of whatever reward was gained. All of it describes; none of it says which text is better.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from mlxdpo_eval.metrics.intervals import mean_or_none

if TYPE_CHECKING:
    import mlx.core as mx

CHUNK = 16  # positions whose (R, chunk, V) float32 log-probabilities are held at once

LogitsAt = Callable[[slice], "mx.array"]
"""A range of positions -> (R, n, V) unnormalised logits that predict the tokens at those positions."""


class TextStats(NamedTuple):
    """Of a set of completions: mean tokens, mean repetition, distinct bigrams, share that stopped by itself.

    None where no completion is long enough to say.
    """

    length: float | None
    repetition: float | None
    distinct_2: float | None
    stopped: float | None


def text_stats(completions: Sequence[Sequence[Hashable]], stopped: Sequence[bool], n: int = 3) -> TextStats:
    """Length, repetition of n-grams, diversity and the share of completions that ended with a stop token."""
    if len(completions) != len(stopped):
        raise ValueError(f"{len(completions)} completions and {len(stopped)} flags; expected one flag each")
    repeated = [r for c in completions if (r := repetition(c, n)) is not None]
    return TextStats(
        mean_or_none([len(c) for c in completions]),
        mean_or_none(repeated),
        distinct_n(completions),
        mean_or_none([float(s) for s in stopped]),
    )


def repetition(ids: Sequence[Hashable], n: int = 3) -> float | None:
    """Share of a text's n-grams that it has had before: 1 - distinct / all (seq-rep-n of arXiv 1908.04319).

    0 says nothing, near 1 a loop. None for a text of fewer than n tokens.
    """
    grams = _grams(ids, n)
    return 1 - len(set(grams)) / len(grams) if grams else None


def distinct_n(completions: Sequence[Sequence[Hashable]], n: int = 2) -> float | None:
    """Distinct n-grams over all n-grams of a whole set (distinct-n of arXiv 1510.03055).

    Low when completions resemble one another. It falls with the amount of text, so compare sets of like size.
    None without any n-gram.
    """
    grams = [gram for ids in completions for gram in _grams(ids, n)]
    return len(set(grams)) / len(grams) if grams else None


def _grams(ids: Sequence[Hashable], n: int) -> list[tuple[Hashable, ...]]:
    if n < 1:
        raise ValueError(f"n is {n}; n-grams have at least one token")
    return [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]


def sequence_kl(policy: LogitsAt, reference: LogitsAt, mask: mx.array) -> mx.array:
    """The KL divergence of each step, summed over the masked steps of each completion: (R,) float32 nats.

        sum_t mask_t sum_v pi(v | x, y<t) (log pi(v | x, y<t) - log ref(v | x, y<t))

    `mask` is (R, T), 1 where position t predicts a completion token. `policy` and `reference` give the logits
    of a few positions at a time, from hidden states say, so that nothing of size (R, T, V) need exist. The
    mean over completions *sampled from the policy at temperature 1* estimates the sequence KL(policy ||
    reference) of the DPO paper's frontier (arXiv 2305.18290, section 6.1, footnote 3). The sum over the
    vocabulary is exact: it varies less than log-ratios of sampled tokens, and no row is below zero. Samples
    at another temperature need both logits divided by it; say so beside the number. A token the policy gives
    no probability (-inf) adds nothing; one that only the reference rules out makes the row inf. Raises
    `ValueError` for shapes that differ.
    """
    import mlx.core as mx

    total = mx.zeros(mask.shape[:1])
    for start in range(0, mask.shape[1], CHUNK):
        here = slice(start, min(start + CHUNK, mask.shape[1]))
        steps = step_kl(policy(here), reference(here))
        if steps.shape != mask[:, here].shape:
            raise ValueError(f"logits of {steps.shape} positions for a mask of {mask[:, here].shape}; expected (R, T)")
        # `where`, not a product: padding may hold anything, and inf * 0 is not a number.
        total = total + mx.where(mask[:, here] > 0, steps, 0.0).sum(-1)
        mx.eval(total)  # frees this chunk before the next one is built
    return total


def step_kl(policy_logits: mx.array, reference_logits: mx.array) -> mx.array:
    """(..., V), (..., V) -> (...) nats, at least 0: KL(softmax(policy) || softmax(reference)), float32."""
    import mlx.core as mx

    if policy_logits.shape != reference_logits.shape:
        raise ValueError(f"policy logits are {policy_logits.shape}, reference logits {reference_logits.shape}")
    policy, reference = (_log_softmax(logits) for logits in (policy_logits, reference_logits))
    p, q, ratio = mx.exp(policy), mx.exp(reference), policy - reference
    # sum (q - p) is 0, so p ratio + q - p sums to the same; its terms are never negative, and a rounding of
    # the normalisers (1e-6 nats, as much as a young run's divergence) no longer enters at first order.
    near = p * (mx.expm1(-ratio) + ratio)
    far = q - p + mx.where(p > 0, p * ratio, 0.0)  # expm1 would overflow
    return mx.maximum(mx.where(ratio > -1, near, far).sum(-1), 0.0)


def _log_softmax(logits: mx.array) -> mx.array:
    import mlx.core as mx

    exact = logits.astype(mx.float32)
    return exact - mx.logsumexp(exact, axis=-1, keepdims=True)
