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
    """From the note in `folder`, which is made where it is missing or old. Raises `SystemExit` when a test fails."""
    file = folder / f"lines-{digest(area)}.json"
    if not file.exists():
        child = os.fork()
        if child == 0:
            os._exit(_measure(area, file))
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise SystemExit(f"{' '.join(area.tests)}: these must pass before anything is mutated")
    note = json.loads(file.read_text("utf-8"))
    lines = {
        path: {int(n): frozenset(tests) for n, tests in of_file.items()} for path, of_file in note["lines"].items()
    }
    return Seen(note["seconds"], lines)


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
    seconds = dict(sorted(watch.seconds.items(), key=lambda item: item[1]))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"seconds": seconds, "lines": lines}), "utf-8")
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
