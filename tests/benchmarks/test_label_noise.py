"""The benchmark of flipped labels in training: which labels each run gets, and what the table says of them."""

import numpy as np
import pytest

from benchmarks.audit import exchanged_rows
from benchmarks.label_noise import LABELS, Trial, labelled, table
from mlxdpo.data.findings import FLIP, Audit
from mlxdpo.types import Preference

ROWS = [Preference(f"prompt {i}", f"right {i}", f"wrong {i}", f"row:{i}") for i in range(10)]
WRONG = np.arange(10) < 3


@pytest.mark.parametrize("labels", LABELS)
def test_each_run_gets_the_labels_of_its_name(labels):
    """The audit here finds every flip."""
    noisy = exchanged_rows(ROWS, WRONG)
    audit = Audit([{"flags": [FLIP] * one, "probability": 1.0 - one} for one in WRONG.tolist()], {"wrong_labels": 0.3})
    rows = labelled(labels, ROWS, noisy, audit)
    wrong = [row for row in rows if row["chosen"].startswith("wrong")]
    assert len(rows) == (7 if labels in ("drop", "agreed") else 10)
    assert len(wrong) == (3 if labels in ("flipped", "fa_dpo") else 0)
    assert all(("probability" in row) == (labels in LABELS[2:]) for row in rows)
    if labels == "fa_dpo":
        assert all(row["probability"] == (row not in wrong) for row in rows)


def test_the_table_gives_back_what_the_best_treatment_gains_on_the_seeds_that_all_have():
    """Of the 20 points between sound and flipped labels `flip` has 15; seed 1 lacks a run, another rate is its own."""
    accuracy = {"sound": 0.9, "flipped": 0.7, "drop": 0.8, "flip": 0.85, "agreed": 0.75, "fa_dpo": 0.7}
    lines = [
        Trial("code", name, 0, 80, 60, 1e-3, 2.0)._asdict() | {"accuracy": value} for name, value in accuracy.items()
    ]
    partly = [Trial("code", "sound", 1, 80, 60, 1e-3, 2.0), Trial("code", "sound", 0, 80, 60, 5e-4, 2.0)]
    text = table([*lines, *({**trial._asdict(), "accuracy": 0.1} for trial in partly)]).splitlines()
    assert text[2:] == ["| code | 80 | 0.001 | 2.0 | 1 | 90.0 | 70.0 | 80.0 | 85.0 | 75.0 | 70.0 | 75% (flip) |"]
