"""How much code one optimizer step passes: functions and files of mlxdpo, and how deep they call each other.

    python -m benchmarks.step_calls          a tiny llama, DPO with LoRA, 2 batches of 2 pairs
    python -m benchmarks.step_calls --list   with the functions, file by file

Counted are the second step of a training (the first also sets up what is compiled) and the training as a whole, one
step long. A function is one place in the source that defines it, inner functions and lambdas included; comprehensions
are left out. Depth counts frames of mlxdpo that are active at once, frames of libraries between them left out.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import mlxdpo  # isort: skip  (before mlx: it puts the fast BLAS in front)

ROOT = Path(mlxdpo.__file__).parent
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # the tiny models
COMPREHENSIONS = {"<listcomp>", "<dictcomp>", "<setcomp>", "<genexpr>"}


class Counter:
    """Functions of mlxdpo that were called while it was on, and the deepest chain of them."""

    def __init__(self) -> None:
        self.functions: set[CodeType] = set()
        self.deepest = 0
        self._frames: list[bool] = []

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """What `sys.setprofile` calls."""
        if event == "call":
            code = frame.f_code
            ours = code.co_filename.startswith(str(ROOT)) and code.co_name not in COMPREHENSIONS
            self._frames.append(ours)
            if ours:
                self.functions.add(code)
                self.deepest = max(self.deepest, sum(self._frames))
        elif event == "return" and self._frames:
            self._frames.pop()

    def files(self) -> dict[str, list[str]]:
        """The names of the functions by file, each below the package."""
        found: dict[str, list[str]] = {}
        for code in sorted(self.functions, key=lambda code: (code.co_filename, code.co_firstlineno)):
            found.setdefault(str(Path(code.co_filename).relative_to(ROOT)), []).append(code.co_qualname)
        return found


def counted(events: Iterator[Any]) -> Counter:
    """What is called from the end of the first optimizer step to the end of the second."""
    counter, steps = Counter(), 0
    for event in events:
        sys.setprofile(None)  # first: leaving the loop closes the training
        steps += event.kind == "step"
        if steps == 2:
            break
        if steps:
            sys.setprofile(counter)
    return counter


def main(words: list[str]) -> int:
    """Print both counts."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_calls", description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--list", action="store_true", help="print the functions, file by file")
    asked = parser.parse_args(words)
    from tiny_runs import recipe

    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLXDPO_CACHE"] = str(Path(folder, "cache"))
        place = Path(folder)
        two = recipe(place, "two", train={"steps": 2, "save_every": 99})
        step = counted(iter(mlxdpo.train(two)))
        one = recipe(place, "one", train={"steps": 1})
        whole = Counter()
        sys.setprofile(whole)
        list(mlxdpo.train(one))
        sys.setprofile(None)
    for name, counter in (("one optimizer step", step), ("a training of one step", whole)):
        print(f"{name}: {len(counter.functions)} functions in {len(counter.files())} files, {counter.deepest} deep")
        if asked.list:
            print("".join(f"  {file}: {', '.join(names)}\n" for file, names in counter.files().items()))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
