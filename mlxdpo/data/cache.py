"""Data sets that are not read and encoded a second time: what names them, and folders that appear whole or never.

cache/pairs/<sources and settings>/<tokenizer and template>/ appears under its name when it is complete.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from mlxdpo.config import DataConfig
from mlxdpo.data.read import heldout_source, prompt_key
from mlxdpo.data.sources import fingerprint
from mlxdpo.data.template import Writer
from mlxdpo.io.digest import json_digest
from mlxdpo.io.staging import publish_folder
from mlxdpo.machine.device import cache_folder
from mlxdpo.types import Extras, Message, Preference, Text, UnpairedExample

# Clean rows between reading and encoding, in a nameless temporary file.
#
# Which rows are held out is known after the last one, and token ids are known after the model is loaded; so the rows
# wait on disk, and a source is read once (a pipe, or a Hub data set that streams, cannot be read twice).

PORTION = 1000
KINDS = {kind.__name__: kind for kind in (Preference, UnpairedExample)}
FIELDS = {
    "Preference": ("prompt", "chosen", "rejected", "where", "tools", "extras"),
    "UnpairedExample": ("prompt", "completion", "desirable", "where", "tools", "extras"),
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

    def filling(self, rows: Iterable[Preference | UnpairedExample]) -> Iterator[None]:
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

    def rows(self, wanted: Callable[[bytes], bool] = lambda key: True) -> Iterator[Preference | UnpairedExample]:
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
        return _key_text(value)
    return {"tools": tuple, "extras": lambda numbers: Extras(*numbers)}.get(name, lambda same: same)(value)


def _key_text(value: Any) -> Text:
    return value if isinstance(value, str) else tuple(Message(*turn) for turn in value)


LIBRARIES = ("transformers", "tokenizers", "jinja2", "numpy")


def source_key(data: DataConfig, seed: int) -> str | None:
    """A name for the rows that `data` gives: its sources' contents, all settings that change a token, the code.

    None where a source's content cannot be named before it is read (a pipe; the Hub when it does not answer): such
    a data set is read again at every start. The seed counts only where it draws the held-out prompts.
    """
    named = heldout_source(data)
    sources = [fingerprint(data.path, data.split), [] if named is None else fingerprint(*named)]
    if None in sources:
        return None
    libraries = {name: importlib.metadata.version(name) for name in LIBRARIES}
    drawn = named is None and data.eval_fraction > 0
    settings = data.model_dump(mode="json", exclude={"path", "eval", "group"})
    return json_digest([sources, settings, seed if drawn else None, _code_digest(), libraries])[:32]


def encoding_key(template: str, writer: Writer) -> str:
    """A name for what turns text into ids: the template's digest and the tokens that end a completion."""
    return json_digest([template, sorted(writer.ends), writer.eos])[:32]


STAGING = ".draft-"  # in front of the names of folders that are not complete


def pairs_folder() -> Path:
    """Where encoded data sets are kept."""
    return cache_folder() / "pairs"


def publish_dataset(path: Path, target: Path) -> None:
    """Give a complete draft its name; where another process was first, its equal stays."""
    try:
        publish_folder(path, target)
    except OSError:
        if not target.exists():
            raise


@functools.cache
def _code_digest() -> str:
    """Digest of this room's own source: changed code cannot find what the old code made."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
