"""Verdicts as other harnesses write them: read without their packages, each in its own file's terms.

alpaca_eval      annotations.json: preference 1 (baseline) to 2 (model), 0 and 1.5 a tie, null no verdict
arena_hard       model_judgment/JUDGE/MODEL.jsonl: two games, the baseline first in the first one, A>>B to B>>A
mt_bench         JUDGE_pair.jsonl of FastChat: g1_winner and g2_winner, model_1, model_2, tie or error
rewardbench_2    one object per prompt with scores of its completions, the right ones first, or results
inspect          an EvalLog, JSON or .eval: values of one scorer, samples by id, epochs below
lines            {"prompt", "a", "b", "verdict": "a" | "b" | "tie" | null}: the rate is b's; where known "a_finish" and
                 "b_finish", "length" for an answer that was cut off at its limit of tokens
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxdpo import UserError

Row = Mapping[str, Any]
DECISIVE = 3  # A>>B counts as three games in Arena-Hard-Auto's show_result.py


class Annotation(NamedTuple):
    """One verdict: `outcome` 1 for the model, 0 for the baseline, None with the `reason` when there is none.

    `longer` is the model's length less the baseline's in characters, where both answers are there. `orders` are the
    outcomes with the model shown first and second, where both were asked. `cut_off`: an answer ended at its limit of
    tokens, so the verdict is on a part of it. `subset` names the part of the benchmark, where rows say so.
    """

    prompt: str
    outcome: float | None
    reason: str = ""
    longer: float | None = None
    orders: tuple[float, float] | None = None
    cut_off: bool = False
    subset: str | None = None


class Theirs(NamedTuple):
    """What the other harness reports of the same file: its estimate, its interval if it has one, and what that is."""

    estimate: float
    low: float | None
    high: float | None
    about: str


class Annotations(NamedTuple):
    """A file as read: its format, its verdicts, and what its own harness makes of them."""

    format: str
    rows: list[Annotation]
    theirs: Theirs | None


def read_annotations(
    source: str | Path | Iterable[Row], format: str = "auto", model: str | None = None, scorer: str | None = None
) -> Annotations:
    """Verdicts of a file, or of rows already read.

    `model` picks whose rate where a file has several models, `scorer` which of an inspect log's. Raises `UserError` for
    a file that cannot be read, rows of no known shape, and a choice that the file leaves open.
    """
    name, rows = ("rows", list(source)) if not isinstance(source, str | Path) else (str(source), _read(Path(source)))
    if not rows:
        raise UserError(f"{name} holds no rows; a file of verdicts has at least one")
    if bad := [i for i, row in enumerate(rows, 1) if not isinstance(row, Mapping)]:
        raise UserError(f"{name}: entry {bad[0]} is not an object; a file of verdicts is a list of objects")
    found = _detect(rows[0]) if format == "auto" else format
    if found not in FORMATS:
        asked = f"unknown format {format!r}" if format != "auto" else f"{name}: columns {', '.join(rows[0])} match none"
        raise UserError(f"{asked}; the formats of verdicts are {', '.join(FORMATS)}")
    try:
        verdicts, theirs = FORMATS[found](rows, model, scorer)
    except (KeyError, TypeError, IndexError) as error:
        raise UserError(f"{name}: a row does not have the shape of {found} ({error!r}); name another format") from None
    return Annotations(found, verdicts, theirs)


def _read(path: Path) -> list[Row]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = [name for name in archive.namelist() if name.startswith("samples/")]
                return [{"samples": [json.loads(archive.read(name)) for name in sorted(names)]}]
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); give a JSON, JSON lines or .eval file") from None
    try:
        whole = json.loads(text)
        return whole if isinstance(whole, list) else [whole]
    except ValueError:
        return [
            _object_of(line, f"{path}:{number}") for number, line in enumerate(text.splitlines(), 1) if line.strip()
        ]


def _object_of(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: not JSON ({error}); fix the line") from None
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected a JSON object, found {type(row).__name__}; fix the line")
    return row


def _detect(row: Row) -> str:
    marks = {
        "alpaca_eval": {"preference", "output_1", "output_2"},
        "arena_hard": {"games", "model"},
        "mt_bench": {"g1_winner", "g2_winner"},
        "inspect": {"samples"},
        "lines": {"prompt", "verdict"},
    }
    for name, keys in marks.items():
        if keys <= row.keys():
            return name
    return "rewardbench_2" if {"scores", "results"} & row.keys() and {"subset", "id", "prompt"} & row.keys() else ""


def _choose(given: str | None, known: Iterable[str], what: str) -> str:
    names = sorted(set(known))
    if given is None and len(names) == 1:
        return names[0]
    if given not in names:
        raise UserError(f"{what} is {given!r}; the file has {', '.join(names)}, choose one of them")
    return given


Read = tuple[list[Annotation], Theirs | None]


def _alpaca_eval(rows: Sequence[Row], model: str | None, scorer: str | None) -> Read:
    chosen = _choose(model, (str(row.get("generator_2")) for row in rows), "model")
    kept = [row for row in rows if str(row.get("generator_2")) == chosen]
    found = []
    for i, row in enumerate(kept):
        preference, prompt = row["preference"], str(row.get("instruction", i))
        longer = float(len(row["output_2"]) - len(row["output_1"]))
        if preference is None or np.isnan(preference):
            found.append(Annotation(prompt, None, "no verdict", longer))
        elif preference != 0 and not 1 <= preference <= 2:
            found.append(Annotation(prompt, None, f"preference {preference:g}", longer))
        else:
            found.append(Annotation(prompt, 0.5 if preference == 0 else float(preference) - 1, "", longer))
    return found, _mean_and_error([a.outcome for a in found], "alpaca_eval: mean, standard error over rows")


ARENA = {"A>B": 1.0, "A>>B": 1.0, "A=B": 0.5, "A<B": 0.0, "A<<B": 0.0}
ARENA |= {label[::-1].translate(str.maketrans("<>", "><")): score for label, score in ARENA.items()}


def _arena_hard(rows: Sequence[Row], model: str | None, scorer: str | None) -> Read:
    """The baseline is A in the first game, the model in the second."""
    chosen = _choose(model, (row["model"] for row in rows), "model")
    found: list[Annotation] = []
    for row in (row for row in rows if row["model"] == chosen):
        prompt = str(row.get("uid", row.get("question_id")))
        labels = [str(game["score"]) for game in row["games"] if game is not None]
        if len(labels) != 2 or not all(label in ARENA for label in labels):
            found.append(Annotation(prompt, None, "no verdict"))
            continue
        second, first = 1 - ARENA[labels[0]], ARENA[labels[1]]
        times = [DECISIVE if ">>" in label or "<<" in label else 1 for label in labels]
        outcomes = [second] * times[0] + [first] * times[1]
        found += [Annotation(prompt, o, orders=(first, second) if i == 0 else None) for i, o in enumerate(outcomes)]
    scores = np.array([a.outcome for a in found if a.outcome is not None])
    if not len(scores):
        return found, None
    means = np.random.default_rng(0).choice(scores, (100, len(scores))).mean(1)
    low, high = np.quantile(means, (0.05, 0.95))
    about = "Arena-Hard-Auto: 90 % interval from 100 resamples of rows, decisive verdicts three times"
    return found, Theirs(float(scores.mean()), float(low), float(high), about)


def _mt_bench(rows: Sequence[Row], model: str | None, scorer: str | None) -> Read:
    """Both orders agree, or it is a tie; errors are no verdicts (FastChat leaves them out without a word)."""
    chosen = _choose(model, (row[side] for row in rows for side in ("model_1", "model_2")), "model")
    found = []
    for row in (row for row in rows if chosen in (row["model_1"], row["model_2"])):
        prompt = f"{row['question_id']}"  # both turns of a question are one cluster
        own = "model_1" if row["model_1"] == chosen else "model_2"
        winners = row["g1_winner"], row["g2_winner"]
        if any(winner not in ("model_1", "model_2", "tie") for winner in winners):
            found.append(Annotation(prompt, None, "error"))
            continue
        first, second = (0.5 if winner == "tie" else float(winner == own) for winner in winners)
        both = first if first == second else 0.5
        found.append(Annotation(prompt, both, orders=(first, second) if own == "model_1" else (second, first)))
    return found, _mean_only([a.outcome for a in found], "FastChat: adjusted win rate, no interval")


def _rewardbench_2(rows: Sequence[Row], model: str | None, scorer: str | None) -> Read:
    """The right completion scores highest, ties at the top shared; the rate to compare with is chance, not 1/2."""
    found = []
    for i, row in enumerate(rows):
        prompt = str(row.get("id", row.get("prompt", i)))
        if row.get("results") is not None:
            found.append(Annotation(prompt, float(row["results"]), subset=row.get("subset")))
            continue
        scores, right = np.ravel(row["scores"]).astype(float), int(row.get("num_correct", 1))
        if not np.isfinite(scores).all():
            found.append(Annotation(prompt, None, "score is not finite"))
            continue
        top = scores == scores.max()
        found.append(Annotation(prompt, float(top[:right].sum() / top.sum()), subset=row.get("subset")))
    return found, _mean_only([a.outcome for a in found], "RewardBench: mean over prompts, no interval")


VALUES = {"C": 1.0, "P": 0.5, "I": 0.0}


def _inspect(rows: Sequence[Row], model: str | None, scorer: str | None) -> Read:
    samples = [sample for row in rows for sample in row["samples"]]
    """An answer that was not given (N) is no verdict; inspect_ai counts it as 0."""
    chosen = _choose(scorer, (name for sample in samples for name in (sample.get("scores") or {})), "scorer")
    found = []
    for sample in samples:
        prompt, score = str(sample["id"]), (sample.get("scores") or {}).get(chosen)
        value = None if score is None else score["value"]
        number = VALUES.get(value) if isinstance(value, str) else value
        valid = isinstance(number, bool | int | float) and 0 <= number <= 1
        reason = (
            "" if valid else {"N": "no answer"}.get(str(value), "no score" if value is None else f"value {value!r}")
        )
        outcome = float(number) if valid and number is not None else None
        choices = (sample.get("output") or {}).get("choices") or [{}]
        cut_off = choices[0].get("stop_reason") in ("max_tokens", "model_length")
        found.append(Annotation(prompt, outcome, reason, cut_off=cut_off))
    counted = [0.0 if a.reason == "no answer" else a.outcome for a in found]
    return found, _mean_and_error(counted, "inspect_ai: mean, stderr() over samples")


def _lines(rows: Sequence[Row], model: str | None, scorer: str | None) -> Read:
    chosen = model or "b"
    if chosen not in ("a", "b"):
        raise UserError(f"model is {chosen!r}; of lines with a and b name one of the two")
    found = []
    for row in rows:
        a, b, verdict = row.get("a"), row.get("b"), row["verdict"]
        longer = float(len(b) - len(a)) if isinstance(a, str) and isinstance(b, str) else None
        sign = 1 if chosen == "b" else -1
        outcome = 0.5 if verdict == "tie" else float(verdict == chosen) if verdict in ("a", "b") else None
        reason = "" if outcome is not None else "no verdict" if verdict is None else f"verdict {verdict!r}"
        cut_off = "length" in (row.get("a_finish"), row.get("b_finish"))
        longer = None if longer is None else sign * longer
        found.append(Annotation(str(row["prompt"]), outcome, reason, longer, cut_off=cut_off, subset=row.get("subset")))
    return found, None


def _valid(outcomes: Sequence[float | None]) -> np.ndarray:
    return np.array([outcome for outcome in outcomes if outcome is not None])


def _mean_only(outcomes: Sequence[float | None], about: str) -> Theirs | None:
    values = _valid(outcomes)
    return Theirs(float(values.mean()), None, None, about) if len(values) else None


def _mean_and_error(outcomes: Sequence[float | None], about: str) -> Theirs | None:
    values = _valid(outcomes)
    if len(values) < 2:
        return _mean_only(outcomes, about)
    mean, half = float(values.mean()), 1.959964 * float(values.std(ddof=1) / np.sqrt(len(values)))
    return Theirs(mean, mean - half, mean + half, about)


FORMATS: dict[str, Callable[[Sequence[Row], str | None, str | None], Read]] = {
    "alpaca_eval": _alpaca_eval,
    "arena_hard": _arena_hard,
    "mt_bench": _mt_bench,
    "rewardbench_2": _rewardbench_2,
    "inspect": _inspect,
    "lines": _lines,
}
