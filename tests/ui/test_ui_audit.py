"""What an audit found, decided row by row on the page, and the new file that comes of it."""

import json
import os

import pytest

from mlxdpo.types import UserError
from mlxdpo.ui import choices
from mlxdpo.ui.data import audit

ROWS = [
    '{"prompt": "q1",  "chosen": "a", "rejected": "b", "score_chosen": 4, "score_rejected": 1}',
    '{"prompt": "q2", "chosen": "<b>c", "rejected": "d"}',
    '{"prompt": "q3", "chosen": "e", "rejected": "f"}',
]


def finding(number, probability, *flags):
    where = {"where": f"pairs.jsonl:{number}", "similar_to": None, "contradicted_by": None}
    return where | {"probability": probability, "flags": list(flags)}


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(ROWS) + "\n")
    found = [finding(1, 0.1, "flip"), finding(2, 0.9, "near-duplicate"), finding(3, 0.8)]
    (tmp_path / "pairs.audit.jsonl").write_text("".join(json.dumps(one) + "\n" for one in found))
    return path


def shown(path, wanted):
    return audit.shown_rows(audit.findings_of(path), wanted)


def test_rows_are_found_by_their_flags_the_least_probable_label_first(pairs):
    assert shown(pairs, audit.EVERY) == [1, 3, 2] and shown(pairs, audit.ANY) == [1, 2]
    assert shown(pairs, "near-duplicate") == [2] and shown(pairs, "contradictory") == []


def test_decisions_make_a_new_file_and_never_touch_the_old_ones(pairs, tmp_path):
    before = pairs.read_bytes()
    audit.decide(pairs, [1], "flip")
    audit.decide(pairs, [2], "drop")
    audit.decide(pairs, [3], "keep")
    assert audit.decisions_of(pairs) == {1: "flip", 2: "drop", 3: "keep"}
    target, dropped, flipped = audit.write_audited(pairs)
    assert (target.name, dropped, flipped) == ("pairs.audited.jsonl", 1, 1) and pairs.read_bytes() == before
    first, third = target.read_text().splitlines()
    swapped = {"prompt": "q1", "chosen": "b", "rejected": "a", "score_chosen": 1, "score_rejected": 4}
    assert json.loads(first) == swapped and third == ROWS[2], "a line nobody decided on is copied as it is"
    kept = target.read_bytes()
    assert audit.write_audited(pairs)[0].name == "pairs.audited-2.jsonl" and target.read_bytes() == kept
    audit.decide(pairs, [2], "drop")  # a second click takes it back
    assert audit.decisions_of(pairs) == {1: "flip", 3: "keep"}
    assert "pairs.audit.jsonl" not in choices.data_files(tmp_path / "runs", tmp_path)


def test_findings_and_texts_stay_text_and_the_decision_is_marked(pairs):
    audit.decide(pairs, [1], "drop")
    rows = {number: json.loads(line) for number, line in enumerate(ROWS, 1)}
    html = audit.audit_view(pairs, rows, audit.ANY)
    assert "<b>" not in html and "&lt;b&gt;c" in html and "10 %" in html
    assert 'data-act="drop" aria-pressed="true" aria-label="Drop row 1"' in html and "1 to drop" in html


def test_what_cannot_be_decided_is_one_sentence(pairs, tmp_path):
    for numbers, act in (([9], "drop"), ([1], "burn")):
        with pytest.raises(UserError, match="no such row or decision"):
            audit.decide(pairs, numbers, act)
    with pytest.raises(UserError, match="no row is marked Drop or Flip"):
        audit.write_audited(pairs)
    audit.decide(pairs, [1, 2, 3], "drop")
    with pytest.raises(UserError, match="nothing would be left"):
        audit.write_audited(pairs)
    assert not list(tmp_path.glob("*audited*"))
    later = (tmp_path / "pairs.audit.jsonl").stat().st_mtime + 9
    os.utime(pairs, (later, later))
    with pytest.raises(UserError, match="was changed after its audit"):
        audit.write_audited(pairs)
    assert 'role="alert"' in audit.audit_view(pairs, {}, audit.ANY)
