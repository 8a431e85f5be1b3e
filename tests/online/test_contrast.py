"""Pairs from two sources: every prompt asked once of each, whatever stops it; what is left out is counted."""

import json
import random
import signal
import subprocess
import sys
import time

import pytest
from chat_servers import chat_reply, chat_server
from stages import LAUNCH
from tiny_runs import finish, recipe
from tiny_words import WORDS, write_words

from mlxdpo.cli import run as cli
from mlxdpo.commands import pairs as command
from mlxdpo.commands import terminal
from mlxdpo.config import DataConfig
from mlxdpo.data.read import read_pairs
from mlxdpo.io.json_file import read_lines
from mlxdpo.online.contrast.chat_server import read_chat_answer
from mlxdpo.online.contrast.run import REFUSAL, SAME, answers_in, is_refusal
from mlxdpo.types import Event, UserError

PROMPTS = [f"Question {n}?" for n in range(30)]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Thirty prompts, the last one twice."""
    write_prompts(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "RETRIES", 0)  # the client waits before each
    return tmp_path


def write_prompts(folder, prompts=(*PROMPTS, PROMPTS[-1])):
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in prompts))


def asked(body):
    return body["messages"][-1]["content"]


def strong(body):
    return chat_reply(f"A long and careful answer to {asked(body)}")


def weak(body):
    return chat_reply(f"Dunno about {asked(body)}")


def words(chosen, rejected, *more, out="pairs.jsonl"):
    return ["pairs", "--chosen", chosen, "--rejected", rejected, "--prompts", "prompts.jsonl", "--out", out, *more]


def test_two_servers_make_pairs_that_train(place, capsys):
    with chat_server(strong) as (one, first, bodies), chat_server(weak) as (two, second, _):
        assert cli(words(f"{one}#big", f"{two}#small", "--max-tokens", "9", "--requests", "3")) == 0
    shown = capsys.readouterr().out
    assert "got 60 of 60 answers" in shown and "left\n" in shown and "1 the same prompt as in an earlier row" in shown
    assert "chosen: 240 tokens answered to 210 tokens of prompts" in shown
    assert first == second == dict.fromkeys(PROMPTS, 1)
    body = bodies[0][0]
    assert {n: body[n] for n in ("model", "max_tokens", "temperature", "seed")} == {
        "model": "big", "max_tokens": 9, "temperature": 0.7, "seed": 0,
    }  # fmt: skip
    rows = list(read_lines(place / "pairs.jsonl"))
    assert [row["prompt"] for row in rows] == PROMPTS  # in the order of the prompts, whoever answered first
    assert rows[0]["chosen"] == f"A long and careful answer to {PROMPTS[0]}" and rows[0]["tokens_rejected"] == 4
    assert rows[0]["made"]["chosen"] == {"source": f"{one}#big", "server": one, "model": "big"}
    found, _ = read_pairs(DataConfig(path=str(place / "pairs.jsonl")))
    assert len(found) == 30
    report = json.loads((place / "pairs.report.json").read_text())
    assert report["tokens"]["rejected"] == {"prompt": 210, "completion": 120} and report["rows"] == 30
    assert not (place / "pairs.jsonl.partial").exists() and len(list(read_lines(place / "pairs.samples.jsonl"))) == 63


ODD = {
    PROMPTS[0]: chat_reply(""),
    PROMPTS[1]: chat_reply("Because it", "length"),
    PROMPTS[2]: chat_reply("I'm sorry, but I can't help with that."),
    PROMPTS[3]: chat_reply("The same\nwords"),
    PROMPTS[4]: chat_reply("<think>what to say</think>\n\nA long and careful answer"),
    PROMPTS[5]: chat_reply("<think>what to say, and it goes on", "length"),
    PROMPTS[6]: (200, {"choices": [{"message": {"content": None, "tool_calls": [{"id": "1"}]}}]}),
    PROMPTS[7]: (200, {"oops": 1}),
    PROMPTS[8]: (400, {"error": {"message": "this prompt is too long"}}),
}


def test_what_cannot_stand_in_a_pair_is_counted_and_costs_no_second_answer(place):
    odd = lambda body: ODD.get(asked(body), strong(body))  # noqa: E731
    dull = lambda body: chat_reply("the same  words") if asked(body) == PROMPTS[3] else weak(body)  # noqa: E731
    with chat_server(odd) as (one, _, _), chat_server(dull) as (two, second, _):
        assert cli(words(f"{one}#big", f"{two}#small")) == 0
        report = json.loads((place / "pairs.report.json").read_text())
        assert report["answers_left_out"] == {
            "chosen, unfinished: no end within max_tokens": 2,
            "chosen, empty": 1,
            f"chosen, {REFUSAL}": 1,
            "chosen, a tool call instead of text": 1,
            "chosen, the reply is not a chat completion": 1,
            "chosen, refused by the server (HTTP 400)": 1,
        }
        assert report["prompts_without_pair"] == {SAME: 1} and report["rows"] == 30 - 7 - 1
        assert not {PROMPTS[n] for n in (0, 1, 2, 5, 6, 7, 8)} & set(second)
        rows = {row["prompt"]: row for row in read_lines(place / "pairs.jsonl")}
        assert rows[PROMPTS[4]]["chosen"] == "A long and careful answer"
        kept = words(f"{one}#big", f"{two}#small", "--unfinished", "keep", "--refusals", "keep", out="kept.jsonl")
        assert cli(kept) == 0
    assert {PROMPTS[1], PROMPTS[2]} <= {row["prompt"] for row in read_lines(place / "kept.jsonl")}


def test_a_server_that_goes_away_loses_nothing_and_is_asked_again_for_what_it_failed(place, capsys):
    down = {"yes": False}

    def flaky(body):
        return (503, {"error": "loading"}) if down["yes"] and asked(body) != PROMPTS[0] else strong(body)

    with chat_server(flaky) as (one, first, _), chat_server(weak) as (two, second, _):
        down["yes"] = True
        assert cli(words(f"{one}#big", f"{two}#small")) == 2
        assert "8 prompts in a row had no answer (HTTP 503: loading); fix the server" in capsys.readouterr().err
        assert first[PROMPTS[1]] == 1 and not second
        down["yes"] = False
        assert cli(words(f"{one}#big", f"{two}#small")) == 0
    assert first[PROMPTS[0]] == 1 and set(second.values()) == {1}
    assert len(list(read_lines(place / "pairs.jsonl"))) == 30


@pytest.mark.parametrize("sooner", [0, 7, 33])
def test_stopped_and_gone_on_with_nothing_is_asked_twice(place, monkeypatch, sooner):
    from mlxdpo.online.contrast import contrast_sources
    from mlxdpo.online.contrast.run import AnswerSettings
    from mlxdpo.online.prompts import read_prompts

    how, prompts = AnswerSettings(requests=2), read_prompts(DataConfig(), "prompts.jsonl")
    with chat_server(strong) as (one, first, _), chat_server(weak) as (two, second, _):
        names = {"chosen": f"{one}#big", "rejected": f"{two}#small"}
        openers = {side: command.source_opener(name, side, how) for side, name in names.items()}

        def begin(stop):
            return list(contrast_sources(names, openers, prompts, how, place / "pairs.jsonl", stop))

        answers = iter(range(1000))
        assert begin(lambda: next(answers) >= sooner)[-1].kind == "interrupted"
        with pytest.raises(UserError, match=r"started with a different asking.seed \(0 then, 5 now\)"):
            list(contrast_sources(names, openers, prompts, AnswerSettings(seed=5), place / "pairs.jsonl"))
        with (place / "pairs.jsonl.partial").open("a") as file:
            file.write('{"side": "torn')  # a writer that was killed
        kept = [len(of_side) for of_side in answers_in(place / "pairs.jsonl.partial")[1].values()]
        *counts, last = begin(lambda: False)
        assert last.kind == "done"
    assert first == second == dict.fromkeys(PROMPTS, 1)
    # Each event is of new answers, and says how many were there before.
    done = [event.values["done"] - event.values["kept"] for event in counts]
    assert done == sorted(set(done)) and done[-1] == 60 - sum(kept) and counts[-1].values["done"] == 60


def test_the_time_left_is_at_the_pace_of_new_answers(monkeypatch, capsys):
    """720 of 1,000 kept and 10 more in 10 s: 270 to come take 270 s, not 4."""
    monkeypatch.setattr(terminal.time, "monotonic", iter((0.0, 10.0)).__next__)
    event = Event("answered", 730, {"done": 730, "total": 1000, "kept": 720})
    assert list(terminal.show_progress([event], "answered")) == [event]
    assert capsys.readouterr().out == "got 730 of 1000 answers, 4:30 left\n"


def test_servers_that_refuse_a_parameter_by_name_are_asked_in_their_words(place):
    def newer(body):
        for name, other in (("max_tokens", "max_completion_tokens"), ("temperature", "the default")):
            if name in body:
                return 400, {"error": {"message": f"Unsupported parameter: '{name}'; use {other}", "param": name}}
        return strong(body)

    with chat_server(newer) as (one, first, bodies), chat_server(weak) as (two, _, _):
        assert cli(words(f"{one}#big", f"{two}#small", "--requests", "1")) == 0
    assert first[PROMPTS[0]] == 3 and sum(first.values()) == 32
    assert bodies[-1][0]["max_completion_tokens"] == 512 and "temperature" not in bodies[-1][0]


def test_a_key_goes_to_its_own_source_and_a_refusal_is_told_in_the_servers_words(place, monkeypatch, capsys):
    monkeypatch.setenv("MLXDPO_CHOSEN_KEY", "secret-1")
    with chat_server(strong) as (one, _, bodies), chat_server(weak) as (two, _, others):
        assert cli(words(f"{one}#big", f"{two}#small")) == 0
        assert {headers.get("authorization") for _, headers in bodies} == {"Bearer secret-1"}
        assert not any("authorization" in headers for _, headers in others)
    with chat_server(lambda body: (401, {"error": {"message": "no such key"}})) as (one, _, _):
        assert cli(words(f"{one}#big", "prompts.jsonl", out="b.jsonl")) == 2
        assert cli(words(f"{one}#big", f"{one}#small", out="b.jsonl")) == 2
    assert "HTTP 401: no such key); put the key into $MLXDPO_CHOSEN_KEY" in capsys.readouterr().err
    assert cli(words("http://example.com/v1#m", "smollm2", out="c.jsonl")) == 2
    assert "$MLXDPO_CHOSEN_KEY would be sent to example.com unencrypted; use https" in capsys.readouterr().err


def test_a_file_of_answers_and_a_model_of_this_machine(place, cache):
    write_words(place / "llama")
    rows = [{"prompt": f"the {a}", "chosen": " runs", "rejected": f" {a} sleeps"} for a in WORDS[:8]]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    finish(recipe(place))
    prompts = [f"the {a} {b}" for a in WORDS[:4] for b in WORDS[12:17]]
    write_prompts(place, prompts)
    answers = [{"prompt": p, "completion": f"{p} and more of it"} for p in prompts[:-1]]
    (place / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
    more = ["--max-tokens", "6", "--unfinished", "keep", "--batch-size", "4"]
    assert cli(words("answers.jsonl", "run@0.5", *more, out="a.jsonl")) == 0
    assert cli(words("answers.jsonl", "llama", *more, out="b.jsonl")) == 0
    assert cli(words("answers.jsonl", "run@0.5", *more, out="c.jsonl")) == 0
    a, b, c = ((place / f"{name}.jsonl").read_bytes() for name in "abc")
    assert a == c and a != b
    report = json.loads((place / "a.report.json").read_text())
    assert report["answers_left_out"]["chosen, no answer to the prompt in the file"] == 1
    first = next(read_lines(place / "a.jsonl"))
    assert first["made"]["rejected"]["strength"] == 0.5 and first["chosen"].endswith("and more of it")
    # pairs as answers: each side takes its own
    (place / "judged.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_prompts(place, [row["prompt"] for row in rows])
    assert cli(words("judged.jsonl", "judged.jsonl", out="d.jsonl")) == 0
    assert [(r["chosen"], r["rejected"]) for r in read_lines(place / "d.jsonl")] == [
        (r["chosen"], r["rejected"]) for r in rows
    ]


@pytest.mark.parametrize(
    ("chosen", "sentence"),
    [
        ("nowhere", "--chosen nowhere: not a folder, a Hub id or a file of answers"),
        ("smollm2@2", "--chosen smollm2@2: only a run has a strength, and smollm2 is not a run; drop @2"),
        ("run@much", "--chosen run@much: 'much' is not a strength; expected RUN@0.5"),
        ("gone.jsonl", "--chosen gone.jsonl: there is no such file"),
        ("http://localhost:9/v1", "name the model after #, such as http://localhost:9/v1#MODEL"),
        (
            "http://a:b@localhost/v1#m",
            "--chosen: do not put the key in the URL, because the URL is saved; set $MLXDPO_CHOSEN_KEY",
        ),
        ("http://[::1#m", "--chosen http://[::1#m: no address; expected a server as http://localhost:1234/v1#MODEL"),
        ("smollm2", "--chosen and --rejected are both smollm2; use two different sources"),
    ],
)
def test_wrong_sources_are_one_sentence_before_anything_is_asked(place, capsys, chosen, sentence):
    assert cli(words(chosen, "smollm2")) == 2
    assert sentence in capsys.readouterr().err and not (place / "pairs.jsonl.partial").exists()


def test_refusals_by_their_words():
    yes = ("I'm sorry, but I can't assist with that request.", "I cannot provide instructions for that.",
           "As an AI language model, I am not able to write that.", "Sorry, I won’t help with hacking.",
           "I must decline to answer.", "Unfortunately, I'm unable to fulfill this request.")  # fmt: skip
    no = ("I cannot stress enough how important it is.", "I'm sorry to hear that. Here is a plan:",
          "You cannot provide two keys.", "I can help you with that.", "Cats can't write.")  # fmt: skip
    assert all(map(is_refusal, yes)) and not any(map(is_refusal, no))


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"\xff", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}']
)
def test_what_is_no_completion_is_no_answer(body):
    assert read_chat_answer(body).failed


@pytest.mark.parametrize(
    ("times", "count"),
    [pytest.param(4, 160, marks=pytest.mark.processes), pytest.param(20, 400, marks=pytest.mark.faults)],
)
def test_killed_again_and_again_nothing_is_lost_and_nothing_is_there_twice(place, times, count):
    prompts = [f"Question {n}?" for n in range(count)]
    write_prompts(place, prompts)
    draw = random.Random(7)

    def slow(reply):
        return lambda body: (time.sleep(0.02), reply(body))[1]

    with chat_server(slow(strong)) as (one, first, _), chat_server(slow(weak)) as (two, second, _):
        command_line = [sys.executable, str(LAUNCH), "cli", *words(f"{one}#big", f"{two}#small", "--requests", "4")]
        kept, kills = 0, 0
        while kills < times:
            process = subprocess.Popen(command_line, cwd=place, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            until = time.monotonic() + 120
            while process.poll() is None and count_answers(place) <= kept and time.monotonic() < until:
                time.sleep(0.005)
            time.sleep(draw.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            said = process.communicate()[0]
            assert process.returncode == -signal.SIGKILL, said
            assert count_answers(place) >= kept
            kept, kills = count_answers(place), kills + 1
        assert subprocess.run(command_line, cwd=place, capture_output=True).returncode == 0
    rows = list(read_lines(place / "pairs.jsonl"))
    assert [row["prompt"] for row in rows] == prompts
    assert all(row["chosen"].endswith(row["prompt"]) and row["rejected"].endswith(row["prompt"]) for row in rows)
    lines = [line for line in read_lines(place / "pairs.samples.jsonl") if "prompt_id" in line]
    assert len(lines) == len({(line["side"], line["prompt_id"]) for line in lines}) == 2 * count
    # what was on its way when the process was killed is asked again: at most `requests` a kill
    assert sum(first.values()) + sum(second.values()) <= 2 * count + times * 2 * 4


def count_answers(place):
    file = place / "pairs.jsonl.partial"
    return file.read_bytes().count(b'"prompt_id"') if file.exists() else 0
