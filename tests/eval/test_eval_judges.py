"""Planted judges get what they deserve; verdicts are kept by content; no server or reward can pose as a verdict."""

import json
import math

import pytest
from planted_judges import Planted, always_first, answers, coin, good_and_bad, longest_wins, mumbles, oracle

from mlxdpo import UserError
from mlxdpo_eval.judged_answers import judge_answers, win_rate
from mlxdpo_eval.judges import AnswerPair, BothOrders, Question, Verdict, ask_both, open_judge
from mlxdpo_eval.judges.kept import cache_file
from mlxdpo_eval.judges.protocol import CERTAIN, invalid
from mlxdpo_eval.report.blocks import answers_headline


def judged(verdict, before, after):
    judge = Planted(verdict)
    return win_rate(judge, judge_answers(judge, before, after), before, after)


def test_a_judge_that_always_prefers_the_first_place_says_one_half_and_is_exposed():
    found = judged(always_first, *good_and_bad(40))
    assert (found.wins, found.ties, found.losses, found.rate) == (0, 40, 0, 0.5)
    assert found.position.bias == 2.0 and found.position.first == 1.0 and found.position.consistent == 0.0
    assert found.position.p < 1e-9


def test_a_place_drops_out_of_the_average_of_logits_exactly():
    # the judge's own preference is log 3 (75 %), its place is worth 2 logits more
    (both,) = ask_both(
        Planted(lambda q: Verdict(2.0 + (math.log(3) if q.first == "good" else -math.log(3)))),
        [AnswerPair("p", "bad", "good")],
    )
    assert both.logit == pytest.approx(math.log(3))


def test_an_oracle_says_one_and_a_coin_one_half():
    before, after = good_and_bad(400)
    assert judged(oracle, before, after).rate == 1.0
    thrown = judged(coin, before, after)
    assert thrown.interval.low < 0.5 < thrown.interval.high and abs(thrown.rate - 0.5) < 0.06
    assert thrown.position.consistent < 0.6


def test_unparsable_verdicts_are_left_out_bounded_and_counted_by_reason():
    before, after = good_and_bad(50)
    found = judged(mumbles, before, after)
    assert found.reasons == {"the answer is not a label": 10} and found.invalid_share == 0.2
    assert (found.n, found.asked, found.answered, found.invalid, found.equal) == (50, 50, 40, 10, 0)
    assert (found.wins, found.ties, found.losses, found.rate) == (40, 0, 0, 1.0)
    assert (found.worst, found.best) == (0.8, 1.0)


def test_a_judge_of_length_is_exposed_by_length_control_and_report_card():
    before = answers([f"{i:03d}" + "x" * (10 + i % 7) for i in range(120)])
    after = answers([f"{i:03d}" + "y" * (12 + (3 * i) % 11) for i in range(120)])
    found = judged(longest_wins, before, after)
    assert found.rate > 0.6 and found.interval.low > 0.5
    assert found.longer.prefers_longer == 1.0
    assert found.controlled.interval.low < 0.5 < found.controlled.interval.high


def test_nobody_is_asked_about_equal_answers_and_no_rate_counts_them():
    judge, same = Planted(oracle), answers(["one", "two"])
    found = win_rate(judge, judge_answers(judge, same, same), same, same)
    assert judge.asked == [] and (found.equal, found.asked, found.ties, found.rate) == (2, 0, 0, None)
    assert (found.overall, found.overall_interval) == (0.5, None)
    assert answers_headline(found, 0.1).verdict == "no difference shown" and not found.failed(0.1)


def nine_of(verdict, equal=95):
    """The win rate of 9 pairs whose answers differ, beside `equal` ones whose answers do not."""
    before, after = good_and_bad(9)
    same = [f"same {i}" for i in range(equal)]
    return judged(verdict, answers(before.texts + same), answers(after.texts + same))


def test_equal_answers_dilute_neither_what_was_won_nor_what_failed():
    won = nine_of(oracle)
    assert (won.n, won.asked, won.answered, won.invalid, won.equal) == (104, 9, 9, 0, 95)
    assert won._replace(n=9, equal=0, overall=None, overall_interval=None) == nine_of(oracle, 0)._replace(
        overall=None, overall_interval=None
    )
    assert won.rate == 1.0 and won.prompts == 9 and won.overall == pytest.approx((9 + 95 / 2) / 104)
    said = answers_headline(won, 0.1)
    assert said.verdict == "better" and "100.0 % of the 9 pairs it judged" in said.sentence
    assert "95 of 104 pairs of answers are identical" in said.sentence


def test_a_judge_that_never_answers_gives_no_verdict():
    """9 of 104 are less than one in ten, 9 of the 9 that were asked about are all."""
    found = nine_of(lambda question: invalid("HTTP 404"))
    assert (found.asked, found.answered, found.invalid, found.invalid_share) == (9, 0, 9, 1.0)
    for allowed in (0.1, 1.0):
        said = answers_headline(found, allowed)
        assert found.failed(allowed) and said.verdict == "no verdict"
        assert "asked about 9 pairs of answers, 0 were answered and 9 are invalid (9 HTTP 404)" in said.sentence


@pytest.mark.parametrize("broken, failed", [(0, False), (1, False), (2, True), (10, True)])
def test_too_many_invalid_verdicts_are_no_verdict(broken, failed):
    found = judged(lambda q: invalid("odd") if int(q.prompt[1:]) < broken else oracle(q), *good_and_bad(10))
    assert found.failed(0.1) is failed and (answers_headline(found, 0.1).verdict == "no verdict") is failed


def test_one_invalid_order_makes_the_pair_invalid():
    judge = Planted(lambda q: invalid("odd") if q.first == "good" else Verdict(1.0))
    assert ask_both(judge, [AnswerPair("p", "bad", "good")]) == [BothOrders(None, None, "odd")]


def test_verdicts_are_kept_by_content_whatever_the_order_of_the_questions(cache):
    judge = Planted(oracle, "kept", cached=True)
    pairs = [AnswerPair(f"p{i}", f"bad {i}", f"good {i}") for i in range(70)]
    first = ask_both(judge, pairs)
    assert len(judge.asked) == 140
    assert ask_both(judge, pairs[::-1]) == first[::-1] and len(judge.asked) == 140
    ask_both(judge, [AnswerPair("p0", "bad 0", "good 1")])  # another answer is another question
    assert len(judge.asked) == 142
    other = Planted(oracle, "other", cached=True)
    ask_both(other, pairs[:1])  # another judge keeps its own
    assert len(other.asked) == 2 and cache_file(judge.identity) != cache_file(other.identity)


def test_failures_are_not_kept(cache):
    judge = Planted(lambda q: invalid("timeout"), "down", cached=True)
    trio = [AnswerPair("p", "a", "b")]
    assert ask_both(judge, trio) == ask_both(judge, trio) == [BothOrders(None, None, "timeout")]
    assert len(judge.asked) == 4


ONE = [Question("prompt {x}", "first", "second")]


def test_an_unknown_judge_lists_the_known_ones():
    with pytest.raises(UserError, match=r"--judge fairness: no such judge; known: local:\.\.\., .*mine"):
        open_judge("fairness", {"mine": lambda p, a: 0.0})


def test_a_reward_of_ones_own_and_what_it_cannot_score(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("def words(prompt, answer):\n    return len(answer.split())\ndef broken(p, a):\n    return 1 / 0\n")
    judge = open_judge(f"{file}:words")
    assert judge.ask([Question("p", "a b", "a"), Question("p", "a", "b")]) == [Verdict(CERTAIN), Verdict(0.0)]
    assert judge.scores(["p"], ["a b c"]) == [3.0]
    assert open_judge(f"{file}:broken").ask(ONE) == [invalid("the reward raised ZeroDivisionError")]
    with pytest.raises(UserError, match="no such function; it has words, broken"):
        open_judge(f"{file}:missing")


def test_votes_are_found_whichever_side_the_answers_were_on(tmp_path):
    file = tmp_path / "votes.jsonl"
    votes = [("p", "x", "y", "a"), ("p", "y", "x", "b"), ("p", "x", "z", "tie"), ("q", "x", "y", "both_bad")]
    file.write_text(
        "".join(json.dumps(dict(zip(("prompt", "a", "b", "winner"), v, strict=True))) + "\n" for v in votes)
    )
    judge = open_judge(f"votes:{file}")
    asked = [Question("p", "y", "x"), Question("p", "z", "x"), Question("q", "y", "x"), Question("r", "x", "y")]
    assert judge.ask(asked) == [Verdict(-CERTAIN), Verdict(0.0), Verdict(0.0), Verdict(None, "no vote", absent=True)]
    file.write_text('{"prompt": "p", "a": "x", "b": "y", "winner": "c"}\n')
    with pytest.raises(UserError, match=r"votes\.jsonl:1: .*not one of a, b, tie, both_bad; none of the 1 lines"):
        open_judge(f"votes:{file}")


def test_pairs_without_a_vote_are_no_failure():
    before, after = good_and_bad(60)
    human = Planted(lambda q: oracle(q) if int(q.prompt[1:]) < 30 else Verdict(None, "no vote", absent=True))
    alone = win_rate(human, judge_answers(human, before, after), before, after)
    assert (alone.asked, alone.absent, alone.invalid_share, alone.rate) == (30, 30, 0.0, 1.0)
    nobody = Planted(lambda q: Verdict(None, "no vote", absent=True))
    none = win_rate(nobody, judge_answers(nobody, before, after), before, after)
    assert answers_headline(none, 0.1).verdict == "no verdict" and none.failed(0.1)
