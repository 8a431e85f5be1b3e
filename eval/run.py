"""The evaluation of a run, start to end: score held-out pairs, answer before and after, judge, measure drift, write.

RUN/eval/results_<time>.json   every number, with its settings
RUN/eval/eval_pairs.jsonl      per held-out pair: what the pair metrics are made of
RUN/eval/eval_samples.jsonl    per pair of answers: texts, KL, every verdict in both orders
RUN/report.html, RUN/report.md
"""

from __future__ import annotations

import datetime
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxdpo import (
    Opened,
    Run,
    distinct_prompts,
    encode_pairs,
    heldout_pairs,
    pair_logps,
    reopen,
    versions,
    write_json,
    write_text,
)

from .clustered import clustered_mean
from .heldout import Heldout, heldout, pair_lines
from .judges import Both, Judge
from .judges.program import OWN, reward_judge
from .plain import plain
from .sampling import Answers, Sampling, draw, first_of_each, on_policy_kl, usual_length
from .sentences import Headline, of_answers, of_pairs
from .texts import length_ratio, text_report
from .winrate import WinRate, judge_answers, win_rate

Say = Callable[[str], None]
FORMAT = 1


class Judged(NamedTuple):
    """One judge's result, its verdicts, and its control: untuned answers against untuned answers."""

    result: WinRate
    found: list[Both]
    control: WinRate


class Evaluation(NamedTuple):
    """What was found: `results` as written, `worst_judge` the largest share of invalid verdicts and whose it is."""

    results: dict[str, Any]
    file: Path
    worst_judge: tuple[float, str]


def evaluate(
    run: Run,
    judges: Sequence[Judge],
    sampling: Sampling,
    data: str | None = None,
    votes: Judge | None = None,
    say: Say = lambda text: None,
) -> Evaluation:
    """Measure a run and write everything. `votes` are human votes on the same answers, if there are any.

    Raises `UserError` when the run's model or reference is another one, or there are no held-out pairs.
    """
    started = time.monotonic()
    rows, report, source = heldout_pairs(run, data)
    opened = reopen(run)
    rows, examples, encoding = encode_pairs(opened, rows)
    say(f"scoring {len(rows)} held-out pairs ({source})")
    logps = pair_logps(opened, examples)
    sampling = sampling if sampling.max_tokens else replace(sampling, max_tokens=usual_length(examples))
    prompts = distinct_prompts(rows, sampling.prompts)
    say(f"answering {len(prompts)} prompts, {sampling.samples} x before and after, to {sampling.max_tokens} tokens")
    before, after, control = draw(opened, prompts, sampling)
    say("measuring drift")
    kl_of = first_of_each(after)
    kl = on_policy_kl(opened, kl_of, sampling.temperature)
    judged = [_judge(judge, before, after, control, votes, say) for judge in judges]
    pairs = heldout(opened, rows, logps)
    results = {
        "format": FORMAT,
        "run": describe(opened),
        "settings": asdict(sampling) | {"judges": {judge.name: dict(judge.identity) for judge in judges}},
        "data": {"source": source, "pairs": len(rows), "left_out": report.lines() + encoding.lines()},
        **_findings(judged, pairs, before, after),
        "drift": drift(before, after, kl_of, kl),
        "versions": versions(),
    }
    write_lines(run.path / "eval" / "eval_pairs.jsonl", pair_lines(opened, rows, logps))
    lines = sample_lines(before, after, dict(zip(kl_of.names, kl, strict=True)), judged)
    write_lines(run.path / "eval" / "eval_samples.jsonl", lines)
    file, written = _save(run, results, time.monotonic() - started)
    worst = max(((j.result.invalid_share, j.result.judge) for j in judged), default=(0.0, ""))
    return Evaluation(written, file, worst)


def _findings(judged: Sequence[Judged], pairs: Heldout, before: Answers, after: Answers) -> dict[str, Any]:
    baseline = reward_judge("longest", OWN["longest"])
    return {
        "headline": _headline(judged, pairs),
        "sentences": [of_answers(j.result).sentence for j in judged] + [of_pairs(pairs).sentence],
        "pairs": pairs,
        "winrates": [j.result for j in judged],
        "controls": {
            "reference_vs_reference": [j.control for j in judged],
            "longest": win_rate(baseline, judge_answers(baseline, before, after), before, after),
        },
    }


def _save(run: Run, results: dict[str, Any], seconds: float) -> tuple[Path, dict[str, Any]]:
    """The results file; only `when` differs between two runs of the same evaluation."""
    now = datetime.datetime.now(datetime.UTC).replace(microsecond=0)
    written = plain(results) | {"when": {"created": now.isoformat(), "seconds": round(seconds, 1)}}
    file = run.path / "eval" / f"results_{now:%Y-%m-%dT%H-%M-%S}.json"
    write_json(file, written)
    return file, written


def _judge(judge: Judge, before: Answers, after: Answers, control: Answers, votes: Judge | None, say: Say) -> Judged:
    say(f"judging {len(before.texts)} pairs of answers: {judge.name}")
    human = None if votes is None else judge_answers(votes, before, after)
    found, first = judge_answers(judge, before, after), first_of_each(before)
    against = win_rate(judge, judge_answers(judge, first, control), first, control)
    return Judged(win_rate(judge, found, before, after, human), found, against)


def _headline(judged: Sequence[Judged], pairs: Heldout) -> Headline:
    """The first judge named speaks; without one the held-out pairs do."""
    return of_answers(judged[0].result) if judged else of_pairs(pairs)


def drift(before: Answers, after: Answers, kl_of: Answers, kl: Sequence[float]) -> dict[str, Any]:
    """KL along the policy's own answers (the first to each prompt), and the form of the texts."""
    tokens = [len(t) + s for t, s in zip(kl_of.tokens, kl_of.stopped, strict=True)]
    old, new = ([float(len(t)) for t in side.tokens] for side in (before, after))
    return {
        "kl": float(np.mean(kl)),
        "kl_interval": clustered_mean(kl, kl_of.names),
        "kl_per_token": float(np.sum(kl) / max(1, sum(tokens))),
        "answers": len(kl),
        "before": text_report(before.tokens, before.stopped, before.names),
        "after": text_report(after.tokens, after.stopped, after.names),
        "length_ratio": length_ratio(old, new, before.names),
        "same": sum(a == b for a, b in zip(before.texts, after.texts, strict=True)) / len(after.texts),
    }


def describe(opened: Opened) -> dict[str, Any]:
    """Whose numbers these are: model, reference, adapter, objective, data."""
    config, manifest = opened.config, opened.run.manifest()
    adapter = opened.run.adapter / "adapters.safetensors"
    return {
        "name": opened.run.path.name,
        "model": manifest["model"],
        "reference": manifest["reference"],
        "reference_source": manifest["reference_source"],
        "adapter_sha256": hashlib.sha256(adapter.read_bytes()).hexdigest(),
        "template": manifest["template"],
        "loss": config.loss.model_dump(),
        "training_pairs": manifest["data"]["pairs"],
        "seed": manifest["seed"],
    }


def sample_lines(
    before: Answers, after: Answers, kl: Mapping[str, float], judged: Sequence[Judged]
) -> list[dict[str, Any]]:
    """One line per pair of answers; `kl` stands at the first answer of each prompt."""
    lines, numbers = [], dict[str, int]()
    for i, name in enumerate(before.names):
        number = numbers[name] = numbers.get(name, -1) + 1
        verdicts = {
            j.result.judge: {
                "shown_first": b.first,
                "shown_second": b.second,
                "logit": b.logit,
                "reason": b.reason,
                "same": b.same,
            }
            for j in judged
            for b in (j.found[i],)
        }
        lines.append(
            {
                "prompt_id": name,
                "sample": number,
                "prompt": before.prompts[i],
                "before": before.texts[i],
                "after": after.texts[i],
                "tokens": [len(before.tokens[i]), len(after.tokens[i])],
                "stopped": [before.stopped[i], after.stopped[i]],
                "kl": kl[name] if number == 0 else None,
                "verdicts": verdicts,
            }
        )
    return lines


def write_lines(file: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """JSON lines, whole or absent."""
    write_text(file, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
