"""What happened to the rows: every refused or changed one is counted under its reason, with the first as example."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mlxdpo.data import reasons
from mlxdpo.types import UserError


class BadRow(Exception):
    """A row that cannot be used: `reason` is a short constant to count by, `sentence` says what is wrong with it."""

    def __init__(self, reason: str, sentence: str):
        super().__init__(sentence)
        self.reason, self.sentence = reason, sentence


@dataclass
class Report:
    """Counts of rows read, kept, refused and changed; `format` is the row shape they were read as.

    `unread` counts, by column, the rows that hold something which nothing reads; `notes` are said of all rows.
    """

    read: int = 0
    kept: int = 0
    refused: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    format: str = ""
    unread: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def refuse(self, where: str, bad: BadRow, policy: Literal["stop", "skip"]) -> None:
        """Count a refused row, or raise `UserError` when the policy is to stop."""
        if policy == "stop":
            raise UserError(f"{where}: {bad.sentence}; fix the row, or set data.on_bad_row to skip")
        self.refused[bad.reason] = self.refused.get(bad.reason, 0) + 1
        self.first.setdefault(bad.reason, f"{where}: {bad.sentence}")

    def change(self, where: str, reason: str) -> None:
        """Count a row that is kept but not as it stood (prompt trimmed, boundary moved)."""
        self.changed[reason] = self.changed.get(reason, 0) + 1
        self.first.setdefault(reason, where)

    def lines(self) -> list[str]:
        """One line per reason, most frequent first, each with its first row; empty when nothing happened."""
        refused = [f"left out {_rows(r, n)} (first: {self.first[r]})" for r, n in _by_count(self.refused)]
        kept = reasons.IN_WORDS  # these are kept as they are
        changed = [
            f"{'' if r in kept else 'changed '}{_rows(r, n)} (first: {self.first[r]})"
            for r, n in _by_count(self.changed)
        ]
        columns = [f"{name} ({count} rows)" for name, count in _by_count(self.unread)]
        unread = [f"unused columns: {', '.join(columns)}"] if columns else []
        return [*self.notes, *refused, *changed, *unread]


def _rows(reason: str, count: int) -> str:
    words = reasons.IN_WORDS.get(reason)
    return f"{count} x {reason}" if words is None else f"{count} {words[count != 1]}"


def _by_count(counts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda item: -item[1])
