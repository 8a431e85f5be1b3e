"""TRL: the YAML of `trl dpo --config`, and the keyword arguments of DPOConfig, ModelConfig, ScriptArguments and
PEFT's LoraConfig as YAML or JSON, flat or under these names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mlxdpo.recipes import hugging_face
from mlxdpo.recipes.outcome import KeyOutcome, Keys, Rule, Tool, by_synonym, effect_of, lost, taken, to, unneeded

GROUPS = (
    "DPOConfig",
    "ModelConfig",
    "ScriptArguments",
    "LoraConfig",
    "TrainingArguments",
    "BitsAndBytesConfig",
    "args",
    "peft_config",
)
"""Keys under which keyword arguments may stand."""


def _data_set(key: str, value: Any, keys: Keys) -> KeyOutcome:
    if value is None:
        return KeyOutcome("not needed", "unset")
    part = keys.get("dataset_config")
    return taken({"data.path": f"{value}:{part}" if part else value})


def _mixture(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`datasets`: a list of sets, of which one data.path holds one."""
    if not value:
        return KeyOutcome("not needed", "unset")
    first, *others = value if isinstance(value, list) else [value]
    entry = first if isinstance(first, Mapping) else {"path": first}
    path = entry.get("path") or entry.get("name")
    settings = {"data.path": f"{path}:{entry['name']}" if entry.get("path") and entry.get("name") else path}
    if entry.get("split"):
        settings["data.split"] = entry["split"]
    if not others:
        return taken(settings)
    return KeyOutcome(
        "not supported", f"one data set per run: the other {len(others)} are not read; join them", settings
    )


def _mixer(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`dataset_mixer` of the alignment handbook: a share of each set; `dataset_splits` to train on and to hold out."""
    if not value:
        return KeyOutcome("not needed", "unset")
    (first, share), *others = value.items()
    splits = [str(split) for split in keys.get("dataset_splits") or []]
    held = [split for split in splits if split.startswith(("test", "eval", "val"))]
    trained = [split for split in splits if split not in held]
    settings = {"data.path": first}
    settings |= ({"data.split": trained[0]} if trained else {}) | ({"data.eval": held[0]} if held else {})
    if others or share != 1:
        return KeyOutcome("not supported", "one data set per run, and all of it; join the others into a file", settings)
    return taken(settings)


def _use_peft(key: str, value: Any, keys: Keys) -> KeyOutcome:
    if value:
        return taken({"lora.method": "lora"})
    return taken(
        {"lora.method": "full", "model.dtype": "float32"}, "every weight is trained, in float32 as in the original"
    )


def _heldout(key: str, value: Any, keys: Keys) -> KeyOutcome:
    if keys.get("eval_strategy", "no") in ("no", False, None):
        return KeyOutcome("not needed", "eval_strategy is no: it is not read there either")
    return taken({"data.eval": value})


def _sync(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """TR-DPO is on where `sync_ref_model` is."""
    if not keys.get("sync_ref_model"):
        return KeyOutcome("not needed", "sync_ref_model is off")
    if key == "sync_ref_model":
        return taken({"reference.sync_every": keys.get("ref_model_sync_steps") or 512})
    return taken({"reference.sync_every" if key.endswith("steps") else "reference.sync_alpha": value})


def _dropout(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`disable_dropout` switches the adapters' dropout off too, and is on where the file is silent."""
    return taken({"lora.dropout": 0.0}, "it switches the adapters' dropout off") if value else taken({})


def _lora_dropout(key: str, value: Any, keys: Keys) -> KeyOutcome:
    if keys.get("disable_dropout", True):
        return KeyOutcome("not needed", "disable_dropout is on where it is not set, and switches it off")
    return taken({"lora.dropout": float(value)})


def _number_type(key: str, value: Any, keys: Keys) -> KeyOutcome:
    kinds = ("auto", "float32", "bfloat16", "float16")
    return taken({"model.dtype": value}) if value in kinds else KeyOutcome("not needed", "unset")


def _trl_defaults(keys: Keys) -> dict[str, Any]:
    """What TRL 1.16 does where the file is silent."""
    library = keys.get("use_peft") == "LoraConfig" or "r" in keys  # PEFT's defaults, not those of ModelConfig
    peft = keys.get("use_peft") or library
    adapters = {"lora.rank": 8 if library else 16, "lora.alpha": 8.0 if library else 32.0}
    whole = {"lora.method": "full", "model.dtype": "float32"}
    evaluates = keys.get("eval_strategy", "no") not in ("no", False, None)
    found = {
        "loss.beta": 0.1,
        "optim.lr": 1e-6,
        "optim.schedule": "linear",
        "optim.warmup": 0.0,
        "train.epochs": 3.0,
        "train.batch_size": 8,
        "train.gradient_accumulation": 1,
        "train.seed": 42,
    }
    found |= adapters if peft else whole
    return found | ({"data.eval": "test"} if evaluates and "/" in str(keys.get("dataset_name", "")) else {})


RULES: Mapping[str, Rule] = {
    **hugging_face.RULES,
    **dict.fromkeys(("loss_type", "loss"), hugging_face.objective_rule),
    "rpo_alpha": hugging_face.imitation_rule,
    "loss_weights": to("loss.weights"),
    "beta": to("loss.beta", float),
    "ld_alpha": to("loss.ld_alpha"),
    "discopop_tau": to("loss.discopop_tau"),
    **by_synonym("use_weighting", bool),
    **by_synonym("f_alpha_divergence_coef", float),
    "f_divergence_type": to("loss.f_divergence", lambda value: str(value).rpartition(".")[2].lower()),
    "max_length": to("data.max_length", int),
    "router_aux_loss_coef": to("train.router_aux_loss_coef", float),
    "dataset_name": _data_set,
    **unneeded("dataset_config", "part of data.path, after a colon"),
    "datasets": _mixture,
    "dataset_train_split": to("data.split"),
    "dataset_test_split": _heldout,
    "use_peft": _use_peft,
    "model_revision": to("model.revision", lambda value: None if value == "main" else value),
    **dict.fromkeys(("dtype", "torch_dtype"), _number_type),
    "disable_dropout": _dropout,
    **dict.fromkeys(("lora_dropout", "dropout"), _lora_dropout),
    **dict.fromkeys(("sync_ref_model", "ref_model_sync_steps", "ref_model_mixup_alpha"), _sync),
    "r": to("lora.rank", int),
    **unneeded("dataset_text_field tokenizer_name is_encoder_decoder base_model_attribute_name",
           "read from the model's files and the columns"),
    **unneeded("label_pad_token_id padding_value ignore_bias_buffers", "of padding and processes; neither is here"),
    **unneeded("force_use_ref_model model_adapter_name ref_adapter_name reference_free_prompt",
           "the reference is the model before tuning, or reference.model"),
    "bias": lambda key, value, keys: effect_of("biases are not trained")(key, None if value == "none" else value, keys),
    "reference_free": to("loss.reference_free", bool),
    **lost("max_prompt_length max_completion_length",
           "prompt and completion share data.max_length; a long prompt loses its beginning (data.on_long_prompt)"),
    **lost("truncation_mode", "see data.on_long_prompt and data.on_long_completion"),
    "dataset_mixer": _mixer,
    **unneeded("dataset_splits", "part of data.split and data.eval"),
    **lost("model_init_kwargs ref_model_init_kwargs", "not read; set what it says under model and data"),
}  # fmt: skip

MARKS = (
    "per_device_train_batch_size dataset_name loss_type use_peft lora_target_modules precompute_ref_log_probs "
    "dataset_train_split dataset_test_split rpo_alpha disable_dropout sync_ref_model truncation_mode dataset_mixer"
)
TRL = Tool("trl", "TRL", frozenset(MARKS.split()), RULES, _trl_defaults)
