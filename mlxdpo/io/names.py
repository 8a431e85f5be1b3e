"""Names from outside: file names that are safe to write to, ids on the Hub, hosts, patterns of a model's modules."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxdpo.machine.limited import LimitReached, call_limited, start_limits
from mlxdpo.types import UserError

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


def is_loopback(host: str | None) -> bool:
    """Whether a host name or address is this very machine, and what is sent there stays on it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address((host or "").strip("[]")).is_loopback
    except ValueError:
        return False


TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:hf_[A-Za-z0-9_-]{8,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}"
    r"|glpat-[\w-]{16,}|xox[abeprs]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{16}|AIza[\w-]{35}|npm_[A-Za-z0-9]{30,}"
    r"|pypi-[\w-]{40,}|r8_[A-Za-z0-9]{30,}|gsk_[A-Za-z0-9]{20,}|wandb_v1_\w{20,}|nvapi-[\w-]{20,}"
    r"|eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
    r"|(?<=Bearer )[\w.~+/-]{8,}=*"
)
"""Logins by their shapes: of the Hub, of model servers, of code hosts, of clouds and package registries."""


def without_tokens(text: str) -> str:
    """`text` with every login in it struck out but for the beginning that says what it was."""
    return TOKEN.sub(lambda found: f"{found[0][:3]}***", text)


PLAIN = re.compile(r"\^?[\w.]{1,500}", re.ASCII)
SECONDS, MEGABYTES = 2, 500


def first_matches(patterns: Sequence[str], names: Sequence[str]) -> list[int | None]:
    """For each name the index of the first pattern that matches its end, from a dot on, as PEFT matches modules.

    A regular expression can take time or memory without end, so all but plain words are matched in a process with
    limits. Raises `UserError` for one that took too much, or is none.
    """
    if all(map(PLAIN.fullmatch, patterns)):
        return _matched([patterns, names])
    try:
        found = call_limited("mlxdpo.io.names:match_limited", [list(patterns), list(names)], SECONDS, MEGABYTES)
    except LimitReached as limit:
        raise UserError(f"its patterns of module names took {limit} to match; list the module names instead") from None
    if isinstance(found, str):
        raise UserError(f"{found[:80]!r} is not a pattern of module names")
    return found


def match_limited(asked: Any) -> list[int | None] | str:
    """In the limited process: the matches, or the first pattern that is none."""
    start_limits(SECONDS, MEGABYTES)
    for pattern in asked[0]:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError):
            return pattern
    return _matched(asked)


def _matched(asked: Any) -> list[int | None]:
    rules = [re.compile(rf"(.*\.)?({pattern})$") for pattern in asked[0]]
    return [next((at for at, rule in enumerate(rules) if rule.match(name)), None) for name in asked[1]]
