"""Data sets that are not read and encoded a second time: what names them, and folders that appear whole or never.

cache/pairs/<sources and settings>/<tokenizer and template>/ appears under its name when it is complete.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlxdpo.config import DataConfig
from mlxdpo.data.read import heldout_source
from mlxdpo.data.sources import fingerprint
from mlxdpo.data.template import Writer
from mlxdpo.platform import cache_folder
from mlxdpo.runs import sync_folder

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
    return _name([sources, settings, seed if drawn else None, _code(), libraries])


def encoding_key(template: str, writer: Writer) -> str:
    """A name for what turns text into ids: the template's digest and the tokens that end a completion."""
    return _name([template, sorted(writer.ends), writer.eos])


def pairs_folder() -> Path:
    """Where encoded data sets are kept."""
    return cache_folder() / "pairs"


@contextlib.contextmanager
def draft(folder: Path) -> Iterator[Path]:
    """A hidden folder below `folder`, gone afterwards unless it was renamed; drafts of killed processes go first.

    A live draft is known by its lock, which the kernel drops when its process ends, however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):  # so that nobody sweeps a draft between its birth and its lock
        _sweep(folder)
        path = Path(tempfile.mkdtemp(dir=folder, prefix=".draft-"))
        lock = _lock(path, fcntl.LOCK_EX)
    try:
        yield path
    finally:
        os.close(lock)
        shutil.rmtree(path, ignore_errors=True)


def publish(path: Path, target: Path) -> None:
    """Give a complete draft its name; where another process was first, its equal stays."""
    target.parent.mkdir(parents=True, exist_ok=True)
    path.chmod(0o755)
    try:
        os.replace(path, target)
    except OSError:
        if not target.exists():
            raise
    sync_folder(target.parent)


def _sweep(folder: Path) -> None:
    for path in folder.glob(".draft-*"):
        try:
            lock = _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # at work, or just gone
            continue
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    lock = _lock(folder, fcntl.LOCK_EX)
    try:
        yield
    finally:
        os.close(lock)


def _lock(folder: Path, how: int) -> int:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, how)
    except OSError:
        os.close(handle)
        raise
    return handle


def _name(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    """Digest of this room's own source: changed code cannot find what the old code made."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()
