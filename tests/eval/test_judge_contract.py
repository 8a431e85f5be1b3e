"""What every kind of judge must do, whoever wrote it. The tests walk the registry: a kind without a specimen fails."""

import json
import math

import pytest
from judge_specimens import ASKED, SPECIMENS, specimen

import mlxdpo_eval.judges as judges
from mlxdpo import UserError
from mlxdpo_eval.judges import JUDGES, AnswerPair, ask_both, open_judge
from mlxdpo_eval.judges.protocol import Verdict


def test_every_kind_of_judge_has_a_specimen():
    assert set(SPECIMENS) == set(JUDGES)


@pytest.mark.parametrize("kind", JUDGES)
def test_every_kind_is_in_the_list_that_users_read(kind):
    assert f"    {kind}:" in judges.__doc__


@pytest.fixture(params=list(JUDGES))
def opened(request, tmp_path, cache):
    """A judge of each kind, and its specimen."""
    with specimen(request.param, tmp_path) as found:
        yield open_judge(found.spec), found


def test_one_verdict_for_each_question_in_order(opened):
    judge, _ = opened
    there = judge.ask(ASKED)
    assert [type(verdict) for verdict in there] == [Verdict] * len(ASKED) and judge.ask([]) == []
    for verdict in there:  # a verdict is a finite logit, or a reason
        assert (verdict.logit is None) == bool(verdict.reason)
        assert verdict.logit is None or math.isfinite(verdict.logit)
    for one, other in zip(there, judge.ask(ASKED[::-1])[::-1], strict=True):
        assert one._replace(logit=None) == other._replace(logit=None)
        assert one.logit is None or other.logit == pytest.approx(one.logit, abs=1e-4)


def test_the_better_answer_wins_in_either_order(opened):
    judge, found = opened
    if found.better:
        prompt, better, worse = ASKED[0]
        assert better == found.better
        (both,) = ask_both(judge, [AnswerPair(prompt, worse, better)])
        assert both.logit > 1


def test_what_it_is_can_be_written_down_and_is_the_same_when_opened_again(opened):
    judge, found = opened
    assert judge.name and isinstance(judge.cached, bool)
    assert json.dumps(dict(judge.identity)) == json.dumps(dict(open_judge(found.spec).identity))


def test_what_it_cannot_use_is_one_sentence(opened):
    _, found = opened
    with pytest.raises(UserError) as error:
        open_judge(found.refused)
    assert str(error.value) and "\n" not in str(error.value)
