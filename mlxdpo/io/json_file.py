"""JSON that is read as strictly as it was written: objects only, UTF-8, with file and line in every message."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, AnyStr

from mlxdpo.io.atomic import is_object
from mlxdpo.types import UserError

LONGEST_LINE = 64 << 20
"""Bytes (of text: characters) of a line, far more than any row has."""


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The JSON lines of a file; a last line without a newline is one if it is whole, else torn (a killed writer's).

    Raises `UserError` naming the file and the line for a whole line that is no JSON object.
    """
    if not os.path.lexists(path):
        return
    _need_file(path)
    with path.open("rb") as file:
        for number, line in enumerate(bounded_lines(file, str(path)), 1):
            if line.endswith(b"\n") or is_object(line):
                yield parse_object(line, f"{path}:{number}")


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as the text of a file of JSON lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises `UserError` naming the file when it cannot be read or holds something else."""
    _need_file(file)
    try:
        return parse_object(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); restore it, or create it again") from None


def bounded_lines(file: IO[AnyStr], name: str) -> Iterator[AnyStr]:
    """The lines of an open file. Raises `UserError` for one of more than `LONGEST_LINE` before it is in memory."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise UserError(
                f"{name}:{number}: a line of more than {LONGEST_LINE >> 20} MB; check that the file is JSON lines"
            )
        yield line


def _need_file(path: Path) -> None:
    """Raise `UserError` for what is there and no file: a folder, or a pipe, which would be waited for."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise UserError(f"{path}: cannot be read (not a file); move it away")


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def parse_object(raw: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `raw`, UTF-8. Raises `UserError` naming `where` it stands."""
    try:
        found = json.loads(raw.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, a number of thousands of digits
        raise UserError(f"{where}: not JSON ({str(error)[:100]}); restore it, or create it again") from None
    if not isinstance(found, dict):
        raise UserError(
            f"{where}: expected a JSON object, found {type(found).__name__}; restore it, or create it again"
        )
    return found


@contextlib.contextmanager
def as_written(file: Path, remedy: str = "restore it, or create it again") -> Iterator[None]:
    """Whatever breaks on the layout of `file`, a file of ours that was changed, becomes a `UserError` naming it."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError, AssertionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise UserError(f"{file}: is not what mlxdpo wrote ({reason}); {remedy}") from error
