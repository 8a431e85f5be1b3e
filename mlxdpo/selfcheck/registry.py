"""What a self-check is, and how all of them are run: one that fails or raises is a row of the table like any other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple


class Finding(NamedTuple):
    """What a check measured, what it may be at most (or at least), in words with units, and whether it holds."""

    ok: bool
    figure: str
    limit: str


class Check(NamedTuple):
    """A check and the sentence that says what to do when it fails."""

    name: str
    advice: str
    measure: Callable[[], Finding]


class CheckResult(NamedTuple):
    """A row of the table. `advice` is empty where the check holds."""

    check: str
    ok: bool
    figure: str
    limit: str
    seconds: float
    advice: str


CHECKS: dict[str, Check] = {}
REPORT = "please report it with this table: do not trust numbers from this machine until then"


def self_check(name: str, advice: str) -> Callable[[Callable[[], Finding]], Callable[[], Finding]]:
    """Enter a function into the registry under `name`."""

    def enter(function: Callable[[], Finding]) -> Callable[[], Finding]:
        """The function itself, registered."""
        assert name not in CHECKS, f"two checks are called {name}"
        CHECKS[name] = Check(name, advice, function)
        return function

    return enter


def run_checks(checks: Iterable[Check] | None = None) -> list[CheckResult]:
    """Every check's result, in the registry's order. A check that raises has failed, for that reason."""
    return [_run(one) for one in (CHECKS.values() if checks is None else checks)]


def _run(one: Check) -> CheckResult:
    start = time.perf_counter()
    try:
        found = one.measure()
    except Exception as error:  # whatever a broken installation throws is a finding
        found = Finding(False, f"{type(error).__name__}: {error}", "no error")
    seconds = time.perf_counter() - start
    figure, limit = plain_line(found.figure), plain_line(found.limit)
    return CheckResult(one.name, bool(found.ok), figure, limit, round(seconds, 3), "" if found.ok else one.advice)


def plain_line(text: str) -> str:
    """One line that a Markdown table can hold and that names no home folder; long ones are cut, and say so."""
    line = " ".join(text.split()).replace(str(Path.home()), "~")
    for character, instead in (("|", "/"), ("`", "'"), ("<", "("), (">", ")"), ("*", "x")):
        line = line.replace(character, instead)
    return line if len(line) <= 200 else f"{line[:200]} ... ({len(line) - 200} more characters)"
