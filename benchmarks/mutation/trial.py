"""One mutant meets its tests, in a process of its own that starts with everything heavy imported already."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

from benchmarks.mutation.covering import ROOT, run_tests
from benchmarks.mutation.mutants import Mutant, planted

PATIENCE = 10.0  # seconds a trial may take at least; a mutant that never ends is noticed too
LAST = 5  # exit status of pytest where no test was collected


def attempt(mutant: Mutant | None, tests: Sequence[str], seconds: float) -> tuple[str, str]:
    """(killed | survived | timeout, the test that failed). Without tests that run its line a mutant survives.

    `seconds`: what these tests take on the sound file; without a mutant they meet that. Raises `RuntimeError` when no
    test could be run.
    """
    if not tests:
        return "survived", ""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        os._exit(_child(mutant, tests, write))
    os.close(write)
    status = _wait(child, PATIENCE + 3 * seconds)
    with os.fdopen(read, encoding="utf-8") as pipe:
        said = pipe.read()
    if status is None:
        return "timeout", ""
    if status == LAST:
        raise RuntimeError(f"none of {len(tests)} tests was found, first of them {tests[0]}")
    return ("killed" if status else "survived"), said


def _wait(child: int, limit: float) -> int | None:
    """Exit status, or None for a child that was killed because its time was over."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


class _Chosen:
    """Keeps the chosen tests, in their order, and says which one failed."""

    def __init__(self, tests: Sequence[str], write: int) -> None:
        self.order, self.write = {test: i for i, test in enumerate(tests)}, write

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Everything else is left out."""
        items[:] = sorted((i for i in items if i.nodeid in self.order), key=lambda i: self.order[i.nodeid])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """The first failure is the last: pytest stops there."""
        if report.failed:
            os.write(self.write, report.nodeid.encode())


def _child(mutant: Mutant | None, tests: Sequence[str], write: int) -> int:
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    try:
        if mutant is not None:
            _plant(mutant)
        return run_tests(sorted({test.split("::")[0] for test in tests}), _Chosen(tests, write))
    except BaseException as error:  # the mutant broke what pytest itself needs: noticed
        os.write(write, f"{type(error).__name__} outside the tests".encode())
        return 1


def module_name(path: str) -> str:
    """eval/metrics/intervals.py is mlxdpo_eval.metrics.intervals."""
    first, *rest = Path(path).with_suffix("").parts
    return ".".join(["mlxdpo_eval" if first == "eval" else first, *rest])


def _plant(mutant: Mutant) -> None:
    """From now on an import of the mutant's module gives the mutant."""
    name = module_name(mutant.path)
    assert name not in sys.modules, f"{name} is imported already"
    file = ROOT / mutant.path
    code = compile(planted(mutant, file.read_text("utf-8")), str(file), "exec")
    sys.meta_path.insert(0, _Finder(name, code))  # type: ignore[arg-type]


class _Finder:
    """Finds one module."""

    def __init__(self, name: str, code: CodeType) -> None:
        self.name, self.code = name, code

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> Any:
        """The spec that there is anyway, with a loader that runs the mutant."""
        if name != self.name:
            return None
        sys.meta_path.remove(self)  # type: ignore[arg-type]
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.origin is not None
        spec.loader = _Loader(name, spec.origin, self.code)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, name: str, origin: str, code: CodeType) -> None:
        super().__init__(name, origin)
        self.code = code

    def get_code(self, fullname: str) -> CodeType:
        """The mutant, not the file."""
        return self.code
