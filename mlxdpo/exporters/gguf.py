"""GGUF, which llama.cpp and what is built on it run: llama, qwen2 and qwen3, with byte-level tokenizers.

Written from fused Hugging Face weights, and read back for the gate from nothing but the file: hyperparameters from its
metadata, weights from its tensors.

The tokenizer is byte-level BPE under the name of the splitting rule that llama.cpp knows it by. llama.cpp reads the
rule's *name*, not the rule. A wrong name gives other token ids for the same text and looks like a model that got worse,
so the rule in `tokenizer.json` must be one of those written out here, to the letter.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlxdpo.exporters import hf
from mlxdpo.exporters.source import ExportSource
from mlxdpo.io.checksum import read_tensors
from mlxdpo.io.json_file import read_json
from mlxdpo.io.weight_files import weight_files
from mlxdpo.model.builtin import unpermute
from mlxdpo.model.chat_template import template_settings
from mlxdpo.model.ends import end_tokens, turn_end
from mlxdpo.model.model_config import read_model_config
from mlxdpo.types import UserError


class Rope(NamedTuple):
    """Rotary positions: `kind` is none, linear or llama3 (a table of factors), `settings` the configuration's own."""

    base: float
    kind: str
    factor: float
    settings: Mapping[str, Any]


def rope_of(config: Mapping[str, Any]) -> Rope:
    """Rotary positions of a config.json, whichever transformers wrote it.

    Raises `UserError` for a scaling without a place in the file.
    """
    read = read_model_config(config, "gguf").config
    settings = read.get("rope_scaling") or {}
    base = float(read.get("rope_theta") or 10000.0)
    kind = settings.get("rope_type") or settings.get("type") or "default"
    if kind == "default":
        return Rope(base, "none", 1.0, settings)
    if kind not in ("linear", "llama3"):
        raise UserError(f"gguf: rope scaling `{kind}` is not known to this converter, only linear and llama3 are")
    return Rope(base, kind, float(settings["factor"]), settings)


def frequency_factors(config: Mapping[str, Any]) -> np.ndarray | None:
    """(head_dim / 2,) float32: what Llama 3's scaling divides each frequency by, or None without it.

    Wavelengths beyond context / low_freq_factor are stretched by `factor`, those below context / high_freq_factor not
    at all, in between by a linear blend of frequencies (Llama 3.1's reference code; arXiv 2407.21783 section 3.4.2).
    """
    rope = rope_of(config)
    if rope.kind != "llama3":
        return None
    width = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    waves = 2 * math.pi * rope.base ** (np.arange(0, width, 2, dtype=np.float64) / width)
    low, high = rope.settings["low_freq_factor"], rope.settings["high_freq_factor"]
    context = rope.settings["original_max_position_embeddings"]
    smooth = np.clip((context / waves - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope.factor + smooth)).astype(np.float32)


FILE = "model.gguf"
FAMILIES = ("llama", "qwen2", "qwen3")
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
PARTS = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUR_TOP, OUR_PARTS = ({own: stored for stored, own in names.items()} for names in (TOP, PARTS))
ROPE_FACTORS = "rope_freqs.weight"
KINDS = {mx.float32: "f32", mx.float16: "f16", mx.bfloat16: "bf16"}
Q8_BLOCK = 32


def library() -> Any:
    """The gguf package, which is optional; this file has its name, which only type checkers mistake for it."""
    return importlib.import_module("gguf")


def refuse_gguf(source: ExportSource) -> None:
    """Raise `UserError` where a faithful file cannot be written: the library, the family, the tokenizer, a bias."""
    if importlib.util.find_spec("gguf") is None:
        raise UserError("gguf: the gguf package is not installed; run `pip install gguf`")
    config = read_json(source.base / "config.json")
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"gguf: {source.base_name} is a {family} model, and this converter knows {', '.join(FAMILIES)}; export "
            f"--to hf and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    biased = family == "llama" and (config.get("attention_bias") or config.get("mlp_bias"))
    if config.get("use_sliding_window") or biased:
        raise UserError(
            f"gguf: {source.base_name} uses sliding windows or biases that a {family} GGUF has no place for"
        )
    rope_of(config)
    refuse_tokenizer(source.base, source.base_name)
    hf.refuse_hf(source)


def write_gguf(source: ExportSource, folder: Path) -> str | None:
    """Write `model.gguf` by way of fused Hugging Face weights, which are removed again."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fused-") as name:
        hf.write_hf(source, Path(name))
        kind = convert_to_gguf(Path(name), folder / FILE, source.choices.gguf_type, source.base_name)
    return f"{kind}, from fused weights"


def convert_to_gguf(source: Path, target: Path, kind: str, name: str) -> str:
    """A Hugging Face folder as one GGUF file of number type `kind` (auto: the type of its own matrices).

    Vectors are float32 in every GGUF, and so are matrices whose width does not divide into q8_0's blocks of 32.
    Returns the type written.
    """
    gguf = library()
    config = read_json(source / "config.json")
    if kind == "auto":
        kind = next(KINDS[a.dtype] for _, a in _tensors(source) if a.ndim == 2)
    writer = gguf.GGUFWriter(target, config["model_type"])
    writer.add_name(name)
    writer.add_file_type(int(getattr(gguf.LlamaFileType, {"f32": "ALL_F32"}.get(kind, f"MOSTLY_{kind.upper()}"))))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _write_shape(writer, config)
    write_tokenizer(writer, source, config)
    for stored, array in _tensors(source):
        if (own := gguf_name(stored)) is None:
            continue
        if config["model_type"] == "llama" and (heads := _reordered_heads(config, own)):
            array = permute(array, heads)
        exact = np.array(array.astype(mx.float32))
        packs = exact.ndim == 2 and (kind != "q8_0" or exact.shape[1] % Q8_BLOCK == 0)
        number = getattr(gguf.GGMLQuantizationType, kind.upper() if packs else "F32")
        writer.add_tensor(own, gguf.quants.quantize(exact, number), raw_dtype=number)
    if (factors := frequency_factors(config)) is not None:
        writer.add_tensor(ROPE_FACTORS, factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return kind


def _tensors(folder: Path) -> Iterator[tuple[str, mx.array]]:
    tied = read_json(folder / "config.json").get("tie_word_embeddings", False)
    for file in weight_files(folder):
        arrays = read_tensors(file)
        for name in sorted(arrays):
            if not (tied and name == "lm_head.weight"):
                yield name, arrays.pop(name)


def gguf_name(stored: str) -> str | None:
    """llama.cpp's name of a Hugging Face tensor; None for the rotary tables of old checkpoints."""
    path, _, end = stored.rpartition(".")
    if path in TOP:
        return f"{TOP[path]}.{end}"
    layer, _, part = path.removeprefix("model.layers.").partition(".")
    if part in PARTS and layer.isdigit():
        return f"blk.{layer}.{PARTS[part]}.{end}"
    if stored.endswith("rotary_emb.inv_freq"):
        return None
    raise UserError(f"gguf: the checkpoint holds `{stored}`, which this converter has no place for; export --to hf")


def hf_name(own: str) -> str:
    """The Hugging Face name of a GGUF tensor: the inverse of `gguf_name`."""
    path, _, end = own.rpartition(".")
    if path in OUR_TOP:
        return f"{OUR_TOP[path]}.{end}"
    _, layer, part = path.split(".")
    return f"model.layers.{layer}.{OUR_PARTS[part]}.{end}"


def permute(rows: mx.array, heads: int) -> mx.array:
    """llama.cpp's order of query and key rows, (heads * d, n) kept: row i stands beside row i + d/2 of its head."""
    n = rows.shape[1]
    return rows.reshape(heads, 2, -1, n).swapaxes(1, 2).reshape(-1, n)


def _reordered_heads(config: Mapping[str, Any], own: str) -> int:
    """How many heads a tensor's rows belong to, 0 where order does not matter. Only the llama family is reordered."""
    if own.endswith("attn_q.weight"):
        return config["num_attention_heads"]
    return config.get("num_key_value_heads") or config["num_attention_heads"] if own.endswith("attn_k.weight") else 0


def _write_shape(writer: Any, config: Mapping[str, Any]) -> None:
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    rope = rope_of(config)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(rope.base)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(library().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)


def reload_gguf(source: ExportSource, folder: Path) -> nn.Module:
    """The file as a model again, from its own metadata and tensors."""
    return read_gguf(folder / FILE, read_json(source.base / "config.json"))


def read_gguf(file: Path, original: Mapping[str, Any]) -> nn.Module:
    """A GGUF file in mlx-lm's definition of its family, float32.

    `original` lends what the file holds in another form only: Llama 3's rope scaling, there a table of factors.
    """
    from mlx_lm.utils import _get_classes

    gguf = library()
    reader = gguf.GGUFReader(file)
    config = read_shape(reader)
    arrays: dict[str, mx.array] = {}
    for tensor in reader.tensors:
        if tensor.name == ROPE_FACTORS:
            config["rope_scaling"] = dict(rope_of(original).settings)
            continue
        exact = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        array = mx.array(exact.astype(np.float32).reshape([int(n) for n in reversed(tensor.shape)]))
        if config["model_type"] == "llama" and (heads := _reordered_heads(config, tensor.name)):
            array = unpermute(array, heads)
        arrays[hf_name(tensor.name)] = array
    config["tie_word_embeddings"] = "lm_head.weight" not in arrays
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    model.load_weights(list(arrays.items()))
    return model


def read_shape(reader: Any) -> dict[str, Any]:
    """The hyperparameters in a GGUF file's metadata, under Hugging Face's names."""
    value = lambda key: reader.get_field(key).contents()  # noqa: E731
    family = value("general.architecture")
    keys = {
        "hidden_size": "embedding_length",
        "num_hidden_layers": "block_count",
        "intermediate_size": "feed_forward_length",
        "num_attention_heads": "attention.head_count",
        "num_key_value_heads": "attention.head_count_kv",
        "head_dim": "attention.key_length",
        "rms_norm_eps": "attention.layer_norm_rms_epsilon",
        "rope_theta": "rope.freq_base",
        "max_position_embeddings": "context_length",
        "vocab_size": "vocab_size",
    }
    config = {"model_type": family} | {name: value(f"{family}.{key}") for name, key in keys.items()}
    if reader.get_field(f"{family}.rope.scaling.type") is not None:
        factor = value(f"{family}.rope.scaling.factor")
        config["rope_scaling"] = {"type": value(f"{family}.rope.scaling.type"), "factor": factor}
    return config


CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+"
REST = "| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+"
# llama.cpp's name -> (the splits before bytes are mapped, whether GPT-2's own rule follows)
RULES: dict[str, tuple[tuple[str, ...], bool]] = {
    "gpt-2": ((), True),
    "smollm": (("digits",), True),
    "qwen2": ((CONTRACTIONS + "|\\p{N}" + REST,), False),
    "llama-bpe": ((CONTRACTIONS + "|\\p{N}{1,3}" + REST,), False),
}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


def rule_name(specification: Mapping[str, Any]) -> str | None:
    """llama.cpp's name for the rule in a parsed `tokenizer.json`, None when it is not one of those known here."""
    outer = specification.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    if specification["model"]["type"] != "BPE" or not steps or steps[-1].get("type") != "ByteLevel":
        return None
    if steps[-1].get("add_prefix_space"):
        return None
    found = (tuple(_split_step(step) for step in steps[:-1]), steps[-1].get("use_regex", True))
    return next((name for name, rule in RULES.items() if rule == found), None)


def _split_step(step: Mapping[str, Any]) -> str:
    if step["type"] == "Digits" and step.get("individual_digits"):
        return "digits"
    if step["type"] == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return step["pattern"].get("Regex", "")
    return f"unknown {step['type']}"


def refuse_tokenizer(folder: Path, name: str) -> None:
    """Raise `UserError` for a tokenizer that cannot be written so that llama.cpp splits text as it does."""
    file = folder / "tokenizer.json"
    if not file.exists() or rule_name(read_json(file)) is None:
        raise UserError(
            f"gguf: the tokenizer of {name} splits text by a rule without a name in this converter (known: "
            f"{', '.join(RULES)}); export --to hf and use llama.cpp's convert_hf_to_gguf.py"
        )


def write_tokenizer(writer: Any, folder: Path, config: Mapping[str, Any]) -> None:
    """Vocabulary, merges, rule, special tokens and chat template of a Hugging Face folder into a GGUF writer."""
    from transformers import AutoTokenizer

    specification = read_json(folder / "tokenizer.json")
    tokens, kinds = vocabulary(specification, config["vocab_size"])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **template_settings(folder))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(rule_name(specification))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = specification["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for end, add in {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }.items():
        if (token := getattr(tokenizer, f"{end}_token_id")) is not None:
            add(token)
    generation = folder / "generation_config.json"
    ends = end_tokens(tokenizer, {**config, **(read_json(generation) if generation.is_file() else {})})
    if others := sorted(ends - {tokenizer.eos_token_id}):
        writer.add_eot_token_id(turn if (turn := turn_end(tokenizer)) in others else others[0])
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(False)
    if template := tokenizer.chat_template:
        several = [{"name": n, "template": t} for n, t in template.items()] if isinstance(template, dict) else None
        writer.add_chat_template(several or template)


def vocabulary(specification: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """(`size` tokens by id, their types). Ids that no token has, where the embedding is wider, are unused."""
    tokens = [f"[PAD{i}]" for i in range(size)]
    kinds = [UNUSED] * size
    for text, i in specification["model"]["vocab"].items():
        tokens[i], kinds[i] = text, NORMAL
    for added in specification.get("added_tokens", []):
        if added["id"] < size:
            tokens[added["id"]] = added["content"]
            kinds[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, kinds
