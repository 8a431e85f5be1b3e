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


def order_rule(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`dataloader_shuffle` and its like, which are on there."""
    kind = "not supported" if value is False else "not needed"
    return KeyOutcome(kind, "pairs are drawn in an order that train.seed decides")


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
    **dict.fromkeys(("shuffle_merged_datasets", "dataloader_shuffle"), order_rule),
    **unneeded("do_train do_eval do_predict", "train, eval and generate are separate commands"),
    **unneeded("remove_unused_columns label_names", "columns beyond the texts are used, or refused by name"),
    **unneeded("prediction_loss_only eval_on_start", "held-out pairs are scored in full, at the start as well"),
    **unneeded("ref_model_quantization_bit", "the reference is the model before tuning, quantised as it is"),
    **unneeded("full_determinism", "runs are bit-identical"),
    **unneeded("resume_from_checkpoint auto_resume_from_checkpoints", "mlxdpo train --resume RUN"),
    **lost("auto_find_batch_size", "`mlxdpo plan` says which batch size fits"),
    **lost("metric_for_best_model greater_is_better", "the best step is the one with the lowest held-out loss"),
}  # fmt: skip
