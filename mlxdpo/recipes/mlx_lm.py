"""mlx-lm and mlx-lm-lora: the YAML of `mlx_lm.lora --config` and `mlx_lm_lora.train --config`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mlxdpo.io.words import counted
from mlxdpo.recipes import hugging_face
from mlxdpo.recipes.outcome import KeyOutcome, Keys, Rule, Tool, by_synonym, lost, taken, to, unneeded
from mlxdpo.types import UserError

MODES = {"dpo": "sigmoid", "cpo": "cpo", "orpo": "orpo"}
INNER = {
    "rank": "lora.rank",
    "scale": "lora.scale",
    "dropout": "lora.dropout",
    "keys": "lora.keys",
    "alpha": "lora.alpha",
}


def _mode(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`train_mode` of mlx-lm-lora. Raises `UserError` for what is no training on pairs."""
    if value == "sft":
        return taken({"stage": "sft"})
    if value not in MODES:
        raise UserError(f"train_mode: {value} is not supported; import-recipe reads sft, {', '.join(MODES)}")
    return taken({"stage": "dpo"} if value == "dpo" else {"loss.name": value})


def _mlx_objective(key: str, value: Any, keys: Keys) -> KeyOutcome:
    if keys.get("train_mode", "dpo") != "dpo":
        return KeyOutcome("not needed", "train_mode names the objective")
    return hugging_face.objective_rule(key, value, keys)


def _penalty(key: str, value: Any, keys: Keys) -> KeyOutcome:
    if keys.get("dpo_cpo_loss_type") != "dpop":
        return KeyOutcome("not needed", "of the objective dpop alone")
    return taken({"loss.dpop_lambda": float(value)}, "inside the sigmoid, as in the paper")


def _inner(key: str, value: Any, keys: Keys) -> KeyOutcome:
    found = {INNER[name]: inner for name, inner in (value or {}).items() if name in INNER and inner is not None}
    if other := [name for name in value or {} if name not in INNER]:
        return KeyOutcome("not supported", f"{', '.join(other)} is unknown", found)
    return taken(found)


def _portion(keys: Keys) -> int:
    return int(keys.get("grad_accumulation_steps") or keys.get("gradient_accumulation_steps") or 1)


def _in_steps(setting: str) -> Rule:
    """A number of their iterations, of which one optimizer step takes `grad_accumulation_steps`."""

    def rule(key: str, value: Any, keys: Keys) -> KeyOutcome:
        """The number in optimizer steps."""
        if not value:
            return KeyOutcome("not needed", "unset")
        steps, portion = max(1, math.ceil(int(value) / _portion(keys))), _portion(keys)
        settings: dict[str, Any] = {setting: steps}
        if key == "iters":
            settings["train.epochs"] = "auto"
        return taken(settings, f"{value} iterations are {counted(steps, 'optimizer step')}" if portion > 1 else "")

    return rule


def _epochs(key: str, value: Any, keys: Keys) -> KeyOutcome:
    if not value or keys.get("iters"):
        return KeyOutcome("not needed", "iters takes precedence, as in the original" if value else "unset")
    return taken({"train.epochs": float(value)})


def _course(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`lr_schedule`: name, arguments (the first is the rate), warmup."""
    if not value:
        return KeyOutcome("not needed", "mlx-lm's default is constant")
    name = str(value.get("name", ""))
    ours = {"cosine_decay": "cosine", "linear_schedule": "linear"}.get(name)
    if ours is None:
        return KeyOutcome("not supported", f"schedule {name} is not supported; the rate stays constant")
    settings: dict[str, Any] = {"optim.schedule": ours}
    if value.get("warmup"):
        settings["optim.warmup"] = float(math.ceil(value["warmup"] / _portion(keys)))
    if value.get("arguments"):
        settings["optim.lr"] = float(value["arguments"][0])
    return taken(settings, "it ends at 0 with the last step")


def _optimizer_settings(key: str, value: Any, keys: Keys) -> KeyOutcome:
    own = (value or {}).get(str(keys.get("optimizer", "adam")).lower()) or {}
    renamed = {"weight_decay": "optim.weight_decay", "betas": "optim.betas"}
    found = {renamed[name]: inner for name, inner in own.items() if name in renamed}
    if other := [name for name in own if name not in (*renamed, "bias_correction", "learning_rate")]:
        return KeyOutcome("not supported", f"{', '.join(other)}: MLX's own value is used", found)
    return taken(found)


def _adapter_file(key: str, value: Any, keys: Keys) -> KeyOutcome:
    return (
        taken({"model.adapter": str(value).rpartition("/")[0] or "."}) if value else KeyOutcome("not needed", "unset")
    )


def _mlx_bits(key: str, value: Any, keys: Keys) -> KeyOutcome:
    return taken({"model.quantize": 8 if "8" in key else 4}) if value else KeyOutcome("not needed", "off, as here")


def _mlx_defaults(keys: Keys) -> dict[str, Any]:
    """What mlx-lm 0.32 and mlx-lm-lora 5 do where the file is silent."""
    found: dict[str, Any] = {"optim.name": "adam", "optim.lr": 1e-5, "optim.schedule": "constant", "optim.warmup": 0.0}
    pairs = "train_mode" in keys  # mlx-lm-lora, whose defaults are others
    found |= {
        "optim.max_grad_norm": 0.0,
        "train.batch_size": 1 if pairs else 4,
        "train.gradient_accumulation": 1,
        "train.seed": 0,
    }
    found |= {"data.max_length": 2048}
    if not keys.get("iters") and not keys.get("epochs"):
        found |= {"train.steps": math.ceil((100 if pairs else 1000) / _portion(keys))}
    found |= {"loss.beta": 0.1} if pairs else {"stage": "sft"}
    if keys.get("fine_tune_type", keys.get("train_type", "lora")) == "full":
        return found | {"model.dtype": "float32"}
    ours = {"lora.layers": -1 if pairs else 16, "lora.rank": 8, "lora.scale": 10.0 if pairs else 20.0}
    given = keys.get("lora_parameters") or {}
    return found | {name: value for name, value in ours.items() if name.rpartition(".")[2] not in given}


RULES: Mapping[str, Rule] = {
    "model": to("model.path"),
    "data": to("data.path"),
    "train_mode": _mode,
    "dpo_cpo_loss_type": _mlx_objective,
    "beta": to("loss.beta", float),
    "delta": _penalty,
    **by_synonym("reference_model_path fine_tune_type train_type learning_rate batch_size num_layers"),
    **dict.fromkeys(("grad_accumulation_steps", "gradient_accumulation_steps"), to("train.gradient_accumulation", int)),
    "seed": to("train.seed", int),
    "optimizer": hugging_face.optimizer,
    "optimizer_config": _optimizer_settings,
    "epochs": _epochs,
    "iters": _in_steps("train.steps"),
    "steps_per_eval": _in_steps("train.eval_every"),
    "save_every": _in_steps("train.save_every"),
    "steps_per_report": _in_steps("log.every_steps"),
    "max_seq_length": to("data.max_length", int),
    "grad_checkpoint": to("train.gradient_checkpointing", bool),
    "adapter_path": to("out"),
    "resume_adapter_file": _adapter_file,
    "lora_parameters": _inner,
    "lr_schedule": _course,
    "report_to": hugging_face.tracker,
    "wandb": lambda key, value, keys: hugging_face.tracker(key, "wandb" if value else "none", keys),
    "trust_remote_code": to("model.trust_remote_code", bool),
    **dict.fromkeys(("load_in_4bits", "load_in_8bits"), _mlx_bits),
    **unneeded("train config", "that is the command mlxdpo train"),
    **unneeded("test test_batches val_batches", "all held-out pairs are scored; mlxdpo eval judges the run"),
    **unneeded("fuse", "mlxdpo export RUN --to fused"),
    **unneeded("project_name clear_cache_threshold", "not needed"),
    **unneeded("mask_prompt train_on_completions", "completions alone are always scored"),
    **unneeded("judge judge_config efficient_long_context seq_step_size temperature max_completion_length group_size "
           "epsilon epsilon_high alpha reward_functions reward_functions_file reward_weights grpo_loss_type "
           "importance_sampling_level lambda_mse lambda_mse_target tau_mse_target clip_epsilon_logits",
           "of other modes of mlx-lm-lora"),
    **unneeded("lm_studio_name", "mlxdpo export RUN --to lmstudio"),
    **unneeded("reward_scaling", "mlx-lm-lora does not use it either"),
    **lost("hf_dataset", "set data.path to its path, and data.columns to its features"),
    **lost("load_in_6bits load_in_mxfp4", "only 4 or 8 bits are supported; the weights are not quantised"),
    **lost("prompt_feature chosen_feature rejected_feature system_feature", "set data.columns"),
}  # fmt: skip

MARKS = (
    "fine_tune_type train_type train_mode iters lora_parameters adapter_path steps_per_report steps_per_eval "
    "max_seq_length grad_checkpoint num_layers dpo_cpo_loss_type lr_schedule mask_prompt optimizer_config "
    "resume_adapter_file reference_model_path val_batches"
)
MLX_LM = Tool("mlx-lm", "mlx-lm", frozenset(MARKS.split()), RULES, _mlx_defaults)
