"""A run's metrics as curves: read once, then followed, without ever reading a long file whole.

A file of up to `WHOLE` bytes is read line by line. Of a longer one `SAMPLES` pieces at evenly spaced places are read:
the first whole line of each piece is a point, and every evaluation in the pieces is kept. So a million lines open in
a fraction of a second, and what is shown of them is said to be a sample.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from os.path import isfile
from pathlib import Path
from typing import Any

from mlxdpo.ui.runs.run_list import sound

WHOLE = 4_000_000  # bytes; about 8,000 steps
SAMPLES = 1_000
PIECE = 8 * 1024  # bytes: about 16 lines
POINTS = 1_000  # the most points of a curve

Line = dict[str, Any]


@dataclass
class Tail:
    """What was read of a `metrics.jsonl` so far, and where to go on.

    steps, evals  lines, in order of steps; `steps` are thinned to at most 2 * POINTS while following
    offset        bytes that are dealt with, always the end of a line
    read          bytes read altogether
    sampled       whether the file was too long to be read whole
    damaged       lines that were read and are not as the trainer writes them
    """

    file: Path
    steps: list[Line] = field(default_factory=list)
    evals: list[Line] = field(default_factory=list)
    offset: int = 0
    inode: int = 0
    read: int = 0
    sampled: bool = False
    damaged: int = 0


def follow_metrics(tail: Tail) -> bool:
    """Take in what was added since the last call; whether there was anything."""
    if not isfile(tail.file):
        return False
    now = tail.file.stat()
    if now.st_ino != tail.inode or now.st_size < tail.offset:  # another file than the one that was read
        tail.steps, tail.evals, tail.offset, tail.inode, tail.sampled, tail.damaged = [], [], 0, now.st_ino, False, 0
    if now.st_size == tail.offset:
        return False
    before = tail.offset
    if now.st_size - tail.offset > WHOLE:
        _sample_lines(tail, now.st_size)
    _read_on(tail)
    return tail.offset != before


def _read_on(tail: Tail) -> None:
    with tail.file.open("rb") as stream:
        stream.seek(tail.offset)
        new = stream.read()
    whole = new.rfind(b"\n") + 1  # a last line without its end is still being written
    tail.read += len(new)
    tail.offset += whole
    _take(tail, new[:whole].splitlines())


def _sample_lines(tail: Tail, size: int) -> None:
    """One point from each of `SAMPLES` places between the offset and the end, and the evaluations near them."""
    tail.sampled, start = True, tail.offset
    with tail.file.open("rb") as stream:
        for number in range(SAMPLES):
            place = start + (size - start) * number // SAMPLES
            stream.seek(place)
            piece = stream.read(PIECE)
            tail.read += len(piece)
            lines = piece.split(b"\n")[0 if place == start else 1 : -1]  # the first is cut, the last may be
            kept = [line for line in lines if b'"eval_loss"' in line or b'"resumed_from"' in line]
            _take(tail, [*lines[:1], *(line for line in kept if line is not lines[0])])
        # The rest is read in order, from a line's beginning.
        stream.seek(max(start, size - PIECE))
        last = stream.read(PIECE)
    tail.read += len(last)
    tail.offset = max(start, size - PIECE) + last.find(b"\n") + 1


def _take(tail: Tail, lines: Iterable[bytes]) -> None:
    for line in lines:
        values = sound(line)
        if values is None:
            tail.damaged += 1
        elif "resumed_from" in values:
            # From 0 everything is done again, the evaluation of step 0 too (as in `Run.metrics`).
            back = values["resumed_from"] or -1
            _drop_from(tail.steps, back + 1)
            _drop_from(tail.evals, back + 1)
        elif "eval_loss" in values:
            _drop_from(tail.evals, values["step"])
            tail.evals.append(values)
        elif "loss" in values:
            # In a sample the line that says so may be missing: a step that comes again replaces what followed it.
            _drop_from(tail.steps, values["step"])
            tail.steps.append(values)
    if len(tail.steps) > 2 * POINTS:
        tail.steps = thinned(tail.steps)


def _drop_from(lines: list[Line], step: int) -> None:
    while lines and lines[-1]["step"] >= step:
        lines.pop()


def thinned(lines: list[Line], most: int = POINTS) -> list[Line]:
    """At most `most` of the lines, evenly spaced, the first and the last among them."""
    if len(lines) <= most:
        return lines
    return [lines[round(i * (len(lines) - 1) / (most - 1))] for i in range(most)]


def points(lines: list[Line], name: str) -> list[tuple[float, float]]:
    """(step, value) of a metric, at most `POINTS`; lines without it are left out."""
    return [(line["step"], line[name]) for line in thinned(lines) if isinstance(line.get(name), int | float)]
