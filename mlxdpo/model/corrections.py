"""What is put right in a model after mlx-lm has built it, and in weights before it takes them.

Only where mlx-lm 0.32.2 has no key for it: the config alone cannot say it. docs/evidence/mlx-lm.md has a minimal case
of each. A corrected model that `mlx_lm` loads by itself computes as mlx-lm does: the export's check measures that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlxdpo.types import UserError

Arrays = dict[str, mx.array]


def correct(model: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """Make `model`, as mlx-lm builds it, compute what transformers does; returns it."""
    text = config.get("text_config") or config
    for kind in {config.get("model_type"), text.get("model_type")} & CORRECTIONS.keys():
        CORRECTIONS[kind](model, text)
    _truncate_not(model, text)
    return model


def _truncate_not(model: nn.Module, text: Mapping[str, Any]) -> None:
    """YaRN with `truncate: false` (gpt-oss): the ramp's ends are not rounded (arXiv 2309.00071, appendix A.1)."""
    rope = text.get("rope_scaling") or {}
    if rope.get("rope_type") != "yarn" or rope.get("truncate", True):
        return
    base, factor = text["rope_theta"], rope["factor"]
    for module in model.modules():
        if type(module).__name__ == "YarnRoPE":
            module._freqs = _yarn_frequencies(module.dims, base, factor, rope)


def _yarn_frequencies(dims: int, base: float, factor: float, rope: Mapping[str, Any]) -> mx.array:
    """(dims / 2,) wavelengths over 2 pi."""
    length = rope["original_max_position_embeddings"]

    def turns(count: float) -> float:
        """The dimension that turns `count` times within the original length."""
        return dims * math.log(length / (count * 2 * math.pi)) / (2 * math.log(base))

    low, high = max(turns(rope.get("beta_fast") or 32), 0), min(turns(rope.get("beta_slow") or 1), dims - 1)
    ramp = mx.clip((mx.arange(dims // 2) - low) / max(high - low, 1e-3), 0, 1)
    plain = base ** (mx.arange(0, dims, 2) / dims)
    return 1 / ((1 - ramp) / plain + ramp / (factor * plain))


def _partial_rope(model: nn.Module, text: Mapping[str, Any]) -> None:
    """GLM turns a share of each head; mlx-lm's glm turns all of it."""
    for module in model.modules():
        if isinstance(module, nn.RoPE):
            module.dims = int(text["head_dim"] * text.get("partial_rotary_factor", 1.0))


def _key_multiplier(model: nn.Module, text: Mapping[str, Any]) -> None:
    """Falcon-H1 multiplies its keys; mlx-lm looks for them under a name that no checkpoint has."""
    for layer in model.layers:  # type: ignore[attr-defined]
        layer.self_attn.scale *= text["key_multiplier"]


def _exchange(name: str, forward: Callable[..., mx.array]) -> Callable[[nn.Module, Any], None]:
    """Another `forward` for the modules of class `name`: the other form of GELU than the one that mlx-lm's file calls,
    or an input put right."""

    def exchange(model: nn.Module, _: Any) -> None:
        """Give each of them a class that differs in what it calls, and in nothing else."""
        made: dict[type, type] = {}
        for module in model.modules():
            if type(module).__name__ == name:
                own = type(module)
                made.setdefault(own, type(name, (own,), {"__call__": forward, "__module__": own.__module__}))
                module.__class__ = made[own]

    return exchange


def _scaled_exactly(self: Any, inputs: mx.array, cache: Any = None, input_embeddings: mx.array | None = None) -> Any:
    """Gemma 3's embeddings times sqrt(hidden_size) in the weights' own type; mlx-lm's file rounds it to bfloat16."""
    from mlx_lm.models.gemma3_text import Gemma3Model

    h = self.embed_tokens(inputs) if input_embeddings is None else input_embeddings
    if h.dtype == mx.float32:
        scale = self.args.hidden_size**0.5
        h = h * (scale / mx.array(scale, mx.bfloat16).item())
    return Gemma3Model.__call__(self, inputs, cache, h)


CORRECTIONS: Mapping[Any, Callable[[Any, Mapping[str, Any]], None]] = {
    "falcon_h1": _key_multiplier,
    "gemma": _exchange("MLP", lambda m, x: m.down_proj(nn.gelu_approx(m.gate_proj(x)) * m.up_proj(x))),
    "gemma3_text": _exchange("Gemma3Model", _scaled_exactly),
    "glm": _partial_rope,
    "gpt_bigcode": _exchange("MLP", lambda m, x: m.c_proj(nn.gelu_approx(m.c_fc(x)))),
    "gpt_neox": _exchange("MLP", lambda m, x: m.dense_4h_to_h(nn.gelu(m.dense_h_to_4h(x)))),
    "starcoder2": _exchange("MLP", lambda m, x: m.c_proj(nn.gelu_approx(m.c_fc(x)))),
}


def router_note(model: nn.Module) -> str:
    """What is known to differ where routers choose among groups of experts and their corrections are below 0; else "".

    mlx-lm sets experts of groups that were left out to 0 and transformers to minus infinity: beside scores below 0 they
    may be chosen (0.08 nats a completion on a tiny model, docs/evidence/mlx-lm.md).
    """
    gates = [m for m in model.modules() if "e_score_correction_bias" in m and (getattr(m, "n_group", 1) or 1) > 1]
    below = sum(bool((gate.e_score_correction_bias < 0).any().item()) for gate in gates)
    if not below:
        return ""
    return (
        f"{below} of {len(gates)} routers correct experts to below 0, where mlx-lm may choose experts of groups that"
        " transformers leaves out: log-probs may differ from transformers'"
    )


def model_classes(config: Mapping[str, Any]) -> tuple[Any, Any]:
    """mlx-lm's model and argument classes for a config; the model takes weights as transformers 5 writes them.

    Raises `UserError` for a model file that needs a package that is not there.
    """
    from mlx_lm.utils import _get_classes

    try:
        model, arguments = _get_classes(dict(config))
    except SystemExit:  # mlx-lm's olmo ends the process
        raise UserError(f"mlx-lm's {config['model_type']} needs the package ai2-olmo, which is not installed") from None
    renames = [RENAMED[kind]] if (kind := str(config.get("model_type"))) in RENAMED else []
    if "text_config" in config:
        renames.insert(0, _text_tower)
    if not renames:
        return model, arguments

    def sanitize(self: Any, weights: Arrays) -> Arrays:
        """mlx-lm's own, after the names are those it knows."""
        for rename in renames:
            weights = rename(dict(weights))
        return model.sanitize(self, weights)

    return type(model.__name__, (model,), {"sanitize": sanitize, "__module__": model.__module__}), arguments


def _without_prefix(weights: Arrays) -> Arrays:
    return {name.removeprefix("transformer."): array for name, array in weights.items()}


TOWERS = (
    "vision_tower.",
    "vision_model.",
    "visual.",
    "multi_modal_projector.",
    "audio_tower.",
    "embed_vision.",
    "embed_audio.",
)


def _text_tower(weights: Arrays) -> Arrays:
    """The names of a text tower that stands beside others below `model`, as transformers has held them since 4.52."""
    if not any(name.startswith("model.language_model.") for name in weights):
        return weights
    found = {}
    for name, array in weights.items():
        inner = name.removeprefix("model.")
        if inner.startswith("language_model."):
            name = inner.replace("language_model.", "language_model.model.", 1)
        elif name.startswith("lm_head."):
            name = f"language_model.{name}"
        elif inner.startswith(TOWERS):
            continue  # text is computed without them
        found[name] = array
    return found


def _olmo_hybrid(weights: Arrays) -> Arrays:
    own = {".attention_layer_norm.": ".input_layernorm.", ".feedforward_layer_norm.": ".post_attention_layernorm."}
    return {_new_name(name, own): array for name, array in weights.items()}


def _new_name(name: str, parts: Mapping[str, str]) -> str:
    for stored, ours in parts.items():
        name = name.replace(stored, ours)
    return name


def _gpt_oss(weights: Arrays) -> Arrays:
    """Experts in 16 bits: (experts, inputs, outputs), gate and up by turns."""
    for name in [n for n in weights if n.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
        array, block = weights.pop(name).swapaxes(-1, -2), name.rpartition(".")[0]
        if name.endswith("down_proj"):
            weights[f"{block}.down_proj.weight"] = array
            weights[f"{block}.down_proj.bias"] = weights.pop(f"{block}.down_proj_bias")
            continue
        bias = weights.pop(f"{block}.gate_up_proj_bias")
        for start, part in enumerate(("gate_proj", "up_proj")):
            weights[f"{block}.{part}.weight"] = mx.contiguous(array[..., start::2, :])
            weights[f"{block}.{part}.bias"] = mx.contiguous(bias[..., start::2])
    return weights


def _convolutions_last(weights: Arrays) -> Arrays:
    """Short convolutions as (channels, width, 1), which mlx-lm's lfm2 makes of them and its lfm2-vl does not."""
    for name in [n for n in weights if n.endswith(".conv.conv.weight")]:
        if weights[name].shape[-1] > weights[name].shape[1]:
            weights[name] = weights[name].transpose(0, 2, 1)
    return weights


def _stack_experts(weights: Arrays) -> Arrays:
    """Experts stored one by one, where mlx-lm's file expects them stacked."""
    blocks = {name.split(".experts.0.")[0] for name in weights if ".experts.0." in name}
    for block in blocks:
        count = len([n for n in weights if n.startswith(f"{block}.experts.") and n.endswith(".up_proj.weight")])
        for part in ("gate_proj", "up_proj", "down_proj"):
            parts = [weights.pop(f"{block}.experts.{e}.{part}.weight") for e in range(count)]
            weights[f"{block}.switch_mlp.{part}.weight"] = mx.stack(parts)
    return weights


def _dense_kimi_linear(weights: Arrays) -> Arrays:
    """transformers writes the dense layers' names as if they had experts."""
    own = {f".block_sparse_moe.{part}_proj.": f".mlp.{part}_proj." for part in ("gate", "up", "down")}
    return {_new_name(name, own): array for name, array in weights.items()}


def _experts_outputs_first(weights: Arrays) -> Arrays:
    """transformers 5 writes experts as (experts, outputs, inputs); published ones are the other way round, as mlx-lm
    expects them."""
    for name in [n for n in weights if n.endswith(".experts.gate_up_proj")]:
        other = f"{name.rpartition('.')[0]}.down_proj"
        if weights[name].shape[1] == 2 * weights[other].shape[2]:
            weights[name], weights[other] = weights[name].swapaxes(1, 2), weights[other].swapaxes(1, 2)
    return weights


RENAMED: Mapping[str, Callable[[Arrays], Arrays]] = {
    "gpt2": _without_prefix,
    "gpt_oss": _gpt_oss,
    "lfm2-vl": _convolutions_last,
    "kimi_linear": _dense_kimi_linear,
    "olmo_hybrid": _olmo_hybrid,
    "qwen3_5_moe": _stack_experts,
    "qwen3_vl_moe": _experts_outputs_first,
}
