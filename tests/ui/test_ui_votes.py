"""Blind votes: balanced sides, nothing that tells them apart, durable lines, honest pairs for the next round."""

import json
import shlex
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
from tiny_desk import SHORT, desk_over, finished_run

from mlxdpo.cli import run as cli
from mlxdpo.config import load_config
from mlxdpo.data.read import prompt_key
from mlxdpo.inference.run_prompts import gallery
from mlxdpo.io.json_file import read_lines
from mlxdpo.online.votes_to_pairs import export_votes, pairs_of
from mlxdpo.runs import Run
from mlxdpo.types import UserError
from mlxdpo.ui.vote.blind_round import Round, blind_html, judged, pick_prompt, play, revealed_html
from mlxdpo.ui.vote.tab import FILE, append_vote, asked, record, standing, standing_html
from mlxdpo_eval.judges.votes import problem_with, read_ballots

pytest.importorskip("gradio", reason="the app's tests need gradio: pip install 'mlxdpo[app]'")

from mlxdpo.ui.vote.tab import cast_vote, voted


@pytest.fixture
def place(tmp_path, cache):
    finished_run(tmp_path, lora={"keys": ["self_attn.q_proj", "mlp.down_proj"], "dropout": 0.1})
    return tmp_path


@pytest.fixture
def desk(place):
    return desk_over(place)


def one_round(desk, prompt="q3 red the:", source="own", settings=SHORT) -> Round:
    *shares, game = play(desk, desk.load("one"), prompt, source, settings)
    assert all(0 <= share < 1 for share in shares)
    return game


def test_sides_are_balanced_over_400_votes(desk, monkeypatch):
    """A fair coin: |heads - 200| > 50 of 400 has probability 6e-7. The answers are drawn once."""
    game = one_round(desk)
    answers = (game.before, game.after)
    monkeypatch.setattr("mlxdpo.ui.vote.blind_round.answer_together", lambda *args, **kw: iter([answers]))
    sides = [one_round(desk).tuned for _ in range(400)]
    assert abs(sides.count("a") - 200) <= 50 and len({one_round(desk).id for _ in range(20)}) == 20


def test_the_page_before_the_vote_is_a_function_of_the_two_texts(desk):
    """The same texts on the same sides give the same bytes, whichever of them is the tuned model's."""
    game = one_round(desk)
    other = replace(game, tuned="b" if game.tuned == "a" else "a", before=game.after, after=game.before)
    assert blind_html(game) == blind_html(other) and revealed_html(seen(game)) != revealed_html(seen(other))
    slower = replace(game.before, seconds=99.0, finish="stop", variant="x")
    assert blind_html(game) == blind_html(replace(game, before=slower))


def seen(game: Round) -> Round:
    return replace(game, winner="a", scores=(None, None))


def test_a_vote_is_on_disk_once_and_readable_by_the_evaluation(desk, place):
    game = one_round(desk)
    done = cast_vote(desk, game, "a", "session")
    assert done.winner == "a" and all(score is not None for score in judged(desk, done).scores)
    for again in (game, done):
        with pytest.raises(UserError, match="already has a vote"):
            cast_vote(desk, again, "b", "session")
    with pytest.raises(UserError, match="is not a vote"):
        cast_vote(desk, one_round(desk), "'; --", "session")
    (line,) = read_lines(place / "runs/one" / FILE)
    assert (line["a"], line["b"]) == (game.side("a").text, game.side("b").text) and line["tuned"] == game.tuned
    (vote,) = read_ballots(place / "runs/one" / FILE).votes
    assert vote.for_tuned == (1 if game.tuned == "a" else -1) and vote.prompt == "q3 red the:"


def test_a_vote_is_said_to_be_saved_before_the_model_is_asked_and_a_second_one_changes_nothing(
    desk, place, monkeypatch
):
    game = one_round(desk)
    monkeypatch.setattr(desk.engine, "call", lambda function: pytest.fail("the MLX thread was asked first"))
    steps = voted(desk, game, "b", "s")
    done, board, standing, words = next(steps)
    assert done.winner == "b" and "after tuning" in board and "1 vote" in standing and "saved: B is better" in words
    assert [line["winner"] for line in read_lines(place / "runs/one" / FILE)] == ["b"]
    for twice in (game, done):  # two clicks at once carry the same round
        ((kept, *_, words),) = voted(desk, twice, "a", "s")
        assert kept.winner == "b" and "saved: B is better" in words
    monkeypatch.undo()
    scored, board, *_ = next(steps)
    assert all(scored.scores) and 'class="tok"' in board and len(list(read_lines(place / "runs/one" / FILE))) == 1


def test_a_vote_that_cannot_be_written_can_be_repeated(desk, place, monkeypatch):
    game = one_round(desk)
    (place / "runs/one/config.yaml").rename(place / "kept")
    ((same, *_, words),) = voted(desk, game, "a", "s")
    assert same is game and not same.winner and 'role="alert"' in words
    (place / "kept").rename(place / "runs/one/config.yaml")
    assert next(voted(desk, same, "a", "s"))[0].winner == "a"


def test_there_is_nothing_to_vote_on_before_the_round(desk):
    with pytest.raises(UserError, match="press “Next pair” first"):
        cast_vote(desk, None, "a", "session")


def test_a_stopped_round_is_no_round(desk):
    with pytest.raises(UserError, match="stopped before both answers"):
        list(play(desk, desk.load("one"), "q3:", "own", SHORT, stopped=lambda: True))


def test_equal_answers_are_drawn_again_and_given_up_on(desk, monkeypatch):
    game = one_round(desk)
    drawn = []

    def same(cast, voices, prompts, settings, **kw):
        drawn.append(settings.seed)
        yield (game.before, game.before)

    monkeypatch.setattr("mlxdpo.ui.vote.blind_round.answer_together", same)
    with pytest.raises(UserError, match="gave the same answer 5 times"):
        one_round(desk)
    assert drawn == [3, 4, 5, 6, 7]


def test_prompts_come_in_turn_and_from_the_right_side(place):
    found = gallery(Run.open(place / "runs/one"))
    assert found.heldout and found.train and not found.note
    assert {prompt_key(r.prompt) for r in found.train}.isdisjoint(found.heldout_keys)
    assert pick_prompt(found, "heldout", "", 1) == found.heldout[1].prompt
    assert pick_prompt(found, "train", "", len(found.train)) == found.train[0].prompt
    with pytest.raises(UserError, match="write a prompt first"):
        pick_prompt(found, "own", " ", 0)


def test_a_run_whose_data_moved_says_so(place):
    (place / "pairs.jsonl").rename(place / "elsewhere.jsonl")
    found = gallery(Run.open(place / "runs/one"))
    assert found.heldout == () and "its data.path no longer exists: the run was made in" in found.note
    with pytest.raises(UserError, match="write your own instead"):
        pick_prompt(found, "heldout", "", 0)


def vote(prompt, a, b, winner, **more):
    return {"prompt": prompt, "a": a, "b": b, "winner": winner, "tuned": "a", **more}


def test_every_vote_is_a_pair_or_counted():
    """Nine votes: p twice (once from the other side), q cancelled, a tie, both bad, one held out, r. Two pairs."""
    votes = [
        vote("p", "x", "y", "a"),
        vote("p", "y", "x", "b"),
        vote("q", "x", "y", "a"),
        vote("q", "x", "y", "b"),
        vote("s", "x", "y", "tie"),
        vote("s", "x", "z", "both_bad"),
        vote("h", "x", "y", "a"),
        vote("r", "x", "y", "b"),
        vote(" r ", "x", "y", "b"),
    ]
    pairs, left_out = pairs_of(votes, frozenset({prompt_key("h")}), problem_with)
    assert [tuple(pair) for pair in pairs] == [("p", "x", "y"), ("r", "y", "x")]
    assert sorted(left_out.values()) == [1, 2, 2, 2] and len(pairs) + sum(left_out.values()) == len(votes)


def test_votes_train_the_next_round(desk, place, monkeypatch):
    monkeypatch.chdir(place)
    heldout = gallery(Run.open(place / "runs/one")).heldout[0].prompt
    for prompt, source in (("q50 blue:", "own"), ("q51 red:", "own"), (heldout, "heldout")):
        cast_vote(desk, one_round(desk, prompt, source), "a", "s")
    found = export_votes(Run.open(Path("runs/one")), problem_with)
    assert (found.pairs, found.votes) == (2, 3) and "1 on held-out prompts" in found.sentence()
    words = shlex.split(found.command)
    assert words[:2] == ["mlxdpo", "train"] and words[3:5] == ["--model.adapter", "runs/one/adapter"]
    recipe = load_config("runs/one/next-round/recipe.yaml")
    assert recipe.model.adapter == "runs/one/adapter" and recipe.lora.dropout == 0.1 and recipe.lora.scale == 20.0
    assert cli(words[1:]) == 0
    after = Run.open("runs/one-votes-1")
    assert after.manifest()["reference"]["adapter"] is not None and after.manifest()["data"]["pairs"] == 2
    kept = {prompt_key(row.prompt) for row in gallery(after).heldout}
    assert kept == gallery(Run.open("runs/one")).heldout_keys
    assert export_votes(Run.open(Path("runs/one")), problem_with).command.endswith("runs/one-votes-2")


def test_no_pair_no_file(desk, place):
    with pytest.raises(UserError, match="none of 0 votes gives a training pair"):
        export_votes(Run.open(place / "runs/one"), problem_with)
    assert not (place / "runs/one/next-round").exists()


def test_the_standing_grows_with_votes_and_leaves_training_prompts_out(tmp_path):
    file = tmp_path / FILE
    assert "No votes yet" in standing_html(file)
    lines = [vote(f"p{i}", "x", "y", "a") for i in range(30)] + [vote("t", "x", "y", "b", source="train")]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found, trained = standing(file)
    assert (found.n, found.wins, trained) == (30, 30, 1)
    assert "The tuned model is better (decided after" in standing_html(file)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines[:4]))
    assert "Cannot tell yet, about" in standing_html(file)


def test_asked_counts_by_source(place):
    run = Run.open(place / "runs/one")
    for i, source in enumerate(("own", "heldout", "heldout")):
        append_vote(run, {**vote("p", "x", "y", "a"), "id": str(i), "source": source})
    assert (asked(run, "heldout"), asked(run, "own"), asked(run, "train")) == (2, 1, 0)


WRITER = """
    import sys
    from pathlib import Path
    from mlxdpo.runs import Run
    from mlxdpo.ui.vote.tab import append_vote
    run = Run(Path(sys.argv[1]))
    for i in range(100000):
        line = {"id": f"{i}", "prompt": "p" * 3000, "a": "x", "b": "y", "winner": "a", "tuned": "a"}
        append_vote(run, line)
        print(i, flush=True)
"""


@pytest.mark.processes
@pytest.mark.parametrize("after", [3, 17])
def test_kill_minus_9_loses_no_vote_and_doubles_none(tmp_path, after):
    """What was reported as written is there once; a torn last line is cut off by the next vote."""
    code = [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path)]
    process = subprocess.Popen(code, stdout=subprocess.PIPE, text=True)
    told = [int(process.stdout.readline()) for _ in range(after)]
    process.send_signal(signal.SIGKILL)
    told += [int(line) for line in process.stdout.read().split("\n")[:-1]]
    process.wait()
    with (tmp_path / FILE).open("ab") as file:
        file.write(b'{"id": "torn", "pro')
    run = Run(tmp_path)
    with pytest.raises(UserError, match="already has a vote"):
        append_vote(run, {"id": str(told[-1]), "winner": "a"})
    append_vote(run, {**vote("p", "x", "y", "b"), "id": "last"})
    ids = [line["id"] for line in read_lines(tmp_path / FILE)]
    assert len(ids) == len(set(ids)) and {str(i) for i in told} <= set(ids) and ids[-1] == "last"
    assert len(ids) - 1 - len(told) in (0, 1)  # at most the one that was written but not yet reported
    assert len(read_ballots(tmp_path / FILE).votes) == len(ids)


def test_a_record_names_both_models(desk):
    game = one_round(desk)
    line = record(game, "tie", "s")
    assert line["adapter"]["before"] is None and len(line["adapter"]["after"]) == 64 and len(line["model"]) == 64
    assert line["sampling"] == game.settings.model_dump() and line["blind"] is True
