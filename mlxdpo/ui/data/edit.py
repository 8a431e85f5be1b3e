"""Editing one row of a preference file: into a new file beside it, whole or not at all, never over the original."""

from __future__ import annotations

import gzip
import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxdpo.data.report import BadRow
from mlxdpo.data.sources import read_rows
from mlxdpo.io.atomic import write_atomic
from mlxdpo.types import UserError
from mlxdpo.ui.data.view import FIELDS, Book, as_text, columns_of, number_of, preference

EDITED = re.compile(r"\.edited(-\d+)?\.jsonl$")
LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz")
_WRITING = threading.Lock()  # two browser tabs


def fields_of(book: Book, row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The columns that can be edited, as (name, text); what is not text is given as JSON."""
    names = [name for name in columns_of(book) if name in row][:FIELDS]
    return [(name, as_text(row[name])) for name in names]


def edited_row(book: Book, where: str, row: Mapping[str, Any], texts: Sequence[str]) -> dict[str, Any]:
    """The row with its fields' new texts. Raises `UserError` when that is no pair, or not JSON where it was."""
    new = dict(row)
    for (name, before), text in zip(fields_of(book, row), texts, strict=False):
        if text != before:
            new[name] = text if isinstance(row[name], str) else _json(name, text)
    preference(book, where, new)
    return new


def _json(name: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise UserError(f"{name} is not valid JSON any more ({error}); it holds messages or numbers") from None


def target_of(path: Path) -> Path:
    """Where an edit of `path` goes: a new file beside it; an edited file is gone on with."""
    if EDITED.search(path.name):
        return path
    stem = re.sub(r"\.(jsonl|ndjson|json|csv|tsv|parquet)(\.gz)?$", "", path.name, flags=re.IGNORECASE)
    names = (f"{stem}.edited{f'-{n}' if n > 1 else ''}.jsonl" for n in range(1, 10_000))
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())


def save_row(path: Path, where: str, before: Mapping[str, Any], new: Mapping[str, Any]) -> Path:
    """Write the file with this one row changed; returns the file. Every other line is copied as it stands.

    Raises `UserError` when the row on disk is not `before` any more, and for rows that JSON cannot hold.
    """
    with _WRITING:
        target, number = target_of(path), number_of(where)
        changed = False

        def write(draft: Path) -> None:
            """Every line but the one that changes, as it is."""
            nonlocal changed
            with draft.open("wb") as out:
                for at, line in _numbered_lines(path):
                    if at == number:
                        if json.loads(line) != json.loads(_json_line(before)):
                            break
                        line, changed = _json_line(new), True
                    out.write(line.rstrip(b"\r\n") + b"\n")
            if not changed:
                raise UserError(f"{where} is not what was shown any more; show the row again and repeat the change")

        write_atomic(target, write)
        return target


def _json_line(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise UserError(f"this row cannot be written as JSON ({error}); edit the file by hand") from None


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of JSON, as they stand or, from another kind of file, as they are read."""
    if path.name.lower().endswith(LINES):
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        return
    for where, row in read_rows(str(path)):
        if isinstance(row, BadRow):
            raise UserError(f"{where}: {row.sentence}; mend that in the file before you edit it here")
        yield number_of(where), _json_line(row)
