"""Conversations, a chunk of prompts at once: answer, critique and revision, or two answers; then their comparison.

Every step is one batched call of `generate`, whose noise belongs to the conversation: a chunk gives the same lines
whenever it is computed.

Which of two answers the principles prefer, and how surely, are soft labels from one token, in both orders:

    s1 = log-odds of the letter of y1, y1 shown as A;  s2 = the same, y1 shown as B;  l = (s1 + s2) / 2
    p  = mean over principles of sigmoid(l)

Source: arXiv 2212.08073 section 4.1, whose labels are the normalised probabilities of (A) and (B), averaged over
principles for robustness. There each comparison is made in one order; here a liking for a letter or a place, which is
large in small models, drops out of l exactly, as it is additive in log-odds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo.config import DataConfig
from mlxdpo.data.encode import encode_prompt
from mlxdpo.data.read import prompt_key
from mlxdpo.forward.next_token import logits_at, next_logits
from mlxdpo.inference.generate import finished
from mlxdpo.model.policy import Policy
from mlxdpo.online.collect import Asked, PolicySource, rows
from mlxdpo.online.constitution.schema import (
    LETTERS,
    Constitution,
    Principle,
    SamplingSettings,
    answer_turns,
    comparison_turns,
    critique_turns,
    revision_turns,
)
from mlxdpo.types import Message, Text, UserError

Rows = Sequence[Sequence[int]]


class Label(NamedTuple):
    """What the principles say of two answers, y1 and y2.

    shown_first, shown_second  (K,) log-odds for y1, shown as A and as B, one entry for each principle
    """

    shown_first: tuple[float, ...]
    shown_second: tuple[float, ...]

    @property
    def logits(self) -> tuple[float, ...]:
        """(K,) log-odds that y1 is better, both orders averaged."""
        return tuple((a + b) / 2 for a, b in zip(self.shown_first, self.shown_second, strict=True))

    @property
    def probabilities(self) -> tuple[float, ...]:
        """(K,) that y1 is better, by each principle."""
        return tuple((1 + lead) / 2 for lead in self._leads())

    @property
    def lead(self) -> float:
        """2 p - 1 of the mean probability p that y1 is better: exactly its negative when y1 and y2 change places."""
        leads = self._leads()
        return sum(leads) / len(leads)

    @property
    def probability(self) -> float:
        """That y1 is better, averaged over the principles."""
        return (1 + self.lead) / 2

    def swapped(self) -> Label:
        """The same with y1 and y2 exchanged."""
        return Label(tuple(-x for x in self.shown_second), tuple(-x for x in self.shown_first))

    def _leads(self) -> list[float]:
        # 2 sigmoid(l) - 1 = tanh(l / 2), which is odd to the last bit.
        return [float(np.tanh(logit / 2)) for logit in self.logits]


def label_pair(policy: Policy, data: DataConfig, rules: Constitution, prompt: Text, first: str, second: str) -> Label:
    """Ask every principle about two different answers, in both orders.

    Raises `UserError` when the tokenizer has no single token for a letter.
    """
    # Always the same question whichever answer is called first, so that the label is antisymmetric to the bit.
    one, other = sorted((first, second))
    shown = [_odds(policy, data, rules, prompt, *order) for order in ((one, other), (other, one))]
    found = Label(tuple(shown[0].tolist()), tuple((-shown[1]).tolist()))
    return found if first == one else found.swapped()


def _odds(policy: Policy, data: DataConfig, rules: Constitution, prompt: Text, a: str, b: str) -> np.ndarray:
    """(K,) float64 log-odds of letter A against B, each letter in all its spellings."""
    letters = [spellings(policy.tokenizer, letter) for letter in LETTERS]
    turns = [comparison_turns(principle, prompt, a, b) for principle in rules.principles]
    rows = [encode_prompt(one, policy.tokenizer, data).tolist() for one in turns]
    logits = shared_next_logits(policy.model, rows, [token for own in letters for token in own]).astype(np.float64)
    sides = np.split(logits, [len(letters[0])], axis=1)
    return np.logaddexp.reduce(sides[0], axis=1) - np.logaddexp.reduce(sides[1], axis=1)


def spellings(tokenizer: Any, letter: str) -> list[int]:
    """Single tokens that read as the letter: some templates leave the space before it to the model.

    Raises `UserError` when there is none.
    """
    found = [tokenizer.encode(text, add_special_tokens=False) for text in (letter, f" {letter}")]
    if not (single := list(dict.fromkeys(ids[0] for ids in found if len(ids) == 1))):
        raise UserError(f"the tokenizer has no single token for {letter}, so this model cannot label; use labels none")
    return single


def shared_next_logits(model: Any, rows: Rows, ids: Sequence[int]) -> np.ndarray:
    """`next_logits` of rows with a long common beginning, which is computed once: (N, len(ids)) float32."""
    common = _shared_beginning(rows)
    if common < 2 or len(rows) == 1:
        return next_logits(model, rows, ids)
    rest = np.zeros((len(rows), max(map(len, rows)) - common), np.int32)
    for padded, row in zip(rest, rows, strict=True):
        padded[: len(row) - common] = row[common:]
    last = mx.array([len(row) - common - 1 for row in rows])
    prefix = mx.array(np.array([rows[0][:common]], np.int32))
    logits = logits_at(model, mx.array(rest), mx.arange(len(rows)), last, prefix)()
    return np.array(logits[:, mx.array(list(ids))])


def _shared_beginning(rows: Rows) -> int:
    """Tokens that all rows begin with, at most all but one of the shortest."""
    most = min(map(len, rows)) - 1
    return next((at for at in range(most) if len({row[at] for row in rows}) > 1), most)


Line = dict[str, Any]
SAME = "the revision repeats the answer"
ECHO = "the revision repeats the critique"
COPIED = "the revision repeats a worked example"
NEAR = 0.9  # of the word triples of two texts, shared: a copy
ALIKE = "both samples are the same"
TOO_LONG = "longer than the model's context"


class Stopped(Exception):
    """The user asked to stop; the chunk is given up."""


def drawn_principle(rules: Constitution, key: bytes, seed: int) -> Principle:
    """The principle of a prompt: a function of the prompt and the seed alone, so every order of prompts draws it."""
    words = np.frombuffer(key.ljust(32, b"\0")[:32], "<u4").tolist()
    return rules.principles[int(np.random.default_rng([seed, *words]).integers(len(rules.principles)))]


class ChatModel:
    """A source that continues conversations, as `how` says; `should_stop` is asked after each."""

    def __init__(self, source: PolicySource, how: SamplingSettings, should_stop: Callable[[], bool]):
        self.source, self.how, self.should_stop = source, how, should_stop
        self.special = frozenset(source.policy.tokenizer.all_special_ids)
        self.room = int(source.policy.config.get("max_position_embeddings") or 2**31)

    def reply(self, asked: Sequence[tuple[Sequence[Message], Any]], max_tokens: int) -> list[Line]:
        """(turns, tools) -> what the model says: text, tokens, finish, and `fault`, "" where there is none.

        Raises `Stopped`.
        """
        policy, data, how = self.source.policy, self.source.data, self.how
        ids = [encode_prompt(tuple(turns), policy.tokenizer, data, tools).tolist() for turns, tools in asked]
        fits = [at for at, one in enumerate(ids) if len(one) + max_tokens <= self.room]
        stream = finished(
            policy.model,
            [ids[at] for at in fits],
            max_tokens=max_tokens,
            eos_ids=policy.eos_ids,
            temperature=how.temperature,
            top_p=how.top_p,
            seed=how.seed,
            batch_size=how.batch_size,
        )
        replies: list[Line] = [{"text": "", "tokens": 0, "finish": "", "fault": TOO_LONG} for _ in ids]
        for place, done in stream:
            if self.should_stop():
                raise Stopped
            text = policy.tokenizer.decode(done.tokens).strip()
            fault = rows.fault(text, done.tokens, done.finish == "stop", how.unfinished == "keep", self.special)
            replies[fits[place]] = {"text": text, "tokens": len(done.tokens), "finish": done.finish, "fault": fault}
        return replies


def revised(chat: ChatModel, chunk: Sequence[Asked], rules: Constitution) -> list[Line]:
    """A line per prompt: principle, initial answer, critique, revision, and why it gives no pair ("" where it does).

    A conversation ends at its first fault; a critique that is cut off is none.
    """
    lines = [_new_line(one) for one in chunk]
    how = chat.how
    drawn = [drawn_principle(rules, prompt_key(one.prompt), how.seed) for one in chunk]
    for line, principle, (reply,) in zip(lines, drawn, _drawn_answers(chat, chunk, 1), strict=True):
        line |= {"principle": principle.name, "initial": reply, "left_out": _about("initial answer", reply["fault"])}
    steps = (
        ("critique", how.critique_tokens, lambda at: critique_turns(*_so_far(rules, drawn, chunk, lines, at))),
        (
            "revision",
            how.max_tokens,
            lambda at: revision_turns(*_so_far(rules, drawn, chunk, lines, at), lines[at]["critique"]["text"]),
        ),
    )
    for part, most, turns in steps:
        going = [at for at, line in enumerate(lines) if not line["left_out"]]
        replies = chat.reply([(turns(at), chunk[at].tools) for at in going], most)
        for at, reply in zip(going, replies, strict=True):
            if part == "critique" and reply["fault"] == rows.UNFINISHED:
                reply["fault"] = ""
            lines[at][part] = reply
            lines[at]["left_out"] = _about(part, reply["fault"])
    for line in lines:
        line["left_out"] = line["left_out"] or _no_revision(line, rules)
    return lines


def _no_revision(line: Line, rules: Constitution) -> str:
    """Why what stands in the place of a revision is none: small models repeat what they have just read."""
    text = line["revision"]["text"]
    if text == line["initial"]["text"]:
        return SAME
    if _near(text, line["critique"]["text"]):
        return ECHO
    return COPIED if any(_near(text, one.revision) for one in rules.examples) else ""


def _near(a: str, b: str) -> bool:
    return rows.jaccard(rows.grams(a), rows.grams(b)) >= NEAR


def sampled(chat: ChatModel, chunk: Sequence[Asked], rules: Constitution) -> list[Line]:
    """A line per prompt: two answers, and why they give no pair ("" where they do)."""
    lines = []
    for one, (first, second) in zip(chunk, _drawn_answers(chat, chunk, 2), strict=True):
        why = _about("answer", first["fault"] or second["fault"])
        same = ALIKE if first["text"] == second["text"] else ""
        lines.append(_new_line(one) | {"first": first, "second": second, "left_out": why or same})
    return lines


PAIR_KINDS = {"revisions": (revised, "revision", "initial"), "samples": (sampled, "first", "second")}
"""By the name of `pairs`: what makes the lines, and the two answers that are compared."""


def labelled(
    lines: Sequence[Line], sides: tuple[str, str], source: PolicySource, judge: Policy, rules: Constitution
) -> None:
    """Put what the principles say of `sides` into each line that gives a pair: that the first side is better."""
    for line in lines:
        if not line["left_out"]:
            prompt = tuple(Message(**turn) for turn in line["prompt"])
            line |= _vote_columns(
                label_pair(judge, source.data, rules, prompt, *(line[side]["text"] for side in sides)), rules
            )


def _vote_columns(found: Label, rules: Constitution) -> Line:
    each = zip(rules.principles, found.shown_first, found.shown_second, found.probabilities, strict=True)
    votes = {one.name: {"shown_first": a, "shown_second": b, "probability": p} for one, a, b, p in each}
    return {"votes": votes, "probability": found.probability}


def _drawn_answers(chat: ChatModel, chunk: Sequence[Asked], count: int) -> list[list[Line]]:
    asked = [(answer_turns(one.prompt), one.tools) for one in chunk for _ in range(count)]
    replies = chat.reply(asked, chat.how.max_tokens)
    return [replies[at : at + count] for at in range(0, len(replies), count)]


def _so_far(rules: Constitution, drawn: Sequence[Principle], chunk: Sequence[Asked], lines: Sequence[Line], at: int):
    return rules, drawn[at], chunk[at].prompt, lines[at]["initial"]["text"]


def _about(part: str, fault: str) -> str:
    return f"{part}: {fault}" if fault else ""


def _new_line(one: Asked) -> Line:
    prompt: list[Mapping[str, Any]] = [turn.as_dict() for turn in answer_turns(one.prompt)]
    tools = {"tools": [dict(tool) for tool in one.tools]} if one.tools else {}
    return {"prompt_id": prompt_key(one.prompt).hex(), "where": one.where, "prompt": prompt, **tools}
