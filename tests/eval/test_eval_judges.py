"""Planted judges get what they deserve; verdicts are kept by content; no server or reward can pose as a verdict."""

import http.server
import itertools
import json
import math
import threading
import time
from contextlib import contextmanager
from dataclasses import replace
from typing import ClassVar

import pytest
from planted_judges import Planted, always_first, answers, coin, good_and_bad, longest_wins, mumbles, oracle

from mlxdpo import UserError
from mlxdpo_eval.judged_answers import judge_answers, win_rate
from mlxdpo_eval.judges import AnswerPair, BothOrders, Question, Verdict, ask_both, open_judge
from mlxdpo_eval.judges.both import cache_file
from mlxdpo_eval.judges.endpoint import endpoint_judge, parse_completion
from mlxdpo_eval.judges.protocol import CERTAIN, invalid


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
    assert found.invalid == {"the answer is no label": 10} and found.invalid_share == 0.2
    assert (found.wins, found.ties, found.losses, found.rate) == (40, 0, 0, 1.0)
    assert (found.worst, found.best) == (0.8, 1.0)


def test_a_judge_of_length_is_exposed_by_length_control_and_report_card():
    before = answers([f"{i:03d}" + "x" * (10 + i % 7) for i in range(120)])
    after = answers([f"{i:03d}" + "y" * (12 + (3 * i) % 11) for i in range(120)])
    found = judged(longest_wins, before, after)
    assert found.rate > 0.6 and found.interval.low > 0.5
    assert found.longer.prefers_longer == 1.0
    assert found.controlled.interval.low < 0.5 < found.controlled.interval.high


def test_equal_answers_are_ties_that_nobody_is_asked_about():
    judge, same = Planted(oracle), answers(["one", "two"])
    found = win_rate(judge, judge_answers(judge, same, same), same, same)
    assert judge.asked == [] and (found.same, found.ties, found.rate, found.interval) == (2, 2, 0.5, None)


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
    assert len(other.asked) == 2 and cache_file(judge) != cache_file(other)


def test_failures_are_not_kept(cache):
    judge = Planted(lambda q: invalid("timeout"), "down", cached=True)
    trio = [AnswerPair("p", "a", "b")]
    assert ask_both(judge, trio) == ask_both(judge, trio) == [BothOrders(None, None, "timeout")]
    assert len(judge.asked) == 4


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with what `reply(number of the request)` says: (status, body), or an event to wait for."""

    reply = staticmethod(lambda number: (200, b""))
    seen: ClassVar[list] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Server.seen.append((body, self.headers))
        found = Server.reply(len(Server.seen))
        if isinstance(found, threading.Event):
            found.wait(600)
            found = (200, chat("A"))
        status, answer = found
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        self.wfile.writelines([answer] if isinstance(answer, bytes) else answer)

    def log_message(self, *args):
        pass


@contextmanager
def served(reply):
    """A judge asking a server that behaves as `reply` says."""
    Server.reply, Server.seen = staticmethod(reply), []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.handle_error = lambda *args: None  # a client that gave up
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        judge = endpoint_judge(f"m@http://127.0.0.1:{server.server_port}/v1/")
        yield replace(judge, pause=0.01, timeout=600, tries=3)
    finally:
        server.shutdown()
        server.server_close()


def chat(text, top=None):
    """A chat completion, with log-probs where given."""
    choice = {"message": {"role": "assistant", "content": text}}
    if top is not None:
        choice["logprobs"] = {"content": [{"top_logprobs": [{"token": t, "logprob": p} for t, p in top.items()]}]}
    return json.dumps({"choices": [choice]}).encode()


ONE = [Question("prompt {x}", "first", "second")]


def test_an_endpoint_is_asked_for_one_token_and_its_log_probs_are_the_verdict(monkeypatch):
    monkeypatch.setenv("MLXDPO_JUDGE_KEY", "secret-key")
    top = {"A": math.log(0.5), " A": math.log(0.1), "B": math.log(0.2), "The": math.log(0.1)}
    with served(lambda n: (200, chat("A", top))) as judge:
        (verdict,) = judge.ask(ONE)
        body, headers = Server.seen[0]
    assert verdict.logit == pytest.approx(math.log(0.6 / 0.2)) and verdict.probability == pytest.approx(0.75)
    assert body["max_tokens"] == 1 and body["temperature"] == 0 and body["model"] == "m"
    assert all(part in body["messages"][0]["content"] for part in ONE[0])
    assert headers["Authorization"] == "Bearer secret-key"
    assert "secret-key" not in repr(judge) + json.dumps(judge.identity)


@pytest.mark.parametrize("text, logit", [("A", CERTAIN), (" b.\n", -CERTAIN), ("(A)", CERTAIN)])
def test_without_log_probs_the_answer_must_be_a_label(text, logit):
    assert parse_completion(chat(text)).logit == logit


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": 3}]}'])
def test_what_is_no_chat_completion_is_invalid(body):
    assert parse_completion(body) == invalid("the reply is no chat completion")


@pytest.mark.parametrize("text", ["Answer A is better", "AB", "", "I cannot judge", "a tie"])
def test_text_around_a_label_is_invalid(text):
    assert parse_completion(chat(text)) == invalid("the answer is no label")


def test_a_label_that_is_not_listed_lies_below_the_least_that_is():
    assert parse_completion(chat("A", {"A": -0.1, "x": -5.0})).logit == pytest.approx(-0.1 + 7.0)


def test_an_overloaded_server_is_asked_again():
    with served(lambda n: (200, chat("B")) if n == 3 else (429, b"slow down")) as judge:
        assert judge.ask(ONE) == [Verdict(-CERTAIN)] and len(Server.seen) == 3


def dripping():
    """A byte every now and then, for good: each read of it is in time."""
    while True:
        yield b" "
        time.sleep(0.01)


def test_one_deadline_holds_for_the_whole_answer():
    with served(lambda n: (200, dripping())) as judge:
        assert replace(judge, timeout=0.3, tries=1).ask(ONE) == [invalid("timeout")]


def test_an_answer_without_end_is_no_answer():
    with served(lambda n: (200, itertools.repeat(b" " * 65536))) as judge:
        assert judge.ask(ONE) == [invalid("the reply has more than 4,000,000 bytes")] and len(Server.seen) == 1


@pytest.mark.parametrize(
    "url", ["http://judge.example/v1", "http://10.0.0.1:8080/v1", "http://localhost.evil.example/v1"]
)
def test_a_key_goes_over_https_or_to_this_machine(url, monkeypatch):
    monkeypatch.delenv("MLXDPO_JUDGE_KEY", raising=False)
    assert endpoint_judge(f"m@{url}")
    monkeypatch.setenv("MLXDPO_JUDGE_KEY", "secret-key")
    with pytest.raises(
        UserError, match=r"MLXDPO_JUDGE_KEY would go to .* in the clear; use https, or unset"
    ) as refused:
        endpoint_judge(f"m@{url}")
    assert "secret-key" not in str(refused.value)
    for safe in (
        url.replace("http:", "https:"),
        "http://127.0.0.1:1/v1",
        "http://localhost/v1",
        "http://[::1]:8080/v1",
    ):
        assert endpoint_judge(f"m@{safe}")


def test_errors_that_stay_are_invalid_not_losses():
    with served(lambda n: (500, b"secret details")) as judge:
        assert judge.ask(ONE) == [invalid("HTTP 500")] and len(Server.seen) == 3
    gave_up = threading.Event()
    with served(lambda n: gave_up) as judge:
        assert replace(judge, timeout=0.1).ask(ONE) == [invalid("timeout")]
        gave_up.set()
    assert replace(judge, tries=1).ask(ONE) == [invalid("no connection")]  # it is down by now


@pytest.mark.parametrize(
    "status, hint", [(401, "MLXDPO_JUDGE_KEY"), (404, "ends in /v1"), (302, "check model and URL")]
)
def test_a_server_that_refuses_the_request_itself_stops_the_evaluation(status, hint):
    with served(lambda n: (status, b"")) as judge, pytest.raises(UserError, match=hint):
        judge.ask(ONE)


@pytest.mark.parametrize("rest", ["m", "@http://x", "m@ftp://x", "m@http://user:pw@x/v1", "m@http://x/v1?key=1"])
def test_an_endpoint_has_a_model_and_a_clean_url(rest):
    with pytest.raises(UserError):
        endpoint_judge(rest)


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
    with pytest.raises(UserError, match=r"votes\.jsonl:1: .*none of a, b, tie, both_bad; none of the 1 lines"):
        open_judge(f"votes:{file}")


def test_pairs_without_a_vote_are_no_failure():
    before, after = good_and_bad(60)
    human = Planted(lambda q: oracle(q) if int(q.prompt[1:]) < 30 else Verdict(None, "no vote", absent=True))
    alone = win_rate(human, judge_answers(human, before, after), before, after)
    assert (alone.absent, alone.invalid_share, alone.rate) == (30, 0.0, 1.0)
