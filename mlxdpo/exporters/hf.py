"""Fused Hugging Face weights: the original shards, in which only the trained tensors differ.

Three bases. Plain weights: the delta is patched onto the stored tensors. Weights that a run packed when loading: every
packed layer is written as it computed, dequantised. A packed folder: dequantised into new shards. With `--base M` the
last two put the delta onto M's full-precision tensors instead; the gate says what that costs.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.exporters.source import (
    Change,
    ExportSource,
    base_of,
    copy_side_files,
    dequantised,
    expert_change,
    plain_weight,
)
from mlxdpo.io.atomic import write_json
from mlxdpo.io.checksum import read_tensor, read_tensors
from mlxdpo.io.json_file import read_json
from mlxdpo.io.weight_files import INDEX, weight_files
from mlxdpo.model.policy import load_folder
from mlxdpo.types import UserError

KINDS = {"F32": mx.float32, "F16": mx.float16, "BF16": mx.bfloat16}


def safetensors_header(file: Path) -> tuple[dict, int]:
    """The parsed header of a safetensors file and where its data begins, in bytes."""
    with file.open("rb") as handle:
        (length,) = struct.unpack("<Q", handle.read(8))
        return json.loads(handle.read(length)), 8 + length


def patch(source: Path, target: Path, changes: Mapping[str, Change], check: Callable[[str, mx.array], None]) -> None:
    """Copy `source` to `target` with each tensor of `changes` replaced by what its change makes of it.

    Every other byte of the file stays: a changed tensor keeps its name, number type and shape, so the header stays as
    it is, and sharding, order and index too. A change sees the stored tensor in float32; its result is rounded once, to
    the tensor's own type. `check` is called with each tensor's name and stored value before it is changed. Raises
    `UserError` for a tensor that is not stored as F32, F16 or BF16.
    """
    entries, begin = safetensors_header(source)
    for name in changes:
        if (kind := entries[name]["dtype"]) not in KINDS:
            raise UserError(f"{source.name}: `{name}` is stored as {kind}; only F32, F16 and BF16 can be changed")
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


# 4-bit codes differ from their weights by a tenth of the weights' size; another model's weights by more than all of it.
UNLIKE = 0.5


def refuse_hf(source: ExportSource) -> None:
    """Raise `UserError` for a run whose weights cannot be written in their original form."""
    if not source.choices.base and source.stored_quantised:
        _refuse_stacks(source)
        return
    stored_changes(source)


def write_hf(source: ExportSource, folder: Path) -> str | None:
    """Write a folder that `transformers` and mlx-lm load; returns a remark on where the numbers come from."""
    if not source.choices.base and source.stored_quantised:
        for file in weight_files(source.folder):
            _write_dequantised(source, file, folder / file.name)
        copy_side_files(source, source.folder, folder)
        _drop_keys(folder / "config.json", {"quantization", "quantization_config"})
        _write_index(folder)
        return "every packed layer dequantised"
    changes = stored_changes(source)
    for file in weight_files(source.base):
        here = {name: change for name, change in changes.items() if source.origins.stored[name] == file}
        patch(file, folder / file.name, here, partial(_check_like, source))
    copy_side_files(source, source.base, folder)
    if (source.base / INDEX).is_file():
        shutil.copyfile(source.base / INDEX, folder / INDEX)
    else:
        _write_index(folder)
    if source.choices.base:
        return f"the delta, trained on other weights, was added to those of {source.base_name}"
    return "the quantised layers of the run, dequantised" if source.quantised else None


def reload_hf(source: ExportSource, folder: Path) -> nn.Module:
    """The written folder, computed as transformers computes it."""
    return load_folder(folder, folder.name)[0]


def stored_changes(source: ExportSource) -> dict[str, Change]:
    """What becomes of each stored tensor of the base that changes, by its stored name.

    Raises `UserError` for a parameter that is stored in another form than it computes in.
    """
    wanted = dict(source.changes)
    if source.quantised and not source.choices.base:
        wanted |= dequantised(source.model)
    found: dict[str, Change] = {}
    for parameter, change in wanted.items():
        names = source.origins.of(parameter)
        if names is None:
            raise UserError(
                f"hf: `{parameter}` is not stored as it computes in {source.base_name} (mlx-lm's {_family(source)} "
                f"loader makes it from other tensors); export --to mlx,fused, or leave the layer out of lora.keys"
            )
        parts = [change] if len(names) == 1 else [expert_change(change, e) for e in range(len(names))]
        found |= dict(zip(names, parts, strict=True))
    return found | _twins(source, found)


def _twins(source: ExportSource, found: dict[str, Change]) -> dict[str, Change]:
    """Tied heads that the checkpoint stores a second time: transformers may read either one."""
    twins: dict[str, Change] = {}
    for name, array in source.origins.unused.items():
        if not name.endswith("lm_head.weight"):
            continue
        for other in found:
            if other.endswith("embed_tokens.weight") and mx.array_equal(array, _stored(source, other)):
                twins[name] = found[other]
    return twins


def _stored(source: ExportSource, name: str) -> mx.array:
    return read_tensor(source.origins.stored[name], name)


def _family(source: ExportSource) -> str:
    return str(source.raw_config.get("model_type", "unnamed"))


def _check_like(source: ExportSource, name: str, stored: mx.array) -> None:
    """Raise `UserError` when `--base` is not the model whose packed weights were trained on."""
    parameter = next((p for p, one in source.origins.one.items() if one == name), "")
    module = source.adapted.get(parameter.removesuffix(".weight"))
    if not source.choices.base or module is None:
        return
    own = plain_weight(base_of(module))
    if own.shape != stored.shape:
        raise UserError(f"--base {source.choices.base}: `{name}` is {stored.shape}, the run trained on {own.shape}")
    apart = float((mx.linalg.norm(own - stored) / mx.linalg.norm(stored)).item())
    if not apart < UNLIKE:
        raise UserError(
            f"--base {source.choices.base}: `{name}` differs from the run's by {apart:.0%} of its size; name the "
            f"full-precision model that {source.trained.config.model.path} was quantised from"
        )


def _refuse_stacks(source: ExportSource) -> None:
    for name in dequantised(source.model):
        parts = [f"{name.removesuffix('.weight')}.{part}" for part in ("weight", "scales")]
        if any(part not in source.origins.stored for part in parts) or "switch_mlp" in name:
            raise UserError(
                f"hf: `{name}` of {source.base_name} is packed in a form that transformers does not have; "
                f"name its full-precision model with --base, or export --to mlx,fused"
            )


def _write_dequantised(source: ExportSource, file: Path, target: Path) -> None:
    stored = read_tensors(file)
    packed, written = dequantised(source.model), {}
    for name, array in stored.items():
        layer, _, part = name.rpartition(".")
        if f"{layer}.weight" in packed and part in ("scales", "biases"):
            continue
        if name in packed:  # scales stand beside their codes, in one shard or another
            kind = _stored(source, f"{layer}.scales").dtype
            array = packed[name](array).astype(kind if mx.issubdtype(kind, mx.floating) else mx.bfloat16)
        elif name in source.changes:
            array = source.changes[name](array.astype(mx.float32)).astype(array.dtype)
        written[name] = array
    mx.save_safetensors(str(target), written, {"format": "pt"})


def _drop_keys(config: Path, dropped: set[str]) -> None:
    write_json(config, {key: value for key, value in read_json(config).items() if key not in dropped})


def _write_index(folder: Path) -> None:
    """The index of new shards; a single file needs none."""
    files = weight_files(folder)
    if len(files) < 2:
        return
    arrays = {file.name: read_tensors(file) for file in files}
    total = sum(array.nbytes for part in arrays.values() for array in part.values())  # type: ignore[union-attr]
    index = {"metadata": {"total_size": total}, "weight_map": {n: f for f, part in arrays.items() for n in part}}
    write_json(folder / INDEX, index)
