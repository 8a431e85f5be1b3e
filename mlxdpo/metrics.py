"""What a run reports, by TRL's names, averaged over pairs and not over batch means.

Departs from TRL in one number: a tie counts one half in `rewards/accuracies`, so an untrained policy reads 0.5
(TRL compares with a strict > and reads 0.0).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np


class Scored(NamedTuple):
    """Pairs that were computed: each field (B,), float64. Log-probs in nats, lengths in tokens."""

    losses: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    ref_chosen: np.ndarray
    ref_rejected: np.ndarray
    chosen_len: np.ndarray
    rejected_len: np.ndarray


def join(parts: Iterable[Scored]) -> Scored:
    """All pairs of several batches."""
    return Scored(*(np.concatenate(columns) for columns in zip(*parts, strict=True)))


def accuracy(scored: Scored) -> float:
    """Share of pairs whose chosen completion gained more over the reference than the rejected one; a tie is 1/2."""
    chosen, rejected = scored.chosen - scored.ref_chosen, scored.rejected - scored.ref_rejected
    return float(((chosen > rejected) + 0.5 * (chosen == rejected)).mean())


def pair_metrics(scored: Scored, beta: float) -> dict[str, float]:
    """TRL's metrics of a set of pairs.

    Rewards are beta * (log pi - log ref), arXiv 2305.18290 section 5, whatever the objective.
    """
    chosen = beta * (scored.chosen - scored.ref_chosen)
    rejected = beta * (scored.rejected - scored.ref_rejected)
    return {
        "loss": float(scored.losses.mean()),
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "rewards/margins": float((chosen - rejected).mean()),
        "rewards/accuracies": accuracy(scored),
        "logps/chosen": float(scored.chosen.mean()),
        "logps/rejected": float(scored.rejected.mean()),
    }
