"""Pairs from a run's own answers: the same bytes again, interrupted or not; nothing left out uncounted."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_runs import copied, finish, recipe, stop_after
from tiny_words import WORDS, write_words

from mlxdpo.cli import run as cli
from mlxdpo.config import DataConfig, Drawing
from mlxdpo.data.read import prompt_key, read_pairs
from mlxdpo.io.digest import folder_digest
from mlxdpo.io.json_file import read_lines
from mlxdpo.online.collect import Ranker, collect, read_prompts, source_of
from mlxdpo.online.collect.rows import (
    BROKEN,
    CLOSE,
    EMPTY,
    FEW,
    REPEATED,
    RULES,
    SPECIAL,
    TIED,
    UNFINISHED,
    best_worst,
    every,
    fault,
    grams,
    jaccard,
    repeats,
    why_none,
)
from mlxdpo.runs import Run
from mlxdpo.types import UserError
from mlxdpo_eval.judges import Verdict
from mlxdpo_eval.judges.both import score_answers

HOW = {"samples": 4, "max_tokens": 6, "batch_size": 8, "unfinished": "keep"}  # chunks of 4 prompts
LENGTH = Ranker("length", {"kind": "test"}, lambda prompts, answers: [[float(len(a)) for a in own] for own in answers])


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    """A finished run of the model of words, trained once."""
    folder = tmp_path_factory.mktemp("once")
    write_words(folder / "llama")
    rows = [{"prompt": f"the {a}", "chosen": " runs", "rejected": f" {a} sleeps"} for a in WORDS[:8]]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLXDPO_CACHE", str(folder.with_name("once-cache")))
        finish(recipe(folder))
    return folder


@pytest.fixture
def place(once, tmp_path, cache, monkeypatch):
    """A copy of that run, and ten prompts, the last one twice."""
    copied(once, tmp_path)
    prompts = [f"the {a} {b}" for a in WORDS[:2] for b in WORDS[12:17]]
    lines = [json.dumps({"prompt": p}) for p in [*prompts, prompts[-1]]]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines) + "\n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def gathered(place, name, stop=lambda: False, ranker=LENGTH, **changes):
    """The events of a collection into `name`."""
    prompts = read_prompts(DataConfig(), str(place / "prompts.jsonl"))
    how = Drawing.model_validate(HOW | changes)
    return list(collect(source_of(Run.open(place / "run")), prompts, ranker, how, place / name, stop))


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(place):
    for name, seed in (("a.jsonl", 1), ("b.jsonl", 1), ("c.jsonl", 2)):
        gathered(place, name, seed=seed)
    a, b, c = ((place / f"{name}.jsonl").read_bytes() for name in "abc")
    assert a == b and a != c and len(a.splitlines()) >= 8


@pytest.mark.parametrize("calls", [0, 5, 17, 39])
def test_interrupted_is_straight(place, calls):
    gathered(place, "straight.jsonl")
    events = gathered(place, "broken.jsonl", stop_after(calls))
    assert events[-1].kind == "interrupted" and not (place / "broken.jsonl").exists()
    with (place / "broken.jsonl.partial").open("a") as file:
        file.write('{"prompt_id": "torn')  # a writer that was killed
    assert gathered(place, "broken.jsonl")[-1].kind == "done"
    for end in (".jsonl", ".samples.jsonl", ".report.json"):
        assert (place / f"broken{end}").read_bytes() == (place / f"straight{end}").read_bytes()


def test_a_chunk_of_which_half_was_written_is_filled_up(place):
    gathered(place, "straight.jsonl")
    gathered(place, "broken.jsonl", stop_after(17))
    partial = place / "broken.jsonl.partial"
    kept = partial.read_bytes().splitlines(keepends=True)[:3]  # the header and two of the four prompts
    partial.write_bytes(b"".join(kept))
    gathered(place, "broken.jsonl")
    assert (place / "broken.jsonl").read_bytes() == (place / "straight.jsonl").read_bytes()


def test_going_on_with_other_settings_is_refused_by_name(place):
    gathered(place, "p.jsonl", stop_after(17))
    with pytest.raises(UserError, match=r"started with a different drawing\.seed \(0 then, 5 now\)"):
        gathered(place, "p.jsonl", seed=5)
    other = Ranker("other", {}, LENGTH.score)
    with pytest.raises(UserError, match=r"started with a different judge\.name \(length then, other now"):
        gathered(place, "p.jsonl", ranker=other)
    gathered(place, "p.jsonl", pairs="all")  # which answers make pairs is decided at the end
    with pytest.raises(UserError, match="already exists"):
        gathered(place, "p.jsonl")


def test_every_answer_is_paired_or_counted(place):
    found = gathered(place, "p.jsonl", unfinished="drop", max_tokens=40, pairs="all")[-1].values["report"]
    answers = [a for line in list(read_lines(place / "p.samples.jsonl"))[1:] for a in line["answers"]]
    assert found["answers"] == len(answers) == 40 and found["prompts_left_out"] == {
        "the same prompt as in an earlier row": 1
    }
    left = sum(a["score"] is None for a in answers)
    assert sum(found["answers_left_out"].values()) == left and found["answers_left_out"][UNFINISHED] > 0
    usable = [a for a in answers if not a["left_out"]]
    assert all(a["finish"] == "stop" and a["score"] == len(a["text"]) for a in usable)
    rows = list(read_lines(place / "p.jsonl"))
    assert found["rows"] == len(rows) and all(r["gap"] == len(r["chosen"]) - len(r["rejected"]) > 0 for r in rows)


def test_an_answer_without_a_verdict_is_counted_not_ranked(place):
    def score(prompts, answers):
        """Nothing is known about answers with the word "the"."""
        return [[math.nan if " the" in a else float(len(a)) for a in own] for own in answers]

    found = gathered(place, "p.jsonl", ranker=Ranker("half", {}, score))[-1].values["report"]
    unknown = [a for line in list(read_lines(place / "p.samples.jsonl"))[1:] for a in line["answers"] if not a["score"]]
    assert found["answers_left_out"]["could not be judged"] == sum(" the" in a["text"] for a in unknown) > 0
    assert not any(" the" in r["chosen"] + r["rejected"] for r in read_lines(place / "p.jsonl"))


def test_rows_say_where_they_come_from(place):
    gathered(place, "p.jsonl", seed=7)
    for row in read_lines(place / "p.jsonl"):
        made = row["made"]
        assert made["run"] == "run" and made["adapter"] == folder_digest(place / "run" / "adapter")
        assert made["model"] == Run.open(place / "run").manifest()["model"]["digest"]
        assert made["template"] == Run.open(place / "run").manifest()["template"]
        assert (made["judge"], made["seed"], made["samples"], made["max_tokens"]) == ("length", 7, 4, 6)
        assert row["score_chosen"] == len(row["chosen"]) > row["score_rejected"] == len(row["rejected"])


def test_ranked_rows_are_the_same_pairs(place):
    gathered(place, "all.jsonl", pairs="all")
    gathered(place, "ranked.jsonl", pairs="ranked")
    pairs = [read_pairs(DataConfig(path=str(place / f"{name}.jsonl")))[0] for name in ("all", "ranked")]
    sets = [{(p.prompt, p.chosen, p.rejected) for p in some} for some in pairs]
    assert sets[0] == sets[1] and len(sets[0]) == len(pairs[0])


def test_the_command_s_file_is_checked_and_trains_unedited(place, capsys):
    words = ["collect", "run", "--prompts", "prompts.jsonl", "--samples", "4", "--max-tokens", "6", "--out", "p.jsonl"]
    assert cli([*words, "--reward", "longest", "--unfinished", "keep"]) == 0, capsys.readouterr().err
    assert "1 the same prompt as in an earlier row" in capsys.readouterr().out
    assert cli(["data", "check", "p.jsonl", "--model", "llama"]) == 0
    assert cli(["train", "--model", "llama", "--data", "p.jsonl", "--data.template", "plain", "--out", "next"]) == 0
    assert cli([*words, "--reward", "longest"]) == 2 and "already exists" in capsys.readouterr().err


MISTAKES = {
    "collect run --prompts prompts.jsonl --out p.jsonl": "name a judge to rank",
    "collect run --prompts prompts.jsonl --out p.jsonl --judge longest --reward longest": "name a judge to rank",
    "collect run --out p.jsonl --judge longest": "no prompts given",
    "collect run --prompts prompts.jsonl --out p.jsonl --judge best": "no such judge",
    "collect run --prompts prompts.jsonl --out p.jsonl --judge longest --pairs margin": "needs a margin above 0",
    "collect run --prompts nope.jsonl --out p.jsonl --judge longest": "nope.jsonl: no such file",
    "collect run --prompts prompts.jsonl --out p.jsonl --judge votes:v.jsonl": "samples nothing",
    "collect run --out p.jsonl --judge votes:v.jsonl": "v.jsonl: no such file of votes",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_mistakes_are_one_sentence(line, place, capsys):
    assert cli(line.split()) == 2
    assert MISTAKES[line] in capsys.readouterr().err and not list(place.glob("p.*"))


def test_votes_become_pairs_without_an_edit(place):
    vote = {"prompt": "the cat", "a": " runs", "b": " sleeps", "tuned": "a", "blind": True}
    lines = [vote | {"winner": "a"}, vote | {"winner": "tie"}, vote | {"prompt": "a dog", "winner": "b"}]
    (place / "v.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert cli(["collect", "run", "--judge", "votes:v.jsonl", "--out", "p.jsonl"]) == 0
    rows = [(r["prompt"], r["chosen"], r["rejected"]) for r in read_lines(place / "p.jsonl")]
    assert rows == [("the cat", " runs", " sleeps"), ("a dog", " sleeps", " runs")]
    report = json.loads((place / "p.report.json").read_text())
    assert report["answers_left_out"] == {"votes without a winner (equally good, or both bad)": 1}


def test_rules_by_hand():
    scores = [0.25, 1.0, -0.5, 1.0, 0.0]
    assert best_worst(scores, 0.0) == [(1, 2)]
    assert every(scores, 0.0) == [(1, 0), (1, 4), (1, 2), (3, 0), (3, 4), (3, 2), (0, 4), (0, 2), (4, 2)]
    assert RULES["margin"](scores, 1.0) == [(1, 4), (1, 2), (3, 4), (3, 2)]  # 1.0 is enough, 0.75 is not
    assert best_worst(scores, 1.6) == [] and best_worst([0.5, 0.5], 0.0) == []
    assert [why_none(s, m) for s, m in (([1.0], 0), ([1.0, 1.0], 0.5), ([1.0, 0.8], 0.5))] == [FEW, TIED, CLOSE]


@given(st.lists(st.integers(-3, 3).map(float), min_size=2, max_size=6), st.sampled_from([0.0, 1.0, 2.5]))
def test_rules_keep_what_they_promise(scores, margin):
    pairs = every(scores, margin)
    apart = {(a, b) for a in range(len(scores)) for b in range(len(scores)) if scores[a] > scores[b]}
    assert set(pairs) == {(a, b) for a, b in apart if scores[a] - scores[b] >= margin} and len(set(pairs)) == len(pairs)
    assert set(best_worst(scores, margin)) <= set(pairs) and bool(best_worst(scores, margin)) == bool(pairs)


def test_screening_by_hand():
    whole = {"tokens": [5], "ended": True, "keep_unfinished": False, "special": {0}}
    assert fault("fine", **whole) == "" and fault(" \n", **whole) == EMPTY
    assert fault("fine", **whole | {"ended": False}) == UNFINISHED
    assert fault("fine", **whole | {"ended": False, "keep_unfinished": True}) == ""
    assert fault("caf\N{REPLACEMENT CHARACTER}", **whole) == BROKEN and fault("x", **whole | {"tokens": [0]}) == SPECIAL
    # Ten words are 8 triples; one word more is 9, 8 of them shared: 8/9.
    ten = "one two three four five six seven eight nine ten"
    assert jaccard(grams(ten), grams(f"{ten} eleven")) == 8 / 9
    texts = [ten, f"{ten} eleven", "ONE, two; three four five six seven eight nine ten!", "ok", "Ok.", ":)", ":("]
    assert repeats(texts, [""] * 7, 0.9) == ["", "", REPEATED, "", REPEATED, "", ""]
    assert repeats(texts[:2], ["", ""], 0.8) == ["", REPEATED]
    assert repeats(["a", "a"], [UNFINISHED, ""], 0.9) == [UNFINISHED, ""]  # what is out already repeats nothing


class Places:
    """A judge that is sure by length, and adds two logits for the first place."""

    name, identity, cached = "places", {"kind": "test"}, False

    def ask(self, questions):
        """The longer one, but for "?", about which there is no verdict."""
        return [
            Verdict(None, "odd") if "?" in (q.first, q.second) else Verdict(len(q.first) - len(q.second) + 2.0)
            for q in questions
        ]


def test_a_judge_that_compares_ranks_by_the_mean_probability_of_winning():
    """ "aaa" beats "aa" and "a" with sigmoid(1) and sigmoid(2): mean .8059; the preference for a place drops out."""
    [scores, odd] = score_answers(Places(), ["p", "q"], [["a", "aaa", "aa"], ["b", "?"]])
    s1, s2 = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-2))
    assert scores == pytest.approx([1 - (s1 + s2) / 2, (s1 + s2) / 2, 0.5])
    assert all(math.isnan(value) for value in odd)


def test_prompts_of_any_rows(tmp_path):
    rows = [{"prompt": "a?", "chosen": "x", "rejected": "y"}, {"prompt": "b?", "chosen": "x", "rejected": "y"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [one.prompt for one in read_prompts(DataConfig(), str(tmp_path / "p.jsonl")).asked] == ["a?", "b?"]
    (tmp_path / "q.jsonl").write_text('{"prompt": "a?"}\n{"question": "b?"}\n')
    with pytest.raises(UserError, match=r'q.jsonl:2: "prompt" is missing'):
        read_prompts(DataConfig(), str(tmp_path / "q.jsonl"))
    found = read_prompts(DataConfig(on_bad_row="skip"), str(tmp_path / "q.jsonl"))
    assert found.left_out == {"no prompt": 1} and prompt_key(found.asked[0].prompt) == prompt_key("a?")


@pytest.mark.real
def test_a_real_model_continues_and_is_ranked(tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("model: smollm2\ndata: {path: p.jsonl, template: plain, eos: leave}\n")
    prompts = ["On Tuesday I went to the zoo", "The zoo they opened on our street"]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))
    words = ["collect", "r.yaml", "--prompts", "p.jsonl", "--reward", "vader", "--samples", "6", "--max-tokens", "16"]
    assert cli([*words, "--out", "a.jsonl"]) == 0 and cli([*words, "--out", "b.jsonl"]) == 0
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    for row in read_lines(tmp_path / "a.jsonl"):
        assert row["chosen"][0] in " ,.'" and row["score_chosen"] > row["score_rejected"]
