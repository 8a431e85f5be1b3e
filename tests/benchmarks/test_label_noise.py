"""The benchmark of flipped labels in training: which labels each run gets, and what the table says of them."""

import numpy as np
import pytest

from benchmarks import label_noise
from benchmarks.audit import SHARE
from benchmarks.label_noise import LABELS, Trial, labelled, table
from mlxdpo.data.findings import FLIP, Audit
from mlxdpo.types import Preference

ROWS = [Preference(f"prompt {i}", f"right {i}", f"wrong {i}", f"row:{i}") for i in range(50)]


@pytest.fixture
def audited(monkeypatch):
    """An audit that finds every flip: the chosen answer is a wrong one."""

    def audit(rows, given, folds, seed):
        wrong = [row.chosen.startswith("wrong") for row in rows]
        return Audit([{"flags": [FLIP] * one, "probability": 1.0 - one} for one in wrong], {})

    class Tokens:
        tokenizer, eos_ids = None, ()

    monkeypatch.setattr(label_noise, "encode", lambda *given, **named: object())
    monkeypatch.setattr(label_noise, "audit_input", lambda *given: None)
    monkeypatch.setattr(label_noise, "audit_pairs", audit)
    return Tokens()


@pytest.mark.parametrize("labels", LABELS)
def test_each_run_gets_the_labels_of_its_name(audited, labels):
    rows = labelled(audited, ROWS, Trial("code", labels, 0, len(ROWS), 1e-3, 1.0))
    flipped = int((np.random.default_rng(0).random(len(ROWS)) < SHARE).sum())
    wrong = [row for row in rows if row["chosen"].startswith("wrong")]
    assert len(rows) == len(ROWS) - flipped * (labels == "drop") and flipped > 0
    assert len(wrong) == (flipped if labels in ("flipped", "fa_dpo") else 0)
    if labels == "fa_dpo":
        assert all(row["probability"] == (row not in wrong) for row in rows)


def test_the_table_gives_back_what_the_best_treatment_gains():
    """Of the 20 points between sound and flipped labels `flip` has 15."""
    accuracy = {"sound": 0.9, "flipped": 0.7, "drop": 0.8, "flip": 0.85, "fa_dpo": 0.7}
    lines = [{"set": "code", "pairs": 80, "labels": name, "accuracy": value} for name, value in accuracy.items()]
    assert table(lines).splitlines()[-1] == "| code | 80 | 1 | 90.0 | 70.0 | 80.0 | 85.0 | 70.0 | 75% (flip) |"
    assert len(table(lines[:-1]).splitlines()) == 2  # a set that is not measured as a whole
