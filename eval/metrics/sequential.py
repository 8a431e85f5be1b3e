"""Votes that are looked at while they come in: evidence that stays valid, and how many votes a claim needs.

A z test repeated after each of 200 votes calls a difference in four of ten cases in which there is none. The
e-process may be looked at after every vote: it exceeds 1 / alpha with probability at most alpha, ever. For that
guarantee the decision is that it reached 1 / alpha at *some* look: stop then, or remember it. A tie enters as half of a
win and half of a loss, or is left out and counted.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import NormalDist

import numpy as np
from scipy import optimize, special

TINY, EPS = 1e-300, 2**-53  # next to 0, and 1 less this is next to 1


def log_e_value(wins: float | np.ndarray, losses: float | np.ndarray, null: float = 0.5):
    """log of the e-process against "the win rate is `null`": ln B(w + 1, l + 1) - w ln null - l ln(1 - null).

    The likelihood ratio of a win rate drawn evenly from (0, 1) against `null`: for null 1/2, E = 2^n B(w + 1,
    l + 1). A martingale that starts at 1 when votes are independent with that rate, hence P(E ever >= 1 /
    alpha) <= alpha (Ville 1939; arXiv 2210.01948). Halves for ties keep that: each factor (p /
    null)^y ((1 - p) / (1 - null))^(1 - y) is convex in y, so E grows no faster than with y rounded at random.
    """
    if np.min(wins) < 0 or np.min(losses) < 0:
        raise ValueError(f"{wins} wins and {losses} losses; expected counts of at least 0")
    likelihood = special.xlogy(wins, null) + special.xlog1py(losses, -null)  # 0 log 0 is 0
    return special.betaln(np.add(wins, 1), np.add(losses, 1)) - likelihood


def anytime_interval(wins: float, losses: float, alpha: float = 0.05) -> tuple[float, float]:
    """Win rates that the e-process has not refuted, E(rate) < 1 / alpha: valid at all looks, (0, 1) at first."""
    _check_alpha(alpha)
    limit, n = -np.log(alpha), wins + losses
    rate = wins / n if n else 0.5

    def excess(null: float) -> float:
        """How far a null hypothesis is from being refused."""
        return float(log_e_value(wins, losses, null)) - limit

    # log E is convex in the rate with its minimum at the share of wins, so each side holds one root.
    low = _zero(excess, TINY, rate) if wins and excess(TINY) > 0 else 0.0
    high = _zero(excess, rate, 1 - EPS) if losses and excess(1 - EPS) > 0 else 1.0
    return low, high


def _zero(function: Callable[[float], float], low: float, high: float) -> float:
    """Where the function changes sign between the two."""
    return optimize.root_scalar(function, bracket=(low, high), method="brentq").root


def votes_needed(wins: float, losses: float, alpha: float = 0.05, limit: int = 100_000) -> int | None:
    """Further votes until the e-process decides, if they come in at the rate (wins + 1) / (votes + 2).

    0 when it has decided already, None when more than `limit` would be needed: there is no difference to be shown that
    way.
    """
    _check_alpha(alpha)
    rate = (wins + 1) / (wins + losses + 2)
    more = np.arange(limit + 1, dtype=np.float64)
    reached = log_e_value(wins + more * rate, losses + more * (1 - rate)) >= -np.log(alpha)
    return int(reached.argmax()) if reached.any() else None


def _votes_for(rate: float, alpha: float, power: float) -> float:
    """Of a two-sided z test against 1/2: ((z_{1 - alpha/2} / 2 + z_power sqrt(p (1 - p))) / (p - 1/2))²."""
    _check_alpha(alpha)
    z, z_power = NormalDist().inv_cdf(1 - alpha / 2), NormalDist().inv_cdf(power)
    return ((z / 2 + z_power * np.sqrt(rate * (1 - rate))) / (rate - 0.5)) ** 2


def minimum_detectable(n: float, alpha: float = 0.05, power: float = 0.8) -> float | None:
    """The win rate above 1/2 that `n` independent votes show with that power; None when even 1 needs more.

    Of a two-sided z test: 783 votes .55, 194 .60, 85 .65; 1 less it is the rate below 1/2. Rows that share a prompt
    count for fewer.
    """
    if n < _votes_for(1.0, alpha, power):
        return None
    return _zero(lambda p: _votes_for(p, alpha, power) - n, 0.5 + 1e-9, 1.0)


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < 1:
        raise ValueError(f"alpha is {alpha}; expected a probability between 0 and 1, such as 0.05")
