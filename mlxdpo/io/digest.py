"""SHA-256 of values, files and model folders.

A file is read once, and its digest remembered in the cache under what the file system says of it (size, inode, times).
Nobody else's word counts: in the Hub's cache, whose large files are named after their digests, the name is compared.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mlxdpo.io.atomic import write_json
from mlxdpo.io.weight_files import weight_files
from mlxdpo.machine.device import cache_folder
from mlxdpo.types import UserError

# A file may be written twice within one tick of a file system's clock (2 s at worst) and keep its stamp.
SETTLED_NS = 2_000_000_000


def json_digest(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """SHA-256 of a value as JSON with sorted keys; `default` makes JSON of what has no form in it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=default).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file's bytes; remembered by path, size, inode and time of change.

    Raises `UserError` for a file of the Hub's cache whose bytes are not those that it is named after.
    """
    real = file.resolve()
    status, now = real.stat(), time.time_ns()
    stamp = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    note = (
        cache_folder()
        / "digests"
        / f"{hashlib.sha256(str(real).encode('utf-8', 'surrogateescape')).hexdigest()[:24]}.json"
    )
    digest = _noted(note, stamp)
    if digest is None:
        with real.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if max(status.st_mtime_ns, status.st_ctime_ns) < now - SETTLED_NS:
            _write_note(note, {"file": str(real), "stamp": stamp, "digest": digest})
    if real.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", real.name) and real.name != digest:
        raise UserError(f"{real}: corrupted (its bytes differ from the Hub's); delete it, and it is downloaded again")
    return digest


def _noted(note: Path, stamp: list[int]) -> str | None:
    """The digest in a note of the cache about a file with this stamp; None where there is none, or it is damaged."""
    try:
        known = json.loads(note.read_bytes())
        whole = json_digest({name: known[name] for name in ("file", "stamp", "digest")}) == known["sum"]
        return known["digest"] if whole and known["stamp"] == stamp else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _write_note(note: Path, known: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):  # a cache that cannot be written costs time, and nothing else
        write_json(note, {**known, "sum": json_digest(known)})


SHAPING = (
    "config.json",
    "hf_quant_config.json",
    "adapters.safetensors",
    "adapter_config.json",
)


def folder_digest(folder: Path, code: bool = False) -> str:
    """SHA-256 over the names and contents of the files in `folder` that shape a log-probability: the weights' identity.

    `code` says that the folder's Python files are run (model.trust_remote_code), and so are among them.
    """
    patterns = (*SHAPING, "*.py") if code else SHAPING
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)} | set(weight_files(folder)))
    parts = [f"{file.name} {file_digest(file)}" for file in files]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
