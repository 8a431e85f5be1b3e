"""Which tests run which lines, and for how long: measured once, so that a mutant meets only tests that see it."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

if TYPE_CHECKING:
    import coverage

ROOT = Path(__file__).parents[2]
# What makes pytest quick to start: no plugins of other packages, asserts as they stand, no search for lost exceptions.
QUIET = ["-q", "-x", "--tb=no", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]


class Area(NamedTuple):
    """Files that are mutated, and the test files that should notice."""

    files: tuple[str, ...]
    tests: tuple[str, ...]


class Seen(NamedTuple):
    """Tests of an area, quickest first, with their seconds; and for each file and line those that run it."""

    seconds: Mapping[str, float]
    lines: Mapping[str, Mapping[int, frozenset[str]]]

    def tests(self, path: str, lines: range, at_import: bool) -> list[str]:
        """The tests that can notice a change of these lines, quickest first. What acts at import, all of them can."""
        found = set(self.seconds) if at_import else set().union(*(self.lines[path].get(n, ()) for n in lines))
        return [test for test in self.seconds if test in found]


def digest(area: Area) -> str:
    """Of all that decides which test runs which line."""
    texts = [(ROOT / name).read_bytes() for name in (*area.files, *area.tests)]
    return hashlib.sha256(b"\0".join(texts)).hexdigest()[:16]


def seen(area: Area, folder: Path) -> Seen:
    """From the notes in `folder`, one for each test file; those that are missing or old are made.

    Raises `SystemExit` when a test fails.
    """
    seconds: dict[str, float] = {}
    lines: dict[str, dict[int, set[str]]] = {path: {} for path in area.files}
    for test in area.tests:
        part = Area(area.files, (test,))
        file = folder / f"lines-{digest(part)}.json"
        if not file.exists():
            _measure_apart(part, file)
        note = json.loads(file.read_text("utf-8"))
        seconds |= note["seconds"]
        for path, of_file in note["lines"].items():
            for n, tests in of_file.items():
                lines[path].setdefault(int(n), set()).update(tests)
    quickest_first = dict(sorted(seconds.items(), key=lambda item: item[1]))
    return Seen(quickest_first, {p: {n: frozenset(t) for n, t in found.items()} for p, found in lines.items()})


def _measure_apart(part: Area, file: Path) -> None:
    """`_measure` in a process of its own: here nothing that is mutated may be imported."""
    child = os.fork()
    if child == 0:
        os._exit(_measure(part, file))
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
        raise SystemExit(f"{part.tests[0]}: must pass before anything is mutated")


class _Watch:
    """Tells coverage which test runs, and keeps its seconds."""

    def __init__(self, cover: coverage.Coverage) -> None:
        self.cover, self.seconds = cover, {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Around each test."""
        self.cover.switch_context(item.nodeid)
        began = time.perf_counter()
        result: Any = yield
        self.seconds[item.nodeid] = round(time.perf_counter() - began, 4)
        self.cover.switch_context("")
        return result


def _measure(area: Area, file: Path) -> int:
    """Run the tests under coverage and write what was seen; pytest's exit status."""
    import coverage

    cover = coverage.Coverage(data_file=None, include=[str(ROOT / path) for path in area.files], config_file=False)
    watch = _Watch(cover)
    cover.start()
    status = run_tests(area.tests, watch)
    cover.stop()
    if status:
        return status
    data, lines = cover.get_data(), {}
    for path in area.files:
        found = data.contexts_by_lineno(str(ROOT / path))
        lines[path] = {n: sorted(filter(None, tests)) for n, tests in found.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    half = file.with_suffix(".half")
    half.write_text(json.dumps({"seconds": watch.seconds, "lines": lines}), "utf-8")
    half.replace(file)
    return 0


def run_tests(files: Sequence[str], *plugins: Any) -> int:
    """pytest in this process; 0 when all pass."""
    from hypothesis import Phase, settings

    # Every mutant meets the same examples; a failing one must not help another mutant, nor cost the time to shrink it.
    phases = (Phase.explicit, Phase.generate)
    settings.register_profile("mutation", database=None, phases=phases, deadline=None, derandomize=True)
    settings.load_profile("mutation")
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    return int(pytest.main([*QUIET, *files], plugins=list(plugins)))
