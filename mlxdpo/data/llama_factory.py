"""LLaMA-Factory's `dataset_info.json`: which files of a folder are data sets, and what their columns are called.

A described file is read under that program's usual names, which are row shapes here: Alpaca (instruction, input,
output, chosen, rejected, kto_tag) and ShareGPT (conversations of from and value).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from mlxdpo.types import UserError

INFO = "dataset_info.json"
Entry = Mapping[str, Any]
"""What the file says of one data set."""

_COLUMNS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
_TAGS = {"role_tag": "from", "content_tag": "value"}
_ROLES = {
    "user_tag": "human",
    "assistant_tag": "gpt",
    "observation_tag": "observation",
    "function_tag": "function_call",
    "system_tag": "system",
}


def described_files(place: Path) -> list[Path]:
    """The data files that `place` stands for where LLaMA-Factory describes it; else none.

    `place` is the folder of a `dataset_info.json` or that file, for all its data sets with preferences (where it has
    none: all of them), or one of these with `:name` behind it for the data set of that name. Raises `UserError` for a
    name that is not there, and for data sets that are no local file.
    """
    folder, _, name = str(place).rpartition(":") if not os.path.exists(place) else (str(place), "", "")
    if not folder:
        return []
    base = Path(folder).parent if Path(folder).name == INFO else Path(folder)
    entries = _described_sets(base)
    if not entries:
        return []
    if name and name not in entries:
        raise UserError(f"{base / INFO}: no data set named {name}; it has {', '.join(list(entries)[:12])}")
    judged = {
        key: entry for key, entry in entries.items() if entry.get("ranking") or _named_columns(entry).get("kto_tag")
    }
    wanted = {name: entries[name]} if name else {k: e for k, e in (judged or entries).items() if "file_name" in e}
    if missing := [key for key, entry in wanted.items() if "file_name" not in entry]:
        raise UserError(f"{base / INFO}: {missing[0]} has no file_name; give its Hub dataset id as --data")
    return sorted({base / str(entry["file_name"]) for entry in wanted.values()})


def entry_of(file: Path) -> Entry | None:
    """What the `dataset_info.json` beside a file says of it, if anything. Raises `UserError` where it asks for a sample
    of the rows: which ones LLaMA-Factory draws is not known here."""
    entries = _described_sets(file.parent)
    name = next((name for name, entry in entries.items() if entry.get("file_name") == file.name), None)
    if name is None:
        return None
    if wanted := entries[name].get("num_samples"):
        raise UserError(
            f'{file.parent / INFO}: "num_samples": {wanted} of {name} cannot be followed; remove it to train on all '
            f"rows of {file.name}, or write the rows that you want into a file"
        )
    return entries[name]


def in_their_names(row: Mapping[str, Any], entry: Entry) -> dict[str, Any]:
    """A row of a described file with LLaMA-Factory's usual names of columns, turn keys and roles."""
    columns, tags = _named_columns(entry), entry.get("tags") or {}
    own = {str(theirs): _COLUMNS.get(name, name) for name, theirs in columns.items() if theirs}
    taken = set(own.values())
    named = {own.get(name, name): value for name, value in row.items() if name in own or name not in taken}
    keys = {str(tags[tag]): usual for tag, usual in _TAGS.items() if tag in tags}
    roles = {str(tags[tag]): usual for tag, usual in _ROLES.items() if tag in tags}
    return {name: _turns_in_their_names(value, keys, roles) for name, value in named.items()} if tags else named


def _turns_in_their_names(value: Any, keys: Mapping[str, str], roles: Mapping[str, str]) -> Any:
    if isinstance(value, list):
        return [_turns_in_their_names(turn, keys, roles) for turn in value]
    if not isinstance(value, Mapping):
        return value
    turn = {keys.get(name, name): said for name, said in value.items()}
    role = turn.get("from")
    return turn | ({"from": roles[role]} if isinstance(role, str) and role in roles else {})


def _named_columns(entry: Entry) -> Mapping[str, Any]:
    columns = entry.get("columns")
    return columns if isinstance(columns, Mapping) else {}


@lru_cache(maxsize=64)
def _read_entries(file: Path, changed: int) -> dict[str, Entry]:
    """datasets writes a file of this name too: it describes the one set beside it and names no file."""
    try:
        found = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return {}
    items = found.items() if isinstance(found, dict) else ()
    entries: dict[str, Entry] = {name: entry for name, entry in items if isinstance(entry, dict)}
    return entries if any(isinstance(entry.get("file_name"), str) for entry in entries.values()) else {}


def _described_sets(folder: Path) -> dict[str, Entry]:
    file = folder / INFO
    try:
        return _read_entries(file, file.stat().st_mtime_ns)
    except (OSError, ValueError):  # none there, or a name that no file can have
        return {}
