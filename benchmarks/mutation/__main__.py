"""The command: `python -m benchmarks.mutation --help`. Stopped, it goes on where it was."""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import mlxdpo  # noqa: F401  (the fast BLAS, before mlx.core)
from benchmarks.mutation import log
from benchmarks.mutation.areas import AREAS
from benchmarks.mutation.covering import ROOT, Seen, digest, seen
from benchmarks.mutation.equivalent import EQUIVALENT
from benchmarks.mutation.mutants import Mutant, mutants
from benchmarks.mutation.trial import attempt

HEAVY = ("mlx.core", "mlx.nn", "numpy", "scipy.special", "scipy.stats", "pytest", "hypothesis", "pydantic", "yaml",
         "jinja2", "transformers", "tokenizers", "mlxdpo.config", "mlx_lm.utils", "mlx_lm.models.llama")  # fmt: skip
"""Imported once, before every mutant's process forks off. Nothing of mlxdpo that is mutated, and no array yet."""
DOCS = ROOT / "docs/evidence/tests.md"
MARKS = ("<!-- mutation -->", "<!-- /mutation -->")


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser("python -m benchmarks.mutation", description=__doc__)
    add = parser.add_argument
    add("--out", type=Path, default=ROOT / ".bench/mutation", help="log and notes (default .bench/mutation)")
    add("--only", nargs="+", choices=AREAS, default=list(AREAS), help="areas to try")
    add("--file", help="only files whose path holds this")
    add("--seconds", type=float, help="stop after the mutant under way then")
    add("--part", default="0/1", metavar="I/N", help="every N-th mutant from the I-th, to share the work")
    add("--show", action="store_true", help="try nothing, show what is known")
    add("--survivors", action="store_true", help="list those that no test noticed")
    add("--docs", action="store_true", help="write the table into docs/evidence/tests.md")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Try, print; 0 when every file reaches the share asked, 1 when one does not, 130 when stopped before the end."""
    asked = parse(words)
    found = {path: mutants(path, (ROOT / path).read_text("utf-8")) for path in _files(asked)}
    check_equivalents(found)
    file = asked.out / "trials.jsonl"
    if not asked.show:
        work(asked, found, file)
    trials = log.read(file)
    noted = {path: digest(AREAS[name]) for name in asked.only for path in AREAS[name].files}
    counts = [log.count(path, of_file, trials, noted[path]) for path, of_file in found.items()]
    if asked.survivors:
        print("\n".join(survivors(found, trials)))
    print(log.table(counts))
    left = sum(row.left for row in counts)
    if left:
        print(f"{left} mutants left; the same command goes on")
        return 130
    if asked.docs:
        write_docs(log.table(counts))
    return int(any(row.share < log.ASKED for row in counts))


def _files(asked: argparse.Namespace) -> list[str]:
    return [path for name in asked.only for path in AREAS[name].files if not asked.file or asked.file in path]


def check_equivalents(found: dict[str, list[Mutant]]) -> None:
    """Raises `SystemExit` for a listed equivalent that is no mutant of its file any more."""
    for path, of_file in found.items():
        if gone := set(EQUIVALENT.get(path, {})) - {m.name for m in of_file}:
            raise SystemExit(f"benchmarks/mutation/equivalent.py: {path} has no mutant {sorted(gone)[0]!r}")


def work(asked: argparse.Namespace, found: dict[str, list[Mutant]], file: Path) -> None:
    """Try what is not known yet, and again what survived tests that have changed since."""
    asked.out.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    for name in HEAVY:
        importlib.import_module(name)
    gc.freeze()
    part, parts = map(int, asked.part.split("/"))
    for name in asked.only:
        area = AREAS[name]
        noted = digest(area)
        trials = log.read(file)
        todo = [m for path in area.files for m in found.get(path, ()) if log.is_open(m, trials, noted)][part::parts]
        if not todo:
            continue
        tests = seen(area, asked.out)
        check_sound(tests, asked.out / f"sound-{noted}")
        for mutant in todo:
            if asked.seconds is not None and time.monotonic() - began > asked.seconds:
                return
            trial = one(mutant, tests, noted)
            log.append(file, trial)
            print(f"{trial.outcome} {trial.seconds:.1f} s {mutant.path}:{mutant.line} {mutant.name}", flush=True)


def check_sound(tests: Seen, note: Path) -> None:
    """Without a fault all must pass in the order in which mutants meet them, or mutants die of nothing. Asked again
    after an hour: what the tests import beside the mutated files may have changed."""
    if note.exists() and time.time() - note.stat().st_mtime < 3600:
        return
    outcome, by = attempt(None, list(tests.seconds), sum(tests.seconds.values()))
    if outcome != "survived":
        raise SystemExit(f"{by or outcome}: fails without any fault when quick tests run first")
    note.touch()


def one(mutant: Mutant, tests: Seen, noted: str) -> log.Trial:
    """A mutant against the tests that run its lines."""
    chosen = tests.tests(mutant.path, mutant.lines, mutant.at_import)
    began = time.monotonic()
    outcome, by = attempt(mutant, chosen, sum(tests.seconds[t] for t in chosen))
    seconds = round(time.monotonic() - began, 2)
    return log.Trial(mutant.key, mutant.path, mutant.name, mutant.line, outcome, by, seconds, noted)


def survivors(found: dict[str, list[Mutant]], trials: dict[str, log.Trial]) -> Iterator[str]:
    """Those that no test noticed and that are not listed as equivalent."""
    for path, of_file in found.items():
        for mutant in of_file:
            if mutant.key in trials and trials[mutant.key].outcome == "survived" and not log.is_equivalent(mutant):
                yield f"{path}:{mutant.line} ({mutant.operator}) {mutant.name}"


def write_docs(table: str) -> None:
    """Put the table between its marks."""
    text = DOCS.read_text("utf-8")
    head, rest = text.split(MARKS[0])
    DOCS.write_text(f"{head}{MARKS[0]}\n{table}\n{MARKS[1]}{rest.split(MARKS[1])[1]}", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
