"""SHA-256 of values, files and model folders.

A file's digest is remembered, so that a second run does not read it again. A Hub download names its large files by
their own SHA-256: those are not read at all.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlxdpo.io.atomic import write_json
from mlxdpo.io.weight_files import weight_files
from mlxdpo.machine.device import cache_folder

# A file may be written twice within one tick of a file system's clock (2 s at worst) and keep its stamp.
SETTLED_NS = 2_000_000_000


def json_digest(value: Any, default: Callable[[Any], Any] | None = None) -> str:
    """SHA-256 of a value as JSON with sorted keys; `default` makes JSON of what has no form in it."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=default).encode()).hexdigest()


def file_digest(file: Path) -> str:
    """SHA-256 of a file; remembered by path, size, inode and time of change."""
    real = file.resolve()
    if re.fullmatch(r"[0-9a-f]{64}", real.name) and real.parent.name == "blobs":
        return real.name  # a Hub blob is named by its own SHA-256
    status, now = real.stat(), time.time_ns()
    stamp = [status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns]
    note = cache_folder() / "digests" / f"{hashlib.sha256(str(real).encode()).hexdigest()[:24]}.json"
    if note.exists():
        known = json.loads(note.read_text("utf-8"))
        if known["stamp"] == stamp:
            return known["digest"]
    with real.open("rb") as handle:
        digest = hashlib.file_digest(handle, "sha256").hexdigest()
    if max(status.st_mtime_ns, status.st_ctime_ns) < now - SETTLED_NS:
        write_json(note, {"file": str(real), "stamp": stamp, "digest": digest})
    return digest


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
