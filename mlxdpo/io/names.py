"""Names that come from outside: file names that are safe to write to, and ids of repositories on the Hub."""

from __future__ import annotations

import re
from pathlib import Path

LONGEST_NAME = 255  # bytes; the limit of the usual file systems
# Windows opens a device under these names, whatever ending they have.
DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}
# Each half at most 96 characters, as on the Hub.
HUB_ID = re.compile(r"[\w-][\w.-]{0,95}/[\w-][\w.-]{0,95}", re.ASCII)
DATA_FILES = {".jsonl", ".json", ".csv", ".parquet", ".yaml", ".gz", ".zst"}


def looks_like_hub_id(name: str) -> bool:
    """Whether a name is spelled like an id on the Hub, owner/name, whatever files there are on this machine."""
    return bool(HUB_ID.fullmatch(name)) and Path(name).suffix not in DATA_FILES


def is_hub_id(name: str) -> bool:
    """Whether a model or data source is an id on the Hub and not a file or folder of this machine."""
    return looks_like_hub_id(name) and not Path(name).exists()


def is_plain_name(name: str) -> bool:
    """Whether a name out of a file or from the Hub stays in its folder, on every system, when a file is called so."""
    odd = not name.isprintable() or any(sign in name for sign in '/\\:*?"<>|') or name != name.strip()
    device = name.split(".")[0].upper() in DEVICES
    return bool(name) and not odd and not device and not name.endswith(".") and len(name.encode()) <= LONGEST_NAME
