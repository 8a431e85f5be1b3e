"""A preference file row by row: what is in it, what fits a search, what the doctor says, one pair as the model sees it.

Rows are shown as they stand in the file, bad ones too. Every text is escaped: a data file may hold anything. An edited
row goes into a new file beside the original, whole or not at all.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from html import escape
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.config import DataConfig
from mlxdpo.data.check import check_rows, finding_lines
from mlxdpo.data.fields import Row
from mlxdpo.data.formats import Format, convert, detect
from mlxdpo.data.read import read_preferences
from mlxdpo.data.report import BadRow, Report
from mlxdpo.data.sources import Found, opened_file, read_rows
from mlxdpo.io.atomic import write_atomic
from mlxdpo.types import Preference, UserError
from mlxdpo.ui.widgets import holds_text, page_table, short

MOST = 50_000  # rows held in memory; the others are neither shown nor searched, and that is said
FIELDS = 4  # columns that can be edited
ANY = "any column"


class RowFilter(NamedTuple):
    """A filter: `text` somewhere in `column` (any case), and that column's length in characters."""

    text: str = ""
    column: str = ANY
    least: int | None = None
    most: int | None = None


class Book(NamedTuple):
    """The rows of a file as they were read, whether there are more, and their shape where one was recognised."""

    path: Path
    rows: tuple[Found, ...]
    more: bool
    shape: Format | None


def open_book(path: Path) -> Book:
    """The first `MOST` rows of a file. Raises `UserError` for one that cannot be read."""
    if not path.is_file():
        raise UserError(f"{path}: the file no longer exists; choose another, or reload the page")
    about = path.stat()
    return _read_book(path, about.st_mtime_ns, about.st_size)


@lru_cache(maxsize=2)  # paging and searching read the file once, until it changes
def _read_book(path: Path, modified: int, size: int) -> Book:
    found = read_rows(str(path))
    rows = tuple(islice(found, MOST))
    sound = (row for _, row in rows[:100] if not isinstance(row, BadRow))
    shape = next((shape for row in sound if (shape := detect(row))), None)
    return Book(path, rows, next(found, None) is not None, shape)


def number_of(where: str) -> int:
    """The row's number in its file: 37 in "pairs.jsonl:37" and in "pairs.csv:row 37"."""
    found = re.search(r"(\d+)$", where)
    return int(found.group(1)) if found else 0


def columns_of(book: Book) -> list[str]:
    """The columns of the shape first, then the others of the first rows."""
    first = list(book.shape.columns) if book.shape else []
    seen = [name for _, row in book.rows[:100] if not isinstance(row, BadRow) for name in row]
    return [name for name in dict.fromkeys([*first, *seen]) if name in seen]


def as_text(value: Any) -> str:
    """A column as text: itself, or as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def matching_rows(book: Book, wanted: RowFilter) -> list[int]:
    """Indices of the rows that fit. An unreadable row fits only where nothing is asked."""
    if wanted == RowFilter():
        return list(range(len(book.rows)))
    return [at for at, (_, row) in enumerate(book.rows) if not isinstance(row, BadRow) and _row_fits(row, wanted)]


def _row_fits(row: Mapping[str, Any], wanted: RowFilter) -> bool:
    names = row if wanted.column == ANY else [wanted.column]
    texts = [as_text(row[name]) for name in names if name in row]
    length = sum(map(len, texts))
    if (wanted.least is not None and length < wanted.least) or (wanted.most is not None and length > wanted.most):
        return False
    return holds_text(texts, wanted.text)


def rows_html(book: Book, found: Sequence[int], page: int, chosen: int | None = None) -> str:
    """One page of the rows found."""
    names = columns_of(book)[:FIELDS]
    limit = f" (of the first {MOST:,}; the file is longer)" if book.more else ""
    headers = ["row", *names, "characters"]
    return page_table("row", headers, lambda at: _row_cells(book.rows[at], names), found, page, chosen, limit)


def _row_cells(found: Found, names: Sequence[str]) -> list[str]:
    where, row = found
    number = str(number_of(where))
    if isinstance(row, BadRow):
        return [number, f"cannot be read: {row.sentence}", *[""] * len(names)]
    texts = [as_text(row.get(name, "")) for name in names]
    return [number, *(short(text) for text in texts), " / ".join(str(len(text)) for text in texts)]


def row_at(book: Book, number: int | None) -> Found:
    """The row of that number. Raises `UserError` when the file has none."""
    for found in book.rows:
        if number_of(found[0]) == number:
            return found
    raise UserError(f"{book.path.name} has no row {number}; it has {len(book.rows):,} rows{' or more' * book.more}")


def doctor(path: Path) -> str:
    """The findings of `mlxdpo data check` on the whole file, as a list."""
    rows, report = read_preferences(DataConfig(path=str(path), on_bad_row="skip"))
    found = check_rows(rows, report, path.name)
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in finding_lines(found)) + "</ul>"


def preference(book: Book, where: str, row: Mapping[str, Any]) -> tuple[Preference, int]:
    """The row's first pair, and how many it has. Raises `UserError` saying what is wrong with the row."""
    if book.shape is None:
        raise UserError(f"{book.path.name}: no known row shape; `mlxdpo data formats` lists them")
    try:
        items = convert(book.shape, [Row(where, book.shape.flattened(row))])
    except BadRow as bad:
        raise UserError(f"{where}: {bad.sentence}") from None
    pairs = [item for item in items if isinstance(item, Preference)]
    if not pairs:
        raise UserError(f"{where}: this row alone is not a pair (shape {book.shape.name}: {book.shape.about})")
    return pairs[0], len(pairs)


def as_seen(pair: Preference, count: int, data: DataConfig, tokenizer: Any) -> str:
    """The pair decoded from its token ids, the scored tokens marked, with their numbers."""
    from mlxdpo.data.encode import encode, shown_example

    report = Report()
    example = encode(pair, tokenizer, data.model_copy(update={"on_bad_row": "skip"}), report)
    remarks = "".join(f"<li>{escape(line)}</li>" for line in report.lines())
    said = f"<ul>{remarks}</ul>" if remarks else ""
    if example is None:
        return f"<p>This pair would be skipped.</p>{said}"
    parts = zip(("chosen", "rejected"), shown_example(example, tokenizer), example.scored, strict=True)
    sides = "".join(_seen_side(name, segments, len(example.prompt), scored) for name, segments, scored in parts)
    more = f"<p>The first of this row's {count} pairs.</p>" if count > 1 else ""
    return f"{SEEN}{more}{sides}{said}"


SEEN = """<style>
.seen { white-space: pre-wrap; overflow-wrap: anywhere; padding: 8px; border: 1px solid var(--border-color-primary);
  color: var(--body-text-color); max-height: 320px; overflow: auto; }
.seen mark { background: #56B4E955; color: inherit; border-bottom: 2px solid #0072B2; }
</style>"""


def _seen_side(name: str, segments: Sequence[tuple[str, bool]], prompt: int, scored: int) -> str:
    body = "".join(f"<mark>{escape(text)}</mark>" if marked else escape(text) for text, marked in segments)
    return (
        f"<h4>{name}: {scored} tokens scored (marked), {prompt} of the prompt not</h4>"
        f'<div class="seen" tabindex="0">{body}</div>'
    )


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
        raise UserError(f"{name} is no longer valid JSON ({error}); it holds messages or numbers") from None


def target_of(path: Path) -> Path:
    """Where an edit of `path` goes: a new file beside it; an edited file is gone on with."""
    if EDITED.search(path.name):
        return path
    stem = stem_of(path)
    names = (f"{stem}.edited{f'-{n}' if n > 1 else ''}.jsonl" for n in range(1, 10_000))
    return next(path.with_name(name) for name in names if not path.with_name(name).exists())


def stem_of(path: Path) -> str:
    """A data file's name without its ending."""
    return re.sub(r"\.(jsonl|ndjson|json|csv|tsv|parquet)(\.gz)?$", "", path.name, flags=re.IGNORECASE)


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
                for at, line in numbered_lines(path):
                    if at == number:
                        if json.loads(line) != json.loads(_json_line(before)):
                            break
                        line, changed = _json_line(new), True
                    out.write(line.rstrip(b"\r\n") + b"\n")
            if not changed:
                raise UserError(f"{where} has changed since it was shown; open the row again and repeat the edit")

        write_atomic(target, write)
        return target


def _json_line(row: Mapping[str, Any]) -> bytes:
    try:
        return json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError) as error:  # UnicodeEncodeError is a ValueError
        raise UserError(f"this row cannot be written as JSON ({error}); edit the file in a text editor") from None


def numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbered lines of JSON, as they stand or, from another kind of file, as they are read."""
    if path.name.lower().endswith(LINES):
        with opened_file(path) as stream:
            for number, line in enumerate(stream, 1):
                yield number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
        return
    for where, row in read_rows(str(path)):
        if isinstance(row, BadRow):
            raise UserError(f"{where}: {row.sentence}; fix that in the file before you edit it here")
        yield number_of(where), _json_line(row)
