"""A panel of judges: `panel:RULE:JUDGE,JUDGE,...`, three or more of one kind or another under a rule that is stated.

    majority   in each order the answer that more members prefer; a tie where as many prefer one as the other
    mean       in each order the mean of the members' logits, each between -10 and 10

Members without a verdict have no say; where fewer than half of the members have one, neither has the panel. Members
keep their verdicts themselves, so a judge that is also asked alone is not asked twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlxdpo import UserError
from mlxdpo_eval.judges.both import ask_questions
from mlxdpo_eval.judges.protocol import CERTAIN, Judge, Metered, Question, Verdict, certain, invalid

RULES: dict[str, Callable[[Sequence[float]], float]] = {
    "majority": lambda logits: certain(float(np.sign(logits).sum())).logit or 0.0,
    "mean": lambda logits: float(np.clip(logits, -CERTAIN, CERTAIN).mean()),
}
"""Rule -> the panel's logit from those of the members that have one."""


@dataclass(frozen=True)
class PanelJudge:
    """Members under a rule. `keep` is off where everything is to be asked again."""

    name: str
    identity: Mapping[str, Any]
    rule: str
    members: tuple[Judge, ...]
    keep: bool = True
    cached: bool = False  # the members' verdicts are kept

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """One verdict per question, from the members' verdicts on it."""
        distinct = list(dict.fromkeys(questions))
        said = [ask_questions(member, distinct, self.keep) for member in self.members]
        return [self._decide([verdicts[question] for verdicts in said]) for question in questions]

    def _decide(self, verdicts: Sequence[Verdict]) -> Verdict:
        logits = [verdict.logit for verdict in verdicts if verdict.logit is not None]
        if 2 * len(logits) < len(verdicts):
            absent = [verdict.absent for verdict in verdicts if verdict.logit is None]
            return (
                Verdict(None, "no vote", absent=True)
                if all(absent)
                else invalid("fewer than half of the panel answered")
            )
        words = "; ".join(
            f"{member.name} {'no verdict' if v.logit is None else f'{v.logit:+.2f}'}"
            for member, v in zip(self.members, verdicts, strict=True)
        )
        return Verdict(RULES[self.rule](logits), note=f"logits that the first is better: {words}")

    def fresh(self) -> Judge:
        """The same panel, asking everything again and keeping nothing."""
        return replace(self, keep=False)

    def spent(self) -> Mapping[str, Any]:
        """What each member used."""
        return {member.name: member.spent() for member in self.members if isinstance(member, Metered)}


def panel_judge(rest: str, open_member: Callable[[str], Judge]) -> Judge:
    """Open `panel:RULE:JUDGE,JUDGE,...`. Raises `UserError` for another rule, one member, and as they do."""
    rule, _, names = rest.partition(":")
    specs = [name.strip() for name in names.split(",") if name.strip()]
    if rule not in RULES:
        raise UserError(
            f"--judge panel:{rest}: no such rule; expected panel:RULE:JUDGE,JUDGE, RULE one of {', '.join(RULES)}"
        )
    if len(set(specs)) < 2 or len(set(specs)) < len(specs):
        raise UserError(f"--judge panel:{rest}: a panel needs at least two different judges, separated by commas")
    members = tuple(open_member(spec) for spec in specs)
    identity = {"kind": "panel", "rule": rule, "members": [dict(member.identity) for member in members]}
    return PanelJudge(f"panel:{rule} of {', '.join(member.name for member in members)}", identity, rule, members)
