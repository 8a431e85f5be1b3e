"""Answers of judges on disk, by what was asked: a question that was answered once is not asked again.

The file is named by the judge's whole identity. Failures are not kept: they may be none the next time. A line that is
not as it was written counts as not there, and its question is asked again.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from mlxdpo.inner import append_line, cache_folder

CHUNK = 64  # questions between two writes: what an interruption may lose
Asked = TypeVar("Asked", bound=Sequence[str])


def ask_unknown(
    identity: Mapping[str, Any],
    asked: Sequence[Asked],
    ask: Callable[[list[Asked]], Iterable[Mapping[str, Any] | None]],
    number: str,
) -> dict[Asked, Mapping[str, Any] | None]:
    """The answer to each question: from disk, or from `ask`, which gives None where there is none.

    `asked` are distinct sequences of text, `number` is the field of an answer that must be a finite number.
    """
    file = cache_file(identity)
    known = _known_answers(file, number)
    keys = {question: question_digest(question) for question in asked}
    found: dict[Asked, Mapping[str, Any] | None] = {q: known[key] for q, key in keys.items() if key in known}
    left = [question for question in asked if question not in found]
    for at in range(0, len(left), CHUNK):
        part = left[at : at + CHUNK]
        for question, answer in zip(part, ask(part), strict=True):
            found[question] = answer
            if answer is not None:
                line = {"question": keys[question], **answer}
                append_line(file, {**line, "sum": _line_sum(line)})
    return found


def _known_answers(file: Path, number: str) -> dict[str, dict[str, Any]]:
    known: dict[str, dict[str, Any]] = {}
    for raw in file.read_bytes().split(b"\n")[:-1] if file.is_file() else []:
        try:
            line = json.loads(raw)
            written = line.pop("sum", None)  # earlier versions wrote none
            if written in (None, _line_sum(line)) and math.isfinite(line[number]):
                known[line.pop("question")] = line
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return known


def _line_sum(line: Mapping[str, Any]) -> str:
    return question_digest(map(str, line.values()))[:16]


def cache_file(identity: Mapping[str, Any]) -> Path:
    """Where the answers of a judge with this identity are kept."""
    return cache_folder() / "verdicts" / f"{question_digest([json.dumps(identity, sort_keys=True)])}.jsonl"


def question_digest(parts: Iterable[str]) -> str:
    """The name of a question: all its texts in their order."""
    return hashlib.sha256(json.dumps(list(parts)).encode()).hexdigest()[:32]
