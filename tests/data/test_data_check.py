"""The doctor's numbers against sets small enough to count by hand, and the sentences made of them."""

import json

import pytest

from mlxdpo.config import DataConfig
from mlxdpo.data import reasons
from mlxdpo.data.check import LengthSpread, check_rows, finding_lines, length_spread
from mlxdpo.data.read import read_preferences
from mlxdpo.data.report import Report
from mlxdpo.types import Message, Preference, UnpairedExample


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([7], LengthSpread(7, 7, 7)),
        ([1, 9], LengthSpread(1, 9, 9)),
        ([3, 1, 2], LengthSpread(2, 3, 3)),
        (list(range(1, 101)), LengthSpread(50, 95, 100)),
        (list(range(20, 0, -1)), LengthSpread(10, 19, 20)),
    ],
)
def test_spread_is_the_nearest_rank(lengths, expected):
    assert length_spread(lengths) == expected


ROWS = [  # chosen longer, rejected longer, equal, chosen longer
    Preference("aaaa", "xxx", "y", "x:1"),
    Preference("aaaa", "xx", "yyyyy", "x:2"),
    Preference("bb", "x", "y", "x:3"),
    Preference((Message("user", "cc"), Message("tool", "c")), (Message("assistant", "xxxx"),), (), "x:4"),
]
REPORT = Report(
    read=8,
    kept=4,
    refused={reasons.DUPLICATE: 3, reasons.TIED: 1},
    first={reasons.DUPLICATE: "x:5: the same pair as in an earlier row", reasons.TIED: "x:8: both 4"},
    format="text",
)


def test_counts_shares_and_lengths_of_pairs():
    found = check_rows(ROWS, REPORT, "x.jsonl")
    assert (found.kind, found.read, found.kept, found.duplicates, found.ties) == ("pairs", 8, 4, 3, 1)
    assert (found.prompts, found.most_per_prompt) == (3, 2)
    assert found.characters == {
        "prompt": LengthSpread(3, 4, 4),
        "chosen": LengthSpread(2, 4, 4),
        "rejected": LengthSpread(1, 5, 5),
    }
    assert (found.unit, found.longer, found.always_longer) == ("characters", 2 / 4, 2.5 / 4)
    assert found.tokens is found.limit is found.over_limit is found.overlap is found.heldout is found.desirable is None


def test_token_lengths_decide_when_given():
    tokens = [(4, 1, 3), (4, 1, 3), (4, 1, 3), (4, 6, 3)]
    found = check_rows(ROWS, REPORT, "x.jsonl", tokens=tokens, limit=7)
    assert (found.unit, found.longer, found.always_longer, found.over_limit) == ("tokens", 1 / 4, 1 / 4, 1)
    assert found.tokens == {
        "prompt": LengthSpread(4, 4, 4),
        "chosen": LengthSpread(1, 6, 6),
        "rejected": LengthSpread(3, 3, 3),
    }


def test_sentences_of_pairs():
    tokens = [(4, 1, 3), (4, 1, 3), (4, 1, 3), (4, 6, 3)]
    heldout = [Preference("aaaa ", "q", "r", "y:1")]
    assert finding_lines(check_rows(ROWS, REPORT, "x.jsonl", heldout, tokens, 7)) == [
        "x.jsonl: 4 pairs from 8 rows, read as text (a prompt and two texts).",
        "Left out 3 rows that repeat earlier pairs (first: x:5: the same pair as in an earlier row).",
        "Left out 1 row whose answers are rated equal (first: x:8: both 4).",
        "3 distinct prompts, 1.33 pairs each on average, 2 at most.",
        "Characters (median / 95 % / longest): prompt 3 / 4 / 4, chosen 2 / 4 / 4, rejected 1 / 5 / 5.",
        "Tokens (median / 95 % / longest): prompt 4 / 4 / 4, chosen 1 / 6 / 6, rejected 3 / 3 / 3.",
        "1 of 4 pairs are longer than 7 tokens.",
        "The chosen completion is the longer one in 25% of the pairs (tokens); always choosing the shorter one is "
        "right in 75%, so an accuracy near that may reflect length alone.",
        "Also among the 1 held-out pairs: 1 of the prompts; held-out numbers will be too good, so take these prompts "
        "out of one side, or let data.eval_fraction split by prompt.",
    ]
    heldout = [Preference("other", "q", "r", "y:1")]
    assert (
        finding_lines(check_rows(ROWS, REPORT, "x", heldout))[-1]
        == "None of the prompts is among the 1 held-out pairs."
    )


def test_opinions_have_a_desirable_share_and_no_length_bias():
    rows = [
        UnpairedExample("a", "xx", True, "x:1"),
        UnpairedExample("b", "x", False, "x:2"),
        UnpairedExample("c", "x", True, "x:3"),
    ]
    found = check_rows(rows, Report(read=3, kept=3, format="unpaired"), "x.jsonl", tokens=[(1, 2)] * 3, limit=2)
    assert (found.kind, found.longer, found.always_longer, found.over_limit) == ("opinions", None, None, 3)
    assert found.desirable == 2 / 3
    assert finding_lines(found)[-1] == (
        "67% of the completions are desirable: 2 thumbs up and 1 down; with loss.desirable_weight 1 and "
        "undesirable_weight 1 they weigh 2.00 to 1; "
        "KTO's authors advise 1 to 1.5, as with loss.undesirable_weight 1.33."
    )


def test_demonstrations_have_no_thumbs_to_speak_of():
    found = check_rows(
        [UnpairedExample("a", "xx", True, "x:1")], Report(read=1, kept=1, format="completion"), "x.jsonl"
    )
    assert (found.kind, found.desirable) == ("demonstrations", None)
    assert finding_lines(found)[0].startswith("x.jsonl: 1 demonstration from 1 row") and "desirable" not in " ".join(
        finding_lines(found)
    )


def test_the_length_rule_that_is_right_more_often_is_named():
    for chosen, rejected, said in (
        ("xx", "y", "the longer one is right in 100%"),
        ("x", "yy", "shorter one is right in 100%"),
    ):
        found = check_rows([Preference("a", chosen, rejected, "x:1")], Report(read=1, kept=1), "x")
        assert said in finding_lines(found)[-1]


@pytest.mark.parametrize(
    ("held", "detectable", "said"),
    [
        (1, None, "1 prompt is held out: too few to show any effect; add data, or set data.eval to other prompts."),
        (30, 0.75, "30 prompts are held out: the smallest win rate distinguishable from 50% is 75% "
         "(power 0.8, level 0.05); a smaller effect needs more prompts or a larger data.eval_fraction."),
        (783, 0.55, "783 prompts are held out: the smallest win rate distinguishable from 50% is 55% "
         "(power 0.8, level 0.05)."),
    ],
)  # fmt: skip
def test_how_small_the_data_are_and_what_they_can_show(held, detectable, said):
    found = check_rows(ROWS, REPORT, "x", heldout_prompts=held, detectable=detectable)
    assert said in finding_lines(found)


def test_contradictions_and_inverted_scores_are_told_in_words(tmp_path):
    pairs = [
        {"prompt": f"p{n}", "chosen": "a", "rejected": "b", "score_chosen": 1, "score_rejected": 9} for n in (1, 2)
    ]
    pairs += [{"prompt": "p1", "chosen": "b", "rejected": "a"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    data = DataConfig(path=str(tmp_path / "a.jsonl"))
    lines = finding_lines(check_rows(*read_preferences(data), "a.jsonl"))
    assert (
        "2 rows whose scores say the opposite of their labels; the labels are trained on (first: a.jsonl:1)." in lines
    )
    assert (
        "1 row that prefers what an earlier row rejects; both are trained on and cancel out (first: a.jsonl:3)."
        in lines
    )
    swap = "--data.columns.chosen rejected --data.columns.rejected chosen"
    assert any(swap in line for line in lines)
    rows, report = read_preferences(data.model_copy(update={"columns": {"chosen": "rejected", "rejected": "chosen"}}))
    assert rows[0].chosen == "b" and reasons.INVERTED not in report.changed


def test_characters_count_calls_too():
    call = (Message("assistant", "", {"tool_calls": [1, 2]}),)
    found = check_rows([Preference((Message("user", "a"),), call, (Message("assistant", "b"),), "x:1")], Report(), "x")
    assert found.characters["chosen"].longest == len("[1, 2]")


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="no rows to examine"):
        check_rows([], Report(), "x")


def test_findings_of_a_file_as_json(tmp_path):
    pairs = [{"prompt": "p", "chosen": f"good {n}", "rejected": "bad"} for n in (1, 2, 2)]
    pairs[0] |= {"chosen": "bad", "rejected": "good 2"}
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    rows, report = read_preferences(DataConfig(path=str(tmp_path / "a.jsonl")))
    found = json.loads(json.dumps(check_rows(rows, report, "a.jsonl").as_dict(), allow_nan=False))
    assert found["refused"] == {reasons.DUPLICATE: 1}
    assert found["changed"] == {reasons.CONTRADICTION: 1}
    assert found["characters"]["prompt"] == {"median": 1, "p95": 1, "longest": 1}
