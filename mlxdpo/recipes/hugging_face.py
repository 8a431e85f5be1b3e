"""Keys that transformers' TrainingArguments and PEFT have, which TRL, LLaMA-Factory and Axolotl share."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from typing import Any

from mlxdpo.losses import LOSSES
from mlxdpo.recipes.outcome import KeyOutcome, Keys, Rule, by_synonym, lost, taken, to, unneeded
from mlxdpo.types import UserError

OPTIMIZERS = ("adamw", "adam", "sgd", "rmsprop", "lion", "adafactor", "muon")
SCHEDULES = {"constant_with_warmup": "constant", "cosine_with_restarts": "", "polynomial": "", "inverse_sqrt": ""}
TRACKERS = ("tensorboard", "wandb", "trackio")

OTHER_NAMES = {
    "aot_pair": "aot", "dpo": "sigmoid", "llama_sigmoid": "sigmoid", "rdpo": "r_dpo", "apo": "apo_zero",
}  # fmt: skip
"""Objectives that are called something else there."""


def loss_name(key: str, value: Any) -> str:
    """Our name of an objective, or of a list of them. Raises `UserError` for one that is not here: another objective
    in its stead would be another training."""
    names = [str(one) for one in (value if isinstance(value, list) else [value])]
    ours = [OTHER_NAMES.get(name, name) for name in names]
    if missing := [name for name, our in zip(names, ours, strict=True) if our not in LOSSES]:
        raise UserError(
            f"{key}: {missing[0]} is not supported; choose an objective (`mlxdpo objectives`) and change the key"
        )
    return "+".join(ours)


def objective_rule(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`loss_type` and its like."""
    if with_imitation(keys):
        return KeyOutcome("not needed", "part of loss.name, with the imitation term")
    return taken({"loss.name": loss_name(key, value)})


def with_imitation(keys: Keys) -> bool:
    """Whether a key beside the objective adds an imitation term to it."""
    return bool(keys.get("rpo_alpha") or keys.get("pref_ftx"))


def imitation_rule(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """A weight of an imitation term beside the objective (`rpo_alpha`, `pref_ftx`): a sum with `sft` here."""
    if not value:
        return KeyOutcome("not needed", "off, as here")
    names = ("dpo_loss_type", "loss_type", "pref_loss", "rl")
    first = next((keys[name] for name in names if isinstance(keys.get(name), str)), "sigmoid")
    name = loss_name(key, first)
    return taken({"loss.name": f"{name}+sft", "loss.weights": [1.0, float(value)]}, "the imitation term is `sft`")


def optimizer(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """adamw_torch_fused, paged_adamw_8bit, ... by the algorithm in the name."""
    name = next((ours for ours in OPTIMIZERS if ours in str(value).lower()), None)
    if name is None:
        return KeyOutcome("not supported", "not supported; adamw is used, and the same rate may act differently")
    compact = "8bit" in str(value) or "4bit" in str(value)
    return taken({"optim.name": name}, "its states are kept in full precision" if compact else "")


def schedule(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """Courses of the learning rate."""
    name = SCHEDULES.get(str(value), str(value))
    if name not in ("cosine", "linear", "constant"):
        return KeyOutcome("not supported", "not supported; cosine is used")
    return taken({"optim.schedule": name})


def tracker(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`report_to`: the trackers that are here and installed."""
    names = [str(one) for one in (value if isinstance(value, list) else [value])]
    if names in (["none"], ["None"]):
        return KeyOutcome("not needed", "default: no tracker")
    ours = [name for name in names if name in TRACKERS]
    if not ours:
        return KeyOutcome("not supported", f"not supported ({', '.join(TRACKERS)}); metrics.jsonl has all numbers")
    if missing := [name for name in ours if importlib.util.find_spec(name) is None]:
        return KeyOutcome(
            "not supported", f"{missing[0]} is not installed; install it and set log.trackers: [{ours[0]}]"
        )
    return taken({"log.trackers": ours})


def target_layers(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """Layers that carry adapters: names, a comma-separated text of them, or a word for all."""
    if value in (None, True, "all", "all-linear", ["all"], ["all-linear"]):
        return KeyOutcome("not needed", "default: all linear layers")
    if value is False:
        return KeyOutcome("not needed", "layers are named by another key")
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else [str(name) for name in value]
    if wild := [name for name in names if not name.replace("_", "").replace(".", "").isalnum()]:
        return KeyOutcome("not supported", f"{wild[0]} is a pattern; name the layers in lora.keys, all are trained now")
    return taken({"lora.keys": names})


def four_bits(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`load_in_4bit` and `load_in_8bit`."""
    if not value:
        return KeyOutcome("not needed", "off, as here")
    bits = 4 if "4" in key else 8
    return taken({"model.quantize": bits}, "MLX's own quantisation")


def rank_stabilised(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`use_rslora`: alpha is divided by the root of the rank (arXiv 2312.03732), which `lora.scale` can say."""
    if not value:
        return KeyOutcome("not needed", "off, as here")
    rank = next((keys[name] for name in ("lora_r", "lora_rank", "r") if keys.get(name)), 16)
    alpha = next((keys[name] for name in ("lora_alpha",) if keys.get(name)), 2 * rank)
    return taken({"lora.scale": alpha / math.sqrt(rank), "lora.alpha": None}, "alpha / sqrt(rank)")


def dora(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`use_dora`."""
    return taken({"lora.method": "dora"}) if value else KeyOutcome("not needed", "off, as here")


def evaluation(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`eval_strategy`: never, or every `eval_steps`."""
    if value in ("no", False, None):
        return taken({"train.eval_every": 0}, "held-out pairs are scored at the start and the end")
    if value == "steps":
        return KeyOutcome("not needed", "train.eval_every says how often")
    return KeyOutcome("not supported", "held-out pairs are scored every train.eval_every steps")


def steps_limit(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`max_steps`, which is -1 where epochs count."""
    if value is None or value <= 0:
        return KeyOutcome("not needed", "train.epochs counts")
    return taken({"train.steps": int(value), "train.epochs": "auto"}, "overrides the epochs, as in the original")


def step_count(setting: str, per: str) -> Rule:
    """A number of steps; a share below 1 of all steps has no counterpart."""

    def rule(key: str, value: Any, keys: Keys) -> KeyOutcome:
        """The number, where it is one."""
        if value is None or value < 1:
            return KeyOutcome("not supported", f"{per} here; set {setting}")
        return taken({setting: int(value)})

    return rule


def best_at_end(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`load_best_model_at_end`: by the held-out loss."""
    if not value:
        return KeyOutcome("not needed", "the last step is kept, as in mlxdpo")
    return taken({"train.keep_model": "best"}, "the step with the lowest held-out loss")


def adam_factors(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`adam_beta1` and `adam_beta2` are one setting."""
    if value is None:
        return KeyOutcome("not needed", "unset")
    return taken({"optim.betas": [float(keys.get("adam_beta1") or 0.9), float(keys.get("adam_beta2") or 0.999)]})


def warmup(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`warmup_steps` wins over `warmup_ratio` where both are given, as in transformers."""
    if key == "warmup_ratio" and keys.get("warmup_steps"):
        return KeyOutcome("not needed", "warmup_steps takes precedence, as in the original")
    if key == "warmup_steps" and not value and keys.get("warmup_ratio"):
        return KeyOutcome("not needed", "warmup_ratio counts")
    return KeyOutcome("not needed", "unset") if value is None else taken({"optim.warmup": float(value)})


RULES: Mapping[str, Rule] = {
    **by_synonym("output_dir gradient_accumulation_steps model_name_or_path per_device_train_batch_size"),
    **by_synonym("lora_r lora_rank r save_total_limit early_stopping_patience", int),
    "seed": to("train.seed", int),
    "weight_decay": to("optim.weight_decay", float),
    "max_grad_norm": to("optim.max_grad_norm", float),
    "gradient_checkpointing": to("train.gradient_checkpointing", bool),
    "trust_remote_code": to("model.trust_remote_code", bool),
    "label_smoothing": to("loss.label_smoothing", float),
    **by_synonym("learning_rate num_train_epochs lora_alpha lora_dropout", float),
    "max_steps": steps_limit,
    "logging_steps": step_count("log.every_steps", "a share of all steps is not supported"),
    "save_steps": step_count("train.save_every", "a share of all steps is not supported"),
    "eval_steps": step_count("train.eval_every", "a share of all steps is not supported"),
    **dict.fromkeys(("eval_strategy", "evaluation_strategy"), evaluation),
    "load_best_model_at_end": best_at_end,
    **dict.fromkeys(("optim", "optimizer"), optimizer),
    **dict.fromkeys(("lr_scheduler_type", "lr_scheduler"), schedule),
    **dict.fromkeys(("warmup_ratio", "warmup_steps"), warmup),
    **dict.fromkeys(("adam_beta1", "adam_beta2"), adam_factors),
    **dict.fromkeys(("lora_target_modules", "target_modules", "lora_target", "lora_target_linear"), target_layers),
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), four_bits),
    **dict.fromkeys(("use_rslora", "peft_use_rslora"), rank_stabilised),
    **dict.fromkeys(("use_dora", "peft_use_dora"), dora),
    "report_to": tracker,
    **unneeded("bf16 fp16 tf32 float16 bfloat16 pure_bf16 bf16_full_eval fp16_full_eval half_precision_backend",
           "model.dtype auto is bfloat16 on a GPU"),
    **unneeded("flash_attention flash_attn attn_implementation xformers_attention sdp_attention eager_attention "
           "use_liger_kernel liger_kernel_config enable_liger_kernel torch_compile torch_compile_backend "
           "torch_compile_mode use_unsloth", "MLX's fused attention and the fused head are always used"),
    **unneeded("ddp_timeout ddp_find_unused_parameters ddp_bucket_cap_mb ddp_backend ddp_broadcast_buffers "
           "ddp_static_graph deepspeed fsdp fsdp_config local_rank accelerator_config parallelism_config "
           "dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor dataloader_persistent_workers "
           "dataloader_drop_last dataloader_in_order dataloader_multiprocessing_context preprocessing_num_workers "
           "dataset_num_proc dataset_processes average_tokens_across_devices",
           "one process on one Mac; mlx.launch starts several (docs/distributed.md)"),
    **unneeded("logging_strategy logging_first_step logging_dir logging_nan_inf_filter log_level log_level_replica "
           "disable_tqdm log_on_each_node plot_loss include_num_input_tokens_seen include_tokens_per_second "
           "skip_memory_metrics run_name project project_name debug", "every step is in metrics.jsonl"),
    **unneeded("wandb_project wandb_entity wandb_name wandb_run_id wandb_watch wandb_log_model wandb_mode",
           "wandb reads WANDB_PROJECT, WANDB_ENTITY and WANDB_NAME from the environment"),
    **unneeded("save_strategy save_only_model save_safetensors overwrite_output_dir overwrite_cache save_on_each_node "
           "enable_jit_checkpoint ignore_data_skip restore_callback_states_from_checkpoint",
           "checkpoints are safetensors with optimizer and order, and no run is overwritten"),
    **unneeded("do_train do_eval do_predict", "train, eval and generate are separate commands"),
    **unneeded("use_cache use_cpu remove_unused_columns label_names prediction_loss_only eval_on_start",
           "not needed"),
    **unneeded("eval_do_concat_batches eval_use_gather_object batch_eval_metrics include_for_metrics "
           "per_device_eval_batch_size eval_accumulation_steps eval_batch_size eval_delay group_by_length "
           "length_column_name train_sampling_strategy padding_free pad_to_multiple_of pad_token sample_packing "
           "pad_to_sequence_len packing ref_model_quantization_bit",
           "batches are laid out without padding from the pairs' lengths"),
    **unneeded("gradient_checkpointing_kwargs activation_checkpointing_kwargs torch_empty_cache_steps "
           "lora_task_type task_type use_fast_tokenizer cache_dir", "of PyTorch alone"),
    **unneeded("bnb_4bit_quant_type use_bnb_nested_quant bnb_4bit_quant_storage bnb_4bit_compute_dtype "
           "quantization_method double_quantization", "of bitsandbytes; MLX has its own quantisation"),
    **unneeded("precompute_ref_log_probs precompute_ref_batch_size dataset_prepared_path full_determinism",
           "the reference is scored once and cached, and runs are bit-identical"),
    **unneeded("push_to_hub hub_model_id hub_token hub_private_repo hub_strategy hub_always_push hub_revision "
           "trackio_space_id trackio_bucket_id trackio_static_space_id",
           "use mlxdpo export RUN --push OWNER/NAME after the evaluation"),
    **unneeded("resume_from_checkpoint auto_resume_from_checkpoints", "mlxdpo train --resume RUN"),
    **lost("neftune_noise_alpha", "no noise is added to embeddings; runs with it differ"),
    **lost("lora_modules_to_save modules_to_save additional_target lora_target_parameters optim_target_modules",
           "these layers stay frozen; train them with lora.method full"),
    **lost("lr_scheduler_kwargs optim_args adam_epsilon cosine_min_lr_ratio label_smoothing_factor",
           "MLX's own value is used: epsilon 1e-8, and schedules end at 0"),
    **lost("auto_find_batch_size", "`mlxdpo plan` says which batch size fits"),
    **lost("activation_offloading activation_checkpointing", "use train.gradient_checkpointing"),
    **lost("use_galore use_apollo use_badam", "another optimizer; adamw is used"),
    **lost("freeze_trainable_layers freeze_trainable_modules", "choose layers with lora.layers and lora.keys"),
    **lost("metric_for_best_model greater_is_better", "the best step is the one with the lowest held-out loss"),
    **lost("data_seed", "one seed, train.seed, draws order, dropout and the adapter's start"),
}  # fmt: skip
