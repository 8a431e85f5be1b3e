"""Human votes: every line is read or counted, the running verdict may be looked at, judges are held against people."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from planted_judges import Planted, coin, good_and_bad, oracle

from mlxdpo import Message, Run, UserError, prompt_name
from mlxdpo_eval.judge_quality import human_agreement
from mlxdpo_eval.judged_answers import judge_answers
from mlxdpo_eval.judges.votes import read_ballots
from mlxdpo_eval.metrics.sequential import anytime_interval, log_e_value, votes_needed
from mlxdpo_eval.report.blocks import roughly, votes_headline
from mlxdpo_eval.voting import vote_run


def vote(prompt="p", winner="a", tuned="a", a="x", b="y", **more):
    """A line as the app writes it."""
    messages = [{"role": "user", "content": prompt}]
    return {
        "prompt": messages,
        "response_a": a,
        "response_b": b,
        "winner": winner,
        "tuned": tuned,
        "blind": True,
    } | more


def written(tmp_path, lines):
    """A file of votes; a line that is text stands as it is."""
    file = tmp_path / "votes.jsonl"
    file.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    return file


def test_every_line_is_a_vote_or_counted_under_its_reason(tmp_path):
    lines = [
        vote(),
        "{torn",
        "[]",
        vote(winner="left"),
        vote(blind=False),
        vote(tuned="c"),
        vote(a=None),
        vote() | {"prompt": 3},
        {"prompt": "q", "a": "x", "b": "y", "winner": "tie"},
        "",
    ]
    ballots = read_ballots(written(tmp_path, lines))
    assert [(v.prompt, v.winner, v.tuned, v.for_tuned) for v in ballots.votes] == [
        ("p", "a", "a", 1),
        ("q", "tie", None, None),
    ]
    assert sum(ballots.left_out.values()) == 7 and len(ballots.left_out) == 7
    assert ballots.first["a vote that was not blind"] == "votes.jsonl:5"
    assert ballots.votes[0].prompt_id == prompt_name("p")  # one user turn is that text


def test_a_last_line_without_an_end_is_read_where_it_is_whole(tmp_path):
    file = tmp_path / "votes.jsonl"
    file.write_text(json.dumps(vote()) + "\n" + json.dumps(vote("q")))
    assert len(read_ballots(file).votes) == 2
    file.write_text(json.dumps(vote()) + "\n" + json.dumps(vote("q"))[:-5])
    assert read_ballots(file).left_out == {"a line that is not JSON": 1}


def test_a_file_without_a_vote_is_an_error_and_an_empty_one_is_not(tmp_path):
    with pytest.raises(UserError, match="none of the 2 lines is a vote"):
        read_ballots(written(tmp_path, ["{}", "3"]))
    with pytest.raises(UserError, match=r"none\.jsonl: no such file of votes"):
        read_ballots(tmp_path / "none.jsonl")
    assert vote_run(read_ballots(written(tmp_path, []))).n == 0


def test_the_side_does_not_matter_and_every_look_is_the_running_vote(tmp_path):
    won = [True, False, True, True, True, False, True, True]
    sides = ["a", "b"] * 4
    lines = [
        vote(f"p{i}", side if w else "ab".replace(side, ""), side)
        for i, (w, side) in enumerate(zip(won, sides, strict=True))
    ]
    found = vote_run(read_ballots(written(tmp_path, lines)))
    assert (found.n, found.wins, found.losses, found.ties) == (8, 6, 2, 0)
    for n, look in enumerate(found.looks, 1):
        counts = sum(won[:n]), n - sum(won[:n])
        assert (look.n, look.low, look.high) == (n, *anytime_interval(*counts))
        assert look.e_value == pytest.approx(np.exp(log_e_value(*counts)))
    assert found.decided_at is None and found.needed == votes_needed(6, 2) > 0
    assert f"at this rate about {roughly(found.needed)} more votes would decide" in votes_headline(found).sentence
    assert [roughly(n) for n in (7, 84, 19976)] == ["7", "84", "20,000"]


def test_a_decision_stands_whatever_follows(tmp_path):
    lines = [vote(f"p{i}") for i in range(12)] + [vote(f"q{i}", "b") for i in range(12)]
    found = vote_run(read_ballots(written(tmp_path, lines)))
    assert found.looks[-1].rate == 0.5 and found.e_value < 1
    # 2^n / (n + 1) reaches 20 at n = 8: 256 / 9
    assert (found.decided_at, found.verdict, found.needed) == (8, "better", 0)
    assert votes_headline(found).sentence.endswith("decided at vote 8.")
    lost = vote_run(read_ballots(written(tmp_path, [vote(f"p{i}", "b") for i in range(12)])))
    assert (lost.verdict, votes_headline(lost).verdict) == ("worse", "worse")


def test_only_the_first_vote_on_a_prompt_is_evidence_and_the_rest_is_counted(tmp_path):
    lines = [vote("p", "both_bad"), vote("p", a="other"), vote("q", tuned=None), vote("r", "tie")]
    found = vote_run(read_ballots(written(tmp_path, lines)))
    assert (found.n, found.ties, found.both_bad) == (2, 2, 1)
    assert list(found.uncounted.values()) == [1, 1] and "not the first vote on its prompt" in found.uncounted


def test_looking_after_every_vote_calls_nothing_more_often_than_one_time_in_twenty(tmp_path):
    rng = np.random.default_rng(0)
    called = 0
    for _ in range(40):
        lines = [vote(f"p{i}", "ab"[int(rng.integers(2))]) for i in range(60)]
        called += vote_run(read_ballots(written(tmp_path, lines))).decided_at is not None
    assert called <= 2


def people(tmp_path, count, good=1.0):
    """Votes on the answers of `good_and_bad`: the good one wins, its side changes."""
    rng, lines = np.random.default_rng(1), []
    for i, (old, new) in enumerate(zip(*(side.texts for side in good_and_bad(count)), strict=True)):
        tuned = "ab"[i % 2]
        right = rng.random() < good
        a, b = (new, old) if tuned == "a" else (old, new)
        lines.append(vote(f"p{i}", tuned if right else "ab".replace(tuned, ""), tuned, a, b))
    return read_ballots(written(tmp_path, lines))


def test_judges_are_asked_about_the_pairs_that_people_voted_on(tmp_path):
    before, after = good_and_bad(60)
    names = [prompt_name(p) for p in before.prompts]
    before = before._replace(names=names)
    ballots = people(tmp_path, 30)
    right = human_agreement(Planted(oracle), judge_answers(Planted(oracle), before, after), before, ballots)
    assert (right.agreement.n, right.agreement.raw, right.corrected, right.unjudged) == (30, 1.0, 30, 0)
    thrown = human_agreement(
        Planted(coin), judge_answers(Planted(coin), before, after), before, people(tmp_path, 30, 0.8)
    )
    assert thrown.agreement.raw < 0.8
    assert abs(thrown.debiased.estimate.estimate - 0.8) < 0.2  # the votes correct a judge that knows nothing
    elsewhere = before._replace(names=[f"other {i}" for i in range(60)])
    other = human_agreement(Planted(oracle), judge_answers(Planted(oracle), before, after), elsewhere, ballots)
    assert (other.agreement.n, other.corrected, other.debiased) == (30, 0, None)


def test_votes_on_another_adapter_or_on_training_prompts_are_no_evidence(tmp_path):
    lines = [
        vote("p", adapter={"before": None, "after": "mine"}),
        vote("q", adapter={"before": None, "after": "step-000200"}),
        vote("r", source="train"),
        vote("r"),  # the same prompt, chosen as one's own
        vote("s", source="own"),
    ]
    ballots = read_ballots(written(tmp_path, lines))
    found = vote_run(ballots, "mine")
    assert found.n == 2 and found.uncounted == {
        "the tuned answer is of another adapter or checkpoint": 1,
        "on a prompt of the training data": 2,
    }
    assert vote_run(ballots).n == 3


def test_what_the_app_writes_is_read(tmp_path):
    """The record of mlxdpo.ui.vote.tab, through its own writer, with every winner and both sides."""
    votes = pytest.importorskip("mlxdpo.ui.vote.tab", reason="the app's votes are not part of this installation")
    from mlxdpo.ui.compare.answers import Answer, Settings
    from mlxdpo.ui.vote.blind_round import Round, models_of

    (tmp_path / "run").mkdir()
    run = Run(tmp_path / "run")
    cast = SimpleNamespace(
        policy=SimpleNamespace(identity={"digest": "base"}),
        before=SimpleNamespace(digest=None),
        after=SimpleNamespace(digest="mine"),
    )
    turns = (Message("system", "be brief"), Message("user", "why?"))
    rounds = [("p0", "a", "a"), ("p1", "b", "a"), (turns, "a", "tie"), ("p3", "b", "both_bad")]
    for i, (prompt, tuned, winner) in enumerate(rounds):
        before, after = (Answer(name, [1], finish="stop", text=f"{name} {i}") for name in ("before", "after"))
        game = Round(f"{i}", "run", "heldout", prompt, before, after, tuned, Settings(), 0.0, models_of(cast))
        votes.append_vote(run, votes.record(game, winner, "session"))
    ballots = read_ballots(run.path / votes.FILE)
    assert ballots.left_out == {} and [v.for_tuned for v in ballots.votes] == [1, -1, 0, 0]
    assert [v.a for v in ballots.votes] == ["after 0", "before 1", "after 2", "before 3"]
    assert ballots.votes[2].prompt_id == prompt_name(turns) and "system: be brief" in ballots.votes[2].prompt
    found = vote_run(ballots, "mine")
    assert (found.n, found.wins, found.losses, found.ties, found.both_bad, found.uncounted) == (4, 1, 1, 2, 1, {})
    assert vote_run(ballots, "other").n == 0
