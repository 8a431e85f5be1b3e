"""AOT: the *distribution* of log-ratios over many pairs should dominate another one, whichever pair a value comes from.

Sorting couples the pairs of an optimizer step. It is taken apart like this: who is matched with whom is found once over
the whole step (`*_matches`, no gradient), and then each pair's loss is its own. The sum over the pairs, and its
gradient, are those of the sorted vectors, however the step is cut into batches.
"""

from __future__ import annotations

import mlx.core as mx

from mlxdpo.losses.ratios import Number, log_ratios, smoothed
from mlxdpo.types import Pairs

Window = tuple[mx.array, ...]


def aot(pairs: Pairs, *, beta: Number, label_smoothing: Number = 0.0, window: Window | None = None) -> mx.array:
    """-(1-e) log s(beta u) - e log s(-beta u), u = sort(pi_w - pi_l) - sort(ref_w - ref_l): AOT on pairs, arXiv
    2406.05882 (logistic loss). `window`: `aot_matches`; without it these pairs are all there are."""
    (matched,) = window or aot_matches(pairs)
    return smoothed(beta * (pairs.chosen - pairs.rejected - matched), label_smoothing)


def aot_matches(pairs: Pairs) -> Window:
    """(B,) for each pair the reference's log-prob difference that has the rank of the policy's among all."""
    policy, ref = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    return (mx.stop_gradient(mx.sort(ref)[_ranks(policy)]),)


def aot_unpaired(
    pairs: Pairs, *, beta: Number, label_smoothing: Number = 0.0, window: Window | None = None
) -> mx.array:
    """The same with u = sort(a) - sort(b): unpaired AOT, arXiv 2406.05882. Chosen and rejected completions of
    different prompts meet; both sides of each match get their slope, through one pair's loss each."""
    a, b = log_ratios(pairs)
    b_of_a, a_of_b = window or aot_unpaired_matches(pairs)
    loss = smoothed(beta * (a - b_of_a), label_smoothing)
    slope_only = smoothed(beta * (a_of_b - b), label_smoothing)
    return loss + slope_only - mx.stop_gradient(slope_only)


def aot_unpaired_matches(pairs: Pairs) -> Window:
    """(B,) twice: the b that has the rank of each a, and the a that has the rank of each b."""
    a, b = log_ratios(pairs)
    return mx.stop_gradient(mx.sort(b)[_ranks(a)]), mx.stop_gradient(mx.sort(a)[_ranks(b)])


def _ranks(values: mx.array) -> mx.array:
    return mx.argsort(mx.argsort(values))
