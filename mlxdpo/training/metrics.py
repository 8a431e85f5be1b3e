"""What a run reports, by TRL's names, averaged over pairs and not over batch means.

Departs from TRL in one number: a tie counts one half in `rewards/accuracies`, so an untrained policy reads 0.5
(TRL compares with a strict > and reads 0.0).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from mlxdpo.losses import Loss


class Scored(NamedTuple):
    """Pairs that were computed: each field (B,), float64. Log-probs in nats, lengths in tokens.

    Of unpaired rows `chosen` is the completion, `desirable` its thumb and `rejected` the completion of another prompt.
    """

    losses: np.ndarray
    chosen: np.ndarray
    rejected: np.ndarray
    ref_chosen: np.ndarray
    ref_rejected: np.ndarray
    chosen_len: np.ndarray
    rejected_len: np.ndarray
    desirable: np.ndarray | None = None


def concatenate_scored(parts: Iterable[Scored | None]) -> Scored:
    """All pairs of several batches."""
    columns = zip(*parts, strict=True)  # type: ignore[arg-type]
    return Scored(*(None if column[0] is None else np.concatenate(column) for column in columns))  # type: ignore[arg-type]


def accuracy(scored: Scored) -> float:
    """Share of pairs whose chosen completion gained more over the reference than the rejected one; a tie is 1/2."""
    return float(_ranked_right(scored).mean())


def _ranked_right(scored: Scored) -> np.ndarray:
    chosen, rejected = scored.chosen - scored.ref_chosen, scored.rejected - scored.ref_rejected
    return (chosen > rejected) + 0.5 * (chosen == rejected)


def pair_values(scored: Scored, loss: Loss, beta: float) -> dict[str, np.ndarray]:
    """(B,) numbers of single pairs: `loss`; `accuracy` and `margin` where the objective compares two completions."""
    if not loss.paired:
        return {"loss": scored.losses}
    rewarded = _as_rewarded(scored, loss)
    margin = beta * ((rewarded.chosen - rewarded.ref_chosen) - (rewarded.rejected - rewarded.ref_rejected))
    return {"loss": scored.losses, "accuracy": _ranked_right(rewarded), "margin": margin}


def _as_rewarded(scored: Scored, loss: Loss) -> Scored:
    """Log-probs as the objective's rewards are made of them: per token where there is no reference and it says so."""
    return token_means(scored) if loss.per_token and "reference" not in loss.needs else scored


def token_means(scored: Scored) -> Scored:
    """Log-probs per token instead of summed ones: the rewards of objectives that compare those without a reference."""
    return scored._replace(chosen=scored.chosen / scored.chosen_len, rejected=scored.rejected / scored.rejected_len)


def preference_metrics(scored: Scored, loss: Loss, beta: float) -> dict[str, float]:
    """TRL's metrics of pairs, or of unpaired rows where the loss reads those, and what its objectives report."""
    if loss.paired:
        found = pair_metrics(_as_rewarded(scored, loss), beta)
        found |= {f"logps/{side}": float(getattr(scored, side).mean()) for side in ("chosen", "rejected")}
    else:
        found = unpaired_metrics(scored, beta)
    return found | reported(scored, loss)


def imitation_metrics(scored: Scored, loss: Loss, beta: float) -> dict[str, float]:
    """Metrics of imitated completions (stage sft): of a pair only one side is there, so nothing is compared."""
    found = {"loss": float(scored.losses.mean()), "logps/chosen": float(scored.chosen.mean())}
    return found | reported(scored, loss)


def reward_metrics(scored: Scored, loss: Loss, beta: float) -> dict[str, float]:
    """TRL's metrics of a reward model (RewardTrainer): `chosen` and `rejected` are rewards here."""
    found = {
        "loss": float(scored.losses.mean()),
        "margin": float((scored.chosen - scored.rejected).mean()),
        "accuracy": accuracy(scored),
    }
    return found | reported(scored, loss)


def reported(scored: Scored, loss: Loss) -> dict[str, float]:
    """What the objectives of a loss report besides rewards and log-probs."""
    return {
        name: value
        for term in loss.terms
        if term.objective.reports
        for name, value in term.objective.reports(scored).items()
    }


def pair_metrics(scored: Scored, beta: float) -> dict[str, float]:
    """TRL's metrics of a set of pairs.

    Rewards are beta * (log pi - log ref), arXiv 2305.18290 section 5, whatever the objective. Where there is no
    reference, `scored` holds zeros for it, and rewards are beta * log pi, as TRL's CPO has them.
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


def unpaired_metrics(scored: Scored, beta: float) -> dict[str, float]:
    """TRL's metrics of unpaired rows (KTOTrainer): chosen are the thumbs up, rejected the thumbs down.

    `rewards/accuracies` is the share of (up, down) couples of which the thumb up has the larger reward, a tie 1/2: what
    it is for pairs, over all couples. What has no row of one kind is left out. `kl` is the estimate of KTO's z, nats.
    """
    assert scored.desirable is not None
    up = scored.desirable > 0.5
    rewards, found = beta * (scored.chosen - scored.ref_chosen), {"loss": float(scored.losses.mean())}
    for name, kind in (("chosen", up), ("rejected", ~up)):
        if kind.any():
            found[f"rewards/{name}"] = float(rewards[kind].mean())
            found[f"logps/{name}"] = float(scored.chosen[kind].mean())
    if up.any() and not up.all():
        below, ties = _below(rewards[up], np.sort(rewards[~up]))
        found["rewards/margins"] = found["rewards/chosen"] - found["rewards/rejected"]
        found["rewards/accuracies"] = float((below + ties / 2).mean() / (~up).sum())
    found["kl"] = max(0.0, float((scored.rejected - scored.ref_rejected).mean()))
    return found


def _below(values: np.ndarray, ordered: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How many of `ordered` are below each value, and how many equal to it."""
    left = np.searchsorted(ordered, values, "left")
    return left, np.searchsorted(ordered, values, "right") - left
