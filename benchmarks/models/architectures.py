"""A tiny random model of every architecture of mlx-lm, built from the names of its arguments.

One table of small sizes serves all model files; what single files want besides stands in `OWN`. Windows are 8 tokens,
so that they cut something off in rows of 22.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm.models
from mlx.utils import tree_flatten, tree_map

VOCAB, WINDOW = 304, 8
LARGEST = 4_000_000  # parameters
ROPE = {"rope_theta": 10000.0, "rope_type": "default"}
ROPES = {"sliding_attention": ROPE, "full_attention": ROPE}
SCALED = ROPE | {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}
SLIDING = ["sliding_attention", "full_attention"] * 2

# Sizes, and the names that model files give them.
SIZES: Sequence[tuple[Any, str]] = [
    (VOCAB, "vocab_size embedding_size num_vocab vocab_size_per_layer_input padded_vocab_size"),
    (64, "hidden_size n_embd d_model model_dim hidden_dim block_dim width lru_width mamba_d_ssm"),
    (
        128,
        "intermediate_size mlp_hidden_size dense_intermediate_size block_ff_dim ffn_hidden_size intermediate_size_mlp",
    ),
    (
        4,
        "num_hidden_layers n_layer n_layers num_layers num_attention_heads n_head n_heads num_heads mamba_n_heads "
        "mamba_num_heads num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads "
        "linear_conv_kernel_dim conv_kernel mamba_d_conv conv_L_cache d_conv conv1d_width swa_num_attention_heads",
    ),
    (
        2,
        "num_key_value_heads num_kv_heads n_kv_heads num_experts_per_tok num_experts_per_token moe_topk moe_top_k "
        "linear_num_key_heads index_n_heads sliding_window_pattern layer_group_size mamba_expand decoder_sparse_step "
        "num_kv_reuse_layers zero_expert_num attn_layer_period expert_layer_period conv_window num_attention_groups "
        "swa_num_key_value_heads cla_share_factor num_loops moe_k",
    ),
    (
        16,
        "head_dim kv_channels hidden_size_per_head mamba_d_head mamba_head_dim kv_lora_rank q_lora_rank v_head_dim "
        "qk_nope_head_dim linear_key_head_dim linear_value_head_dim index_head_dim mamba_d_state state_size "
        "ssm_state_size chunk_size mamba_chunk_size swa_head_dim swa_v_head_dim a_low_rank_dim v_low_rank_dim "
        "gate_low_rank_dim decay_low_rank_dim block_multiple_of",
    ),
    (
        32,
        "moe_intermediate_size shared_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size "
        "moe_shared_expert_intermediate_size routed_expert_hidden_size dim_model_base",
    ),
    (
        WINDOW,
        "sliding_window sliding_window_size attention_window_size window_size loop_window_size qk_rope_head_dim "
        "rotary_dim time_step_rank",
    ),
    (
        1,
        "n_shared_experts num_shared_experts moe_num_shared_experts n_group topk_group n_groups mamba_n_groups "
        "first_k_dense_replace attn_layer_offset expert_layer_offset moe_layer_freq num_dense_layers",
    ),
    (
        512,
        "max_position_embeddings max_seq_len n_positions n_ctx model_max_length attention_chunk_size index_topk "
        "block_size",
    ),
    (1e-5, "rms_norm_eps norm_eps layer_norm_eps layer_norm_epsilon layernorm_epsilon norm_epsilon block_norm_eps"),
    (1e4, "rope_theta rotary_emb_base rope_local_base_freq swa_rope_theta"),
    (
        1.0,
        "routed_scaling_factor embedding_multiplier residual_multiplier scale_depth scale_emb logits_soft_cap "
        "block_ffn_dim_multiplier",
    ),
    (0.5, "partial_rotary_factor rotary_pct attention_multiplier"),
]
SMALL = {name: size for size, names in SIZES for name in names.split()}
MLA: Mapping[str, Any] = {"num_key_value_heads": 4, "n_group": 2, "topk_group": 1}
GROUPED = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "mscale": 1.0, "mscale_all_dim": 1.0}
KDA = {
    "kda_layers": [1, 2, 3],
    "full_attn_layers": [4],
    "num_heads": 4,
    "head_dim": 16,
    "short_conv_kernel_size": 4,
}
LONGCAT = {"mla_scale_q_lora": True, "mla_scale_kv_lora": True, "num_layers": 2, "zero_expert_type": "identity"}
LONGROPE = {"short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "original_max_position_embeddings": 512}

# What single files want besides; `text` names the file that a wrapper's text model comes from, where it is another.
OWN: Mapping[str, Mapping[str, Any]] = {
    "afm7": {"num_layers": 6},
    "afmoe": {"layer_types": SLIDING},
    "deepseek_v2": {"rope_scaling": YARN},
    "gemma3n": {
        "num_kv_shared_layers": 2,
        "layer_types": SLIDING,
        "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
        "hidden_size_per_layer_input": 16,
        "altup_num_inputs": 2,
        "altup_active_idx": 0,
        "laurel_rank": 8,
        "final_logit_softcapping": 30.0,
    },
    "gemma4_text": {
        "layer_types": SLIDING,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 2,
        "rope_parameters": {"full_attention": ROPE | {"partial_rotary_factor": 0.5}, "sliding_attention": ROPE},
    },
    "glm_moe_dsa": MLA | GROUPED | {"rope_parameters": ROPE},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {"moe_intermediate_size": 32, "rope_scaling": {"alpha": 2.0, "factor": 1.0, "type": "dynamic"}},
    "kimi_k3": {
        "num_key_value_heads": 4,
        "activation_situ_beta": 1.0,
        "activation_situ_linear_beta": 1.0,
        "attn_res_block_size": 2,
        "linear_attn_config": KDA | {"gate_lower_bound": -5.0},
    },
    "lfm2": {"full_attn_idxs": [1, 3]},
    "lfm2_moe": {"full_attn_idxs": [1, 3]},
    "llama4_text": {"no_rope_layers": [1, 0, 1, 1], "tie_word_embeddings": False},
    "longcat_flash": LONGCAT,
    "longcat_flash_ngram": LONGCAT,
    "mamba2": {"num_heads": 8, "time_step_limit": (0.0, 1e9)},
    "mimo_v2_flash": GROUPED
    | {
        "hybrid_layer_pattern": [1, 0, 1, 0],
        "moe_layer_freq": [0, 1, 1, 1],
        "head_dim": 32,
        "swa_head_dim": 32,
        "add_swa_attention_sink_bias": True,
    },
    "muse_spark": {
        "layer_types": SLIDING,
        "layer_rope_theta": [1e4] * 4,
        "rope_parameters": ROPE,
        "moe_hidden_size": 32,
        "final_logit_softcapping": 30.0,
        "num_shared_experts": 0,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe", "mlp"],
        "moe_latent_size": 32,
        "time_step_limit": (0.0, 1e9),
    },
    "plamo": {"n_shared_head": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"], "logits_soft_cap": 30.0, "num_key_value_heads": 1},
    "seed_oss": {"tie_word_embeddings": False},
    "step3p5": {"layer_types": SLIDING, "share_expert_dim": 32, "moe_layers_enum": "1,2,3"},
    "baichuan_m1": {"sliding_window_layers": [1, 3]},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "exaone4": {"rope_scaling": {"rope_type": "default"}, "sliding_window_pattern": "LG"},
    "exaone_moe": {"is_moe_layer": [False, True] * 2, "layer_types": SLIDING},
    "gear": {"layer_types": ["full_attention", "conv_mixer", "sliding_attention", "conv_mixer"]},
    "gemma3": {"text": "gemma3_text"},
    "gemma3_text": {"num_hidden_layers": 6},
    "gemma4": {"text": "gemma4_text"},
    "mistral3": {"text": "ministral3"},
    "pixtral": {"text": "llama"},
    "qwen2_vl": {"text": "qwen2"},
    "qwen3_vl": {"text": "qwen3"},
    "qwen3_vl_moe": {"text": "qwen3_moe"},
    "kimi_k25": {"text": "deepseek_v3"},
    "prism_hadamard_qwen35": {"text": "qwen3_5"},
    "qwen3_5_moe": {"text": "qwen3_5"},
    "lfm2-vl": {"text": "lfm2"},
    "llama4": {"num_experts_per_tok": 1},
    "ministral3": {"layer_types": SLIDING, "rope_parameters": SCALED},
    "mistral4": MLA | {"rope_parameters": SCALED},
    "minimax_m3_vl": {
        "moe_layer_freq": [0, 1, 1, 1],
        "sparse_attention_config": {
            "sparse_num_index_heads": 2,
            "sparse_index_dim": 8,
            "sparse_block_size": 16,
            "sparse_topk_blocks": 4,
            "sparse_local_block": 1,
            "sparse_attention_freq": [0, 1, 1, 1],
        },
    },
    "mellum": {"layer_types": SLIDING, "rope_parameters": ROPES},
    "spark2_5": {"rope_parameters": ROPES},
    "phimoe": {"rope_scaling": LONGROPE | {"short_mscale": 1.0, "long_mscale": 1.0, "type": "longrope"}},
    "minicpm3": {
        "num_key_value_heads": 4,
        "rope_scaling": LONGROPE | {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "type": "longrope"},
    },
    "nemotron-nas": {
        "block_configs": [
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 2.0}},
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 1.0}},
            {"attention": {"replace_with_linear": True}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 1.0}},
        ],
    },
    "openelm": {
        "num_transformer_layers": 3,
        "num_query_heads": [4, 4, 4],
        "num_kv_heads": [2, 2, 2],
        "ffn_multipliers": [1.0, 1.5, 2.0],
        "ffn_dim_divisor": 16,
    },
    "kimi_linear": {"linear_attn_config": KDA, "num_key_value_heads": 4},
}  # fmt: skip


def architectures() -> list[str]:
    """Names of mlx-lm's model files; not of those that need a package which is not there."""
    found = []
    for module in pkgutil.iter_modules(mlx_lm.models.__path__):
        try:
            file = importlib.import_module(f"mlx_lm.models.{module.name}")
        except SystemExit:  # olmo ends the process
            continue
        if hasattr(file, "ModelArgs"):
            found.append(module.name)
    return sorted(found)


def tiny_arguments(kind: str, kinds: str = "ModelArgs") -> dict[str, Any]:
    """Small arguments for a model file, or for the class `kinds` of it."""
    file = importlib.import_module(f"mlx_lm.models.{kind}")
    own = dict(OWN.get(kind, {}))
    text, found = own.pop("text", None), {}
    for field in dataclasses.fields(getattr(file, kinds)):
        needed = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if field.name in SMALL:
            found[field.name] = SMALL[field.name]
        elif field.name == "text_config":
            source = file if text is None else importlib.import_module(f"mlx_lm.models.{text}")
            inner = next(name for name in TEXT if hasattr(source, name))
            found[field.name] = tiny_arguments(text or kind, inner)
        elif needed:
            found[field.name] = kind if field.name == "model_type" else _neutral(field.type)
    return found | {key: value for key, value in own.items()}


def _neutral(kind: Any) -> Any:
    """A value of an argument's type that switches nothing on."""
    name = str(kind).lower()
    return next((value for word, value in NEUTRAL.items() if word in name), None)


TEXT = ("TextArgs", "TextConfig", "TextModelArgs", "ModelArgs")  # what files call the arguments of a text model
NEUTRAL = {"bool": False, "list": [], "dict": {}, "float": 1.0, "int": 1}


def tiny_model(kind: str) -> nn.Module:
    """A random model, float32, frozen. Raises `ValueError` for one that is not tiny."""
    file = importlib.import_module(f"mlx_lm.models.{kind}")
    model = file.Model(file.ModelArgs.from_dict(tiny_arguments(kind)))
    size = sum(a.size for a in _arrays(model))
    if size > LARGEST:
        raise ValueError(f"{kind}: {size} parameters are not tiny")
    mx.random.seed(0)
    model.__dict__.setdefault("_no_grad", set())  # recurrent_gemma forgets super().__init__()
    model.__dict__.setdefault("_training", True)
    model.set_dtype(mx.float32)
    noisy = lambda a: a + 0.02 * mx.random.normal(a.shape) if mx.issubdtype(a.dtype, mx.floating) else a  # noqa: E731
    model.update(tree_map(noisy, model.parameters()))
    mx.eval(model.parameters())
    model.freeze()
    return model


def _arrays(model: nn.Module) -> list[mx.array]:
    return [a for _, a in tree_flatten(model.parameters())]
