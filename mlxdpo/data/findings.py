"""Findings on each pair of a set: what is known of it in numbers, what is wrong with it by name, what to keep of all.

A finding is a fact and no verdict: published rules for choosing pairs contradict each other (arXiv 2502.14560,
2508.04149), so each is there by name, and none is applied unasked.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from mlxdpo.data.audit import Fit, cross_fit, label_posterior
from mlxdpo.data.read import prompt_key
from mlxdpo.types import Preference, Text, UserError

FLIP, DUPLICATE, CONTRADICTORY, OFF_TEMPLATE = "flip", "near-duplicate", "contradictory", "off-template"
FLAGS = {
    FLIP: "the other pairs say that the rejected answer is the better one",
    DUPLICATE: "nearly the same prompt and answers as an earlier pair",
    CONTRADICTORY: "another row prefers the other answer to the same prompt",
    OFF_TEMPLATE: "marks of a chat template, or the next speaker's turn, inside an answer",
}
SURE = 0.75
"""Probability, by the other pairs, that a label is wrong from which it counts as flipped."""
SIMILAR = 0.85
"""Cosine of two pairs' centred embeddings from which the later one counts as a near-duplicate."""
MARKS = re.compile(
    r"<\|[\w-]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>"
    r"|^#{2,3} ?(?:Instruction|Response|Human|Assistant):|^(?:Human|User|Assistant): ?",
    re.MULTILINE,
)
FORM = ("characters", "words", "lines", "list items", "headings", "code fences", "bold", "digits", "exclamation marks")


class AuditInput(NamedTuple):
    """What findings are made from, of N rows.

    embeddings   (N, E) what pairs are compared by
    differences  (N, D) features of chosen less those of rejected
    ches         (N,) CHES per token; reference (N, 2) log-probs of chosen and rejected, nats; lengths (N, 2) tokens
    """

    embeddings: np.ndarray
    differences: np.ndarray
    ches: np.ndarray
    reference: np.ndarray
    lengths: np.ndarray


class Audit(NamedTuple):
    """Findings of every row, and on all of them."""

    rows: list[dict[str, Any]]
    summary: dict[str, Any]


def audit_pairs(rows: Sequence[Preference], given: AuditInput, folds: int, sure: float = SURE, seed: int = 0) -> Audit:
    """The findings on `rows`. Raises `UserError` for fewer prompts than folds."""
    prompts = [prompt_key(row.prompt) for row in rows]
    try:
        looks = np.log1p(_forms(rows, 0)) - np.log1p(_forms(rows, 1))
        fit = cross_fit([given.differences, _likelihoods(given), looks], prompts, folds, seed)
        form = cross_fit([looks], prompts, folds, seed)
    except ValueError as error:
        raise UserError(f"{error}; give more pairs, or fewer --folds") from None
    right, wrong_share = label_posterior(fit.logits)
    of, similarity = nearest_earlier(given.embeddings)
    against = _contradicting(rows)
    means = given.reference / given.lengths
    found = []
    for i, row in enumerate(rows):
        flags = [FLIP] if right[i] <= 1 - sure else []
        flags += [DUPLICATE] if similarity[i] >= SIMILAR else []
        flags += [CONTRADICTORY] if against[i] is not None else []
        flags += [OFF_TEMPLATE] if any(MARKS.search(_words(answer)) for answer in (row.chosen, row.rejected)) else []
        found.append(
            {
                "row": i,
                "where": row.where,
                "flags": flags,
                "probability": round(float(right[i]), 4),
                "form_logit": round(float(form.logits[i]), 4),
                "reference_margin": round(float(given.reference[i, 0] - given.reference[i, 1]), 4),
                "reference_margin_per_token": round(float(means[i, 0] - means[i, 1]), 4),
                "ches_per_token": round(float(given.ches[i]), 4),
                "similarity": round(float(similarity[i]), 4),
                "similar_to": rows[of[i]].where if of[i] >= 0 else None,
                "contradicted_by": None if (other := against[i]) is None else rows[other].where,
                "chosen_tokens": int(given.lengths[i, 0]),
                "rejected_tokens": int(given.lengths[i, 1]),
            }
        )
    return Audit(found, _summary_of(found, fit, form, given) | {"wrong_labels": wrong_share})


def _likelihoods(given: AuditInput) -> np.ndarray:
    """(N, 3) differences of the answers' log-probs under the reference, nats, summed and per token, and of their log
    lengths: how well each fits its prompt."""
    means = given.reference / given.lengths
    columns = [a[:, 0] - a[:, 1] for a in (given.reference, means, np.log(given.lengths))]
    return np.stack(columns, axis=1)


def _summary_of(found: Sequence[Mapping[str, Any]], fit: Fit, form: Fit, given: AuditInput) -> dict[str, Any]:
    longer = given.lengths[:, 0] > given.lengths[:, 1]
    return {
        "pairs": len(found),
        "flags": {flag: sum(flag in one["flags"] for one in found) for flag in FLAGS},
        "agreement": fit.accuracy,
        "form_accuracy": form.accuracy,
        "longer": float(longer.mean()),
        "reference_accuracy": float((given.reference[:, 0] > given.reference[:, 1]).mean()),
        "displacement_expected": float((given.ches > 0).mean()),
    }


def nearest_earlier(embeddings: np.ndarray, block: int = 512) -> tuple[np.ndarray, np.ndarray]:
    """For each of N rows the earlier row with the highest cosine of centred, scaled embeddings, (N,) numbers and (N,)
    cosines; -1 and -1.0 for the first row."""
    centred = embeddings - embeddings.mean(axis=0)
    scaled = centred / (centred.std(axis=0) + 1e-6)
    unit = scaled / np.maximum(np.linalg.norm(scaled, axis=1, keepdims=True), 1e-12)
    of, best = np.full(len(unit), -1), np.full(len(unit), -1.0)
    for start in range(0, len(unit), block):
        part = unit[start : start + block] @ unit[: start + block].T
        for k, cosines in enumerate(part):
            if (i := start + k) > 0:
                of[i] = int(cosines[:i].argmax())
                best[i] = cosines[of[i]]
    return of, best


def _words(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(turn.content for turn in text)


def _contradicting(rows: Sequence[Preference]) -> list[int | None]:
    """For each row the first other one that prefers what it rejects."""
    first: dict[Any, int] = {}
    for i, row in enumerate(rows):
        first.setdefault((prompt_key(row.prompt), _words(row.chosen), _words(row.rejected)), i)
    return [first.get((prompt_key(row.prompt), _words(row.rejected), _words(row.chosen))) for row in rows]


def _forms(rows: Sequence[Preference], side: int) -> np.ndarray:
    """(N, F) counts of `FORM` in the answers of one side: what an answer looks like, whatever it says."""
    return np.array([form_counts(_words((row.chosen, row.rejected)[side])) for row in rows], np.float64)


def form_counts(text: str) -> list[int]:
    """Counts by the names of `FORM`."""
    count = lambda pattern: len(re.findall(pattern, text, re.MULTILINE))  # noqa: E731
    patterns = (r"^\s*(?:[-*•]|\d+[.)])\s", r"^#+\s", r"^```", r"\*\*[^*]+\*\*", r"\d", r"!")
    return [len(text), len(text.split()), text.count("\n") + 1, *map(count, patterns)]


SELECTIONS: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "agreed": lambda one: one["probability"],
    "hard": lambda one: -one["reference_margin_per_token"],
    "easy": lambda one: one["reference_margin_per_token"],
    "low-ches": lambda one: -one["ches_per_token"],
    "diverse": lambda one: -one["similarity"],
}
"""By what `--select NAME:SHARE` ranks pairs, best first. hard: the reference finds the rejected answer likelier, a
token; agreed: other pairs agree with the label; diverse: unlike every earlier pair."""


def selected(findings: Sequence[Mapping[str, Any]], rule: str) -> set[int]:
    """The rows that a rule NAME:SHARE keeps. Raises `UserError` for another form."""
    name, _, tail = rule.partition(":")
    try:
        share = float(tail)
    except ValueError:
        share = 0.0
    if name not in SELECTIONS or not 0 < share < 1:
        raise UserError(f"--select {rule}: expected NAME:SHARE such as low-ches:0.8; names: {', '.join(SELECTIONS)}")
    ranked = sorted(range(len(findings)), key=lambda i: (-SELECTIONS[name](findings[i]), i))
    return set(ranked[: max(1, round(share * len(ranked)))])


def chosen_rows(
    findings: Sequence[Mapping[str, Any]], drop: Collection[str], flip: bool, rule: str | None
) -> tuple[list[int], set[int]]:
    """(rows to keep, in order; those of them whose answers are exchanged). Raises `UserError` for an unknown flag."""
    for flag in drop:
        if flag not in FLAGS:
            raise UserError(f"--drop {flag}: no such flag; flags: {', '.join(FLAGS)}")
    if flip and FLIP in drop:
        raise UserError("--flip and --drop flip: a pair is either exchanged or left out; give one of them")
    kept = selected(findings, rule) if rule else set(range(len(findings)))
    left = [i for i in range(len(findings)) if i in kept and not set(findings[i]["flags"]) & set(drop)]
    return left, {i for i in left if flip and FLIP in findings[i]["flags"]}
