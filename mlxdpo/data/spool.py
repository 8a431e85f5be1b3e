"""Clean rows between reading and encoding, in a nameless temporary file.

Which rows are held out is known after the last one, and token ids are known after the model is loaded; so the rows
wait on disk, and a source is read once (a pipe, or a Hub data set that streams, cannot be read twice).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mlxdpo.data.read import prompt_key
from mlxdpo.types import Extras, Message, Opinion, Preference, Text

PORTION = 1000
KINDS = {kind.__name__: kind for kind in (Preference, Opinion)}
FIELDS = {
    "Preference": ("prompt", "chosen", "rejected", "where", "tools", "extras"),
    "Opinion": ("prompt", "completion", "desirable", "where", "tools", "extras"),
}


class Spool:
    """Rows that can be walked through again and again, without their other columns.

    `prompts` are the distinct `prompt_key`s: 16 bytes each, all that stays in memory. `count` is the number of rows.
    """

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)  # not the system's /tmp: that may be memory
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as the object lives)
        self.prompts: set[bytes] = set()
        self.count = 0

    def filling(self, rows: Iterable[Preference | Opinion]) -> Iterator[None]:
        """Take up rows, pausing after every `PORTION` for a caller who shows how far it is, or stops it."""
        for row in rows:
            key = prompt_key(row.prompt)
            self.prompts.add(key)
            kind = type(row).__name__
            line = [key.hex(), kind, *(getattr(row, name) for name in FIELDS[kind])]
            # What JSON has no form of (a date out of Parquet in a tool call) becomes the text a template would write.
            self._file.write(json.dumps(line, default=str).encode() + b"\n")
            self.count += 1
            if self.count % PORTION == 0:
                yield

    def rows(self, wanted: Callable[[bytes], bool] = lambda key: True) -> Iterator[Preference | Opinion]:
        """The rows whose prompt's key is wanted, in order."""
        self._file.seek(0)
        for line in self._file:
            key, kind, *fields = json.loads(line)
            if wanted(bytes.fromhex(key)):
                yield KINDS[kind](
                    **{name: _back(name, value) for name, value in zip(FIELDS[kind], fields, strict=True)}
                )


def _back(name: str, value: Any) -> Any:
    """A field out of JSON, which knows lists alone."""
    if name in ("prompt", "chosen", "rejected", "completion"):
        return _text(value)
    return {"tools": tuple, "extras": lambda numbers: Extras(*numbers)}.get(name, lambda same: same)(value)


def _text(value: Any) -> Text:
    return value if isinstance(value, str) else tuple(Message(*turn) for turn in value)
