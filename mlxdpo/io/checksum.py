"""Safetensors and JSON files with a SHA-256 over their contents in the file itself, checked when they are read.

A disk or a copy that changes one bit makes a checkpoint that parses and trains on into something else; safetensors and
JSON notice nothing. The checksum travels with the file, and other programs read past it: it is one more entry of a
safetensors file's metadata, one more key of a JSON object. A file without a checksum comes from another program and is
accepted: damage to the name of the checksum harms no number.

Safetensors is the only kind of weights that this project reads. Damaged files raise `UserError`.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlxdpo.io.atomic import write_atomic, write_json
from mlxdpo.io.digest import json_digest
from mlxdpo.io.json_file import read_json
from mlxdpo.types import UserError

PICKLES = re.compile(r".*\.(bin|pt|pth|ckpt|pkl|pickle|msgpack|h5|npz)")
"""Files that run code when they are opened, or may hold what does."""


def pickled_in(folder: Path) -> str:
    """What to say of a folder without safetensors: that there is a pickle instead, if there is."""
    names = sorted(path.name for path in folder.iterdir() if PICKLES.fullmatch(path.name)) if folder.is_dir() else []
    return f"; {names[0]} is a pickle and could run code, convert it to safetensors first" if names else ""


def read_tensors(file: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file by name, lazy: MLX checks header, offsets and sizes now and reads bytes later.

    Raises `UserError` naming the file when it is missing, cut off, or laid out otherwise.
    """
    try:
        return mx.load(str(file), format="safetensors")  # type: ignore[return-value]
    except (RuntimeError, ValueError, OverflowError) as error:
        reason = " ".join(str(error).split()).replace(str(file), "it")[:200]
        raise UserError(f"{file}: not a readable safetensors file ({reason}); restore it, or create it again") from None


def read_tensor(file: Path, name: str) -> mx.array:
    """The array `name` of a safetensors file. Raises `UserError` as `read_tensors`, and when there is none."""
    found = read_tensors(file)
    if name not in found:
        raise UserError(f"{file}: holds no array `{name}`; restore it, or create it again")
    return found[name]


CHECKSUM = "sha256"


class DamagedError(UserError):
    """A file is not what was written into it."""


def save_checksummed(path: Path, arrays: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays as safetensors with their checksum, whole or not at all."""
    metadata = {**(metadata or {}), CHECKSUM: checksum_of(arrays)}
    write_atomic(path, lambda file: mx.save_safetensors(str(file), dict(arrays), metadata))


def load_checksummed(path: Path) -> dict[str, mx.array]:
    """The arrays of a safetensors file, read. Raises `UserError` as `read_tensors`, and where the checksum differs."""
    arrays, stored = read_tensors(path), _stored_checksum(path)
    if stored is not None and stored != checksum_of(arrays):
        raise DamagedError(f"{path}: corrupted (checksum mismatch); restore it")
    return arrays


def has_checksum(path: Path) -> bool:
    """Whether a safetensors file has a checksum. Raises `UserError` as `read_tensors`."""
    read_tensors(path)
    return _stored_checksum(path) is not None


def _stored_checksum(path: Path) -> str | None:
    """The checksum in a file that `read_tensors` could read."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return (header.get("__metadata__") or {}).get(CHECKSUM)


def checksum_of(arrays: Mapping[str, mx.array]) -> str:
    """SHA-256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name}\0{array.dtype}\0{array.shape}\0".encode())
        if array.size:  # bytes, because NumPy knows no bfloat16
            digest.update(np.array(array.reshape(-1).view(mx.uint8), copy=False).data)
    return digest.hexdigest()


def write_checksummed_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with its checksum, whole or not at all."""
    write_json(path, with_checksum(value))


def with_checksum(value: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its checksum as the last key."""
    return {**value, CHECKSUM: json_digest(value)}


def read_checksummed_json(path: Path) -> dict[str, Any]:
    """A JSON object without its checksum. Raises `UserError` as `read_json`, and where the checksum differs."""
    value = read_json(path)
    stored = value.pop(CHECKSUM, None)
    if stored is not None and stored != with_checksum(value)[CHECKSUM]:
        raise DamagedError(
            f'{path}: changed since it was written; restore it, or remove its "{CHECKSUM}" line out '
            f"if the change was intended"
        )
    return value
