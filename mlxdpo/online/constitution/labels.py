"""Which of two answers do the principles prefer, and how surely? Soft labels from one token, in both orders.

    s1 = log-odds of the letter of y1, y1 shown as A;  s2 = the same, y1 shown as B;  l = (s1 + s2) / 2
    p  = mean over principles of sigmoid(l)

Source: arXiv 2212.08073 section 4.1, whose labels are the normalised probabilities of (A) and (B), averaged over
principles for robustness. There each comparison is made in one order; here a liking for a letter or a place, which is
large in small models, drops out of l exactly, as it is additive in log-odds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo.config import DataConfig
from mlxdpo.data.encode import encode_prompt
from mlxdpo.forward import fused_head as heads
from mlxdpo.forward.architectures import model_parts
from mlxdpo.forward.next_token import next_logits
from mlxdpo.forward.shared_prefix import hidden_states
from mlxdpo.forward.token_rows import spreader
from mlxdpo.model.adapters import dropout_off
from mlxdpo.model.policy import Policy
from mlxdpo.online.constitution.schema import Constitution
from mlxdpo.online.constitution.wording import LETTERS, comparison_turns
from mlxdpo.types import Text, UserError

Rows = Sequence[Sequence[int]]


class Label(NamedTuple):
    """What the principles say of two answers, y1 and y2.

    shown_first, shown_second  (K,) log-odds for y1, shown as A and as B, one entry for each principle
    """

    shown_first: tuple[float, ...]
    shown_second: tuple[float, ...]

    @property
    def logits(self) -> tuple[float, ...]:
        """(K,) log-odds that y1 is better, both orders averaged."""
        return tuple((a + b) / 2 for a, b in zip(self.shown_first, self.shown_second, strict=True))

    @property
    def probabilities(self) -> tuple[float, ...]:
        """(K,) that y1 is better, by each principle."""
        return tuple((1 + lead) / 2 for lead in self._leads())

    @property
    def lead(self) -> float:
        """2 p - 1 of the mean probability p that y1 is better: exactly its negative when y1 and y2 change places."""
        leads = self._leads()
        return sum(leads) / len(leads)

    @property
    def probability(self) -> float:
        """That y1 is better, averaged over the principles."""
        return (1 + self.lead) / 2

    def swapped(self) -> Label:
        """The same with y1 and y2 exchanged."""
        return Label(tuple(-x for x in self.shown_second), tuple(-x for x in self.shown_first))

    def _leads(self) -> list[float]:
        # 2 sigmoid(l) - 1 = tanh(l / 2), which is odd to the last bit.
        return [float(np.tanh(logit / 2)) for logit in self.logits]


def label_pair(policy: Policy, data: DataConfig, rules: Constitution, prompt: Text, first: str, second: str) -> Label:
    """Ask every principle about two different answers, in both orders.

    Raises `UserError` when the tokenizer has no single token for a letter.
    """
    # Always the same question whichever answer is called first, so that the label is antisymmetric to the bit.
    one, other = sorted((first, second))
    shown = [_odds(policy, data, rules, prompt, *order) for order in ((one, other), (other, one))]
    found = Label(tuple(shown[0].tolist()), tuple((-shown[1]).tolist()))
    return found if first == one else found.swapped()


def _odds(policy: Policy, data: DataConfig, rules: Constitution, prompt: Text, a: str, b: str) -> np.ndarray:
    """(K,) float64 log-odds of letter A against B, each letter in all its spellings."""
    letters = [spellings(policy.tokenizer, letter) for letter in LETTERS]
    turns = [comparison_turns(principle, prompt, a, b) for principle in rules.principles]
    rows = [encode_prompt(one, policy.tokenizer, data).tolist() for one in turns]
    logits = shared_next_logits(policy.model, rows, [token for own in letters for token in own]).astype(np.float64)
    sides = np.split(logits, [len(letters[0])], axis=1)
    return np.logaddexp.reduce(sides[0], axis=1) - np.logaddexp.reduce(sides[1], axis=1)


def spellings(tokenizer: Any, letter: str) -> list[int]:
    """Single tokens that read as the letter: some templates leave the space before it to the model.

    Raises `UserError` when there is none.
    """
    found = [tokenizer.encode(text, add_special_tokens=False) for text in (letter, f" {letter}")]
    if not (single := list(dict.fromkeys(ids[0] for ids in found if len(ids) == 1))):
        raise UserError(f"the tokenizer has no single token for {letter}, so this model cannot label; use labels none")
    return single


def shared_next_logits(model: Any, rows: Rows, ids: Sequence[int]) -> np.ndarray:
    """`next_logits` of rows with a long common beginning, which is computed once: (N, len(ids)) float32."""
    common = _shared_beginning(rows)
    parts = model_parts(model)
    if parts is None or common < 2 or len(rows) == 1:
        return next_logits(model, rows, ids)
    rest = np.zeros((len(rows), max(map(len, rows)) - common), np.int32)
    for padded, row in zip(rest, rows, strict=True):
        padded[: len(row) - common] = row[common:]
    last = mx.array([len(row) - common - 1 for row in rows])
    group = mx.zeros(len(rows), mx.int32)
    with dropout_off(model):
        prefix = mx.array(np.array([rows[0][:common]], np.int32))
        states = hidden_states(parts, prefix, mx.array(rest), spreader(group, len(rows)))
        logits = heads.logits(parts.head, parts.norm(states[mx.arange(len(rows)), last]))
        return np.array(logits[:, mx.array(list(ids))].astype(mx.float32))


def _shared_beginning(rows: Rows) -> int:
    """Tokens that all rows begin with, at most all but one of the shortest."""
    most = min(map(len, rows)) - 1
    return next((at for at in range(most) if len({row[at] for row in rows}) > 1), most)
