"""LLaMA-Factory: the YAML of `llamafactory-cli train`, with `stage: dpo` and its relatives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlxdpo.recipes import hugging_face
from mlxdpo.recipes.outcome import KeyOutcome, Keys, Rule, Tool, by_synonym, lost, taken, to, unknown_key, unneeded
from mlxdpo.types import UserError

STAGES = {"dpo": {"stage": "dpo"}, "kto": {"loss.name": "kto"}, "sft": {"stage": "sft"}, "rm": {"stage": "reward"}}


def _stage(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`stage`. Raises `UserError` for what is no training on pairs."""
    if value not in STAGES:
        raise UserError(f"stage: {value} is not supported; import-recipe reads stage: {', '.join(STAGES)}")
    return taken(STAGES[value])


def _named_sets(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """Names of `dataset_info.json` in `dataset_dir`, which is read here too; a file or a Hub id by itself."""
    if not value:
        return KeyOutcome("not needed", "unset")
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)
    first, others = names[0], names[1:]
    info = Path(str(keys.get("dataset_dir") or "data")) / "dataset_info.json"
    by_itself = Path(first).exists() or "/" in first
    setting = "data.eval" if key == "eval_dataset" else "data.path"
    settings = {setting: first if by_itself else f"{info}:{first}"}
    if others:
        return KeyOutcome("not supported", f"one data set per run: {', '.join(others)} not read; join them", settings)
    there = by_itself or info.exists()
    return taken(settings, "" if there else f"{info} does not exist; it comes with LLaMA-Factory")


def _finetuning(key: str, value: Any, keys: Keys) -> KeyOutcome:
    if value == "lora":
        return taken({"lora.method": "dora" if keys.get("use_dora") else "lora"})
    if value == "full":
        return taken({"lora.method": "full", "model.dtype": "float32"}, "in float32, as updates vanish in 16 bits")
    return KeyOutcome("not supported", "not supported; a LoRA adapter is trained", {"lora.method": "lora"})


def _factory_bits(key: str, value: Any, keys: Keys) -> KeyOutcome:
    if not value:
        return KeyOutcome("not needed", "off, as here")
    if int(value) in (4, 8):
        return taken({"model.quantize": int(value)}, "MLX's own quantisation")
    return KeyOutcome("not supported", "only 4 or 8 bits are supported; the weights are not quantised")


def _adapters(key: str, value: Any, keys: Keys) -> KeyOutcome:
    if not value:
        return KeyOutcome("not needed", "unset")
    return KeyOutcome("not supported", "convert it with `mlxdpo import --peft`, then set model.adapter")


def _factory_defaults(keys: Keys) -> dict[str, Any]:
    """What LLaMA-Factory 0.9.5 does where the file is silent."""
    found: dict[str, Any] = {"loss.beta": 0.1, "optim.lr": 5e-5, "optim.schedule": "linear", "optim.warmup": 0.0}
    found |= {"train.epochs": 3.0, "train.batch_size": 8, "train.gradient_accumulation": 1, "train.seed": 42}
    found |= {"data.max_length": 2048}
    if "stage" not in keys:
        found["stage"] = "sft"
    if keys.get("pref_loss") == "simpo":
        found["loss.gamma"] = 0.5
    if keys.get("finetuning_type", "lora") != "lora":
        return found
    rank = int(keys.get("lora_rank") or 8)
    return found | {"lora.rank": rank, "lora.alpha": 2.0 * rank}


RULES: Mapping[str, Rule] = {
    **hugging_face.RULES,
    "stage": _stage,
    "finetuning_type": _finetuning,
    "pref_beta": to("loss.beta", float),
    "pref_loss": hugging_face.objective_rule,
    "pref_ftx": hugging_face.imitation_rule,
    "dpo_label_smoothing": to("loss.label_smoothing", float),
    "simpo_gamma": to("loss.gamma", float),
    "ld_alpha": to("loss.ld_alpha"),
    **by_synonym("kto_chosen_weight kto_rejected_weight", float),
    "ref_model": to("reference.model"),
    **dict.fromkeys(("dataset", "eval_dataset"), _named_sets),
    **unneeded("dataset_dir", "part of data.path"),
    "cutoff_len": to("data.max_length", int),
    "val_size": to("data.eval_fraction", float),
    "quantization_bit": _factory_bits,
    **dict.fromkeys(("adapter_name_or_path", "adapter_folder", "ref_model_adapters"), _adapters),
    "moe_aux_loss_coef": to("train.router_aux_loss_coef", float),
    "early_stopping_steps": to("train.patience", int),
    "use_muon": lambda key, value, keys: taken({"optim.name": "muon"}) if value else unknown_key(key, value, keys),
    "enable_thinking": to("data.thinking", bool),
    "disable_gradient_checkpointing": to("train.gradient_checkpointing", lambda value: not value),
    "model_revision": to("model.revision", lambda value: None if value == "main" else value),
    **unneeded("template default_system train_on_prompt mask_history", "the model's own chat template is used, answers "
           "alone are scored"),
    **unneeded("interleave_probs mix_strategy", "one data set per run"),
    **unneeded("create_new_adapter", "training starts with an adapter that changes nothing"),
    **unneeded("batch_size", "of that tool's benchmarks"),
    **lost("pref_bco_weight", "no such term; the objective is used without it"),
}  # fmt: skip

MARKS = (
    "finetuning_type stage pref_beta pref_loss pref_ftx cutoff_len dataset_dir template lora_target lora_rank "
    "quantization_bit val_size overwrite_cache plot_loss do_train"
)
LLAMA_FACTORY = Tool("llamafactory", "LLaMA-Factory", frozenset(MARKS.split()), RULES, _factory_defaults)
