"""What judges reply and people vote: a verdict, or counted as none; what cannot be parsed is never a tie."""

import copy
import json
import math
import random

import pytest
from counting import balanced, case, fuzzed
from hypothesis import strategies as st
from mutating import ODD_NAMES, ODD_TEXTS, ODD_VALUES, SEEDS, dumped, mutate_bytes, mutate_value
from planted_judges import Planted, good_and_bad
from votes import VOTE

from mlxdpo_eval.judged_answers import judge_answers, win_rate
from mlxdpo_eval.judges import open_judge
from mlxdpo_eval.judges.ladder import COMPARING, NO_COMPLETION, read_reply
from mlxdpo_eval.judges.program import reward_judge
from mlxdpo_eval.judges.protocol import invalid
from mlxdpo_eval.judges.server import Unanswered
from mlxdpo_eval.judges.votes import read_ballots, votes_judge
from mlxdpo_eval.voting import vote_run

pytestmark = pytest.mark.fuzz

TOP = [
    {"token": "A", "logprob": -0.1, "bytes": [65]},
    {"token": " B", "logprob": -2.4},
    {"token": "C", "logprob": -9.0},
]
REPLY = {
    "id": "x", "object": "chat.completion", "created": 1, "model": "m",
    "choices": [{"index": 0, "finish_reason": "length", "message": {"role": "assistant", "content": "A"},
                 "logprobs": {"content": [{"token": "A", "logprob": -0.1, "top_logprobs": TOP}]}}],
    "usage": {"prompt_tokens": 5, "completion_tokens": 1},
}  # fmt: skip
SAID = ["A", "B", "A.", "(B)", "Answer A", "both", "tie", "", "C", "**A**", "a", "AB", "A B"]


def reply(rng):
    """A reply of a server: with log-probs or without, a label or a chat about it, changed or broken."""
    value = copy.deepcopy(REPLY)
    if rng.random() < 0.5:
        del value["choices"][0]["logprobs"]
        value["choices"][0]["message"]["content"] = rng.choice(SAID)
    act = rng.random()
    return (
        dumped(value)
        if act < 0.2
        else mutate_bytes(rng, dumped(value))
        if act < 0.5
        else dumped(mutate_value(rng, value))
    )


def parsed(raw, method=COMPARING[0]):
    """What a method reads from the bytes of a reply."""
    found = read_reply(raw)
    return invalid(NO_COMPLETION) if found is None else method.read(found)


def checked(raw):
    """The verdict on a reply, which has a finite log-odds and names a label, or says why it has none."""
    for method in COMPARING[1:]:
        other = parsed(raw, method)
        assert (other.logit is None) == bool(other.reason)
    verdict = parsed(raw)
    if verdict.logit is None:
        assert verdict.reason
    else:
        assert math.isfinite(verdict.logit) and 0 <= verdict.probability <= 1
        assert any(label in json.dumps(json.loads(raw)).upper() for label in "AB")
        assert verdict.logit != 0 or b"logprob" in raw, "a tie out of nothing"
    return verdict


@fuzzed(100, 1_500, seed=SEEDS)
def test_replies_of_endpoints(seed):
    case("judge replies", lambda: checked(reply(random.Random(seed))))


@fuzzed(15, 200, seed=SEEDS)
def test_every_pair_of_a_win_rate_is_counted(seed):
    rng = random.Random(seed)
    before, after = good_and_bad(rng.randint(1, 6))
    judge = Planted(lambda question: parsed(reply(rng)))

    def rate():
        found = win_rate(judge, judge_answers(judge, before, after), before, after)
        balanced(found.n, found.wins + found.ties + found.losses, found.invalid + found.absent + found.equal)

    case("win rates", rate)


@fuzzed(20, 300, value=st.sampled_from(ODD_VALUES) | st.floats())
def test_programmed_rewards(value):
    before, after = good_and_bad(3)
    judge = reward_judge("odd", lambda prompt, answer: value if answer == "good" else 0.0)

    def rate():
        found = win_rate(judge, judge_answers(judge, before, after), before, after)
        balanced(found.n, found.wins + found.ties + found.losses, found.invalid + found.absent + found.equal)

    case("programmed rewards", rate)


def votes(rng):
    """A file of votes, some of them changed."""
    lines = [
        dict(VOTE, id=f"v{n}", prompt=rng.choice(["Hi?", "Why?", VOTE["prompt"]])) for n in range(rng.randint(1, 5))
    ]
    raw = b"".join(dumped(mutate_value(rng, line) if rng.random() < 0.5 else line) + b"\n" for line in lines)
    return mutate_bytes(rng, raw) if rng.random() < 0.4 else raw


@fuzzed(40, 800, seed=SEEDS)
def test_votes(tmp_path, seed):
    file = tmp_path / "votes.jsonl"
    file.write_bytes(raw := votes(random.Random(seed)))

    def count():
        ballots = read_ballots(file)
        lines = sum(bool(line.strip()) for line in raw.split(b"\n"))
        balanced(lines, len(ballots.votes), sum(ballots.left_out.values()))
        run = vote_run(ballots)
        balanced(len(ballots.votes), run.n, sum(run.uncounted.values()))
        assert run.wins + run.losses + run.ties == run.n
        votes_judge(str(file))

    case("votes", count)


KIND = st.sampled_from(
    ["local", "endpoint", "rubric", "panel", "panel:mean", "reward", "votes", "x.py", "longest", "", "vader"]
)
REST = st.sampled_from(
    [*ODD_NAMES, *ODD_TEXTS, "m@http://h", "m@http://h:x", "m@http://[::1", "m@ftp://h", "@", "m@http://u:p@h/v1"]
)


def unreachable(*args):
    """No server is there."""
    raise Unanswered("no connection")


@fuzzed(20, 300, kind=KIND, rest=REST)
def test_names_of_judges(tmp_path, monkeypatch, kind, rest):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("mlxdpo_eval.judges.endpoint.find_rung", unreachable)
    case("judge names", lambda: open_judge(f"{kind}:{rest}"))
