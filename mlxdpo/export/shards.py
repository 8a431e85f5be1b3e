"""Safetensors files, patched in place: every byte of the original but those of the tensors that changed.

A changed tensor keeps its name, number type and shape, so the header stays as it is, and sharding, order and index too.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlxdpo.export.deltas import Change
from mlxdpo.tensors import read_tensors
from mlxdpo.types import UserError

KINDS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def header(file: Path) -> tuple[dict, int]:
    """The parsed header of a safetensors file and where its data begins, in bytes."""
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        return json.loads(handle.read(length)), 8 + length


def patch(source: Path, target: Path, changes: Mapping[str, Change], check: Callable[[str, mx.array], None]) -> None:
    """Copy `source` to `target` with each tensor of `changes` replaced by what its change makes of it.

    A change sees the stored tensor in float32; its result is rounded once, to the tensor's own type. `check` is called
    with each tensor's name and stored value before it is changed. Raises `UserError` for a tensor that is not stored
    as F32, F16 or BF16.
    """
    entries, begin = header(source)
    for name in changes:
        if (kind := entries[name]["dtype"]) not in KINDS:
            raise UserError(f"{source.name}: `{name}` is stored as {kind}; only F32, F16 and BF16 can take a delta")
    shutil.copyfile(source, target)
    stored = read_tensors(source)
    with target.open("r+b") as handle:
        for name, change in changes.items():
            old = stored.pop(name).astype(mx.float32)  # popped, so that it can be freed
            check(name, old)
            handle.seek(begin + entries[name]["data_offsets"][0])
            handle.write(raw_bytes(change(old).astype(KINDS[entries[name]["dtype"]])))


def raw_bytes(array: mx.array) -> bytes:
    """The array's bytes in C order; numpy has no bfloat16, so types are looked through."""
    return np.array(mx.contiguous(array).view(mx.uint8)).tobytes()
