"""Tiny random models as transformers itself saves them, one of each architecture that transformers and mlx-lm know.

Every size is bounded: an architecture's default configuration would take the machine down. Windows are 12 tokens long
and rotary positions are stretched beyond 16 tokens, so that rows of 40 tokens meet both.
"""

from __future__ import annotations

import copy
import pkgutil
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

from mlxdpo.model.config_rules import ALIASES

WINDOW, ORIGINAL = 12, 16  # tokens
LARGEST = 4_000_000  # parameters
VOCAB = 300

# Laid over the configuration of any architecture that has the key.
SMALL: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": WINDOW,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = ["sliding_attention", "full_attention"] * 2
MLA = {"num_key_value_heads": 4, "head_dim": 8, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}

# What single architectures need besides.
OWN: Mapping[str, Mapping[str, Any]] = {
    "bailing_hybrid": {
        "num_expert_group": 2,
        "topk_group": 1,
        "num_experts_per_token": 2,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "layer_group_size": 2,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
    },
    "dbrx": {
        "d_model": 64,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 512,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": MLA | {"topk_method": "group_limited_greedy"},
    "deepseek_v3": MLA,
    "deepseek_v32": MLA
    | {
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_topk": 512,
    },
    "dots1": {"first_k_dense_replace": 1, "max_window_layers": 4},
    "ernie4_5_moe": {
        "moe_k": 2,
        "moe_num_experts": 4,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
    },
    "falcon_h1": {
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
        "key_multiplier": 0.7,
        "attention_out_multiplier": 0.9,
        "ssm_in_multiplier": 0.8,
        "lm_head_multiplier": 0.5,
        "embedding_multiplier": 2.0,
        "mlp_multipliers": [0.8, 0.6],
        "ssm_multipliers": [0.9, 0.8, 0.7, 0.6, 1.1],
    },
    "falcon_mamba": {"intermediate_size": 128, "time_step_rank": 8},
    "gemma3_text": {"num_hidden_layers": 6},
    "gemma3n": {},
    "phimoe": {"attention_bias": True, "lm_head_bias": True},
    "gemma4_text": {"pad_token_id": 0},
    "gemma4_unified_text": {"pad_token_id": 0},
    "qwen2_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
    "qwen2_5_vl_text": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}},
    "gpt2": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "gpt_bigcode": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512},
    "gpt_neox": {"intermediate_size": 256},
    "gptj": {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512, "rotary_dim": 8},
    "glm_moe_dsa": MLA
    | {
        "index_head_dim": 16,
        "index_n_heads": 2,
        "index_topk": 512,
    },
    "glm4_moe": {"first_k_dense_replace": 1},
    "glm4_moe_lite": MLA
    | {
        "n_group": 1,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"] * 2,
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
    },
    "jamba": {
        "mamba_d_state": 16,
        "mamba_dt_rank": 8,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "use_mamba_kernels": False,
    },
    "kimi_linear": {
        "num_expert_group": 1,
        "topk_group": 1,
        "num_experts_per_token": 2,
        "num_key_value_heads": 4,
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "q_lora_rank": None,
    },
    "laguna": {
        "layer_types": SLIDING,
        "num_attention_heads_per_layer": [4] * 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {
        "num_layers": 2,
        "ffn_hidden_size": 96,
        "moe_topk": 2,
        "zero_expert_num": 2,
        "expert_ffn_hidden_size": 32,
        "num_key_value_heads": 4,
        "head_dim": 8,
    },
    "llama4_text": {
        "intermediate_size_mlp": 96,
        "moe_layers": [1, 3],
        "interleave_moe_layer_step": 2,
        "attention_chunk_size": 512,
        "num_experts_per_tok": 1,
    },
    "mamba": {"intermediate_size": 128, "time_step_rank": 8},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 16},
    "mellum": {
        "layer_types": SLIDING,
    },
    "mimo_v2_flash": {"layer_types": SLIDING, "head_dim": 24},
    "minicpm3": {"dim_model_base": 32, "num_key_value_heads": 4},
    "minimax": {"block_size": 16},
    "nemotron_h": {
        "layers_block_type": ["mamba", "attention", "moe", "mlp"],
        "ssm_state_size": 16,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 32,
    },
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "linear_num_key_heads": 4},
    "qwen2_moe": {},
    "recurrent_gemma": {
        "lru_width": 64,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "attention"],
        "num_key_value_heads": 1,
    },
    "smollm3": {
        "no_rope_layers": [1, 0, 1, 1],
    },
    "step3p5": {"layer_types": SLIDING},
}


VISION_OWN: Mapping[str, Mapping[str, Any]] = {
    "llama4": {"vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32},
}
TOP: Mapping[str, Mapping[str, Any]] = {}

# The towers beside the text: as small as their code allows.
VISION: Mapping[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "depth": 1,
    "embed_dim": 32,
    "out_hidden_size": 64,
    "num_heads": 2,
    "projection_dim": 32,
    "mlp_dim": 32,
    "image_size": 28,
    "patch_size": 14,
}

BASE = {"rope_theta": 10000.0}
STRETCHED = BASE | {"factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONG = BASE | {
    "rope_type": "longrope",
    "original_max_position_embeddings": ORIGINAL,
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [2.0 + i for i in range(8)],
}
ROPES: Mapping[str, Mapping[str, Any]] = {
    "linear": {"rope_parameters": BASE | {"rope_type": "linear", "factor": 4.0}},
    "dynamic": {"rope_parameters": BASE | {"rope_type": "dynamic", "factor": 4.0}, "max_position_embeddings": ORIGINAL},
    "llama3": {"rope_parameters": STRETCHED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    "yarn": {"rope_parameters": STRETCHED | {"rope_type": "yarn"}},
    "longrope": {"rope_parameters": LONG, "max_position_embeddings": 4 * ORIGINAL},
}
VARIANTS: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "llama": dict(ROPES) | {"biases": {"attention_bias": True, "mlp_bias": True}, "tied": {"tie_word_embeddings": True},
                            "gelu": {"hidden_act": "gelu"}},
    "qwen2": dict(ROPES) | {"window": {"use_sliding_window": True, "max_window_layers": 2}},
    "qwen3": dict(ROPES) | {"window": {"use_sliding_window": True, "max_window_layers": 2}},
    "smollm3": {"window": {"use_sliding_window": True, "layer_types": SLIDING}},
    "mistral": {"no window": {"sliding_window": None}},
    "mixtral": {"no window": {"sliding_window": None}, "yarn": ROPES["yarn"]},
    "phi3": {
        "no window": {"sliding_window": None},
        "longrope": dict(ROPES["longrope"], original_max_position_embeddings=ORIGINAL)
    },
    "starcoder2": {"no window": {"sliding_window": None}},
    "minicpm3": {"untied": {"tie_word_embeddings": False}},
    "deepseek_v3": {"yarn": ROPES["yarn"]},
    "gpt_oss": {"plain rope": {"rope_parameters": BASE | {"rope_type": "default"}}},
    "granitemoehybrid": {"rope": {"position_embedding_type": "rope"}},
}  # fmt: skip


def shared_types() -> list[str]:
    """Every `model_type` with a text model that both transformers and mlx-lm know."""
    import mlx_lm.models
    from mlx_lm.utils import MODEL_REMAPPING

    files = {module.name for module in pkgutil.iter_modules(mlx_lm.models.__path__)}
    known = {**MODEL_REMAPPING, "lfm2_vl": ALIASES["lfm2_vl"]}
    return sorted(name for name in CONFIG_MAPPING if known.get(name, name) in files and name not in NO_TEXT)


NO_TEXT = {"pixtral"}  # a vision tower in transformers


def tiny_config(kind: str, changes: Mapping[str, Any]) -> Any:
    """A transformers config of this `model_type`, small, with `changes` in its text part."""
    # transformers writes into what it is given.
    made, changes = CONFIG_MAPPING[kind], copy.deepcopy(dict(changes))
    default = made().to_dict()
    if "text_config" not in default:
        return made(
            **{key: value for key, value in SMALL.items() if key in default} | dict(OWN.get(kind, {}), **changes)
        )
    inner = default["text_config"]
    text = {key: value for key, value in SMALL.items() if key in inner} | {"model_type": inner["model_type"]}
    text |= dict(OWN.get(inner["model_type"], {}), **OWN.get(kind, {}), **changes)
    towers = {}
    if vision := default.get("vision_config"):
        small = {key: value for key, value in VISION.items() if key in vision}
        towers["vision_config"] = small | {"model_type": vision["model_type"]} | VISION_OWN.get(kind, {})
    if default.get("audio_config"):
        towers["audio_config"] = None
    return made(text_config=text, **towers, **TOP.get(kind, {}))


def tiny_model(kind: str, changes: Mapping[str, Any] = {}, seed: int = 0) -> Any:
    """A random model of this `model_type`, float32. Raises `ValueError` for one that is not tiny."""
    config = tiny_config(kind, changes)
    with torch.device("meta"):
        count = sum(p.numel() for p in _of(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count} parameters are not tiny")
    model = _of(config).float().eval()
    _randomise(model, seed)
    return model


def _of(config: Any) -> Any:
    images = AutoModelForImageTextToText
    made = images if type(config) in images._model_mapping and hasattr(config, "text_config") else AutoModelForCausalLM
    return made.from_config(config, attn_implementation="eager")


def _randomise(model: Any, seed: int) -> None:
    """Weights so large that predictions are far from uniform, vectors around what they begin as."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, array in model.named_parameters():
            drawn = torch.randn(array.shape, generator=noise)
            if array.ndim < 2 or "A_log" in name:
                array.add_(0.1 * drawn)
            else:
                array.copy_((0.4 if "conv" in name else 0.15) * drawn)
        for name, array in model.named_buffers():
            if "bias" in name and array.is_floating_point():  # corrections of routers; see docs/evidence/mlx-lm.md
                array.copy_(0.1 * torch.randn(array.shape, generator=noise).abs())


def pairs() -> list[tuple[list[int], list[int], list[int]]]:
    """(prompt, chosen, rejected) token ids: rows of 40, 29, 12 and 9 tokens, and one prompt used twice."""
    noise = np.random.default_rng(0)

    def some(count: int) -> list[int]:
        return noise.integers(3, VOCAB, count).tolist()

    first, second = some(20), some(5)
    return [(first, some(20), some(9)), (second, some(7), some(4)), (second, some(3), some(6))]


def torch_logps(model: Any, prompt: list[int], completion: list[int]) -> float:
    """log p(completion | prompt) by transformers, nats."""
    ids = torch.tensor([prompt + completion])
    if type(model).__name__ == "Llama4ForConditionalGeneration":  # it fails where there is no image
        model = model.language_model
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 : -1]
    logps = torch.log_softmax(logits.double(), dim=-1)
    return float(logps.gather(2, ids[:, len(prompt) :, None]).sum())
