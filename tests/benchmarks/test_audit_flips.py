"""The benchmark of the audit: its sets are what they say, and its figure is 1 where the truth is in the features."""

import numpy as np
import pytest

from benchmarks.audit import SETS, auroc, exchanged_rows, turned
from mlxdpo.data.findings import AuditInput


@pytest.mark.parametrize("name", SETS)
def test_sets_are_the_same_every_time_and_differ_in_their_answers_alone(name):
    make, _ = SETS[name]
    rows = make(40)
    assert len(rows) == 40 and rows == make(40)
    assert all(row.prompt and row.chosen.strip() != row.rejected.strip() for row in rows)
    assert len({row.where for row in rows}) == 40
    if name == "code":
        assert all(sorted(row.chosen.split("\n")) == sorted(row.rejected.split("\n")) for row in rows)


def test_turning_twice_is_nothing_and_rows_and_numbers_turn_together():
    draw = np.random.default_rng(0)
    given = AuditInput(
        draw.normal(size=(9, 12)), draw.normal(size=(9, 4)), draw.normal(size=9), draw.normal(size=(9, 2)),
        draw.normal(size=(9, 2)),
    )  # fmt: skip
    flipped = draw.random(9) < 0.5
    once = turned(given, flipped)
    assert all(np.array_equal(a, b) for a, b in zip(turned(once, flipped), given, strict=True))
    assert np.array_equal(once.differences[flipped], -given.differences[flipped])
    assert np.array_equal(once.embeddings[flipped, 4:8], given.embeddings[flipped, 8:])
    rows = SETS["tone"][0](9)
    assert exchanged_rows(exchanged_rows(rows, flipped), flipped) == rows


def test_auroc_by_hand():
    """Positives .9 and .5, negatives .5, .1 and .7: above in 3 + 1 of 6, one tie."""
    scores, positive = np.array([0.9, 0.5, 0.5, 0.1, 0.7]), np.array([True, True, False, False, False])
    assert auroc(scores, positive) == pytest.approx((3 + 1 + 0.5) / 6)
