"""GGUF, which llama.cpp and what is built on it run: a whole model, or the adapter alone to go on top of one.

Written by the gguf package from fused Hugging Face weights, and read back for the gate from nothing but the file:
settings from its metadata, weights from its tensors. `gguf_families` knows names and keys, `gguf_vocabulary` the
tokenizer. Types that the gguf package cannot pack (K-quants) are packed by llama.cpp's own `llama-quantize`.
"""

from __future__ import annotations

import importlib
import importlib.util
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlxdpo.exporters import hf
from mlxdpo.exporters.gguf_families import (
    FAMILIES,
    Described,
    describe_model,
    frequency_factors,
    permute,
    read_shape,
    reordered_heads,
    rope_of,
    tensor_names,
    write_shape,
)
from mlxdpo.exporters.gguf_vocabulary import refuse_tokenizer, write_tokenizer
from mlxdpo.exporters.source import ExportSource, GgufType
from mlxdpo.io.json_file import read_json
from mlxdpo.model.adapters import place_lora, read_settings
from mlxdpo.model.builtin import unpermute
from mlxdpo.model.corrections import correct, model_classes
from mlxdpo.model.policy import load_folder, load_policy
from mlxdpo.types import UserError

FILE, LORA_FILE = "model.gguf", "adapter.gguf"
ROPE_FACTORS = "rope_freqs.weight"
KINDS = {mx.float32: "f32", mx.float16: "f16", mx.bfloat16: "bf16"}
BLOCK = 32  # weights that share a scale in the package's own packed types
QUANTIZER = "llama-quantize"
BY_QUANTIZER = tuple(kind for kind in get_args(GgufType) if "_k" in kind)


def library() -> Any:
    """The gguf package, which is optional; this file has its name, which only type checkers mistake for it."""
    return importlib.import_module("gguf")


def _refuse_without_library() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError("gguf: the gguf package is not installed; run `pip install gguf`")


def refuse_gguf(source: ExportSource) -> None:
    """Raise `UserError` where a faithful file cannot be written: the library, the family, the tokenizer, a setting."""
    _refuse_without_library()
    describe_model(read_json(source.base / "config.json"), source.base_name)
    refuse_tokenizer(source.base, source.base_name)
    if source.choices.gguf_type in BY_QUANTIZER and shutil.which(QUANTIZER) is None:
        raise UserError(
            f"--gguf-type {source.choices.gguf_type} is packed by llama.cpp's {QUANTIZER}, which is not on the PATH; "
            f"run `brew install llama.cpp`, or choose q8_0 or q4_1"
        )
    hf.refuse_hf(source)


def write_gguf(source: ExportSource, folder: Path) -> str | None:
    """Write `model.gguf` by way of fused Hugging Face weights, which are removed again."""
    kind = source.choices.gguf_type
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fused-") as name:
        fused = Path(name)
        hf.write_hf(source, fused)
        if kind not in BY_QUANTIZER:
            return f"{convert_to_gguf(fused, folder / FILE, kind, source.base_name)}, from fused weights"
        plain = fused / FILE
        exact = convert_to_gguf(fused, plain, "auto", source.base_name)
        pack(plain, folder / FILE, kind)
    return f"{kind}, packed by {QUANTIZER} from fused {exact} weights"


def pack(plain: Path, target: Path, kind: str) -> None:
    """Pack a GGUF file with llama.cpp's `llama-quantize`. Raises `UserError` with its last words when it fails."""
    done = subprocess.run([QUANTIZER, str(plain), str(target), kind.upper()], capture_output=True, text=True)
    if done.returncode or not target.is_file():
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise UserError(
            f"{QUANTIZER} stopped with status {done.returncode}: {last[0][:200]}; choose another --gguf-type"
        )


def convert_to_gguf(source: Path, target: Path, kind: str, name: str) -> str:
    """A Hugging Face folder as one GGUF file of number type `kind` (auto: the type of its own matrices).

    Vectors and expert routers are float32 in every GGUF, and so are matrices whose width does not divide into blocks.
    Returns the type written.
    """
    gguf, raw = library(), read_json(source / "config.json")
    model = describe_model(raw, name)
    arrays: dict[str, mx.array] = dict(tree_flatten(load_folder(source, name)[0].parameters()))
    if kind == "auto":
        kind = next(KINDS[a.dtype] for a in arrays.values() if a.ndim == 2)
    writer = gguf.GGUFWriter(target, model.family.architecture)
    writer.add_file_type(int(getattr(gguf.LlamaFileType, {"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}"))))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_shape(writer, model)
    write_tokenizer(writer, source, raw, model.config["vocab_size"], name)
    for stored, own in tensor_names(model.family.architecture, model.config["num_hidden_layers"], arrays).items():
        exact = np.array(_to_llama_cpp(model, stored, own, arrays.pop(stored)))
        packs = (
            exact.ndim > 1 and "ffn_gate_inp" not in own and (kind in KINDS.values() or exact.shape[-1] % BLOCK == 0)
        )
        number = getattr(gguf.GGMLQuantizationType, kind.upper() if packs else "F32")
        writer.add_tensor(own, gguf.quants.quantize(exact, number), raw_dtype=number)
    if (factors := frequency_factors(model.raw)) is not None:
        writer.add_tensor(ROPE_FACTORS, factors)
    _write_file(writer)
    return kind


def _write_file(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _to_llama_cpp(model: Described, stored: str, own: str, array: mx.array) -> mx.array:
    """A parameter of mlx-lm's in llama.cpp's order and offset, float32."""
    array = array.astype(mx.float32)
    if heads := reordered_heads(model.family, model.config, own):
        array = permute(array, heads)
    if own.endswith("shexp.weight") and array.shape[0] == 1:
        array = array[0]  # the gate of the shared expert is a vector
    return array + model.family.offset if stored.endswith("norm.weight") else array


def _from_llama_cpp(config: Mapping[str, Any], stored: str, own: str, array: mx.array) -> mx.array:
    """The inverse of `_to_llama_cpp`."""
    family = FAMILIES[config["model_type"]]
    if heads := reordered_heads(family, config, own):
        array = unpermute(array, heads)
    if own.endswith("ffn_gate_inp_shexp.weight"):
        array = array[None]
    return array - family.offset if stored.endswith("norm.weight") else array


def reload_gguf(source: ExportSource, folder: Path) -> nn.Module:
    """The file as a model again, from its own metadata and tensors."""
    return read_gguf(folder / FILE, read_json(source.base / "config.json"))


def read_gguf(file: Path, original: Mapping[str, Any]) -> nn.Module:
    """A GGUF file in mlx-lm's definition of its family, float32.

    `original` lends what the file holds in another form only: Llama 3's rope scaling, there a table of factors.
    """
    reader = library().GGUFReader(file)
    config, arrays = read_shape(reader), read_arrays(reader)
    if arrays.pop(ROPE_FACTORS, None) is not None:
        config["rope_scaling"] = dict(rope_of(original).settings)
    config["tie_word_embeddings"] = "output.weight" not in arrays
    model_class, arguments = model_classes(config)
    model = correct(model_class(arguments.from_dict(config)), config)
    wanted = [name for name, _ in tree_flatten(model.parameters())]
    if config["tie_word_embeddings"]:
        wanted = [name for name in wanted if not name.endswith("lm_head.weight")]
        model.sanitize({}) if "lm_head" in model else None  # gemma 3 drops its head when it sees no weights of one
    names = tensor_names(FAMILIES[config["model_type"]].architecture, config["num_hidden_layers"], wanted)
    found = [(name, _from_llama_cpp(config, name, own, arrays.pop(own))) for name, own in names.items()]
    if arrays:
        raise UserError(f"{file}: no place for {', '.join(sorted(arrays)[:3])} in a {config['model_type']} model")
    model.load_weights(found)
    return model


def read_arrays(reader: Any) -> dict[str, mx.array]:
    """Every tensor of a GGUF file, unpacked, float32, by its name there."""
    gguf, found = library(), {}
    for tensor in reader.tensors:
        exact = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
        found[tensor.name] = mx.array(exact.reshape([int(n) for n in reversed(tensor.shape)]))
    return found


def refuse_lora(source: ExportSource) -> None:
    """Raise `UserError` for an adapter that llama.cpp has no form of."""
    _refuse_without_library()
    if source.method != "lora":
        raise UserError(f"gguf-lora: the run trained with lora.method {source.method}; export --to gguf")
    if source.stored_quantised and not source.choices.base:
        raise UserError(
            f"gguf-lora: {source.base_name} is packed for MLX, which llama.cpp cannot load; name the full-precision "
            f"model that it was made from with --base"
        )
    describe_model(read_json(source.base / "config.json"), source.base_name)
    for name, module in source.adapted.items():
        if "embedding" in module:
            raise UserError(f"gguf-lora: `{name}` is adapted, and llama.cpp would not change the head; use --to gguf")


def write_lora(source: ExportSource, folder: Path) -> str | None:
    """Write `adapter.gguf`, float32: for each adapted tensor A (r, in) and B (out, r), and alpha for all of them."""
    gguf, model = library(), describe_model(read_json(source.base / "config.json"), source.base_name)
    lora = read_settings(source.trained.run.adapter)
    writer = gguf.GGUFWriter(folder / LORA_FILE, model.family.architecture)
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.multiplier * lora.rank)
    for own, module in _lora_names(model, source.adapted).items():
        a, b = module.lora_a.astype(mx.float32), module.lora_b.astype(mx.float32)
        a, b = (a.reshape(len(b), -1, a.shape[-1]), b) if b.ndim == 3 else (a.T, b.T)
        if heads := reordered_heads(model.family, model.config, own):
            b = permute(b, heads)
        writer.add_tensor(f"{own}.lora_a", np.array(a))
        writer.add_tensor(f"{own}.lora_b", np.array(b))
    _write_file(writer)
    note = f"load it on top of a GGUF of {source.base_name}; lossless"
    return f"{note} (trained on packed weights, measured on unpacked ones)" if source.quantised else note


def _lora_names(model: Described, modules: Mapping[str, Any]) -> dict[str, Any]:
    """llama.cpp's tensor name -> the adapted module."""
    names = tensor_names(
        model.family.architecture, model.config["num_hidden_layers"], [f"{name}.weight" for name in modules]
    )
    return {own: modules[stored.removesuffix(".weight")] for stored, own in names.items()}


def reload_lora(source: ExportSource, folder: Path) -> nn.Module:
    """The base with the adapter's arrays read back from the file."""
    path = source.choices.base or source.trained.config.model.path
    changed = {"path": path, "adapter": None, "quantize": None} | ({"revision": None} if source.choices.base else {})
    policy = load_policy(source.trained.config.model.model_copy(update=changed))
    model = describe_model(read_json(source.base / "config.json"), source.base_name)
    place_lora(policy.model, read_settings(source.trained.run.adapter))
    reader = library().GGUFReader(folder / LORA_FILE)
    arrays, alpha = read_arrays(reader), reader.get_field("adapter.lora.alpha").contents()
    placed = {name: module for name, module in policy.model.named_modules() if "lora_a" in module}
    for own, module in _lora_names(model, placed).items():
        a, b = arrays.pop(f"{own}.lora_a"), arrays.pop(f"{own}.lora_b")
        if heads := reordered_heads(model.family, model.config, own):
            b = unpermute(b, heads)
        module.scale = alpha / b.shape[-1]
        module.lora_a, module.lora_b = (a.reshape(module.lora_a.shape), b) if b.ndim == 3 else (a.T, b.T)
    return policy.model
