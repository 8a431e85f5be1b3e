"""The objective of a reward model: it sees the rewards of both completions where others see log-probs."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.types import Pairs


def bradley_terry(pairs: Pairs, *, margin: float = 0.0, center: float = 0.0) -> mx.array:
    """Reward modelling: -log s(r_w - r_l - margin) + center (r_w + r_l)^2, with r in `pairs.chosen` and `.rejected`.

    First term: arXiv 2203.02155 eq. 1 (Bradley-Terry); `margin`: arXiv 2307.09288 eq. 2 (Llama 2), a number by which
    the better answer should win. Second term: arXiv 2312.09244 (section 3.1), which takes away the freedom to add a
    constant to all rewards; 0.01 there. A pair's term is its own, so batches of any size give the same sum.
    """
    gap = pairs.chosen - pairs.rejected
    return -nn.log_sigmoid(gap - margin) + center * (pairs.chosen + pairs.rejected) ** 2
