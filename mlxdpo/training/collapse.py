"""Signs that a run gets worse, looked for in what is scored anyway and in a few answers; each is said once.

- Both likelihoods can sink while their difference grows, since DPO and its kin see only the difference of two
  log-ratios (arXiv 2402.13228 section 3): the chosen answers fall below the reference.
- Answers become a loop, empty, or never end, and the policy leaves the distribution it started from.
- The labels say nothing: pairs that were not trained on yet are ranked as by chance although rewards have moved.
- The chosen answers repeat themselves much more than the rejected: repetition is what is taught.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from mlxdpo.losses import LOSSES, Loss
from mlxdpo.training.metrics import Scored
from mlxdpo.training.watched_answers import AnswerStats, repeated_share
from mlxdpo.types import Example

PER_TOKEN, SUMMED = 0.1, 2.0  # nats below the reference, both at once: a short answer may lose 0.1 a token to noise
STEPS = 10  # steps that count as one look where no pairs are held out
LOST, SOON = 3.0, 3  # nats a token that the chosen answers of so many steps are below the reference: a collapse;
# healthy runs came to 2.4 at most, ones at a hundred times the rate to 4 and more (docs/evidence/collapses.md)
TAUGHT = 0.3  # by how much the chosen answers' share of repeated 3-grams may lead the rejected ones'
LOOP, LOOP_ROSE = 0.5, 0.3  # share of repeated 3-grams in answers, and its rise since the start
FAR = 1.0  # nats a token from the start: ordinary runs end below 0.3
FEW = 1.0  # tokens of an answer that says nothing
UNTOLD = 1.0  # standard deviations that guessing reaches once in six, and pairs that can be learnt soon leave behind
FEWEST_PAIRS, LEAST_REWARD = 16, 0.1  # before that nothing is said of labels


class CollapseWatch:
    """Looks for the signs of a run that gets worse. Methods return what there is to say of a sign that is new."""

    def __init__(self, loss: Loss, heldout: bool, beta: float = 0.1):
        names = [term.name for term in loss.terms]
        # apo_down lowers both by design; without a reference there is nothing to fall below.
        self.paired, self.anchored = loss.paired, "reference" in loss.needs
        self.may_fall = not loss.paired or not self.anchored or "apo_down" in names
        self.own, self.heldout, self.beta = names, heldout, beta
        self.recent: deque[tuple[float, float]] = deque(maxlen=STEPS)
        self.said: set[str] = set()
        self.lost = False  # whether the chosen answers of the last steps are `LOST` below the reference
        self.count, self.total, self.squares = 0, 0.0, 0.0

    def pairs(self, examples: Sequence[Example]) -> str | None:
        """What to say of the pairs before the first step, if anything."""
        if not self.paired or not examples:
            return None
        some = [examples[i] for i in dict.fromkeys(np.linspace(0, len(examples) - 1, 64).astype(int).tolist())]
        chosen, rejected = (
            float(np.mean([repeated_share([int(token) for token in getattr(pair, side)]) for pair in some]))
            for side in ("chosen", "rejected")
        )
        if chosen - rejected < TAUGHT:
            return None
        return self._once(
            "taught",
            f"the chosen answers repeat themselves ({chosen:.2f} of their 3-grams, the rejected {rejected:.2f}): the "
            f"model will learn to repeat; look at them with mlxdpo data check",
        )

    def step(self, scored: Scored, unseen: bool = False) -> str | None:
        """What to say after a step, if anything. `unseen`: its pairs are of the first pass."""
        if unseen and self.paired and self.anchored:
            gains = (scored.chosen - scored.ref_chosen) - (scored.rejected - scored.ref_rejected)
            self.count, self.total = self.count + len(gains), self.total + float(gains.sum())
            self.squares += float(np.square(gains).sum())
        if self.may_fall:
            return None
        self.recent.append(_fall(scored))
        falls = [per_token for per_token, _ in list(self.recent)[-SOON:]]
        self.lost = len(falls) == SOON and sum(falls) / SOON >= LOST
        if self.lost:
            return self._once(
                "lost",
                f"the run gets worse: the chosen answers of the last {SOON} steps are {sum(falls) / SOON:.1f} nats a "
                f"token less likely than under the reference; lower optim.lr",
            )
        if self.heldout or len(self.recent) < STEPS:
            return None
        means = [sum(column) / STEPS for column in zip(*self.recent, strict=True)]
        return self._fallen(means[0], means[1], f"the last {STEPS} steps")

    def evaluation(self, scored: Scored) -> str | None:
        """What to say after an evaluation on held-out pairs, if anything."""
        return None if self.may_fall else self._fallen(*_fall(scored), "held-out pairs")

    def labels(self) -> str | None:
        """What to say of the labels, if anything.

        Where labels are random, the sum of n reward differences over the root of the sum of their squares has mean 0
        and variance 1; where pairs can be learnt, it grows with the root of n.
        """
        moved = self.beta * np.sqrt(self.squares / max(1, self.count))
        if self.count < FEWEST_PAIRS or moved < LEAST_REWARD or self.total >= UNTOLD * np.sqrt(self.squares):
            return None
        return self._once(
            "labels",
            f"rewards have moved by {moved:.2f}, yet of {self.count} pairs not trained on before the chosen answers "
            f"gain no more than the rejected: the labels look random, or the rate is too high; look at the pairs with "
            f"mlxdpo data check, or lower optim.lr",
        )

    def answers(self, now: AnswerStats, start: AnswerStats, chosen: float) -> tuple[bool, str | None]:
        """Whether the answers show no sign of a collapse, and what to say of signs that are new, if anything.

        `chosen` is the mean length of the chosen answers, tokens.
        """
        signs = {
            "loop": now.repetition >= LOOP and now.repetition - start.repetition >= LOOP_ROSE,
            "empty": now.length <= FEW and start.length > FEW and chosen > 2 * FEW,
            "endless": now.clipped == 1 and start.clipped <= 0.5 and chosen <= start.length,
            "far": self.anchored and now.kl >= FAR,
        }
        words = {
            "loop": f"repeat themselves ({now.repetition:.2f} of their 3-grams, {start.repetition:.2f} at the start)",
            "empty": f"have become empty ({start.length:.0f} tokens at the start)",
            "endless": f"no longer end, and {1 - start.clipped:.0%} of them did at the start",
            "far": f"are {now.kl:.1f} nats a token away from those of the start",
        }
        new = [words[name] for name, seen in signs.items() if seen and self._once(name, name)]
        text = f"the run gets worse: greedy answers to training prompts {' and '.join(new)}; lower optim.lr"
        return not any(signs.values()), text if new else None

    def _once(self, name: str, text: str) -> str | None:
        if name in self.said:
            return None
        self.said.add(name)
        return text

    def _fallen(self, per_token: float, summed: float, where: str) -> str | None:
        if per_token < PER_TOKEN or summed < SUMMED:
            return None
        others = [n for n, o in LOSSES.items() if o.lifts and o.paired and o.reference and n not in self.own]
        return self._once(
            "fallen",
            f"the chosen answers are {per_token:.2f} nats a token less likely than under the reference ({where}): "
            f"the policy moves away from both answers; loss.name {', '.join(others)} counter that, "
            f"or add imitation, as in loss.name {self.own[0]}+sft with loss.weights [1, 0.1]",
        )


def _fall(scored: Scored) -> tuple[float, float]:
    fall = scored.ref_chosen - scored.chosen
    return float((fall / scored.chosen_len).mean()), float(fall.mean())
