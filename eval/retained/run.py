"""The retained checks of a run: both models answer the same items, without sampling noise.

Items with options are scored by the probability of the right ones among the four: softmax of summed log-probs in nats
through the end of the turn. Instructions and formats are scored by greedy answers, passages by likelihood per token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from mlxdpo import Preference
from mlxdpo.inner import TrainedRun, encode_pairs, encode_prompt, generate, pair_logps
from mlxdpo_eval.metrics.areas import Changes, area_changes, area_scores
from mlxdpo_eval.retained.check import RetainedCheck
from mlxdpo_eval.retained.checks import retained_checks
from mlxdpo_eval.retained.texts import PASSAGE_AREA

MAX_TOKENS = 40  # of an answer: all that are asked for are shorter
BATCH = 64
CHAT = {"template": "auto", "eos": "score", "max_length": 1024, "credit": None, "reasoning": "keep"}
PLAIN = CHAT | {"template": "plain", "eos": "leave"}


class Retained(NamedTuple):
    """What the checks found: perplexity of the neutral passages besides, and the seconds it took."""

    changes: Changes
    perplexity: tuple[float, float]
    seconds: float


class CheckScores(NamedTuple):
    """(n,) scores of items before and after, and what each of them answered."""

    before: list[float]
    after: list[float]
    answers: list[tuple[str, str] | None]


def check_retained(
    opened: TrainedRun, limit: int | None = None, say: Callable[[str], None] = lambda text: None
) -> tuple[Retained, list[dict[str, Any]]]:
    """The bundled checks before and after, `limit` of each area, and a line per item for a file."""
    started = time.monotonic()
    checks = retained_checks(limit)
    say(f"checking what was retained: {len(checks)} items, before and after")
    found = score_checks(opened, checks)
    scores = area_scores([check.area for check in checks], found.before, found.after, PASSAGE_AREA)
    text = scores[PASSAGE_AREA]
    perplexity = tuple(float(np.exp(-np.log(side).mean())) for side in (text.before, text.after))
    # Of a passage the share of its likelihood per token that is left: its drop is then in percent.
    scores[PASSAGE_AREA] = text._replace(before=np.ones_like(text.before), after=text.after / text.before)
    lines = [
        {"area": c.area, "prompt": c.prompt, "options": list(c.options), "before": b, "after": a}
        | ({} if answer is None else {"answers": list(answer)})
        for c, b, a, answer in zip(checks, found.before, found.after, found.answers, strict=True)
    ]
    return Retained(area_changes(scores), (perplexity[0], perplexity[1]), time.monotonic() - started), lines


def score_checks(opened: TrainedRun, checks: Sequence[RetainedCheck]) -> CheckScores:
    """Each check's score before and after, in order."""
    before, after = np.zeros(len(checks)), np.zeros(len(checks))
    answers: list[tuple[str, str] | None] = [None] * len(checks)
    kinds: dict[Any, list[int]] = {_option_scores: [], _passage_scores: [], _answer_scores: []}
    for i, check in enumerate(checks):
        scorer = _answer_scores if check.passes else _option_scores if len(check.options) > 1 else _passage_scores
        kinds[scorer].append(i)
    for scorer, rows in kinds.items():
        if rows:
            before[rows], after[rows], texts = scorer(opened, [checks[i] for i in rows])
            for i, text in zip(rows, texts, strict=True):
                answers[i] = text
    return CheckScores(before.tolist(), after.tolist(), answers)


Scores = tuple[np.ndarray, np.ndarray, Sequence[tuple[str, str] | None]]


def _with_data(opened: TrainedRun, settings: dict[str, Any]) -> TrainedRun:
    """The run with text encoded as the checks need it, and the model before tuning for its reference."""
    data = opened.config.data.model_copy(update=settings)
    return opened._replace(config=opened.config.model_copy(update={"data": data}), reference=opened.start)


def _is_chat(opened: TrainedRun) -> bool:
    return bool(opened.policy.tokenizer.chat_template)


def _asked(check: RetainedCheck, chat: bool) -> str:
    """The prompt, for a model without a chat template as the beginning of a document."""
    return check.prompt if chat else f"Question: {check.prompt}\nAnswer:"


def _both_logps(
    opened: TrainedRun, rows: list[Preference], settings: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(2, B) before, (2, B) after, (2, B) lengths in tokens of the two completions of each row."""
    ready = _with_data(opened, settings)
    kept, examples, report = encode_pairs(ready, rows)
    if len(kept) != len(rows):
        raise ValueError(
            f"{len(rows) - len(kept)} of {len(rows)} checks cannot be encoded: {'; '.join(report.lines())}"
        )
    found = pair_logps(ready, examples)
    return (
        np.array([found.ref_chosen, found.ref_rejected]),
        np.array([found.chosen, found.rejected]),
        np.array([found.chosen_len, found.rejected_len]),
    )


def _option_scores(opened: TrainedRun, checks: Sequence[RetainedCheck]) -> Scores:
    """Two options of a question are the two completions of a row, so each is scored once."""
    chat = _is_chat(opened)
    rows = [
        Preference(_asked(check, chat), *(o if chat else f" {o}" for o in check.options[at : at + 2]), where="retained")
        for check in checks
        for at in (0, 2)
    ]
    before, after, _ = _both_logps(opened, rows, CHAT)
    is_right = np.arange(4) < np.array([[check.right] for check in checks])
    shares = [special.softmax(side.T.reshape(len(checks), 4), axis=1) for side in (before, after)]
    return (shares[0] * is_right).sum(1), (shares[1] * is_right).sum(1), [None] * len(checks)


def _passage_scores(opened: TrainedRun, checks: Sequence[RetainedCheck]) -> Scores:
    """exp(mean log-prob of a token): 1 / perplexity of each passage."""
    # A row has two completions that differ; the first sentence alone is the shortest second one that is also text.
    texts = [(check.options[0], check.options[0].split(".")[0]) for check in checks]
    rows = [Preference(check.prompt, *text, where="retained") for check, text in zip(checks, texts, strict=True)]
    before, after, lengths = _both_logps(opened, rows, PLAIN)
    return np.exp(before[0] / lengths[0]), np.exp(after[0] / lengths[0]), [None] * len(checks)


def _answer_scores(opened: TrainedRun, checks: Sequence[RetainedCheck]) -> Scores:
    with opened.start() as model:
        before = _greedy_answers(opened, model, checks)
    after = _greedy_answers(opened, opened.policy.model, checks)
    passed = [
        np.array(
            [float(check.passes is not None and check.passes(text)) for check, text in zip(checks, side, strict=True)]
        )
        for side in (before, after)
    ]
    return passed[0], passed[1], list(zip(before, after, strict=True))


def _greedy_answers(opened: TrainedRun, model: Any, checks: Sequence[RetainedCheck]) -> list[str]:
    """The likeliest answers, without the space around them; of a document, up to the next question."""
    ready, chat = _with_data(opened, CHAT), _is_chat(opened)
    tokenizer = opened.policy.tokenizer
    prompts = [encode_prompt(_asked(check, chat), tokenizer, ready.config.data).tolist() for check in checks]
    done = generate(
        model, prompts, max_tokens=MAX_TOKENS, eos_ids=opened.policy.eos_ids, temperature=0.0, batch_size=BATCH
    )
    texts = [tokenizer.decode(c.tokens) for c in done]
    return [(text if chat else text.split("\nQuestion:")[0]).strip() for text in texts]
