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
from mlxdpo.inner import TrainedRun, encode_pairs, encode_prompt, generate, model_logps
from mlxdpo_eval.metrics.areas import AreaScores, Changes, area_changes, area_scores
from mlxdpo_eval.retained.check import RetainedCheck
from mlxdpo_eval.retained.checks import retained_checks
from mlxdpo_eval.retained.texts import PASSAGE_AREA

MAX_TOKENS = 40  # of an answer: all that are asked for are shorter
BATCH = 64  # prompts that are answered at once
PAIRS = 8  # scored at once
CHAT = {"template": "auto", "eos": "score", "max_length": 1024, "credit": None, "reasoning": "keep"}
PLAIN = CHAT | {"template": "plain", "eos": "leave"}


class Retained(NamedTuple):
    """What the checks found: perplexity of the neutral passages besides, and the seconds it took."""

    changes: Changes
    perplexity: tuple[float, float]
    seconds: float


class ModelScores(NamedTuple):
    """(n,) scores of the items under one model, and the text of those that it answered."""

    scores: np.ndarray
    answers: list[str | None]


def check_retained(
    opened: TrainedRun, limit: int | None = None, say: Callable[[str], None] = lambda text: None
) -> tuple[Retained, list[dict[str, Any]]]:
    """The bundled checks before and after, `limit` of each area, and a line per item for a file."""
    started = time.monotonic()
    checks = retained_checks(limit)
    say(f"checking what was retained: {len(checks)} items, before and after")
    with opened.start() as model:
        before = score_checks(opened, model, checks)
    after = score_checks(opened, opened.policy.model, checks)
    scores = areas_of(checks, before, after)
    perplexity = tuple(
        float(np.exp(-np.log(side.scores[[check.area == PASSAGE_AREA for check in checks]]).mean()))
        for side in (before, after)
    )
    lines = [
        {"area": check.area, "prompt": check.prompt, "options": list(check.options), "before": first, "after": last}
        | ({} if old is None else {"answers": [old, new]})
        for check, first, last, old, new in zip(
            checks, before.scores.tolist(), after.scores.tolist(), before.answers, after.answers, strict=True
        )
    ]
    return Retained(area_changes(scores), (perplexity[0], perplexity[1]), time.monotonic() - started), lines


def areas_of(checks: Sequence[RetainedCheck], before: ModelScores, after: ModelScores) -> dict[str, AreaScores]:
    """The scores of each area; of a passage the share of its likelihood per token that is left: a drop in percent."""
    scores = area_scores([check.area for check in checks], before.scores, after.scores, PASSAGE_AREA)
    text = scores[PASSAGE_AREA]
    return scores | {PASSAGE_AREA: text._replace(before=np.ones_like(text.before), after=text.after / text.before)}


def score_checks(opened: TrainedRun, model: Any, checks: Sequence[RetainedCheck]) -> ModelScores:
    """Each check's score under one model of a run, in order."""
    scores = np.zeros(len(checks))
    answers: list[str | None] = [None] * len(checks)
    kinds: dict[Any, list[int]] = {_option_scores: [], _passage_scores: [], _answer_scores: []}
    for i, check in enumerate(checks):
        scorer = _answer_scores if check.passes else _option_scores if len(check.options) > 1 else _passage_scores
        kinds[scorer].append(i)
    for scorer, rows in kinds.items():
        if rows:
            scores[rows], texts = scorer(opened, model, [checks[i] for i in rows])
            for i, text in zip(rows, texts, strict=True):
                answers[i] = text
    return ModelScores(scores, answers)


Scored = tuple[np.ndarray, Sequence[str | None]]


def _with_data(opened: TrainedRun, settings: dict[str, Any]) -> TrainedRun:
    """The run with text encoded as the checks need it."""
    data = opened.config.data.model_copy(update=settings)
    return opened._replace(config=opened.config.model_copy(update={"data": data}))


def _is_chat(opened: TrainedRun) -> bool:
    return bool(opened.policy.tokenizer.chat_template)


def _asked(check: RetainedCheck, chat: bool) -> str:
    """The prompt, for a model without a chat template as the beginning of a document."""
    return check.prompt if chat else f"Question: {check.prompt}\nAnswer:"


def _logps_and_lengths(
    opened: TrainedRun, model: Any, rows: list[Preference], settings: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """(2, B) log-probs of the two completions of each row, nats, and their (2, B) lengths in tokens."""
    ready = _with_data(opened, settings)
    kept, examples, report = encode_pairs(ready, rows)
    if len(kept) != len(rows):
        raise ValueError(
            f"{len(rows) - len(kept)} of {len(rows)} checks cannot be encoded: {'; '.join(report.lines())}"
        )
    logps = model_logps(model, examples, ready.config.data.group, PAIRS)
    return logps, np.array([example.scored for example in examples]).T


def _option_scores(opened: TrainedRun, model: Any, checks: Sequence[RetainedCheck]) -> Scored:
    """Two options of a question are the two completions of a row, so each is scored once."""
    chat = _is_chat(opened)
    rows = [
        Preference(_asked(check, chat), *(o if chat else f" {o}" for o in check.options[at : at + 2]), where="retained")
        for check in checks
        for at in (0, 2)
    ]
    logps, _ = _logps_and_lengths(opened, model, rows, CHAT)
    is_right = np.arange(4) < np.array([[check.right] for check in checks])
    shares = special.softmax(logps.T.reshape(len(checks), 4), axis=1)
    return (shares * is_right).sum(1), [None] * len(checks)


def _passage_scores(opened: TrainedRun, model: Any, checks: Sequence[RetainedCheck]) -> Scored:
    """exp(mean log-prob of a token): 1 / perplexity of each passage."""
    # A row has two completions that differ; the first sentence alone is the shortest second one that is also text.
    texts = [(check.options[0], check.options[0].split(".")[0]) for check in checks]
    rows = [Preference(check.prompt, *text, where="retained") for check, text in zip(checks, texts, strict=True)]
    logps, lengths = _logps_and_lengths(opened, model, rows, PLAIN)
    return np.exp(logps[0] / lengths[0]), [None] * len(checks)


def _answer_scores(opened: TrainedRun, model: Any, checks: Sequence[RetainedCheck]) -> Scored:
    texts = _greedy_answers(opened, model, checks)
    passed = [float(check.passes is not None and check.passes(text)) for check, text in zip(checks, texts, strict=True)]
    return np.array(passed), texts


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
