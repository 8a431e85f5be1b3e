"""Where mlx-lm computes another model than transformers: a case of each, without mlxdpo. The table is in mlx-lm.md.

python docs/evidence/mlx_lm_cases.py [CASE ...]

Needs torch, transformers and mlx-lm. A tiny random model is saved by transformers and loaded by mlx-lm; the log-prob of
a row of 40 tokens, nats, is computed by both. Prints how far they are apart, or mlx-lm's error.
"""

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx
import torch
from mlx_lm.utils import load_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SMALL = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
BASE = {"rope_theta": 10000.0}
STRETCHED = BASE | {"factor": 4.0, "original_max_position_embeddings": 16}
YARN = STRETCHED | {"rope_type": "yarn"}
LONG = {"short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [2.0 + i for i in range(8)]}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16, "mamba_chunk_size": 16}

# What a case shows: the model_type, what its config says besides, and what is written into config.json by hand so that
# mlx-lm loads it and nothing but the case is seen.
CASES = {
    "rope_parameters": (
        "llama",
        {"rope_parameters": STRETCHED | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    ),
    "rope_parameters, no default": ("granite", {}),
    "rope_parameters, another default": ("phi", {}),
    "layer_types": (
        "cohere2",
        {
            "sliding_window": 12,
            "rope_parameters": BASE | {"rope_type": "default"},
            "layer_types": ["full_attention", "sliding_attention"] * 2,
        },
        {"rope_theta": 10000.0},
    ),
    "defaults of a text config": ("gemma3", {}),
    "window": ("mistral", {"sliding_window": 12}, {"rope_theta": 10000.0}),
    "window of some layers": (
        "qwen2",
        {
            "rope_parameters": BASE | {"rope_type": "default"},
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 2,
        },
        {"rope_theta": 10000.0},
    ),
    "longrope": (
        "phi3",
        {
            "sliding_window": None,
            "original_max_position_embeddings": 64,
            "rope_parameters": BASE | LONG | {"rope_type": "longrope", "original_max_position_embeddings": 64},
        },
        {"rope_theta": 10000.0},
    ),
    "dynamic": (
        "llama",
        {"max_position_embeddings": 16, "rope_parameters": BASE | {"rope_type": "dynamic", "factor": 4.0}},
        {"rope_theta": 10000.0},
    ),
    "partial rotary": ("glm", {"rope_parameters": BASE | {"rope_type": "default"}}, {"rope_theta": 10000.0}),
    "scaling of nn.RoPE": ("mixtral", {"sliding_window": None, "rope_parameters": YARN}, {"rope_theta": 10000.0}),
    "scale of embeddings": (
        "gemma3_text",
        {"hidden_size": 96, "num_hidden_layers": 6, "sliding_window": 64, "tie_word_embeddings": True},
    ),
    "gelu, tanh form": ("gemma", {}),
    "gelu, exact form": ("gpt_neox", {"intermediate_size": 256}, {"rotary_emb_base": 10000, "rotary_pct": 0.25}),
    "key_multiplier": (
        "falcon_h1",
        MAMBA | {"mamba_n_heads": 4, "mamba_d_ssm": 64, "key_multiplier": 0.39},
        {"head_dim": 16, "rope_theta": 1e11},
    ),
    "time steps": (
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "attention", "moe", "mlp"],
            "ssm_state_size": 16,
            "mamba_num_heads": 8,
            "mamba_head_dim": 16,
            "n_groups": 2,
            "chunk_size": 16,
            "moe_shared_expert_intermediate_size": 32,
            "n_group": 1,
            "topk_group": 1,
            "time_step_min": 0.5,
        },
    ),
    "position_embedding_type": (
        "granitemoehybrid",
        MAMBA | {"layer_types": ["mamba", "attention"] * 2, "shared_intermediate_size": 48},
        {"layer_types": ["mamba", "attention"] * 2, "rope_theta": 10000},
    ),
    "experts' sum": (
        "jamba",
        {
            "mamba_d_state": 16,
            "mamba_dt_rank": 8,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "use_mamba_kernels": False,
        },
    ),
    "router's correction": (
        "ernie4_5_moe",
        {
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "moe_layer_start_index": 1,
            "moe_layer_end_index": 3,
        },
        {"rope_theta": 500000},
    ),
    "logit factor of a tied head": (
        "minicpm3",
        MLA | {"dim_model_base": 32, "num_key_value_heads": 4, "tie_word_embeddings": True},
        {
            "rope_theta": 10000,
            "rope_scaling": {
                "type": "longrope",
                "original_max_position_embeddings": 512,
                "long_factor": [1.0] * 4,
                "short_factor": [1.0] * 4,
            },
        },
    ),
    "corrections below 0": (
        "glm4_moe",
        {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1},
        {"head_dim": 16, "rope_theta": 10000, "rope_scaling": None, "partial_rotary_factor": 0.5},
    ),
    "names: gpt2": ("gpt2", {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 512}, {"n_ctx": 512}),
    "names: gpt_oss": ("gpt_oss", {"sliding_window": 64, "rope_parameters": BASE | {"rope_type": "default"}}),
    "names: olmo_hybrid": (
        "olmo_hybrid",
        {
            "layer_types": ["linear_attention", "full_attention"] * 2,
            "linear_num_key_heads": 4,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
    "names: nanochat": ("nanochat", {}),
}


def tiny(kind: str, changes: dict) -> torch.nn.Module:
    """A random model of this `model_type`; its config holds only what `changes` and SMALL say."""
    torch.manual_seed(0)
    made, default = CONFIG_MAPPING[kind], CONFIG_MAPPING[kind]().to_dict()
    known = {key: value for key, value in SMALL.items() if key in default.get("text_config", default)} | changes
    if "text_config" in default:
        vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        config = made(text_config=known, vision_config=vision)
    else:
        config = made(**known)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, array in [*model.named_parameters(), *model.named_buffers()]:
            if "bias" in name and "correction" in name:
                array.copy_(torch.randn(array.shape) - 1)
            elif array.ndim > 1 and "A_log" not in name and isinstance(array, torch.nn.Parameter):
                array.copy_((0.4 if "conv" in name else 0.15) * torch.randn(array.shape))
    return model


def difference(kind: str, changes: dict, by_hand: Mapping[str, object] = {}) -> float:
    """|log p by mlx-lm - log p by transformers| of a row, nats. Raises what mlx-lm raises."""
    model = tiny(kind, changes)
    ids = torch.randint(3, 300, (1, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[:, :-1].double(), -1)
    theirs = float(logps.gather(2, ids[:, 1:, None]).sum())
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = Path(folder, "config.json")
        config.write_text(json.dumps(json.loads(config.read_text()) | by_hand))
        loaded, _ = load_model(Path(folder))
    row = mx.array(ids.numpy())
    logits = loaded(row)[:, :-1].astype(mx.float32)
    logps = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return abs(mx.take_along_axis(logps, row[:, 1:, None], -1).sum().item() - theirs)


def main(cases: list[str]) -> None:
    """Print a line for each case."""
    for case in cases or CASES:
        try:
            found = f"{difference(*CASES[case]):.1e} nats off"
        except Exception as error:  # the case is that it does not load
            found = f"mlx-lm: {type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:90]}"
        print(f"{case:34} {CASES[case][0]:18} {found}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
