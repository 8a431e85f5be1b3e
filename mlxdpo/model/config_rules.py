"""What mlx-lm 0.32.2 wants to be told of single architectures, and what it computes otherwise than transformers.

`make parity` proves each entry: a tiny model that transformers saved is loaded, and its log-probs are held against
torch. docs/models.md is the table of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from mlxdpo.types import UserError

Values = dict[str, Any]
Rule = Callable[[Values, Any], Values]
"""(config with transformers' defaults filled in, transformers' config object) -> keys under mlx-lm's names."""


def period(layer_types: list[str] | None, full: str = "full_attention") -> int:
    """Every how many layers one is `full`, mlx-lm's `sliding_window_pattern`. Raises `UserError` for other patterns."""
    kinds = [kind == full for kind in layer_types or [full]]
    for every in range(1, len(kinds) + 1):
        if kinds == [i % every == every - 1 for i in range(len(kinds))]:
            return every
    raise UserError(
        f"its layer_types are not a repeated pattern of sliding layers and one {full} layer, as mlx-lm requires"
    )


def _window_pattern(config: Values, _: Any) -> Values:
    return {"sliding_window_pattern": period(config.get("layer_types"))}


def _gemma3(config: Values, hf: Any) -> Values:
    ropes = hf.rope_parameters
    return _window_pattern(config, hf) | {"rope_local_base_freq": ropes["sliding_attention"]["rope_theta"]}


def _neox(config: Values, hf: Any) -> Values:
    rope = hf.rope_parameters
    return {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope.get("partial_rotary_factor", 1.0)}


def _kimi_linear(config: Values, hf: Any) -> Values:
    linear = [i + 1 for i, kind in enumerate(hf.layer_types) if kind == "linear_attention"]  # counted from 1
    return {
        "rope_theta": 10000.0,  # asked for and not used: its attention has no positions
        "first_k_dense_replace": hf.mlp_layer_types.index("sparse") if "sparse" in hf.mlp_layer_types else 0,
        "linear_attn_config": {
            "kda_layers": linear,
            "num_heads": hf.linear_num_heads,
            "head_dim": hf.linear_head_dim,
            "short_conv_kernel_size": hf.linear_conv_kernel_dim,
        },
    }


def _mimo_v2_flash(config: Values, hf: Any) -> Values:
    full, sliding = hf.rope_parameters["full_attention"], hf.rope_parameters["sliding_attention"]
    if full.get("partial_rotary_factor") != sliding.get("partial_rotary_factor"):
        raise UserError("its sliding and full layers rotate different shares of a head, which mlx-lm has no key for")
    return {
        "hybrid_layer_pattern": [int(kind == "sliding_attention") for kind in hf.layer_types],
        "moe_layer_freq": [int(kind == "sparse") for kind in hf.mlp_layer_types],
        "add_swa_attention_sink_bias": True,
        "add_full_attention_sink_bias": False,
        "sliding_window_size": hf.sliding_window,
        "n_shared_experts": None,
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "layernorm_epsilon": hf.rms_norm_eps,
        "swa_rope_theta": sliding["rope_theta"],
        "swa_num_attention_heads": hf.num_attention_heads,
        "swa_num_key_value_heads": 2 * hf.num_key_value_heads,
        "swa_head_dim": hf.head_dim,
        "swa_v_head_dim": hf.v_head_dim,
    }


def _dense_first(config: Values, hf: Any) -> Values:
    """How many layers come before the first sparse one, where the config lists the kind of each layer."""
    kinds = hf.mlp_layer_types
    dense = kinds.index("sparse") if "sparse" in kinds else len(kinds)
    if kinds != ["dense"] * dense + ["sparse"] * (len(kinds) - dense):
        raise UserError("its mlp_layer_types mix dense and sparse layers; mlx-lm can only have the first ones dense")
    return {"first_k_dense_replace": dense}


def _granite_hybrid(config: Values, hf: Any) -> Values:
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    position = "rope" if hf.position_embedding_type == "rope" else "nope"
    return {"layer_types": [names.get(kind, kind) for kind in hf.layer_types], "position_embedding_type": position}


def _longrope_always(config: Values, hf: Any) -> Values:
    """MiniCPM3: mlx-lm knows no other rotation than longrope's; factors of 1 are the plain one."""
    if config.get("rope_scaling"):
        return {}
    length = config["max_position_embeddings"]
    return {"rope_scaling": {"type": "longrope", "original_max_position_embeddings": length}}


def _yarn_always(config: Values, hf: Any) -> Values:
    """DeepSeek-V2: mlx-lm knows no other rotation than yarn's; a factor of 1 is the plain one."""
    return {} if config.get("rope_scaling") else {"rope_scaling": {"type": "yarn", "factor": 1.0}}


def _minimax_m2(config: Values, hf: Any) -> Values:
    return {"shared_intermediate_size": 0, "rotary_dim": _rotated(hf)}


def _rotated(hf: Any) -> int:
    """Dimensions of a head that have a position."""
    return int(hf.head_dim * hf.rope_parameters.get("partial_rotary_factor", 1.0))


def _glm_dsa(config: Values, hf: Any) -> Values:
    return {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1} | _dense_first(config, hf)


def _exaone_moe(config: Values, hf: Any) -> Values:
    return {"is_moe_layer": [kind == "sparse" for kind in hf.mlp_layer_types]}


def _recurrent_gemma(config: Values, hf: Any) -> Values:
    if hf.num_key_value_heads != 1:
        raise UserError(f"it has {hf.num_key_value_heads} key-value heads, and mlx-lm's recurrent_gemma always one")
    return {}


def _interval(config: Values, hf: Any) -> Values:
    return {"full_attention_interval": period(hf.layer_types)}


def _apertus(config: Values, _: Any) -> Values:
    return {"mlp_bias": False, "post_norm": False, "qk_norm": True}  # asked for; mlx-lm reads the first alone


def _called_otherwise(**names: str) -> Rule:
    """Keys that mlx-lm calls otherwise: ours from transformers' attribute."""
    return lambda config, hf: {own: getattr(hf, theirs) for own, theirs in names.items()}


def _constants(**values: Any) -> Rule:
    return lambda config, hf: values


RULES: Mapping[str, Rule] = {
    "apertus": _apertus,
    "cohere2": _window_pattern,
    "deepseek_v2": _yarn_always,
    "deepseek_v32": _dense_first,
    "exaone4": lambda config, hf: {"sliding_window_pattern": "L" * (period(hf.layer_types) - 1) + "G"},
    "exaone_moe": _exaone_moe,
    "gemma3_text": _gemma3,
    "gemma4_unified_text": _constants(hidden_size_per_layer_input=0),
    "glm4_moe_lite": _dense_first,
    "glm_moe_dsa": _glm_dsa,
    "gpt2": _called_otherwise(n_ctx="n_positions"),
    "gpt_bigcode": lambda config, hf: {"n_inner": hf.n_inner or 4 * hf.n_embd},
    "gpt_neox": _neox,
    "granitemoehybrid": _granite_hybrid,
    "kimi_linear": _kimi_linear,
    "lfm2": _called_otherwise(block_dim="hidden_size", block_ff_dim="intermediate_size"),
    "mamba2": lambda config, hf: {"intermediate_size": int(hf.expand * hf.hidden_size)},
    "mimo_v2_flash": _mimo_v2_flash,
    "minicpm3": _longrope_always,
    "minimax_m2": _minimax_m2,
    "minimax_m3_vl_text": lambda config, hf: {"rotary_dim": _rotated(hf)},
    "longcat_flash": _constants(
        attention_method="MLA", zero_expert_type="identity", mla_scale_q_lora=True, mla_scale_kv_lora=True
    ),
    "nemotron_h": lambda config, hf: {"time_step_limit": (hf.time_step_min, math.inf)},
    "qwen3_5_moe_text": _interval,
    "qwen3_vl_moe_text": _constants(norm_topk_prob=True),
    "qwen3_5_text": _interval,
    "qwen3_next": _interval,
    "recurrent_gemma": _recurrent_gemma,
    "solar_open": _constants(intermediate_size=0, first_k_dense_replace=0, partial_rotary_factor=1.0),
}

REPLACED = {
    "layer_types",
    "n_inner",
    "position_embedding_type",
    "rotary_dim",
    "sliding_window_pattern",
    "time_step_limit",
}
"""Keys of which a rule's value stands in place of config.json's; others are filled in where they are missing."""

ALIASES: Mapping[str, str] = {
    "lfm2_vl": "lfm2-vl",
    "qwen3_5_text": "qwen3_5",
    "qwen3_5_moe_text": "qwen3_5_moe",
}
"""A `model_type` that mlx-lm has no file for, and the one that reads it."""


def _jamba(raw: Mapping[str, Any], hf: Any) -> str:
    several = hf is not None and hf.num_experts > 1
    return "mlx-lm's jamba weighs its experts otherwise than transformers (it makes their weights sum to 1)" * several


def _ernie(raw: Mapping[str, Any], hf: Any) -> str:
    return "mlx-lm's ernie4_5_moe leaves out the correction that its router adds before it chooses experts"


def _phi3small(raw: Mapping[str, Any], hf: Any) -> str:
    dummies = raw.get("dummy_token_indices")
    outside = dummies is None or max(dummies, default=0) >= raw.get("vocab_size", 0)
    return "its dummy_token_indices are missing, or beyond its vocabulary" * outside


def _minicpm3(raw: Mapping[str, Any], hf: Any) -> str:
    scaled = hf is not None and hf.tie_word_embeddings and hf.hidden_size != hf.dim_model_base
    return "mlx-lm's minicpm3 leaves out the factor of the logits where the head is tied to the embedding" * scaled


REFUSED: Mapping[str, Callable[[Mapping[str, Any], Any], str]] = {
    "ernie4_5_moe": _ernie,
    "jamba": _jamba,
    "minicpm3": _minicpm3,
    "minimax": lambda raw, hf: "mlx-lm's minimax is MiniMax-M2, and this is the one with linear attention",
    "llama4_text": lambda raw, hf: "mlx-lm's llama4_text has no experts" * bool(getattr(hf, "moe_layers", None)),
    "bitnet": lambda raw, hf: "mlx-lm's kernel for ternary weights has no gradient",
    "longcat_flash": lambda raw, hf: "mlx-lm's longcat_flash knows its experts' weights by other names",
    "bailing_hybrid": lambda raw, hf: "mlx-lm's bailing_hybrid is an earlier design under the same name",
    "phi3small": _phi3small,
    "nanochat": lambda raw, hf: "mlx-lm's nanochat knows the weights by other names and other shapes",
}
"""Why an architecture cannot be computed as transformers does; the empty text where this model of it can be."""
