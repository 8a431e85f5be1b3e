"""Tiny random models of real architectures, built in-process, in memory or as Hugging Face folders."""

import json
from pathlib import Path

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

SHAPE = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}
CONFIGS = {
    "llama": SHAPE | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "tie_word_embeddings": True},
    "qwen3": SHAPE | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": False},
    "gemma2": SHAPE
    | {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
    "gemma3_text": SHAPE
    | {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
        "sliding_window_pattern": 2,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "rope_local_base_freq": 10000.0,
        "hidden_activation": "gelu_pytorch_tanh",
        "tie_word_embeddings": True,
    },
}

# Only their shared shape and the fields that their model definitions add: for tests that no torch is asked about.
SHAPES = CONFIGS | {
    "smollm3": SHAPE | {"model_type": "smollm3", "tie_word_embeddings": True, "no_rope_layers": [1, 0, 1]},
    "qwen2": SHAPE | {"model_type": "qwen2", "tie_word_embeddings": False},
    "qwen3_moe": SHAPE
    | {
        "model_type": "qwen3_moe",
        "tie_word_embeddings": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "mixtral": SHAPE | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2},
    "phi3": SHAPE | {"model_type": "phi3"},
    "olmo2": SHAPE | {"model_type": "olmo2", "tie_word_embeddings": False},
    "starcoder2": SHAPE | {"model_type": "starcoder2"},
    "gemma": SHAPE | {"model_type": "gemma"},
    "cohere": SHAPE | {"model_type": "cohere", "logit_scale": 0.5},
    "granite": SHAPE
    | {
        "model_type": "granite",
        "logits_scaling": 4.0,
        "attention_multiplier": 0.3,
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    },
    "qwen3_5": {
        "model_type": "qwen3_5",
        "text_config": SHAPE
        | {
            "model_type": "qwen3_5_text",
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 12,
            "linear_conv_kernel_dim": 4,
            "tie_word_embeddings": True,
            "full_attention_interval": 3,
        },
    },
    "kimi_linear": SHAPE
    | {
        "model_type": "kimi_linear",
        "num_key_value_heads": 4,
        "linear_attn_config": {
            "kda_layers": [1, 2],
            "num_heads": 2,
            "head_dim": 8,
            "short_conv_kernel_size": 4,
        },
        "model_max_length": 512,
        "num_experts": 0,
        "moe_intermediate_size": 16,
        "kv_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 8,
    },
}


def tiny_model(kind="llama", vocab=300, seed=0, **changes):
    """A random model with weights large enough that its predictions differ a lot from uniform."""
    config = SHAPES[kind] | {"vocab_size": vocab} | changes
    if "text_config" in config:
        config["text_config"] = config["text_config"] | {"vocab_size": vocab} | changes
    model_class, arguments = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(arguments.from_dict(config))
    spread = [
        (n, mx.random.normal(p.shape) * (0.3 if p.ndim > 1 else 0.1)) for n, p in tree_flatten(model.parameters())
    ]
    model.load_weights([(n, p if p.ndim > 1 else 1 + p) for n, p in spread])
    mx.eval(model.parameters())
    model.freeze()
    return model


def write_model(folder: Path, tokenizer, kind="llama", seed=0, **changes) -> Path:
    """The same as a Hugging Face folder with a tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    vocab = max(300, len(tokenizer))
    model = tiny_model(kind, vocab, seed, **changes)
    config = CONFIGS[kind] | {"vocab_size": vocab, "eos_token_id": tokenizer.eos_token_id} | changes
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
    arrays = dict(tree_flatten(model.parameters()))
    if config["tie_word_embeddings"]:  # mlx-lm makes gemma3 a head of its own, which tied checkpoints do not have
        arrays.pop("lm_head.weight", None)
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


def write_experts(folder: Path, tokenizer, **changes) -> Path:
    """A tiny mixture of experts as its Hugging Face checkpoint: one tensor an expert."""
    folder.mkdir()
    config = SHAPES["qwen3_moe"] | {"architectures": ["Qwen3MoeForCausalLM"], "tie_word_embeddings": False} | changes
    config |= {"vocab_size": 300, "eos_token_id": tokenizer.eos_token_id}
    arrays = {}
    for name, a in tree_flatten(tiny_model("qwen3_moe", 300, tie_word_embeddings=False, **changes).parameters()):
        if "switch_mlp" in name:
            before, _, part = name.partition("switch_mlp.")
            arrays |= {f"{before}experts.{e}.{part}": mx.contiguous(a[e]) for e in range(len(a))}
        else:
            arrays[name] = a
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), arrays, {"format": "pt"})
    tokenizer.save_pretrained(folder)
    return folder


def change(file, **values):
    """Lay values over a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | values))
