"""The same comparisons asked a second time, past the cache: does a judge repeat itself?

A judge may repeat itself 95 % of the time and still prefer a position (arXiv 2606.19544), so this is no quality by
itself; but one that does not repeat itself makes every other number of it noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .judges import Both, Judge, ask_both
from .judges.both import Trio
from .report_card import retest
from .stats import Interval


class Retest(NamedTuple):
    """`n` comparisons valid both times, out of `asked`; `same` is the share with the same winner.

    `invalid` had no verdict the second time. `moved` is the mean absolute change of the averaged logit.
    """

    asked: int
    n: int
    invalid: int
    same: float | None
    interval: Interval | None
    moved: float | None


def retested(
    judge: Judge, trios: Sequence[Trio], found: Sequence[Both], prompts: Sequence[str], count: int
) -> Retest | None:
    """Ask `count` of the comparisons again, evenly spaced over those with a verdict; None where there are none.

    `found` are the first verdicts, one per trio. Equal answers were never asked about and are left out. A file of
    votes has nobody to ask.
    """
    known = [i for i, both in enumerate(found) if both.logit is not None and not both.same]
    if not known or judge.identity.get("kind") == "votes":
        return None
    at = [known[k] for k in np.unique(np.linspace(0, len(known) - 1, min(count, len(known))).round().astype(int))]
    again = ask_both(judge, [trios[i] for i in at], cached=False)
    both = [(found[i].logit, b.logit, prompts[i]) for i, b in zip(at, again, strict=True)]
    usable = [(a, b, p) for a, b, p in both if a is not None and b is not None]
    invalid = len(at) - len(usable)
    if not usable:
        return Retest(len(at), 0, invalid, None, None, None)
    first, second, names = (list(column) for column in zip(*usable, strict=True))
    was, now = (np.sign(values).astype(int) for values in (first, second))
    same, interval = retest(was, now, names)
    return Retest(len(at), len(usable), invalid, same, interval, float(np.abs(np.subtract(first, second)).mean()))
