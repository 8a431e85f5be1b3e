"""The end of a collection: from every answer with its score to rows, the report, and the answers kept for reading."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxdpo.config import Drawing
from mlxdpo.io.atomic import write_json, write_text
from mlxdpo.io.json_file import json_lines, read_lines
from mlxdpo.online.collect.rows import made_of, pair_rows, written
from mlxdpo.online.prompts import Prompts
from mlxdpo.types import UserError

Lines = Sequence[Mapping[str, Any]]


def report_file(out: Path) -> Path:
    """Where the report on the rows in `out` stands."""
    return out.with_name(f"{out.stem}.report.json")


def samples_file(out: Path) -> Path:
    """Where every answer behind the rows in `out` stands."""
    return out.with_name(f"{out.stem}.samples.jsonl")


def write_collection(
    partial: Path, out: Path, identity: Mapping[str, Any], prompts: Prompts, how: Drawing
) -> dict[str, Any]:
    """Write report and rows, then rename `partial`. Done again after a kill in between, it writes the same.

    Raises `UserError` where no prompt gives a pair; the answers then wait in `partial` for another rule.
    """
    lines = list(read_lines(partial))[1:]
    found = [pair_rows(line, how) for line in lines]
    rows = [row for own, _ in found for row in own]
    none = Counter(why for _, why in found if why)
    report = {
        "prompts": len(lines),
        "prompts_left_out": prompts.left_out,
        "prompts_without_pair": dict(none.most_common()),
        "answers": sum(len(line["answers"]) for line in lines),
        "answers_left_out": dict(Counter(a["left_out"] for a in _all_answers(lines) if a["left_out"]).most_common()),
        "mean_score": _mean_score([a["score"] for a in _all_answers(lines) if a["score"] is not None]),
        "rows": len(rows),
        "pairs": how.pairs,
        "margin": how.margin,
        "identity": identity,
    }
    if not rows:
        write_json(report_file(out), report)
        why = "; ".join(collection_sentences(report))
        raise UserError(f"{out}: no prompt gave a pair ({why}); the answers are in {partial.name}")
    made, turns = made_of(identity), any(not isinstance(one.prompt, str) for one in prompts.asked)
    text = json_lines(written(row, turns) | {"made": made} for row in rows)
    write_json(report_file(out), report | {"sha256": hashlib.sha256(text.encode()).hexdigest()})
    write_text(out, text)
    partial.rename(samples_file(out))
    return report


def collection_sentences(report: Mapping[str, Any]) -> list[str]:
    """What was left out, in words with counts."""
    parts = ("prompts_left_out", "answers_left_out", "prompts_without_pair")
    nouns = {"answers_left_out": "answers: "}
    return [f"{count} {nouns.get(part, '')}{why}" for part in parts for why, count in report[part].items()]


def _all_answers(lines: Lines) -> Iterator[Mapping[str, Any]]:
    return (answer for line in lines for answer in line["answers"])


def _mean_score(scores: Sequence[float]) -> float | None:
    return sum(scores) / len(scores) if scores else None
