"""Both likelihoods can sink while their difference grows: said once, with the objectives that counter it.

DPO and its kin see only the difference of two log-ratios (arXiv 2402.13228 section 3 shows how the chosen completion's
likelihood falls under them).
"""

from __future__ import annotations

from collections import deque

from mlxdpo.losses import LOSSES, Loss
from mlxdpo.training.metrics import Scored

PER_TOKEN, SUMMED = 0.1, 2.0  # nats below the reference, both at once: a short answer may lose 0.1 a token to noise
STEPS = 10  # steps that count as one look where no pairs are held out


class LikelihoodWatch:
    """Looks at what is scored anyway and speaks once."""

    def __init__(self, loss: Loss, heldout: bool):
        names = [term.name for term in loss.terms]
        # apo_down lowers both by design; without a reference there is nothing to fall below.
        self.silent = not loss.paired or "reference" not in loss.needs or "apo_down" in names
        self.own, self.heldout = names, heldout
        self.recent: deque[tuple[float, float]] = deque(maxlen=STEPS)

    def step(self, scored: Scored) -> str | None:
        """What to say after a step, if anything."""
        if self.heldout or self.silent:
            return None
        self.recent.append(_fall(scored))
        if len(self.recent) < STEPS:
            return None
        means = [sum(column) / STEPS for column in zip(*self.recent, strict=True)]
        return self._say(means[0], means[1], f"the last {STEPS} steps")

    def evaluation(self, scored: Scored) -> str | None:
        """What to say after an evaluation on held-out pairs, if anything."""
        return None if self.silent else self._say(*_fall(scored), "held-out pairs")

    def _say(self, per_token: float, summed: float, where: str) -> str | None:
        if per_token < PER_TOKEN or summed < SUMMED:
            return None
        self.silent = True
        others = [n for n, o in LOSSES.items() if o.lifts and o.paired and o.reference and n not in self.own]
        return (
            f"the chosen answers are {per_token:.2f} nats a token less likely than under the reference ({where}): "
            f"the policy moves away from both answers; loss.name {', '.join(others)} counter that, "
            f"or add imitation, as in loss.name {self.own[0]}+sft with loss.weights [1, 0.1]"
        )


def _fall(scored: Scored) -> tuple[float, float]:
    fall = scored.ref_chosen - scored.chosen
    return float((fall / scored.chosen_len).mean()), float(fall.mean())
