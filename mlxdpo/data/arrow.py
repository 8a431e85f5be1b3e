"""Rows of Arrow tables (Parquet files, saved datasets, the Hub) as they were before Arrow gave all rows one type.

A column of objects has one struct type, the union of the keys of all its rows: a row's objects come back with null
under every key that only other rows have. Such nulls are taken out at every depth, so that a tool schema or a call is
what was written; Arrow does not keep which nulls were written, so these go too. JSON columns (`Json` of datasets
4.7 and later, the `arrow.json` extension type, Parquet's JSON) are decoded once and keep their nulls.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mlxdpo.data import reasons
from mlxdpo.data.report import BadRow
from mlxdpo.types import UserError

Decoder = Callable[[Any], Any]

PORTION_OF_ROWS = 256
"""Rows of a file that are in memory at once."""


def parquet_rows(file: Path, name: str) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """The rows of a Parquet file, each with where it stands. Raises `UserError` for a damaged file."""
    import pyarrow.parquet as pq

    return _numbered_rows(lambda: pq.ParquetFile(file).iter_batches(batch_size=PORTION_OF_ROWS), name, "Parquet")


def arrow_rows(file: Path, name: str) -> Iterator[tuple[str, dict[str, Any] | BadRow]]:
    """The rows of an Arrow file, a stream as datasets saves it, or the random-access form.

    Raises `UserError` for a damaged file.
    """
    return _numbered_rows(lambda: _arrow_batches(file), name, "Arrow")


def _arrow_batches(file: Path) -> Iterator[Any]:
    import pyarrow as pa

    with pa.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(number) for number in range(reader.num_record_batches))
            return
        source.seek(0)
        yield from pa.ipc.open_stream(source)


def _numbered_rows(batches: Callable[[], Iterable[Any]], name: str, kind: str) -> Iterator[Any]:
    import pyarrow as pa

    try:
        rows = (row for batch in batches() for row in rows_of_batch(batch))
        for number, row in enumerate(rows, 1):
            yield f"{name}:row {number}", row
    except (pa.ArrowException, UnicodeDecodeError) as error:  # a column's name may be no UTF-8
        said = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: not a readable {kind} file ({said})") from None


def rows_of_batch(batch: Any) -> Iterator[dict[str, Any] | BadRow]:
    """The rows of a record batch or table of Arrow; one that cannot be read is a `BadRow` in its place."""
    decoders = {field.name: decode for field in batch.schema if (decode := decoder_of(field.type))}
    for at in range(batch.num_rows):
        yield _decoded_row(batch.slice(at, 1), decoders)


def _decoded_row(one: Any, decoders: dict[str, Decoder]) -> dict[str, Any] | BadRow:
    try:
        row = one.to_pylist()[0]
        return row | {name: decode(row[name]) for name, decode in decoders.items() if row[name] is not None}
    except UnicodeDecodeError as error:
        return BadRow(reasons.INVALID_UTF8, f"the text is not UTF-8 ({error.reason})")
    except RecursionError:
        return BadRow(reasons.MALFORMED, "a JSON column is nested too deeply to be a row")
    except (ValueError, OverflowError) as error:  # a date beyond Python's years, a JSON column that holds none
        return BadRow(reasons.MALFORMED, f"a value cannot be read ({' '.join(str(error).split())})")


def decoder_of(kind: Any) -> Decoder | None:
    """What turns `to_pylist`'s value of an Arrow type into the value that was stored; None where it is that already."""
    import pyarrow as pa

    if isinstance(kind, pa.JsonType):
        return lambda value: json.loads(value)
    if isinstance(kind, pa.BaseExtensionType):
        return decoder_of(kind.storage_type)
    if pa.types.is_struct(kind):
        return _struct({field.name: decoder_of(field.type) for field in kind})
    if pa.types.is_map(kind):
        values = decoder_of(kind.item_type) or _as_stored
        return lambda pairs: {key: values(value) for key, value in pairs if value is not None}
    if hasattr(kind, "value_type") and not pa.types.is_dictionary(kind) and (inner := decoder_of(kind.value_type)):
        return lambda items: [item if item is None else inner(item) for item in items]
    return None


def _struct(fields: dict[str, Decoder | None]) -> Decoder:
    def without_nulls(value: Any) -> dict[str, Any]:
        """The object without the keys that hold null."""
        return {name: (fields[name] or _as_stored)(item) for name, item in value.items() if item is not None}

    return without_nulls


def _as_stored(value: Any) -> Any:
    return value
