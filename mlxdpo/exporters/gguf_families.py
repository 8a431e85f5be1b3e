"""What llama.cpp calls a model's settings and tensors: one table of keys, and per family what it takes for granted.

Tensor names are those of the gguf package's own map, asked with mlx-lm's names. The same names and keys serve writing
and reading back. Where llama.cpp computes with a value that a file has no place for, the family lists it as assumed: a
model with another value is refused, and a file is read back with that one.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from mlxdpo.model.model_config import read_model_config
from mlxdpo.types import UserError

# config.json's name (as mlx-lm reads it) -> llama.cpp's key, and whether it is a float.
KEYS: dict[str, tuple[str, bool]] = {
    "vocab_size": ("vocab_size", False),
    "max_position_embeddings": ("context_length", False),
    "hidden_size": ("embedding_length", False),
    "num_hidden_layers": ("block_count", False),
    "intermediate_size": ("feed_forward_length", False),
    "num_attention_heads": ("attention.head_count", False),
    "num_key_value_heads": ("attention.head_count_kv", False),
    "head_dim": ("attention.key_length", False),
    "rms_norm_eps": ("attention.layer_norm_rms_epsilon", True),
    "rope_theta": ("rope.freq_base", True),
    "sliding_window": ("attention.sliding_window", False),
    "sliding_window_pattern": ("attention.sliding_window_pattern", False),
    "attn_logit_softcapping": ("attn_logit_softcapping", True),
    "final_logit_softcapping": ("final_logit_softcapping", True),
    "original_max_position_embeddings": ("rope.scaling.original_context_length", False),
    "num_local_experts": ("expert_count", False),
    "num_experts": ("expert_count", False),
    "num_experts_per_tok": ("expert_used_count", False),
    "moe_intermediate_size": ("expert_feed_forward_length", False),
    "shared_expert_intermediate_size": ("expert_shared_feed_forward_length", False),
}
EVERYWHERE = tuple(KEYS)[:9]
WINDOW, CAPS = ("sliding_window",), ("attn_logit_softcapping", "final_logit_softcapping")
EXPERTS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")


class Family(NamedTuple):
    """A `model_type`: llama.cpp's architecture, further `keys`, what is `assumed`, and how its tensors differ.

    `permuted`: query and key rows stand in llama.cpp's own order. `offset` is added to norms (gemma's compute 1 + w).
    """

    architecture: str
    keys: tuple[str, ...] = ()
    assumed: Callable[[Mapping[str, Any]], dict[str, Any]] = lambda config: {}
    permuted: bool = False
    offset: float = 0.0


def _head(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"query_pre_attn_scalar": config["head_dim"]}


def _every_layer_routed(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []}


def _every_fourth_without_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"no_rope_layers": [int((i + 1) % 4 != 0) for i in range(config["num_hidden_layers"])]}


def _no_bias(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"attention_bias": False, "mlp_bias": False}


def _no_window(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"use_sliding_window": False}


FAMILIES = {
    "llama": Family("llama", assumed=_no_bias, permuted=True),
    "mistral": Family("llama", assumed=_no_bias, permuted=True),
    "mixtral": Family("llama", ("num_local_experts", "num_experts_per_tok"), permuted=True),
    "smollm3": Family("smollm3", assumed=lambda c: _no_bias(c) | _every_fourth_without_rope(c), permuted=True),
    "qwen2": Family("qwen2", assumed=_no_window),
    "qwen3": Family("qwen3", assumed=_no_window),
    "qwen2_moe": Family("qwen2moe", (*EXPERTS, "shared_expert_intermediate_size"), _no_window),
    "qwen3_moe": Family("qwen3moe", EXPERTS, lambda c: _every_layer_routed(c) | _no_window(c)),
    "gemma": Family("gemma", offset=1.0),
    "gemma2": Family("gemma2", (*WINDOW, *CAPS), _head, offset=1.0),
    "gemma3_text": Family(
        "gemma3",
        (*WINDOW, "sliding_window_pattern"),
        lambda c: _head(c) | {"rope_local_base_freq": 10000.0},
        offset=1.0,
    ),
    "phi3": Family("phi3", ("original_max_position_embeddings", *WINDOW)),
}
SCALINGS = ("linear", "llama3")


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
    if kind not in SCALINGS:
        raise UserError(f"gguf: rope scaling `{kind}` is not supported; only linear and llama3 are")
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


class Described(NamedTuple):
    """A model as a file describes it: its family, the config.json of its text model, and the same under mlx-lm's
    names, with what follows from other entries filled in."""

    family: Family
    raw: Mapping[str, Any]
    config: dict[str, Any]


def describe_model(raw: Mapping[str, Any], name: str) -> Described:
    """Read a config.json for llama.cpp. Raises `UserError` for a family that is not known here, and for a model that
    llama.cpp would compute otherwise."""
    raw = raw | raw.get("text_config", {}) if "text_config" in raw else dict(raw)
    kind = str(raw.get("model_type"))
    if kind not in FAMILIES:
        raise UserError(
            f"gguf: {name} is a {kind} model, but the supported families are {', '.join(FAMILIES)}; export "
            f"--to hf and convert that folder with llama.cpp's convert_hf_to_gguf.py"
        )
    raw = {key: value for key, value in raw.items() if key != "text_config"}
    config = dict(read_model_config(raw, name).config)
    heads = config["num_attention_heads"]
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    config["num_key_value_heads"] = config.get("num_key_value_heads") or heads
    config["rope_theta"] = config.get("rope_theta") or 10000.0
    family = FAMILIES[kind]
    for key, value in family.assumed(config).items():
        if config.get(key) is not None and config[key] != value:
            raise UserError(
                f"gguf: {name} has {key} {config[key]}, and llama.cpp computes a {kind} model with {value}; "
                f"export --to fused"
            )
    if kind == "phi3":
        config["original_max_position_embeddings"] = config["max_position_embeddings"]
        config["sliding_window"] = config.get("sliding_window") or 0
    rope_of(raw)
    return Described(family, raw, config)


def write_shape(writer: Any, model: Described) -> None:
    """A model's settings into a GGUF writer, under llama.cpp's keys."""
    architecture, config = model.family.architecture, model.config
    for name in ("rope_theta", *EVERYWHERE, *model.family.keys):
        key, fractional = KEYS[name]
        if (value := config.get(name)) is not None:
            add = writer.add_float32 if fractional else writer.add_uint32
            add(f"{architecture}.{key}", value)
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(int(config["head_dim"] * (config.get("partial_rotary_factor") or 1.0)))
    rope = rope_of(model.raw)
    if rope.kind == "linear":
        writer.add_rope_scaling_type(importlib.import_module("gguf").RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)


def read_shape(reader: Any) -> dict[str, Any]:
    """The hyperparameters in a GGUF file's metadata, as mlx-lm's config of its family."""
    architecture = reader.get_field("general.architecture").contents()
    value = lambda key: getattr(reader.get_field(f"{architecture}.{key}"), "contents", lambda: None)()  # noqa: E731
    routed = value("expert_count") is not None
    kinds = [kind for kind, family in FAMILIES.items() if family.architecture == architecture]
    kind = "mixtral" if architecture == "llama" and routed else kinds[0]
    named = ("rope_theta", *EVERYWHERE, *FAMILIES[kind].keys)
    config = {name: found for name in named if (found := value(KEYS[name][0])) is not None}
    config = {"model_type": kind} | config | FAMILIES[kind].assumed(config)
    if value("rope.scaling.type") is not None:
        config["rope_scaling"] = {"type": value("rope.scaling.type"), "factor": value("rope.scaling.factor")}
    if (turned := value("rope.dimension_count")) not in (None, config["head_dim"]):
        config["partial_rotary_factor"] = turned / config["head_dim"]
    return config


MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
ENDS = (".weight", ".bias")


def tensor_names(architecture: str, layers: int, names: Iterable[str]) -> dict[str, str]:
    """mlx-lm's parameter names -> llama.cpp's, by the gguf package's map. Raises `UserError` for one that it lacks."""
    gguf = importlib.import_module("gguf")
    by_name = {known: arch for arch, known in gguf.MODEL_ARCH_NAMES.items()}
    known, found = gguf.get_tensor_name_map(by_name[architecture], layers), {}
    for name in names:
        own = known.get_name(_stacked(name.removeprefix("language_model.")), try_suffixes=ENDS)
        if own is None:
            raise UserError(f"gguf: the checkpoint holds `{name}`, which llama.cpp's {architecture} does not have")
        found[name] = own
    return found


def _stacked(name: str) -> str:
    """Stacks of experts as llama.cpp's own converter calls them."""
    if "block_sparse_moe.switch_mlp" not in name:
        return name.replace("switch_mlp", "experts")
    path, part, end = name.rsplit(".", 2)
    layer = path.removeprefix("model.").removesuffix(".block_sparse_moe.switch_mlp")
    return f"{layer}.feed_forward.experts.{MIXTRAL[part]}.{end}"


def permute(rows: mx.array, heads: int) -> mx.array:
    """llama.cpp's order of query and key rows, (heads * d, ...) kept: row i stands beside row i + d/2 of its head."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def reordered_heads(family: Family, config: Mapping[str, Any], own: str) -> int:
    """How many heads the rows of llama.cpp's tensor `own` belong to, 0 where they keep their order."""
    part = own.split(".")[-2] if own.endswith(ENDS) else ""
    if not family.permuted or part not in ("attn_q", "attn_k"):
        return 0
    return config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
