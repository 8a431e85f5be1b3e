"""Rounds of tuning, measured on the same held-out prompts with the same noise, and the rule by which they stop.

A round is gamed when its judge rises while another judge, which ranks nothing, surely falls: reward
over-optimisation as in arXiv 2210.10760, seen from outside. "Surely" is a 95 % interval, clustered by prompt, that
lies on one side of 0; each round is held against the one before and against the start, so a rule that looks 2 N times
in N rounds stops by chance in at most 2.5 % of the looks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mlxdpo import Preference
from mlxdpo.inner import TrainedRun
from mlxdpo_eval.judges import AnswerPair, Judge, Scalar, ask_both
from mlxdpo_eval.metrics.drift import text_stats
from mlxdpo_eval.metrics.intervals import Interval, clustered_mean, paired_difference
from mlxdpo_eval.results import to_json
from mlxdpo_eval.sampling import Answers, Sampling, on_policy_kl, sample_tuned

RoundJson = Mapping[str, Any]
BASES = ("from_previous", "from_start")


def measure_round(
    opened: TrainedRun, rows: Sequence[Preference], judges: Sequence[Judge], sampling: Sampling, start: RoundJson | None
) -> dict[str, Any]:
    """The answers of the model in `opened.policy` with each judge's score and their KL to `opened.reference`, nats.

    `start` is the start as measured, which itself has none. A judge that only compares scores an answer 1, 1/2 or 0
    by whether it beats the start's answer to the same prompt and noise, both orders asked.
    """
    answers = sample_tuned(opened, rows, sampling)
    kl = [0.0] * len(answers.names) if start is None else on_policy_kl(opened, answers, sampling.temperature)
    scores = [_judge_scores(judge, answers, start) for judge in judges]
    lines = [
        {
            "prompt_id": name,
            "prompt": answers.prompts[i],
            "text": answers.texts[i],
            "tokens": list(answers.tokens[i]),
            "stopped": answers.stopped[i],
            "kl": kl[i],
            "scores": [own[i] for own in scores],
        }
        for i, name in enumerate(answers.names)
    ]
    settings = {"seed": sampling.seed, "max_tokens": sampling.max_tokens, "temperature": sampling.temperature}
    return {"judges": [judge.name for judge in judges], "settings": settings, "answers": to_json(lines)}


def _judge_scores(judge: Judge, answers: Answers, start: RoundJson | None) -> list[float | None]:
    if isinstance(judge, Scalar):
        found = judge.scores(answers.prompts, answers.texts)
        return [float(value) if math.isfinite(value) else None for value in found]
    if start is None:
        return [0.5] * len(answers.texts)
    before = [line["text"] for line in start["answers"]]
    asked = [AnswerPair(*one) for one in zip(answers.prompts, before, answers.texts, strict=True)]
    return [None if b.logit is None else (1 + float(np.sign(b.logit))) / 2 for b in ask_both(judge, asked)]


def summarize_round(measured: Sequence[RoundJson], max_kl: float) -> tuple[dict[str, Any], str]:
    """The numbers of the last of `measured` (start first, then rounds), and why to stop after it; "" to go on.

    `max_kl` is in nats per token of the answers, their ends included.
    """
    last, number = measured[-1]["answers"], len(measured) - 1
    names = [line["prompt_id"] for line in last]
    lengths = np.array([len(line["tokens"]) + line["stopped"] for line in last], float)
    kl = np.array([line["kl"] for line in last])
    judged = [_judge_summary(measured, place) for place in range(len(measured[-1]["judges"]))]
    row = {
        "judges": judged,
        "kl": float(kl.mean()),
        "kl_interval": clustered_mean(kl, names),
        "kl_per_token": float(kl.sum() / max(1.0, lengths.sum())),
        "texts": text_stats([line["tokens"] for line in last], [line["stopped"] for line in last])._asdict(),
        "answers": len(last),
        "prompts": len(set(names)),
    }
    over = clustered_mean(kl - max_kl * lengths, names)
    return to_json(row), _judges_against(judged, number) or _drift_against(over, row["kl_per_token"], max_kl)


def _judge_summary(measured: Sequence[RoundJson], place: int) -> dict[str, Any]:
    """One judge's scores of the last round: their mean, and paired changes. Answers without a score are left out."""
    scores = [[line["scores"][place] for line in one["answers"]] for one in measured]
    names = [line["prompt_id"] for line in measured[-1]["answers"]]
    valid = [(value, name) for value, name in zip(scores[-1], names, strict=True) if value is not None]
    mean = [value for value, _ in valid]
    return {
        "name": measured[-1]["judges"][place],
        "mean": float(np.mean(mean)) if mean else None,
        "interval": clustered_mean(mean, [name for _, name in valid]) if mean else None,
        "from_previous": None if len(measured) < 2 else _paired_change(scores[-2], scores[-1], names),
        "from_start": None if len(measured) < 2 else _paired_change(scores[0], scores[-1], names),
        "left_out": len(names) - len(mean),
    }


def _paired_change(old: Sequence[Any], new: Sequence[Any], names: Sequence[str]) -> Interval | None:
    kept = [(o, n, name) for o, n, name in zip(old, new, names, strict=True) if o is not None and n is not None]
    if not kept:
        return None
    return paired_difference([o for o, _, _ in kept], [n for _, n, _ in kept], [name for _, _, name in kept])


def _judges_against(judged: Sequence[Mapping[str, Any]], number: int) -> str:
    """What the judges say against going on."""
    if not number:
        return ""
    first, *others = judged
    for base, since in zip(BASES, (f"round {number - 1}", "the start"), strict=True):
        rise = first[base]
        for other in others:
            fall = other[base]
            if rise is not None and fall is not None and rise.estimate > 0 and fall.high < 0:
                return (
                    f"round {number}: {first['name']} is being gamed: since {since} it rose by {_signed(rise)} while "
                    f"{other['name']}, which ranked nothing, fell by {_signed(fall)}"
                )
    fall = first["from_previous"]
    if fall is not None and fall.high < 0:
        return f"round {number}: {first['name']} itself fell since round {number - 1}, by {_signed(fall)}"
    return ""


def _drift_against(over: Interval | None, per_token: float, max_kl: float) -> str:
    if over is None or over.low <= 0:
        return ""
    return (
        f"the KL from the start is {per_token:.3f} nats per token, significantly above rounds.max_kl {max_kl:g}: "
        f"further gains by the judge come from drift"
    )


def _signed(change: Interval) -> str:
    return f"{change.estimate:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
