"""Safetensors files, read so that a damaged one is a sentence: the only kind of weights that this project reads."""

from __future__ import annotations

import re
from pathlib import Path

import mlx.core as mx

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
        raise UserError(f"{file}: not a readable safetensors file ({reason}); restore it, or make it again") from None


def read_tensor(file: Path, name: str) -> mx.array:
    """The array `name` of a safetensors file. Raises `UserError` as `read_tensors`, and when there is none."""
    found = read_tensors(file)
    if name not in found:
        raise UserError(f"{file}: holds no array `{name}`; restore it, or make it again")
    return found[name]
