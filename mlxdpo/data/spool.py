"""Clean rows between reading and encoding, in a nameless temporary file.

Which rows are held out is known after the last one, and token ids are known after the model is loaded; so the rows
wait on disk, and a source is read once (a pipe, or a Hub data set that streams, cannot be read twice).
"""

from __future__ import annotations

import pickle
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from mlxdpo.data.read import prompt_key
from mlxdpo.types import Opinion, Preference

FIELDS = {
    Preference: ("prompt", "chosen", "rejected", "where", "tools", "extras"),
    Opinion: ("prompt", "completion", "desirable", "where", "tools", "extras"),
}


class Spool:
    """Rows that can be walked through again and again, without their other columns.

    `prompts` are the distinct `prompt_key`s: 16 bytes each, all that stays in memory.
    """

    def __init__(self, rows: Iterable[Preference | Opinion], folder: Path):
        folder.mkdir(parents=True, exist_ok=True)  # not the system's /tmp: that may be memory
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (open as long as the object lives)
        self.prompts: set[bytes] = set()
        for row in rows:
            key = prompt_key(row.prompt)
            self.prompts.add(key)
            kind = type(row)
            fields = {name: getattr(row, name) for name in FIELDS[kind]}
            pickle.dump((key, kind, fields), self._file, pickle.HIGHEST_PROTOCOL)

    def rows(self, wanted: Callable[[bytes], bool] = lambda key: True) -> Iterator[Preference | Opinion]:
        """The rows whose prompt's key is wanted, in order."""
        self._file.seek(0)
        while True:
            try:
                key, kind, fields = pickle.load(self._file)
            except EOFError:
                return
            if wanted(key):
                yield kind(**fields)
