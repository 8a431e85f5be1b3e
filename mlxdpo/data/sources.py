"""Rows from where the user keeps them: a local file or folder, or a data set on the Hugging Face Hub.

A row that cannot be read comes out as a `BadRow` in its place, so the caller decides whether to stop or to
count it and go on. What concerns the whole source (missing, empty, damaged, unknown kind) raises `UserError`.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import itertools
import json
import lzma
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from mlxdpo.data import reasons
from mlxdpo.data.arrow import PORTION_OF_ROWS, arrow_rows, parquet_rows, rows_of_batch
from mlxdpo.data.fields import column_names, describe_type
from mlxdpo.data.llama_factory import INFO, Entry, described_files, entry_of, in_their_names
from mlxdpo.data.report import BadRow
from mlxdpo.io.digest import file_digest
from mlxdpo.io.json_file import LONGEST_LINE, bounded_lines
from mlxdpo.io.names import HUB_ID
from mlxdpo.machine.device import cache_folder
from mlxdpo.types import UserError

Found = tuple[str, dict[str, Any] | BadRow]
"""Where a row stands, and the row."""

HUB_DATA = re.compile(rf"{HUB_ID.pattern}(:[\w./-]+)?", re.ASCII)

HELDOUT_SPLITS = ("valid", "validation", "val", "dev", "eval", "heldout")
_SPLIT_NAMES = ("train", "test", *HELDOUT_SPLITS)
_BOOKKEEPING = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json"}


def read_rows(path: str, split: str = "train") -> Iterator[Found]:
    """Rows of a file, of a folder of files (sorted by name), or of a Hub id `org/name` or `org/name:config`.

    Yields (where, row); where is "pairs.jsonl:37" (line) or "pairs.parquet:row 12". In a folder, files named
    after the split (train.jsonl, train-00000.parquet) are read; if there are none, those named after no split.

    Raises `UserError` for a source that is missing, empty, damaged, of an unknown kind or out of reach.
    """
    if not path:
        raise UserError("no data given; set data.path to a file, a folder or a Hub dataset id")
    if is_hub_dataset(path):
        return _guarded(_hub_rows(path, split), path)
    readers = [(_reader(file, name), file, name) for file, name in _local(path, split)]
    return _guarded((row for read, file, name in readers for row in _rows_of_file(read, file, name)), path)


def _rows_of_file(read: Callable[[Path, str], Iterator[Found]], file: Path, name: str) -> Iterator[Found]:
    """The rows of a file; where LLaMA-Factory's dataset_info.json describes it, under that program's names."""
    entry: Entry | None = entry_of(file)
    for where, row in read(file, name):
        yield where, row if entry is None or isinstance(row, BadRow) else in_their_names(row, entry)


def fingerprint(path: str, split: str) -> list[str] | None:
    """What a source holds, without reading a row: each file's name and SHA-256, or a Hub data set's commit.

    None where that cannot be known: a pipe, a source that cannot be read (`read_rows` says why), no answer.
    """
    try:
        if is_hub_dataset(path):
            return [f"{path} {_hub_commit(path)}"]
        files = _local(path, split)
        if not all(file.is_file() for file, _ in files):  # a pipe can be read only once
            return None
        described = {file.parent / INFO: INFO for file, _ in files if entry_of(file)}
        return [f"{name} {file_digest(file)}" for file, name in [*files, *described.items()]]
    except (OSError, UserError):  # reading the rows meets it again, in its turn
        return None


def _local(path: str, split: str) -> list[tuple[Path, str]]:
    """Files and what their rows are called after."""
    place = Path(os.path.expanduser(path))
    if described := described_files(place):
        return [(file, f"{file.parent.name}/{file.name}") for file in described]
    if os.path.isdir(place):
        return [(file, f"{place.name}/{file.relative_to(place)}") for file in _files_of(place, split)]
    if os.path.exists(place):
        return [(place, place.name)]
    raise UserError(f"{path}: no such file or folder; expected data such as pairs.jsonl or a Hub id org/name")


def is_hub_dataset(path: str) -> bool:
    """Whether a path is a Hub dataset id: org/name without a data file's ending, and nothing here has that name."""
    here = os.path.exists(path) or os.path.exists(path.rpartition(":")[0])
    return HUB_DATA.fullmatch(path) is not None and _file_kind(Path(path)) not in READERS and not here


def heldout_split(path: str, split: str) -> str | None:
    """The split of a local folder that is held out by its name (`valid` beside `train`, as mlx-lm has it), or None."""
    place = Path(os.path.expanduser(path))
    if split != "train" or not os.path.isdir(place) or described_files(place):
        return None
    found = {_split_of(file.relative_to(place), "train") for file in _data_files(place)}
    to_train = found - {*HELDOUT_SPLITS, "test"}
    return next((name for name in HELDOUT_SPLITS if name in found), None) if to_train else None


def _guarded(rows: Iterator[Found], path: str) -> Iterator[Found]:
    empty = True
    try:
        for row in rows:
            empty = False
            yield row
    except (OSError, EOFError, zlib.error, lzma.LZMAError, csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({_one_line(error)}); check the file") from None
    if empty:
        raise UserError(f"{path}: holds no rows; expected at least one")


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _file_kind(file: Path) -> str:
    suffixes = [suffix.lower() for suffix in file.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _reader(file: Path, name: str) -> Callable[[Path, str], Iterator[Found]]:
    if reader := READERS.get(_file_kind(file)):
        return reader
    raise UserError(f"{name}: unknown kind of file; expected {', '.join(READERS)}")


def _files_of(folder: Path, split: str) -> list[Path]:
    """The folder's data files that belong to the split, sorted."""
    files = _data_files(folder)
    if not files:
        raise UserError(f"{folder}: no data files in this folder; expected {', '.join(READERS)}")
    named = {file: _split_of(file.relative_to(folder), split) for file in files}
    chosen = [f for f in files if named[f] == split] or [f for f in files if named[f] is None]
    if not chosen:
        known = ", ".join(sorted({str(name) for name in named.values()}))
        raise UserError(f'{folder}: no files of the split "{split}"; the folder has {known}')
    return chosen


def _data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if _is_data(file.relative_to(folder)) and file.is_file())


def _is_data(file: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.parts)
    cached = file.suffix == ".arrow" and file.name.startswith("cache-")  # of `map` on a saved dataset
    return not hidden and not cached and file.name not in _BOOKKEEPING and _file_kind(file) in READERS


def _split_of(file: Path, wanted: str) -> str | None:
    """The split that a file of a folder is named after: its own name says so, or a folder between."""
    for part in reversed(file.parts):
        for name in (wanted, *_SPLIT_NAMES):
            if re.match(rf"{re.escape(name)}([-_.]|$)", part, re.IGNORECASE):
                return name
    return None


def _opened_zstd(file: Path) -> IO[bytes]:
    import pyarrow as pa  # no dependency more: Arrow carries the format

    return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))  # type: ignore[return-value]


COMPRESSED: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _opened_zstd,
}
"""How a compressed text file is opened, by its last ending."""


def opened_file(file: Path) -> IO[bytes]:
    """A text file as UTF-8, decompressed; one that begins with the mark of UTF-16 (Windows) is rewritten aside."""
    stream = COMPRESSED.get(file.suffix.lower(), lambda path: path.open("rb"))(file)
    if stream.peek(2)[:2] not in (b"\xff\xfe", b"\xfe\xff"):
        return stream
    cache_folder().mkdir(parents=True, exist_ok=True)
    copy: Any = tempfile.TemporaryFile(dir=cache_folder())  # noqa: SIM115 (the caller closes it)
    with stream, io.TextIOWrapper(stream, "utf-16", "surrogatepass", newline="") as text:
        while part := text.read(1 << 20):
            copy.write(part.encode("utf-8", "surrogatepass"))
    copy.seek(0)
    return copy


def _json_lines(file: Path, name: str) -> Iterator[Found]:
    with opened_file(file) as stream:
        for line, raw in enumerate(bounded_lines(stream, name), 1):
            if raw.strip():
                yield f"{name}:{line}", _object_in(raw.removeprefix(b"\xef\xbb\xbf") if line == 1 else raw)


def _object_in(raw: bytes) -> dict[str, Any] | BadRow:
    try:
        return _as_row(_parse(raw))
    except BadRow as bad:
        return bad


def _as_row(value: Any) -> dict[str, Any] | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow(reasons.NOT_OBJECT, f"the row is {describe_type(value)}; expected an object of columns")


def _parse(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8").rstrip())
    except UnicodeDecodeError as error:
        at = f"byte {raw[error.start]:#04x} at position {error.start + 1}"
        raise BadRow(reasons.INVALID_UTF8, f"the text is not UTF-8 ({at})") from None
    except RecursionError:
        raise BadRow(reasons.MALFORMED, "the JSON is nested too deeply to be a row") from None
    except json.JSONDecodeError as error:
        place = f"line {error.lineno} column {error.colno}" if error.lineno > 1 else f"column {error.colno}"
        raise BadRow(reasons.MALFORMED, f"not valid JSON ({error.msg} at {place})") from None
    except ValueError as error:  # a number with thousands of digits
        raise BadRow(reasons.MALFORMED, f"not valid JSON ({_one_line(error)})") from None


def _json_file(file: Path, name: str) -> Iterator[Found]:
    """An array of rows, an object with one list of rows, or JSON lines under the wrong ending."""
    with opened_file(file) as stream:
        raw = stream.read().removeprefix(b"\xef\xbb\xbf").strip()
    if not raw:
        return
    try:
        value = _parse(raw)
    except BadRow as bad:
        if isinstance(_object_in(raw.split(b"\n", 1)[0]), BadRow):
            raise UserError(f"{name}: {bad.sentence}; expected an array of rows") from None
        yield from _json_lines(file, name)
        return
    for number, row in enumerate(_rows_in(value, name), 1):
        yield f"{name}:row {number}", _as_row(row)


def _rows_in(value: Any, name: str) -> list[Any]:
    if isinstance(value, dict):
        lists = [column for column in value.values() if isinstance(column, list)]
        if len(lists) == 1:
            return lists[0]
    if isinstance(value, list):
        return value
    raise UserError(
        f"{name}: the file is {describe_type(value)}; expected an array of rows or an object with one list of rows"
    )


def _table_rows(file: Path, name: str, delimiters: str) -> Iterator[Found]:
    """CSV or TSV with a header. Bytes that are not UTF-8 become surrogates, which the text check refuses.

    The delimiter is the one of `delimiters` that splits the header most often, the first of them where none does.
    """
    csv.field_size_limit(LONGEST_LINE)  # the default refuses answers beyond 128 KiB
    with opened_file(file) as raw, io.TextIOWrapper(raw, "utf-8-sig", "surrogateescape", newline="") as stream:
        lines = bounded_lines(stream, name)
        first = next(lines, "")
        told = 1 if re.fullmatch(r"sep=.\r?\n?", first) else 0  # Excel's own line: the delimiter
        if told:
            delimiters, first = first[4], next(lines, "")
        delimiter = max(delimiters, key=lambda mark: _header_cells(first, mark))
        reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{name}:1: two columns have the same name in {column_names(header)}; rename one")
        while True:
            where = f"{name}:{reader.line_num + 1 + told}"
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield where, BadRow(reasons.MALFORMED, f"not a valid table row ({_one_line(error)})")
                continue
            if cells:
                yield where, _csv_cells(header, cells)


def _header_cells(line: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=delimiter), []))
    except csv.Error:
        return 0


def _csv_cells(header: list[str], cells: list[str]) -> dict[str, Any] | BadRow:
    if len(cells) != len(header):
        return BadRow(reasons.MALFORMED, f"the row has {len(cells)} cells where the header has {len(header)}")
    return dict(zip(header, cells, strict=True))


def _hub_rows(path: str, split: str) -> Iterator[Found]:
    try:
        tables = _load_hub(path, split).with_format("arrow").iter(batch_size=PORTION_OF_ROWS)
        for number, row in enumerate((row for table in tables for row in rows_of_batch(table)), 1):
            yield f"{path}:row {number}", row
    except Exception as error:  # what streaming raises depends on the HTTP library under huggingface_hub
        raise UserError(_hub_sentence(error, path, split)) from error


def _hub_sentence(error: Exception, path: str, split: str) -> str:
    if isinstance(error, ConnectionError):
        return f"{path}: no such file here, and the Hub cannot be reached; give a local file or go online"
    if isinstance(error, FileNotFoundError):
        return f"{path}: neither a local file nor a dataset on the Hub; check the spelling, or log in if it is gated"
    return f'{path}: cannot load the split "{split}" from the Hub ({_one_line(error)})'


def _hub_commit(path: str) -> str:
    from huggingface_hub import HfApi

    try:
        return str(HfApi().dataset_info(path.partition(":")[0], timeout=10).sha)
    except Exception as error:  # depends on the HTTP library, as above
        raise UserError(f"{path}: the Hub does not say which commit this is ({_one_line(error)})") from error


def _load_hub(path: str, split: str) -> Any:
    """Stream a dataset; behind the colon stands one of its configurations, else one of its folders."""
    from datasets import load_dataset

    name, _, part = path.partition(":")
    try:
        return load_dataset(name, part or None, split=split, streaming=True)
    except ValueError as error:
        if not part or "BuilderConfig" not in str(error):
            raise
        return load_dataset(name, data_dir=part, split=split, streaming=True)


READERS: dict[str, Callable[[Path, str], Iterator[Found]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_file,
    ".csv": partial(_table_rows, delimiters=",;\t|"),
    ".tsv": partial(_table_rows, delimiters="\t,;|"),
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
}
"""Readers by file ending; the text ones also with one of `COMPRESSED` behind it."""
