"""Seven kinds of server x what goes wrong: the ladder finds how to ask each, errors say the server's own words."""

import itertools
import json
import math
import threading
import time
from dataclasses import replace

import pytest
from judge_servers import KINDS, MODEL, chat_answer, completion, ollama, openai_chat, refusal, serving

import mlxdpo_eval.judges.endpoint as endpoint
from mlxdpo import UserError
from mlxdpo_eval.judges import AnswerPair, Question, Verdict, ask_both, open_judge
from mlxdpo_eval.judges.both import score_answers
from mlxdpo_eval.judges.ladder import NO_COMPLETION, read_label_odds, read_reply, read_text_verdict
from mlxdpo_eval.judges.protocol import CERTAIN, invalid
from mlxdpo_eval.judges.server import GIVE_UP, Unanswered, parse_address

pytestmark = pytest.mark.usefixtures("cache")
PAIRS = [AnswerPair(f"p{i}", f"a poor answer {i}", f"a good answer {i}") for i in range(3)]
ONE = [Question("prompt {x}", "good", "poor")]
ASKED_BY = {
    "openai, chat": "log-probs of the labels",
    "openai, reasoning": "structured output, after reasoning",
    "ollama": "structured output",
    "lm studio": "structured output",
    "vllm": "log-probs of the labels",
    "mlx_lm.server": "log-probs of the labels",
    "thinking": "structured output, after reasoning",
}
each_server = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """The client's waits between two tries, a hundredth of what they are."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.005)
    monkeypatch.delenv("MLXDPO_JUDGE_KEY", raising=False)
    monkeypatch.delenv("MLXDPO_JUDGE_PRICE", raising=False)


def opened(server, kind="endpoint", model=MODEL):
    return open_judge(f"{kind}:{model}@{server.url}/")


@each_server
def test_the_test_question_finds_how_to_ask(kind):
    with serving(KINDS[kind]) as server:
        judge = opened(server)
        before = len(server.seen)
        found = ask_both(judge, PAIRS)
        assert len(server.seen) == before + 2 * len(PAIRS), "what was learned is not learned again"
    assert judge.spent()["asked_by"] == judge.identity["asked_by"] == ASKED_BY[kind]
    for both in found:
        if "log-probs" in ASKED_BY[kind]:  # three to one, and the place drops out
            assert both.logit == pytest.approx(math.log(3))
        else:
            assert both.logit == CERTAIN
    assert judge.spent()["failed"] <= 4 and judge.spent()["prompt_tokens"] >= 50 * 6


@each_server
def test_a_model_that_is_missing_is_said_in_the_servers_words_before_anything_else(kind):
    with serving(KINDS[kind]) as server, pytest.raises(UserError) as error:
        opened(server, model="absent")
    said = str(error.value)
    assert "absent" in said.split("@")[1] and "the server has judge, other" in said
    assert any(words in said for words in ("does not exist", "not found", "Not Found", "valid downloaded model"))


@each_server
def test_a_server_that_is_slow_or_gone_is_no_loss_and_no_hang(kind):
    released = threading.Event()
    slow = []

    def behave(body):
        """As it does, until it hangs."""
        if slow:
            released.wait(600)
        return KINDS[kind](body)

    with serving(behave) as server:
        judge = opened(server)
        slow.append(True)
        hasty = replace(judge, server=replace(judge.server.patient(0.05), retries=1))
        assert ask_both(hasty, PAIRS[:1])[0].reason == "timeout"
        released.set()
    assert judge.ask(ONE) == [invalid("no connection")]  # it is down by now


@each_server
def test_a_rate_limit_is_waited_for_and_counted(kind):
    turns = itertools.count()

    def behave(body):
        """Every second request is one too many."""
        if next(turns) % 2 == 0:
            return *refusal("Rate limit reached for requests", None, "rate_limit_exceeded", 429), {
                "retry-after-ms": "1"
            }
        return KINDS[kind](body)

    with serving(behave) as server:
        judge = opened(server)
        assert all(both.logit is not None and both.logit > 0 for both in ask_both(judge, PAIRS[:1]))
        assert judge.spent()["retries"] >= 2


@each_server
def test_answers_that_are_cut_off_are_invalid_and_say_so(kind):
    cut = []

    def behave(body):
        """As it does; later it stops in the middle of a word."""
        return completion("Answer A is certai", finish="length") if cut else KINDS[kind](body)

    with serving(behave) as server:
        judge = opened(server)
        cut.append(True)
        assert judge.ask(ONE) == [invalid("the answer was cut off")]


@each_server
def test_a_rubric_gives_points_and_reasons_and_asks_once(kind):
    with serving(KINDS[kind]) as server:
        judge = opened(server, "rubric")
        before = len(server.seen)
        found = ask_both(judge, PAIRS)
        assert (
            [both.logit for both in found] == [CERTAIN] * 3
            and "2 points" in found[0].note
            and "9 points" in found[0].note
        )
        assert judge.scores(["p0", "p0"], ["a poor answer 0", "a good answer 0"]) == [2.0, 9.0]
        assert score_answers(judge, ["p1"], [["a good answer 1", "a poor answer 1"]]) == [[9.0, 2.0]]
        assert len(server.seen) == before + 6, "each answer once"
        ask_both(judge, PAIRS[:1], cached=False)
        assert len(server.seen) == before + 8, "asked again, past what is kept"
    assert "structured" in judge.spent()["asked_by"]


def test_a_server_without_a_verdict_is_refused_with_what_each_method_brought():
    with serving(lambda body: completion("I would rather not say.")) as server, pytest.raises(UserError) as error:
        opened(server)
    assert "no verdict for the test question (log-probs of the labels: the answer is not a label; structured" in str(
        error.value
    )
    assert len(server.seen) == 3


def test_a_server_that_takes_nothing_but_a_message_is_asked_that_way():
    def behave(body):
        """Refuses what it does not know without a name."""
        return completion(chat_answer(body)) if set(body) == {"model", "messages"} else (400, {"detail": "bad request"})

    with serving(behave) as server:
        assert opened(server).ask(ONE)[0].logit == CERTAIN
    assert set(server.seen[-1][0]) == {"model", "messages"}


def test_a_budget_that_is_too_large_is_made_smaller():
    def behave(body):
        """A reasoning model with little room."""
        if body.get("max_tokens", 0) > 5000:
            return refusal(f"max_tokens is too large: {body['max_tokens']}. This model's maximum is 8192", "max_tokens")
        return KINDS["thinking"](body)

    with serving(behave) as server:
        assert opened(server).ask(ONE)[0].logit == CERTAIN
    assert server.seen[-1][0]["max_tokens"] == 4096


@pytest.mark.parametrize(
    "status, hint",
    [(401, r"put the key into \$MLXDPO_JUDGE_KEY"), (404, "usually ends in /v1"), (302, "it redirects to")],
)
def test_a_refusal_of_the_test_question_stops_before_anything_is_sampled(status, hint):
    def behave(body):
        """Refuses everything."""
        return status, b"<b>no entry</b>", {"Location": "http://127.0.0.1:9/elsewhere"}

    with serving(behave) as server, pytest.raises(UserError, match=hint) as error:
        opened(server)
    assert f"HTTP {status}: " in str(error.value) and "no entry" in str(error.value) and "<b>" not in str(error.value)
    assert len(server.seen) == 1


def test_what_is_refused_later_is_one_invalid_verdict():
    def behave(body):
        """One answer is too long for it."""
        if "good 1" in body["messages"][0]["content"]:
            return refusal("This model's maximum context length is 4096 tokens", "messages", "context_length_exceeded")
        return openai_chat(body)

    with serving(behave) as server:
        judge = opened(server)
        found = judge.ask([Question("p", "good 1", "x"), Question("p", "good 2", "x")])
    assert found[0] == invalid("HTTP 400: This model's maximum context length is 4096 tokens") and found[1].logit > 0


def test_a_server_that_is_gone_is_not_asked_for_hours():
    broken = []
    with serving(lambda body: (500, {"error": "CUDA out of memory"}) if broken else ollama(body)) as server:
        judge = opened(server)
        judge = replace(judge, server=replace(judge.server, retries=0))
        broken.append(True)
        before = len(server.seen)
        found = [judge.ask([Question(f"p{i}", "good", "x")])[0].reason for i in range(20)]
        assert len(server.seen) == before + GIVE_UP
    assert found[0] == "HTTP 500: CUDA out of memory" and set(found[GIVE_UP:]) == {found[-1]}
    assert found[-1] == f"not sent: {GIVE_UP} questions in a row had no answer (HTTP 500)"


def dripping():
    """A byte every now and then, for good: each read of it is in time."""
    while True:
        yield b" "
        time.sleep(0.01)


@pytest.mark.parametrize(
    "reply, reason",
    [(dripping, "timeout"), (lambda: itertools.repeat(b" " * 65536), "the reply has more than 4,000,000 bytes")],
)
def test_one_deadline_and_one_bound_hold_for_a_whole_answer(reply, reason):
    odd = []
    with serving(lambda body: (200, reply()) if odd else ollama(body)) as server:
        judge = opened(server)
        odd.append(True)
        seconds = 0.3 if reason == "timeout" else 600
        assert replace(judge, server=replace(judge.server.patient(seconds), retries=0)).ask(ONE) == [invalid(reason)]


def test_what_is_packed_is_not_unpacked():
    """A few bytes may stand for gigabytes."""
    odd = []
    with serving(lambda body: (200, b"x", {"Content-Encoding": "gzip"}) if odd else ollama(body)) as server:
        judge = opened(server)
        odd.append(True)
        assert judge.ask(ONE) == [invalid("the reply is compressed, which was not requested")]
    assert server.seen[-1][1]["Accept-Encoding"] == "identity"


@pytest.mark.parametrize("key", ["", "secret-key-0123"])
def test_the_key_goes_into_the_request_and_nothing_else_of_the_surroundings_does(key, monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "ambient")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Ambient: ambient")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    if key:
        monkeypatch.setenv("MLXDPO_JUDGE_KEY", key)
    with serving(openai_chat) as server:
        judge = opened(server)
        assert judge.ask(ONE)[0].logit > 0
    for _, headers in server.seen:
        assert headers["Authorization"] == (f"Bearer {key}" if key else None)
        assert "ambient" not in str(headers)
    if key:
        assert key not in repr(judge) + json.dumps(judge.identity) + json.dumps(judge.spent())


def test_a_key_that_a_server_repeats_is_struck_out(monkeypatch):
    monkeypatch.setenv("MLXDPO_JUDGE_KEY", "secret-key-0123")
    words = "Incorrect API key provided: secret-key-0123, also sk-ab***yz."
    with (
        serving(lambda body: refusal(words, None, "invalid_api_key", 401)) as server,
        pytest.raises(UserError) as error,
    ):
        opened(server)
    assert "Incorrect API key provided: ***" in str(error.value)
    assert "secret-key" not in str(error.value) and "ab***yz" not in str(error.value)


@pytest.mark.parametrize(
    "url", ["http://judge.example/v1", "http://10.0.0.1:8080/v1", "http://localhost.evil.example/v1"]
)
def test_a_key_goes_over_https_or_to_this_machine(url, monkeypatch):
    assert parse_address("endpoint", f"m@{url}") == ("m", url)
    monkeypatch.setenv("MLXDPO_JUDGE_KEY", "secret-key")
    with pytest.raises(UserError, match=r"JUDGE_KEY would be sent to .* unencrypted; use https, or unset") as refused:
        open_judge(f"rubric:m@{url}")
    assert "secret-key" not in str(refused.value)
    for safe in (
        url.replace("http:", "https:"),
        "http://127.0.0.1:1/v1",
        "http://localhost/v1",
        "http://[::1]:8080/v1",
    ):
        assert parse_address("endpoint", f"m@{safe}") == ("m", safe)


@pytest.mark.parametrize("rest", ["m", "@http://x", "m@ftp://x", "m@http://user:pw@x/v1", "m@http://x/v1?key=1"])
def test_an_endpoint_has_a_model_and_a_clean_url(rest):
    with pytest.raises(UserError):
        open_judge(f"endpoint:{rest}")


def test_without_the_client_it_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'mlxdpo\[judges\]'"):
        open_judge("endpoint:m@http://127.0.0.1:1/v1")


def test_tokens_and_dollars_are_counted(monkeypatch):
    monkeypatch.setenv("MLXDPO_JUDGE_PRICE", f"other=1,1 {MODEL}=2,10")
    with serving(ollama) as server:
        judge = opened(server)
        start = dict(judge.spent())
        judge.ask(ONE)
        spent = judge.spent()
    used = [spent[name] - start[name] for name in ("requests", "prompt_tokens", "completion_tokens", "dollars")]
    assert used == [1, 50, 7, pytest.approx((2 * 50 + 10 * 7) / 1e6)]
    monkeypatch.setenv("MLXDPO_JUDGE_PRICE", "cheap")
    with pytest.raises(UserError, match=r"\$MLXDPO_JUDGE_PRICE is 'cheap'; expected dollars per million tokens"):
        open_judge(f"endpoint:m@{server.url}")


def test_a_slow_test_question_says_that_no_answer_came(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(endpoint, "FIRST_ANSWER", 0.05)

    def behave(body):
        """Never in time."""
        released.wait(600)
        return ollama(body)

    with serving(behave) as server:
        with pytest.raises(
            UserError, match=r"no answer to the test question \(timeout\); check that the server is running"
        ):
            opened(server)
        released.set()


def chat(text, top=None, **message):
    """The bytes of a chat completion."""
    return json.dumps(completion(text, logprobs=top, **message)[1]).encode()


@pytest.mark.parametrize("text, logit", [("A", CERTAIN), (" b.\n", -CERTAIN), ("(A)", CERTAIN)])
def test_without_log_probs_the_answer_must_be_a_label(text, logit):
    assert read_label_odds(read_reply(chat(text))).logit == logit


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b"{}", b'{"choices": []}', b'{"choices": [{"message": 3}]}'])
def test_what_is_no_chat_completion_is_none(body):
    assert read_reply(body) is None
    odd = []
    with serving(lambda asked: (200, body) if odd else ollama(asked)) as server:
        judge = opened(server)
        odd.append(True)
        assert judge.ask(ONE) == [invalid(NO_COMPLETION)]


@pytest.mark.parametrize("text", ["Answer A is better", "AB", "", "I cannot judge", "a tie"])
def test_text_around_a_label_is_invalid(text):
    assert read_label_odds(read_reply(chat(text))) == invalid("the answer is not a label")


def test_a_label_that_is_not_listed_lies_below_the_least_that_is():
    assert read_label_odds(read_reply(chat("A", {"A": -0.1, "x": -5.0}))).logit == pytest.approx(-0.1 + 7.0)
    assert read_label_odds(read_reply(chat("x", {"x": -0.1, "A": -5.0}))) == invalid("the labels are improbable")


@pytest.mark.parametrize(
    "text, logit",
    [
        ("B is long, A is right.\n\nVerdict: A", CERTAIN), ("**Verdict:** **B**", -CERTAIN), 
        ("verdict - (b).", -CERTAIN),
        ("Verdict: A? No.\nVerdict: B", -CERTAIN), ("[[A]]", CERTAIN), ("Final answer: A", CERTAIN), ("B", -CERTAIN),
        ('```json\n{"verdict": "B"}\n```', -CERTAIN), ("<think>Verdict: B</think>Verdict: A", CERTAIN),
        ("Verdict: A or B, I cannot say", None), ("Both are fine", None), ("Verdict: neither", None),
        ("A better one", None),
        ("<think>Verdict: B", None),
    ],
)  # fmt: skip
def test_the_last_verdict_of_a_text_counts_and_none_is_invented(text, logit):
    assert read_text_verdict(read_reply(chat(text))).logit == logit


def test_reasoning_in_a_field_of_its_own_is_no_answer():
    for name in ("reasoning", "reasoning_content"):
        found = read_reply(chat("", finish="length", **{name: "Verdict: A"}))
        assert read_text_verdict(found) == invalid("its reasoning was cut off")


@pytest.mark.parametrize(
    "rule, logits, expected",
    [
        ("majority", (3.0, 0.1, -9.0), CERTAIN), ("majority", (3.0, -0.1, None), 0.0),
        ("majority", (1.0, None, None), None),
        ("mean", (3.0, 0.5, -9.5), -2.0), ("mean", (99.0, -10.0, None), 0.0), ("mean", (None, None, 1.0), None),
    ],
)  # fmt: skip
def test_a_panel_decides_by_its_rule(rule, logits, expected, tmp_path, monkeypatch):
    from planted_judges import Planted

    import mlxdpo_eval.judges as judges

    members = [
        Planted(lambda q, at=at: invalid("odd") if at is None else Verdict(at), f"m{i}") for i, at in enumerate(logits)
    ]
    monkeypatch.setitem(judges.JUDGES, "member", lambda rest: members[int(rest)])
    panel = open_judge(f"panel:{rule}:member:0,member:1,member:2")
    (verdict,) = panel.ask(ONE)
    assert verdict.logit == pytest.approx(expected) if expected is not None else verdict.logit is None
    assert panel.identity["rule"] == rule and rule in panel.name


def test_a_panel_keeps_the_verdicts_of_its_members_and_says_what_it_cannot_use():
    with serving(ollama) as server:
        alone = opened(server)
        ask_both(alone, PAIRS)
        before = len(server.seen)
        panel = open_judge(f"panel:majority:endpoint:{MODEL}@{server.url},longest,shortest")
        assert [both.logit for both in ask_both(panel, PAIRS)] == [CERTAIN] * 3
        assert len(server.seen) == before + 2, "the test question alone"
        ask_both(panel, PAIRS, cached=False)
        assert len(server.seen) == before + 2 + 6
        assert panel.spent()[f"endpoint:{MODEL}"]["requests"] == 8
    for spec, words in (
        ("panel:best:longest,shortest", "no such rule"),
        ("panel:mean:longest", "two different judges"),
    ):
        with pytest.raises(UserError, match=words):
            open_judge(spec)


def test_an_answer_without_end_at_the_test_question_is_said(monkeypatch):
    monkeypatch.setattr(endpoint, "find_rung", lambda *args: (_ for _ in ()).throw(Unanswered("no connection")))
    with pytest.raises(UserError, match="no answer to the test question"):
        open_judge("endpoint:m@http://127.0.0.1:1/v1")
