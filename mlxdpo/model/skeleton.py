"""A model without its weights: mlx-lm's own definition with arrays that are never evaluated, so only shapes exist.

What is trained, quantised and kept is then decided by the code that a run itself goes through, for every architecture,
and costs no memory: a lazy MLX array knows its shape and dtype and holds nothing.
"""

from __future__ import annotations

import contextlib
import io
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlxdpo.config import LoraConfig, ModelConfig
from mlxdpo.io.json_file import as_written, parse_object
from mlxdpo.io.weight_files import check_weight_files, missing_files
from mlxdpo.machine.device import default_dtype
from mlxdpo.model.adapters import attach_lora, checked_lora
from mlxdpo.model.corrections import model_classes
from mlxdpo.model.model_config import ModelReading, read_model_config
from mlxdpo.model.policy import (
    BUILTIN,
    cast,
    check_packing,
    find_model,
    strangers_files,
    try_two_tokens,
    why_no_weights,
)
from mlxdpo.model.stored_shapes import check_counts
from mlxdpo.types import UserError

# All of a model folder but its weights.
LIGHT = ["*.json", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja"]
HEADER_LIMIT = 100 << 20  # bytes; the format's own limit


class Stored(NamedTuple):
    """What a safetensors header says of one array: dtype as the format spells it ("BF16"), and shape."""

    dtype: str
    shape: tuple[int, ...]


class Skeleton(NamedTuple):
    """`model` has shapes and dtypes only: evaluate none of its frozen arrays. `stored` is by the files' names."""

    model: nn.Module
    config: Mapping[str, Any]
    folder: Path
    stored: dict[str, Stored]
    reading: ModelReading


def read_skeleton(config: ModelConfig) -> Skeleton:
    """The model of a recipe as `load_policy` would load it: cast and quantised alike, frozen.

    Of a Hub id, only the small files are downloaded. Raises `UserError` for what `load_policy` would refuse.
    """
    from mlx_lm.utils import load_config, quantize_model

    folder, stored = _look_up_files(config)
    with strangers_files(config.path):
        raw = load_config(folder)
        if raw.get("model_file"):
            raise UserError(
                f"{config.path}: its architecture is defined by its Python code, so memory cannot be estimated"
            )
        check_counts(raw, {array: one.shape for array, one in stored.items()}, config.path)
        check_packing(raw, config.path)
        reading = read_model_config(raw, config.path)
        if reading.filled and not _has_shapes(reading, stored) and _has_shapes(reading.as_stored(), stored):
            reading = reading.as_stored()  # as `load_folder` does where the weights are not those
        model = _definition(reading.loaded, stored)
        try_two_tokens(model)
    if config.quantize:
        if raw.get("quantization"):
            raise UserError(
                f"{config.path} is already quantised ({raw['quantization']['bits']} bits); drop model.quantize"
            )
        with contextlib.redirect_stdout(io.StringIO()):  # it prints, and the answer may be JSON
            model, _ = quantize_model(model, dict(raw), group_size=64, bits=config.quantize)
    cast(model, default_dtype() if config.dtype == "auto" else getattr(mx, config.dtype))
    model.freeze()
    return Skeleton(model, raw, folder, stored, reading)


def make_trainable(model: nn.Module, lora: LoraConfig) -> None:
    """`attach_lora` for a skeleton. Raises the same `UserError`s.

    DoRA measures the frozen weights, which are not there: its adapters are LoRA's, and `dora_extra` counts the rest.
    """
    lora = checked_lora(model, lora)
    attach_lora(model, lora.model_copy(update={"method": "lora"}) if lora.method == "dora" else lora)


def dora_extra(model: nn.Module) -> int:
    """Elements of DoRA's magnitude vectors beside LoRA's matrices: one per output of each adapted layer."""
    return sum(m.lora_b.shape[-1] for _, m in model.named_modules() if "lora_b" in m)


def _look_up_files(config: ModelConfig) -> tuple[Path, dict[str, Stored]]:
    """The model's folder, with or without weights in it, and what the headers of its weight files say."""
    on_hub = not (config.path in BUILTIN or Path(config.path).is_dir() or config.path.count("/") != 1)
    folder = find_model(config.path, config.revision, *([LIGHT] if on_hub else []))
    files = [] if on_hub and missing_files(folder) else check_weight_files(folder, config.path)
    if files:
        return folder, {name: one for file in files for name, one in read_header(file).items()}
    if on_hub:
        return folder, _hub_headers(config)
    raise UserError(f"{config.path}: {why_no_weights(folder, config.path)}")


def _hub_headers(config: ModelConfig) -> dict[str, Stored]:
    from huggingface_hub import get_safetensors_metadata
    from huggingface_hub.errors import HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError

    try:
        found = get_safetensors_metadata(config.path, revision=config.revision)
    except (HfHubHTTPError, NotASafetensorsRepoError, SafetensorsParsingError, OSError) as error:
        raise UserError(f"{config.path}: its weights cannot be inspected ({str(error).splitlines()[0]})") from None
    tensors = (item for file in found.files_metadata.values() for item in file.tensors.items())
    return {name: Stored(str(one.dtype), tuple(one.shape)) for name, one in tensors}


def read_header(file: Path) -> dict[str, Stored]:
    """Names, dtypes and shapes in a safetensors file, without its arrays. Raises `UserError` when it is none.

    Source: the safetensors format: 8 bytes of little-endian length, then that much JSON.
    """
    with file.open("rb") as stream:
        start = stream.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else HEADER_LIMIT + 1
        if size > HEADER_LIMIT:
            raise UserError(f"{file}: not a safetensors file (its header would have {size} bytes); download it again")
        header = parse_object(stream.read(size), f"{file}: not a safetensors file")
    header.pop("__metadata__", None)
    with as_written(file, "download it again"):
        return {name: Stored(str(one["dtype"]), tuple(map(int, one["shape"]))) for name, one in header.items()}


def _definition(raw: Mapping[str, Any], stored: Mapping[str, Stored]) -> Any:
    """mlx-lm's model for a config.json, quantised where its files are, nothing evaluated."""
    model_class, arguments = model_classes(raw)
    model = model_class(arguments.from_dict(raw))
    if "lm_head" in model and not any(name.endswith("lm_head.weight") for name in stored):
        model.pop("lm_head")  # a tied head that the definition makes first and drops when it sees the files
        if hasattr(model, "tie_word_embeddings"):
            model.tie_word_embeddings = True
    if quantisation := raw.get("quantization"):
        nn.quantize(
            model,
            quantisation["group_size"],
            quantisation["bits"],
            mode=quantisation.get("mode", "affine"),
            class_predicate=lambda path, module: _quantised(path, module, quantisation, stored),
        )
    return model


def _has_shapes(reading: ModelReading, stored: Mapping[str, Stored]) -> bool:
    """Whether the model of a reading has the stored arrays and no others; a packed one is not looked into."""
    if "quantization" in reading.loaded:
        return True
    try:
        model_class, arguments = model_classes(reading.loaded)
        model = model_class(arguments.from_dict(reading.loaded))
        arrays = {name: mx.zeros(one.shape) for name, one in stored.items()}  # lazy: nothing is allocated
        given = model.sanitize(arrays) if hasattr(model, "sanitize") else arrays
    except (ValueError, TypeError, KeyError):
        return False
    own: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    shapes = {name: given[name].shape for name in given}
    tied = own.get("lm_head.weight", mx.zeros(())).shape  # made first, and dropped where the files have none
    return all(shapes.get(name, tied if name == "lm_head.weight" else None) == a.shape for name, a in own.items())


def _quantised(path: str, module: Any, quantisation: Mapping[str, Any], stored: Mapping[str, Stored]) -> Any:
    if path in quantisation:
        return quantisation[path]
    return hasattr(module, "to_quantized") and f"{path}.scales" in stored
