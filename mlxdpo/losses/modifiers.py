"""What can be laid over an objective: functions from pairs to pairs, and weights of pairs.

A modifier that makes no sense for an objective is refused with the reason (`Objective.refuses`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.losses.ratios import bounded_exp, bounded_expm1, log_ratios
from mlxdpo.types import Pairs, Unpaired

MODIFIERS: dict[str, str] = {
    "f_divergence": "2309.16240",
    "ld_alpha": "2409.06411",
    "wpo": "2406.11827",
    "reference_free": "2305.18290",
    "probability": "2305.18290",
    "weight": "",
    "margin": "2402.10571",
}
"""Every modifier with its paper; the last three come from columns of the data."""


def ld_pairs(pairs: Pairs, ld_alpha: float) -> Pairs:
    """LD-DPO, arXiv 2409.06411: of each completion the first min(|y_w|, |y_l|) tokens count fully and the rest
    ld_alpha, under policy and reference alike. Needs `Pairs.shared` and `ref_shared`."""
    assert pairs.shared is not None and pairs.ref_shared is not None  # whoever asks for it had them scored
    policy = pairs.shared + ld_alpha * (mx.stack([pairs.chosen, pairs.rejected]) - pairs.shared)
    ref = pairs.ref_shared + ld_alpha * (mx.stack([pairs.ref_chosen, pairs.ref_rejected]) - pairs.ref_shared)
    return pairs._replace(chosen=policy[0], rejected=policy[1], ref_chosen=ref[0], ref_rejected=ref[1])


def ld_log_ratios(pairs: Pairs, ld_alpha: float) -> Pairs:
    """The same for objectives of log-ratios: those are formed first, or sums ten times as large lose a digit."""
    assert pairs.shared is not None and pairs.ref_shared is not None
    beginnings, nothing = pairs.shared - pairs.ref_shared, mx.zeros_like(pairs.chosen)
    ratios = beginnings + ld_alpha * (mx.stack(log_ratios(pairs)) - beginnings)
    return pairs._replace(chosen=ratios[0], rejected=ratios[1], ref_chosen=nothing, ref_rejected=nothing)


def without_reference(pairs: Pairs) -> Pairs:
    """A uniform reference, whose log-probs cancel: arXiv 2305.18290's code calls it reference_free."""
    nothing = mx.zeros_like(pairs.ref_chosen)
    shared = None if pairs.shared is None else mx.zeros_like(pairs.shared)
    return pairs._replace(ref_chosen=nothing, ref_rejected=nothing, ref_shared=shared)


def f_divergence_scores(pairs: Pairs, divergence: str, alpha: float) -> Pairs:
    """f-DPO, arXiv 2309.16240: each log-ratio x becomes f'(e^x), up to a constant that cancels."""
    score = divergence_score(divergence, alpha)
    a, b = log_ratios(pairs)
    return without_reference(pairs)._replace(chosen=score(a), rejected=score(b))


def divergence_score(divergence: str, alpha: float) -> Callable[[mx.array], mx.array]:
    """c(x) of a log-ratio x: reverse_kl x, forward_kl 1 - e^-x, js_divergence log 2 + log s(x), alpha_divergence
    (e^((alpha-1) x) - 1)/(alpha - 1), which is x at alpha = 1. Exponents are bounded."""
    if divergence == "forward_kl":
        return lambda x: 1 - bounded_exp(-x)
    if divergence == "js_divergence":
        return lambda x: math.log(2) + nn.log_sigmoid(x)
    if divergence == "alpha_divergence" and alpha != 1:
        return lambda x: bounded_expm1((alpha - 1) * x) / (alpha - 1)
    return lambda x: x


def swapped_pairs(pairs: Pairs) -> Pairs:
    """The pairs with their roles exchanged, as a label says that they are with probability 1 - p."""
    margin = None if pairs.margin is None else -pairs.margin
    return pairs._replace(
        chosen=pairs.rejected,
        rejected=pairs.chosen,
        ref_chosen=pairs.ref_rejected,
        ref_rejected=pairs.ref_chosen,
        chosen_len=pairs.rejected_len,
        rejected_len=pairs.chosen_len,
        margin=margin,
    )


def wpo_weight(pairs: Pairs) -> mx.array:
    """WPO, arXiv 2406.11827 eq. 2: how much the pair looks like the policy's own samples, a weight without gradient.

    w(y) = exp(mean over tokens of log p(y_t) - log sum_v p_v^2), the product of both completions', (B,). Needs
    `Pairs.squares`. It may exceed 1, as in the paper's sampled alignment and TRL 1.x.
    """
    assert pairs.squares is not None  # whoever asks for it had them scored
    chosen = (pairs.chosen - pairs.squares[0]) / pairs.chosen_len
    rejected = (pairs.rejected - pairs.squares[1]) / pairs.rejected_len
    return mx.stop_gradient(mx.exp(chosen + rejected))


def unpaired_rows(pairs: Pairs) -> Unpaired:
    """Unpaired rows out of the pairs they are laid out as (`types.Example`)."""
    assert pairs.desirable is not None
    kl = pairs.rejected - pairs.ref_rejected
    return Unpaired(pairs.chosen, pairs.ref_chosen, pairs.chosen_len, pairs.desirable, kl)
