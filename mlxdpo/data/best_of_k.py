"""Records of several completions, some right and the others wrong: what best-of-k accuracy is measured on.

Two shapes: RewardBench 2's {"prompt", "chosen": [...], "rejected": [...]} (arXiv 2506.01937; `chosen` may be one text),
and {"prompt", "completions": [...], "n_correct": n} with the right ones first. They are for evaluation only.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mlxdpo.data import fields, reasons
from mlxdpo.data.fields import answer, asked_prompt, prompt_of_row
from mlxdpo.data.report import BadRow, Report
from mlxdpo.data.sources import read_rows
from mlxdpo.types import Preference, Text

LOOKED_AT = 100  # rows among which one has to be such a record
_SHAPE = "best-of-k"
_READ = {"prompt", "chosen", "rejected", "completions", "n_correct"}


class BestOfK(NamedTuple):
    """One prompt with k completions, the first `right` of them right; `columns` are the record's other columns."""

    prompt: Text
    completions: tuple[Text, ...]
    right: int
    where: str
    columns: Mapping[str, Any]

    def pairs(self) -> list[tuple[int, int, Preference]]:
        """Each right completion against each wrong one, with the places of both."""
        places = itertools.product(range(self.right), range(self.right, len(self.completions)))
        return [
            (i, j, Preference(self.prompt, self.completions[i], self.completions[j], self.where, columns=self.columns))
            for i, j in places
        ]


def holds_best_of_k(path: str, split: str) -> bool:
    """Whether the source's rows are such records. A pipe, which can be read only once, is taken to hold pairs."""
    if Path(path).is_fifo():
        return False
    rows = itertools.islice(read_rows(path, split), LOOKED_AT)
    return any(not isinstance(row, BadRow) and _texts(row) is not None for _, row in rows)


def read_best_of_k(path: str, split: str, policy: Literal["stop", "skip"]) -> tuple[list[BestOfK], Report]:
    """All records of a source, and what became of its rows. Columns have the names above: `data.columns` is for pairs.

    Raises `UserError` at the first bad record where `policy` is stop. A record in which a wrong completion is a right
    one, word for word, states nothing: it is left out and counted whatever the policy.
    """
    report, records = Report(format=_SHAPE), []
    for where, row in read_rows(path, split):
        report.read += 1
        try:
            records.append(_record(where, row))
        except BadRow as bad:
            report.refuse(where, bad, "skip" if bad.reason in reasons.NO_PREFERENCE else policy)
    report.kept = len(records)
    return records, report


def _record(where: str, row: Mapping[str, Any] | BadRow) -> BestOfK:
    if isinstance(row, BadRow):
        raise row
    found = _texts(row)
    if found is None:
        names = fields.column_names(row)
        raise BadRow(
            reasons.MISSING_COLUMN,
            f"not a best-of-k record: it needs prompt, chosen and a list rejected, but has {names}",
        )
    right, wrong = found
    prompt = asked_prompt(prompt_of_row(row, "prompt"))
    if shared := set(right) & set(wrong):
        raise BadRow(reasons.IDENTICAL, f'"{fields.printable(min(shared))}" is both right and wrong')
    completions = tuple(answer({"completion": text}, "completion", prompt) for text in [*right, *wrong])
    kept = {name: value for name, value in row.items() if name not in _READ}
    return BestOfK(prompt, completions, len(right), where, kept)


def _texts(row: Mapping[str, Any]) -> tuple[Sequence[str], Sequence[str]] | None:
    """(right, wrong) completions of a row, or None for another shape."""
    prompt, chosen, rejected = (row.get(name) for name in ("prompt", "chosen", "rejected"))
    if not fields.TEXT_OR_MESSAGES.test(prompt):
        return None
    if fields.TEXTS.test(rejected) and (isinstance(chosen, str) or fields.TEXTS.test(chosen)):
        return ([chosen] if isinstance(chosen, str) else chosen), rejected  # type: ignore[return-value]
    texts, right = row.get("completions"), row.get("n_correct")
    if fields.TEXTS.test(texts) and isinstance(right, int) and not isinstance(right, bool) and 0 < right < len(texts):  # type: ignore[arg-type]
        return texts[:right], texts[right:]  # type: ignore[index]
    return None
