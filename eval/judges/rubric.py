"""A rubric judge: `rubric:MODEL@URL` gives each answer by itself 1 to 10 points with its reasons; the higher one wins.

It sees no second answer, so there is no order to prefer. Points are coarse: ties are frequent, and a scale means
something else to every model. Each answer is asked about once and kept on disk.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mlxdpo_eval.judges.endpoint import ask_server, ask_together, probe_server
from mlxdpo_eval.judges.kept import ask_unknown
from mlxdpo_eval.judges.ladder import Method, Reply, Rung, object_format, read_object
from mlxdpo_eval.judges.protocol import TEST_QUESTION, Judge, Question, Verdict, certain, invalid
from mlxdpo_eval.judges.server import Server, open_server

POINTS = (1, 10)
RUBRIC = """An assistant answered a prompt. Give the answer 1 to 10 points: 1 for useless or wrong, 5 for an answer \
with clear faults, 10 for one that cannot be better. Judge whether it is helpful, correct, clear and honest. Length by \
itself is no merit.

[Prompt]
{prompt}

[Answer]
{answer}

How many points? """


class Grade(NamedTuple):
    """Points of an answer and the reasons for them; None with why there are none."""

    points: float | None
    reasons: str = ""
    reason: str = ""


def read_grade(reply: Reply) -> Grade:
    """The points of an object, or the last ones that a text names."""
    found = read_object(reply)
    if found is not None and "points" in found:
        return _grade(found["points"], str(found.get("reasons", "")), reply)
    named = re.findall(r"points?\W{0,12}(\d+(?:\.\d+)?)(?:\s*/\s*10)?", reply.text, re.IGNORECASE)
    return _grade(named[-1] if named else None, reply.text, reply)


def _grade(value: Any, reasons: str, reply: Reply) -> Grade:
    try:
        points = math.nan if isinstance(value, bool) or value is None else float(value)
    except (TypeError, ValueError):
        points = math.nan
    if POINTS[0] <= points <= POINTS[1]:
        return Grade(points, reasons.strip())
    return Grade(None, "", "the answer was cut off" if reply.cut_off else "the answer has no points from 1 to 10")


GRADING: tuple[Method[Grade], ...] = (
    Method(
        "structured output",
        'Reply with an object, the reasons in at most three sentences: {"reasons": "...", "points": 7}.',
        512,
        object_format(
            "grade", {"reasons": {"type": "string"}, "points": {"type": "integer", "enum": list(range(1, 11))}}
        ),
        read_grade,
    ),
    Method(
        "free text",
        'Give your reasons in at most three sentences, then end with a line "Points: N", with N from 1 to 10.',
        1_024,
        {},
        read_grade,
    ),
)


@dataclass(frozen=True)
class RubricJudge:
    """A model on a server that grades answers one by one. `keep` is off where everything is to be asked again."""

    name: str
    identity: Mapping[str, Any]
    server: Server
    rung: Rung[Grade]
    keep: bool = True
    cached: bool = False  # it keeps grades itself, of which many pairs are made

    def scores(self, prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The points of each answer; NaN where there are none."""
        rows = list(zip(prompts, answers, strict=True))
        grades = self._grades(rows)
        return [math.nan if grades[row].points is None else float(grades[row].points or 0) for row in rows]

    def ask(self, questions: Sequence[Question]) -> list[Verdict]:
        """The answer with more points wins; each answer is asked about once."""
        grades = self._grades([(q.prompt, answer) for q in questions for answer in (q.first, q.second)])
        return [_compare_grades(grades[q.prompt, q.first], grades[q.prompt, q.second]) for q in questions]

    def fresh(self) -> Judge:
        """The same judge, asking everything again and keeping nothing."""
        return replace(self, keep=False)

    def spent(self) -> Mapping[str, Any]:
        """How it is asked, requests and tokens so far."""
        return {"asked_by": self.rung.name, **self.server.usage.numbers()}

    def _grades(self, rows: Sequence[tuple[str, str]]) -> dict[tuple[str, str], Grade]:
        distinct = list(dict.fromkeys(rows))
        if not self.keep:
            return dict(zip(distinct, ask_together(self._one, distinct), strict=True))
        failed: dict[tuple[str, str], Grade] = {}

        def ask(part: list[tuple[str, str]]) -> Iterator[Mapping[str, Any] | None]:
            """Grades to be kept, None for failures."""
            for row, grade in zip(part, ask_together(self._one, part), strict=True):
                if grade.points is None:
                    failed[row] = grade
                yield None if grade.points is None else {"points": grade.points, "reasons": grade.reasons}

        found = ask_unknown(self.identity, distinct, ask, "points")
        return {
            row: failed[row] if kept is None else Grade(kept["points"], str(kept.get("reasons", "")))
            for row, kept in found.items()
        }

    def _one(self, row: tuple[str, str]) -> Grade:
        text = RUBRIC.format(prompt=row[0], answer=row[1]) + self.rung.method.ending
        found = ask_server(self.server, self.rung, text)
        return Grade(None, "", found) if isinstance(found, str) else found


def _compare_grades(first: Grade, second: Grade) -> Verdict:
    if first.points is None or second.points is None:
        return invalid(first.reason or second.reason)
    notes = sorted(f"{grade.points:g} points: {grade.reasons}" for grade in (first, second))  # the same in both orders
    return certain(first.points - second.points)._replace(note="\n".join(notes))


def rubric_judge(rest: str) -> Judge:
    """Open `rubric:MODEL@URL` with a test question. Raises `UserError` for another form, and without an answer."""
    asked = RUBRIC.format(prompt=TEST_QUESTION.prompt, answer=TEST_QUESTION.first)
    server, rung = probe_server("rubric", open_server("rubric", rest), GRADING, lambda ending: asked + ending)
    identity = {
        "kind": "rubric",
        "model": server.model,
        "url": server.url,
        "asked_by": rung.name,
        "wording": RUBRIC + rung.method.ending,
    }
    return RubricJudge(f"rubric:{server.model}", identity, server, rung)
