"""The demo's data: openings, ranking, and the files that ship."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlxdpo.demo
from mlxdpo.demo import rewards
from mlxdpo.types import UserError

sys.path.insert(0, str(Path(__file__).parents[2]))  # the folder of `benchmarks`, which no installation has

from benchmarks import demo_pairs
from benchmarks.demo_pairs import GROUPS, MIN_GAP, Continuation, best_against_worst, openings

FOLDER = Path(mlxdpo.demo.__file__).parent


def rows(name: str) -> list[dict]:
    with (FOLDER / name).open(encoding="utf-8") as file:  # not splitlines(): it also splits at U+2028
        return [json.loads(line) for line in file]


def test_openings_are_distinct_short_and_enough():
    train, heldout = openings()
    assert len({*train, *heldout}) == len(train) + len(heldout) == 480
    assert len(train) == 360
    assert all(5 <= len(opening.split()) <= 8 and opening == opening.strip() for opening in [*train, *heldout])


def test_all_openings_of_a_subject_are_in_the_same_part():
    parts = [set(part) for part in openings()]
    for templates, subjects in GROUPS:
        for subject in subjects.split(", "):
            written = {template.format(subject) for template in templates}
            assert sum(written <= part for part in parts) == 1, subject


@pytest.mark.parametrize("name, slack", [("vader", 0.0), ("textblob", 0.2)])
def test_openings_are_neutral(name, slack):
    """TextBlob has a few plain words in its list and gets some slack; VADER decides and gets none."""
    pytest.importorskip("vaderSentiment" if name == "vader" else "textblob")
    scored = {opening: rewards.REWARDS[name](opening) for part in openings() for opening in part}
    assert {o: s for o, s in scored.items() if abs(s) > slack} == {}


@pytest.mark.parametrize("name", sorted(rewards.REWARDS))
def test_rewards_know_good_from_bad(name):
    pytest.importorskip("vaderSentiment" if name == "vader" else "textblob")
    good, bad = (rewards.REWARDS[name](text) for text in ("It was wonderful, I love it.", "It was terrible and awful."))
    assert -1 <= bad < -0.4 < 0.4 < good <= 1
    assert rewards.REWARDS[name]("The table is made of wood.") == 0


def test_a_missing_package_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "textblob", None)
    with pytest.raises(UserError, match=r"needs textblob.*pip install 'mlxdpo\[demo\]'"):
        rewards.textblob("text")


def test_rank_hand_worked():
    """a: .9 against -.2. b: .4 apart, too little. c: only empty texts. The first of equal scores is taken."""
    samples = [
        ("a", [Continuation(" x", "length", 0.1), Continuation(" y", "stop", 0.9), Continuation(" z", "length", -0.2)]),
        ("b", [Continuation(" x", "length", 0.1), Continuation(" y", "length", 0.5)]),
        ("c", [Continuation("", "stop", 0.0)]),
        ("d", [Continuation(t, "length", s) for t, s in ((" 1", 0.0), (" 2", 1.0), (" 3", 0.0), (" 4", 1.0))]),
    ]
    ranked = best_against_worst(samples, {"seed": 3})
    assert [(r["prompt"], r["chosen"], r["rejected"]) for r in ranked.rows] == [
        ("a", " y", " z"),
        ("d", " 2", " 1"),
    ]
    assert ranked.rows[0] == {
        "prompt": "a",
        "chosen": " y",
        "rejected": " z",
        "score_chosen": 0.9,
        "score_rejected": -0.2,
        "finish_chosen": "stop",
        "finish_rejected": "length",
        "made": {"seed": 3},
    }
    assert ranked.left_out == {f"rewards less than {MIN_GAP} apart": 1, "no text was sampled": 1}


@given(st.lists(st.lists(st.tuples(st.sampled_from(["", "a", "b"]), st.floats(-1, 1)), max_size=5), max_size=6))
def test_rank_counts_every_prompt_once(raw):
    samples = [(str(i), [Continuation(t, "length", s) for t, s in group]) for i, group in enumerate(raw)]
    ranked = best_against_worst(samples, {})
    assert len(ranked.rows) + sum(ranked.left_out.values()) == len(samples)
    for row in ranked.rows:
        scores = [s.score for s in samples[int(row["prompt"])][1] if s.text]
        assert row["score_chosen"] == max(scores) and row["score_rejected"] == min(scores)
        assert row["score_chosen"] - row["score_rejected"] >= MIN_GAP


@pytest.mark.parametrize("name, least, part", [("pairs.jsonl", 200, "train"), ("heldout.jsonl", 64, "heldout")])
def test_shipped_pairs(name, least, part):
    found, allowed = rows(name), set(getattr(openings(), part))
    assert len(found) >= least
    assert len({row["prompt"] for row in found}) == len(found), "one pair per opening"
    assert {row["prompt"] for row in found} <= allowed
    assert (FOLDER / name).stat().st_size < 300_000
    for row in found:
        assert row["score_chosen"] - row["score_rejected"] >= MIN_GAP
        assert {row["finish_chosen"], row["finish_rejected"]} <= {"stop", "length"}
        assert row["made"] == demo_pairs.provenance(row["made"]["seed"])
        for text in (row["chosen"], row["rejected"]):
            assert text == text.rstrip() != "" and not any(mark in text for mark in ("\ufffd", "<|"))


def test_shipped_prompts_are_the_heldout_openings():
    assert [row["prompt"] for row in rows("prompts.jsonl")] == openings().heldout


@pytest.mark.parametrize("name", ["pairs.jsonl", "heldout.jsonl"])
def test_shipped_scores_are_vaders(name):
    pytest.importorskip("vaderSentiment")
    for row in rows(name):
        for side in ("chosen", "rejected"):
            assert round(rewards.vader(row["prompt"] + row[side]), 4) == row[f"score_{side}"]


@pytest.mark.real
def test_the_script_makes_the_shipped_pairs_again():
    """Other batches and other machines round differently, so one of eight openings may come out otherwise."""
    pytest.importorskip("vaderSentiment")
    shipped = {row["prompt"]: row for row in rows("pairs.jsonl")}
    some = list(shipped)[:: len(shipped) // 7][:8]
    made = best_against_worst(demo_pairs.sample_continuations(some, seed=0).items(), demo_pairs.provenance(0))
    assert sum(row == shipped[row["prompt"]] for row in made.rows) >= 7
