"""Axolotl: the YAML of `axolotl train`, with `rl: dpo` and its relatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxdpo.recipes import hugging_face
from mlxdpo.recipes.outcome import KeyOutcome, Keys, Rule, Tool, by_synonym, lost, taken, to, unneeded
from mlxdpo.types import UserError

OBJECTIVES = {"dpo": "sigmoid", "ipo": "ipo", "orpo": "orpo", "kto": "kto", "simpo": "simpo"}
# For these types Axolotl reads columns by other names than the shape that is found here would.
COLUMNS = {"field_prompt": "prompt", "field_chosen": "chosen", "field_rejected": "rejected"}
COLUMNS |= {"field_messages": "messages", "field_system": "system"}


def _kind(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`rl`. Raises `UserError` for what is no preference training."""
    if value in OBJECTIVES and hugging_face.with_imitation(keys):
        return KeyOutcome("not needed", "part of loss.name, with the imitation term")
    if value in OBJECTIVES:
        return taken({"loss.name": OBJECTIVES[value]})
    if value is True:  # what Axolotl's first recipes had
        return taken({"loss.name": "sigmoid"})
    raise UserError(f"rl: {value} is not supported; import-recipe reads rl: {', '.join(OBJECTIVES)}")


def _listed_sets(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`datasets` or `test_datasets`: path, split, type."""
    entries = [entry if isinstance(entry, Mapping) else {"path": entry} for entry in value or []]
    if not entries:
        return KeyOutcome("not needed", "unset")
    first = entries[0]
    files = first.get("data_files")
    path = (files[0] if isinstance(files, list) else files) or first.get("path")
    if first.get("name"):
        path = f"{path}:{first['name']}"
    if key == "test_datasets":
        return taken({"data.eval": path})
    settings: dict[str, Any] = {"data.path": path}
    if first.get("split"):
        settings["data.split"] = first["split"]
    own = first.get("type")
    fields = {**first, **own} if isinstance(own, Mapping) else first
    if columns := {ours: fields[name] for name, ours in COLUMNS.items() if fields.get(name) not in (None, ours)}:
        settings["data.columns"] = columns
    note = "" if own is None else "the type is detected from the columns; the model's template is used"
    if len(entries) == 1:
        return taken(settings, note)
    return KeyOutcome(
        "not supported", f"one data set per run: the other {len(entries) - 1} are not read; join them", settings
    )


def _adapter(key: str, value: Any, keys: Keys) -> KeyOutcome:
    if value in ("lora", "qlora"):
        bits = {"model.quantize": 4} if value == "qlora" and keys.get("load_in_4bit", True) else {}
        return taken({"lora.method": "dora" if keys.get("peft_use_dora") else "lora", **bits})
    if value:
        return KeyOutcome("not supported", "not supported; a LoRA adapter is trained", {"lora.method": "lora"})
    return taken({"lora.method": "full", "model.dtype": "float32"}, "no adapter: every weight is trained")


def _four_bits(key: str, value: Any, keys: Keys) -> KeyOutcome:
    if value and not keys.get("adapter"):
        return KeyOutcome("not supported", "quantised weights cannot be trained without an adapter")
    return hugging_face.four_bits(key, value, keys)


def _from_there(key: str, value: Any, keys: Keys) -> KeyOutcome:
    return taken({"model.adapter": value}) if value else KeyOutcome("not needed", "unset")


def _axolotl_defaults(keys: Keys) -> dict[str, Any]:
    """What Axolotl 0.19 does where the file is silent."""
    found: dict[str, Any] = {"loss.beta": 0.1, "optim.schedule": "cosine", "train.epochs": 1.0, "train.batch_size": 1}
    found |= {"train.gradient_accumulation": 1, "train.seed": 42, "data.max_length": 512, "optim.warmup": 0.03}
    if keys.get("rl") == "simpo":
        found["loss.gamma"] = 0.5
    return found | ({} if keys.get("adapter") else {"lora.method": "full", "model.dtype": "float32"})


RULES: Mapping[str, Rule] = {
    **hugging_face.RULES,
    "base_model": to("model.path"),
    "revision_of_model": to("model.revision"),
    "rl": _kind,
    **dict.fromkeys(("rl_beta", "dpo_beta", "orpo_alpha"), to("loss.beta", float)),
    "simpo_gamma": to("loss.gamma", float),
    "cpo_alpha": to("loss.cpo_alpha", float),
    "rpo_alpha": hugging_face.imitation_rule,
    "dpo_label_smoothing": to("loss.label_smoothing", float),
    "dpo_use_weighting": to("loss.wpo", bool),
    "dpo_loss_type": hugging_face.objective_rule,
    "dpo_loss_weights": to("loss.weights"),
    **unneeded("dpo_use_liger_kernel flex_attention sage_attention flash_attn_cross_entropy chunked_cross_entropy "
               "chunked_cross_entropy_num_chunks", "MLX's fused attention and the fused head are always used"),
    **unneeded("dpo_padding_free batch_flattening sample_packing_group_size sample_packing_bin_size",
               "batches are laid out without padding from the pairs' lengths"),
    **lost("max_prompt_len", "prompt and completion share data.max_length; a long prompt loses its beginning"),
    **lost("chat_template_kwargs", "data.thinking is the one that can be set"),
    **by_synonym("kto_desirable_weight kto_undesirable_weight", float),
    **dict.fromkeys(("datasets", "test_datasets"), _listed_sets),
    "val_set_size": to("data.eval_fraction", float),
    "sequence_len": to("data.max_length", int),
    "micro_batch_size": to("train.batch_size", int),
    "num_epochs": to("train.epochs", float),
    "adapter": _adapter,
    "lora_model_dir": _from_there,
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), _four_bits),
    **unneeded("model_type tokenizer_type tokenizer_config is_llama_derived_model is_mistral_derived_model "
           "is_qwen_derived_model is_falcon_derived_model base_model_config tokenizer_use_fast tokenizer_legacy",
           "read from the model's files"),
    **unneeded("chat_template default_system_message train_on_inputs special_tokens tokens",
           "the model's own chat template and tokens are used, completions alone are scored"),
    **unneeded("rl_adapter_ref_model", "the reference is the model without its adapter, scored once"),
    **unneeded("lora_fan_in_fan_out strict plugins s2_attention eval_table_size eval_max_new_tokens "
           "eval_sample_packing shuffle_merged_datasets skip_prepare_dataset gptq loss_watchdog_threshold "
           "loss_watchdog_patience "
           "lora_mlp_kernel lora_qkv_kernel lora_o_kernel merge_lora save_first_step flash_optimum low_cpu_mem_usage",
           "not needed"),
    **lost("dataset_exact_deduplication", "equal rows are counted by `mlxdpo data check`, and kept"),
    **unneeded("mlflow_tracking_uri mlflow_experiment_name comet_project_name use_wandb use_mlflow use_comet "
        "use_tensorboard",
           "log.trackers: tensorboard, wandb or trackio"),
    **lost("evals_per_epoch saves_per_epoch", "set train.eval_every and train.save_every, in steps"),
    **lost("chat_template_jinja", "the model's own chat template is used"),
    **lost("excess_length_strategy", "see data.on_long_prompt and data.on_long_completion"),
    **lost("unfrozen_parameters relora_steps", "not done here"),
}  # fmt: skip

MARKS = (
    "base_model rl rl_beta micro_batch_size sequence_len num_epochs val_set_size sample_packing "
    "lora_target_linear dataset_prepared_path flash_attention special_tokens tokenizer_type"
)
AXOLOTL = Tool("axolotl", "Axolotl", frozenset(MARKS.split()), RULES, _axolotl_defaults)
