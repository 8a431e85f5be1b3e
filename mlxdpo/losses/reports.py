"""What an objective reports besides rewards and log-probs, by TRL's names. Each gets columns of NumPy float64, (B,)."""

from __future__ import annotations

from typing import Any

import numpy as np


def imitation(scored: Any) -> dict[str, float]:
    """`nll_loss`: minus the mean log-prob of a chosen token, nats."""
    return {"nll_loss": float(-scored.chosen.sum() / scored.chosen_len.sum())}


def odds(scored: Any) -> dict[str, float]:
    """`log_odds_chosen`: mean log of the chosen completion's odds over the rejected one's, arXiv 2403.07691 eq. 4;
    `log_odds_ratio`: mean log-sigmoid of it."""
    w, low = scored.chosen / scored.chosen_len, scored.rejected / scored.rejected_len
    ratio = (w - low) - (np.log(-np.expm1(w)) - np.log(-np.expm1(low)))
    found = {"log_odds_chosen": float(ratio.mean()), "log_odds_ratio": float(-np.logaddexp(0, -ratio).mean())}
    return imitation(scored) | found
