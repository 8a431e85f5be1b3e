"""The log of trials: one line of JSON each, so that a stopped run goes on, and what it says of each file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.mutation.equivalent import EQUIVALENT
from benchmarks.mutation.mutants import Mutant

ASKED = 0.85
"""The share of a file's mutants that must be noticed."""


class Trial(NamedTuple):
    """A line. `outcome`: killed, timeout (noticed too) or survived; `tests`: digest of the tests and files then."""

    key: str
    path: str
    name: str
    line: int
    outcome: str
    by: str
    seconds: float
    tests: str


def read(file: Path) -> dict[str, Trial]:
    """The last trial of each mutant."""
    if not file.exists():
        return {}
    return {trial.key: trial for trial in (Trial(**json.loads(line)) for line in file.read_text("utf-8").splitlines())}


def append(file: Path, trial: Trial) -> None:
    """One line, written at once: several runs may share a log."""
    line = (json.dumps(trial._asdict(), ensure_ascii=False) + "\n").encode()
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, line)
    finally:
        os.close(handle)


class Count(NamedTuple):
    """A file's mutants by what became of them; `left`: not tried yet."""

    path: str
    killed: int
    timeout: int
    survived: int
    equivalent: int
    left: int

    @property
    def noticed(self) -> int:
        """Killed by a failing test, or by running without end."""
        return self.killed + self.timeout

    @property
    def tried(self) -> int:
        """Without those that no test could notice."""
        return self.noticed + self.survived

    @property
    def share(self) -> float:
        """Of the mutants tried; 1 of none."""
        return self.noticed / self.tried if self.tried else 1.0


def is_equivalent(mutant: Mutant) -> bool:
    """Whether it is listed with a reason as one that no test could notice."""
    return mutant.name in EQUIVALENT.get(mutant.path, {})


def is_open(mutant: Mutant, trials: Mapping[str, Trial], tests: str) -> bool:
    """Whether it is to be tried: it never was, or it survived other tests than those of today."""
    trial = trials.get(mutant.key)
    return trial is None or (trial.outcome == "survived" and trial.tests != tests and not is_equivalent(mutant))


def count(path: str, found: Sequence[Mutant], trials: Mapping[str, Trial], tests: str) -> Count:
    """What became of a file's mutants. A listed equivalent that a test killed counts as killed."""
    outcomes = ["left" if is_open(m, trials, tests) else trials[m.key].outcome for m in found]
    pairs = list(zip(found, outcomes, strict=True))
    equal = sum(is_equivalent(m) and outcome == "survived" for m, outcome in pairs)
    number = {name: outcomes.count(name) for name in ("killed", "timeout", "survived", "left")}
    return Count(path, number["killed"], number["timeout"], number["survived"] - equal, equal, number["left"])


def total(counts: Iterable[Count]) -> Count:
    """All files together."""
    numbers = (row[1:] for row in counts)
    return Count("all", *map(sum, zip(*numbers, strict=True)))


def table(counts: Sequence[Count]) -> str:
    """Markdown, with Wilson's 95 % interval: what other faults of this kind would meet."""
    from mlxdpo_eval.metrics.intervals import wilson  # late: it is one of the files that are mutated

    head = "| file | mutants | killed | never ended | survived | equivalent | noticed |"
    lines = [head, "|---|--:|--:|--:|--:|--:|--:|"]
    for row in (*counts, total(counts)):
        interval = wilson(row.noticed, row.tried)
        share = f"{row.share:.1%} ({interval.low:.0%} to {interval.high:.0%})" if interval else "-"
        numbers = (row.tried + row.equivalent, row.killed, row.timeout, row.survived, row.equivalent)
        lines.append(f"| {row.path} | {' | '.join(map(str, numbers))} | {share} |")
    return "\n".join(lines)
