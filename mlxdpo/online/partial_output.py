"""A partial output that can be gone on with: one process at a time, from the same settings, chunk by chunk.

What is done stands on disk, a line per prompt. The same command given again checks that every setting is what it was,
answers the prompts that are missing, and ends in the same bytes as one that was never interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxdpo.data.read import prompt_key
from mlxdpo.io.atomic import append_line
from mlxdpo.online.prompts import Asked
from mlxdpo.types import Event

LOCK = ".lock"
"""The lock file of an output that is a folder."""


def changed_setting(then: Any, now: Any, name: str = "") -> str:
    """The first setting that differs, as "optim.lr (1e-05 then, 2e-05 now)"; "" where all are the same."""
    if isinstance(then, Mapping) and isinstance(now, Mapping):
        inside = (changed_setting(then.get(k), now.get(k), f"{name}.{k}".lstrip(".")) for k in {**then, **now})
        return next(filter(None, inside), "")
    return "" if then == now else f"{name} ({then} then, {now} now)"


def answer_missing(
    asked: Sequence[Asked],
    size: int,
    done: set[str],
    answer: Callable[[Sequence[Asked]], Iterable[Mapping[str, Any]] | None],
    file: Path,
    kind: str,
) -> Generator[Event, None, bool]:
    """Answer the prompts that are not in `done`, `size` at once, and append their lines to `file` as they come.

    A chunk of which some prompts are missing is answered as a whole, as it was the first time. Yields an event of
    `kind` after each such chunk and returns True; where `answer` gives None or leaves some out, yields "interrupted"
    and returns False. An event's `kept` is how many were in `done` before: they say nothing of the pace.
    """
    kept = len(done)
    for at in range(0, len(asked), size):
        chunk = asked[at : at + size]
        missing = {key for one in chunk if (key := prompt_key(one.prompt).hex()) not in done}
        if not missing:
            continue
        for line in answer(chunk) or ():
            if line["prompt_id"] in missing:
                append_line(file, line)
                missing.remove(line["prompt_id"])
                done.add(line["prompt_id"])
        if missing:
            yield Event("interrupted", len(done), {"file": file})
            return False
        yield Event(kind, len(done), {"done": len(done), "total": len(asked), "kept": kept})
    return True
