"""The model's own answers before and after tuning: the same prompts, the same noise, one loaded model, in batches.

A third set, drawn from the untuned model with other noise, is the control: a judge and its interval that see a
difference between it and the first one see things.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo import Preference, UserError
from mlxdpo.inner import (
    Example,
    TrainedRun,
    encode_prompt,
    finished,
    prompt_name,
    prompt_text,
    time_left,
)
from mlxdpo_eval.metrics.drift import sequence_kl

NUMBERS = 1 << 28  # logits of policy and reference together that a forward pass may hold: 1 GB in float32
ROWS = 32
Say = Callable[[str], None]
LONGEST = 256  # tokens of an answer when the data decides


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `max_tokens` 0: as long as 95 % of the held-out answers, at most `LONGEST`."""

    prompts: int = 100
    samples: int = 2
    max_tokens: int = 0
    temperature: float = 1.0
    seed: int = 0
    batch_size: int = 64


class Answers(NamedTuple):
    """Answers to prompts, one entry each: the prompt's name, its text and ids, the answer's text and ids, its end."""

    names: list[str]
    prompts: list[str]
    ids: list[list[int]]
    texts: list[str]
    tokens: list[list[int]]
    stopped: list[bool]


def default_max_tokens(examples: Sequence[Example]) -> int:
    """Tokens that hold 95 % of the held-out completions, at most `LONGEST`."""
    lengths = [count for example in examples for count in example.scored]
    return min(LONGEST, int(np.ceil(np.quantile(lengths, 0.95))))


def sample_before_after(
    opened: TrainedRun, rows: Sequence[Preference], sampling: Sampling, say: Say = lambda text: None
) -> tuple[Answers, Answers, Answers]:
    """(before, after, control): `samples` answers a prompt before and after, one more from before as control.

    The k-th answer to a prompt meets the same noise before and after. Raises `UserError` as `sample_answers`.
    """
    before, control = sample_start(opened, rows, sampling, say)
    return before, sample_tuned(opened, rows, sampling, say), control


def sample_start(
    opened: TrainedRun, rows: Sequence[Preference], sampling: Sampling, say: Say = lambda text: None
) -> tuple[Answers, Answers]:
    """Before and control of `sample_before_after`."""
    k = sampling.samples
    with opened.start() as model:
        drawn = sample_answers(opened, model, rows, k + 1, sampling, say, "answers before")
    last = [i % (k + 1) == k for i in range(len(drawn.names))]
    return _select_answers(drawn, [not x for x in last]), _select_answers(drawn, last)


def sample_tuned(
    opened: TrainedRun, rows: Sequence[Preference], sampling: Sampling, say: Say = lambda text: None
) -> Answers:
    """After of `sample_before_after`: answers of the weights that are in `opened.policy` now."""
    return sample_answers(opened, opened.policy.model, rows, sampling.samples, sampling, say, "answers after")


def sample_answers(
    opened: TrainedRun,
    model: Any,
    rows: Sequence[Preference],
    count: int,
    sampling: Sampling,
    say: Say = lambda text: None,
    called: str = "answers",
) -> Answers:
    """`count` answers of `model` to the prompt of each row, those to one prompt next to one another.

    The k-th answer to a prompt meets the same noise whatever the model. `say` is told every ten seconds how many
    answers, by the name `called`, are done and how long the rest will take. Raises `UserError` for a prompt that the
    template refuses.
    """
    data, tokenizer = opened.config.data, opened.policy.tokenizer
    ids = [encode_prompt(row.prompt, tokenizer, data, row.tools).tolist() for row in rows]
    repeated = [(row, one) for row, one in zip(rows, ids, strict=True) for _ in range(count)]
    sampled: list[int] = []  # tokens of every step so far
    steps = finished(
        model,
        [one for _, one in repeated],
        max_tokens=sampling.max_tokens,
        eos_ids=opened.policy.eos_ids,
        temperature=sampling.temperature,
        seed=sampling.seed,
        batch_size=sampling.batch_size,
        count=sampled.append,
    )
    longest = max(1, len(repeated) * sampling.max_tokens)  # if no answer ends by itself
    found = dict(time_left(steps, len(repeated), called, say, share=lambda: sum(sampled) / longest))
    done = [found[i] for i in range(len(repeated))]
    return Answers(
        [prompt_name(row.prompt) for row, _ in repeated],
        [prompt_text(row.prompt) for row, _ in repeated],
        [one for _, one in repeated],
        [tokenizer.decode(c.tokens) for c in done],
        [list(c.tokens) for c in done],
        [c.finish == "stop" for c in done],
    )


def _select_answers(answers: Answers, kept: Sequence[bool]) -> Answers:
    fields: list[Any] = [list(itertools.compress(field, kept)) for field in answers]
    return Answers(*fields)


def first_answers(answers: Answers) -> Answers:
    """The first answer to each prompt."""
    seen: set[str] = set()
    return _select_answers(answers, [not (name in seen or seen.add(name)) for name in answers.names])


def on_policy_kl(opened: TrainedRun, answers: Answers, temperature: float, say: Say = lambda text: None) -> list[float]:
    """KL(policy || reference) along each of the tuned policy's own answers: nats per sequence, exact per step.

    `temperature` is the one the answers were drawn at: both distributions are taken at it, so that they are the
    ones compared. `say` is told every ten seconds how long the rest will take. Raises `UserError` at 0, where the
    policy is no distribution.
    """
    if temperature <= 0:
        raise UserError("the KL of greedy answers is not a divergence of the policy; sample at --temperature 1")
    result = [0.0] * len(answers.ids)
    vocabulary = int(opened.policy.model(mx.array([[0]])).shape[-1])
    batches, order = list[list[int]](), sorted(range(len(answers.ids)), key=lambda i: -_token_count(answers, i))
    while order:
        rows = max(1, min(ROWS, NUMBERS // (2 * vocabulary * _token_count(answers, order[0]))))
        batches.append(order[:rows])
        order = order[rows:]
    for here in time_left(batches, len(batches), "batches of answers whose drift is measured", say):
        for i, nats in zip(here, _batch_kl(opened, answers, here, temperature), strict=True):
            result[i] = nats
    return result


def _token_count(answers: Answers, i: int) -> int:
    return len(answers.ids[i]) + len(answers.tokens[i])


def _batch_kl(opened: TrainedRun, answers: Answers, here: list[int], temperature: float) -> list[float]:
    tokens, mask = _pad_answers(answers, here)
    first = min(len(answers.ids[i]) for i in here) - 1  # before it there is only prompt
    opened.policy.model.eval()  # dropout on the adapters would make it another policy
    tuned = opened.policy.model(tokens)[:, first:] / temperature
    mx.eval(tuned)
    with opened.reference() as model:
        base = model(tokens)[:, first:] / temperature
        mx.eval(base)
    opened.policy.model.train()
    return sequence_kl(lambda at: tuned[:, at], lambda at: base[:, at], mask[:, first:]).tolist()


def _pad_answers(answers: Answers, here: list[int]) -> tuple[mx.array, mx.array]:
    """(R, T) rows and masks, 1 where the position's next token was drawn (the one that ends the answer included)."""
    rows = [answers.ids[i] + answers.tokens[i] for i in here]
    tokens, mask = (np.zeros((len(rows), max(map(len, rows))), kind) for kind in (np.int32, np.float32))
    for row, (i, ids) in enumerate(zip(here, rows, strict=True)):
        tokens[row, : len(ids)] = ids
        start = len(answers.ids[i]) - 1
        mask[row, start : start + len(answers.tokens[i]) + answers.stopped[i]] = 1
    return mx.array(tokens), mx.array(mask)
