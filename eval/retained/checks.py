"""The whole retained set: the same items in the same order on every machine.

All questions, answers and passages are written for this set or generated here from a fixed seed, so none of them comes
from a benchmark that a model may have been trained on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from mlxdpo_eval.retained.check import RetainedCheck
from mlxdpo_eval.retained.instructions import instruction_checks
from mlxdpo_eval.retained.questions import arithmetic_checks, fact_checks
from mlxdpo_eval.retained.texts import harmful_checks, harmless_checks, passage_checks

SEED = 20_240_601


def retained_checks(limit: int | None = None, seed: int = SEED) -> list[RetainedCheck]:
    """Every check, area by area; with `limit` that many of each area, spread evenly over it.

    Each area has a random generator of its own, so changing one leaves the others as they are.
    """
    areas = (
        arithmetic_checks,
        fact_checks,
        instruction_checks,
        harmful_checks,
        harmless_checks,
        passage_checks,
    )
    found: list[RetainedCheck] = []
    for generator in areas:
        checks = generator(random.Random(f"{seed} {generator.__name__}"))
        found += checks if limit is None else _evenly(checks, limit)
    return found


def _evenly(checks: Sequence[RetainedCheck], count: int) -> list[RetainedCheck]:
    kept = min(count, len(checks))
    return [checks[i * len(checks) // kept] for i in range(kept)]
