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


def _special_tokens(key: str, value: Any, keys: Keys) -> KeyOutcome:
    if set(value or {}) <= {"pad_token"}:
        return KeyOutcome("not needed", "nothing is padded")
    return KeyOutcome("not supported", "the model's own tokens begin and end a text")


def _batch_size(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`batch_size` is that of a step, from which Axolotl computes the accumulation."""
    if not value or keys.get("gradient_accumulation_steps"):
        return KeyOutcome("not needed", "unset" if not value else "micro_batch_size and accumulation give it")
    return taken({"train.gradient_accumulation": max(1, int(value) // int(keys.get("micro_batch_size") or 1))})


def _reward_model(key: str, value: Any, keys: Keys) -> KeyOutcome:
    return taken({"stage": "reward"}) if value else KeyOutcome("not needed", "off, as here")


def _beta(key: str, value: Any, keys: Keys) -> KeyOutcome:
    if (keys.get("trl") or {}).get("beta") is not None:
        return KeyOutcome("not needed", "trl.beta takes precedence, as in the original")
    return to("loss.beta", float)(key, value, keys)


def _of_trl(key: str, value: Any, keys: Keys) -> KeyOutcome:
    """`trl`: settings of online trainers, except `beta`, which wins over `rl_beta`."""
    given = {name: one for name, one in (value or {}).items() if one is not None}
    settings = {"loss.beta": float(given.pop("beta"))} if "beta" in given else {}
    if given:
        return KeyOutcome("not supported", f"{', '.join(given)}: of trainers that sample", settings)
    return taken(settings) if settings else KeyOutcome("not needed", "unset")


def _from_there(key: str, value: Any, keys: Keys) -> KeyOutcome:
    return taken({"model.adapter": value}) if value else KeyOutcome("not needed", "unset")


def _axolotl_defaults(keys: Keys) -> dict[str, Any]:
    """What Axolotl 0.19 does where the file is silent."""
    found: dict[str, Any] = {"loss.beta": 0.1, "optim.schedule": "cosine", "train.epochs": 1.0, "train.batch_size": 1}
    found |= {"train.gradient_accumulation": 1, "train.seed": 42, "data.max_length": 512, "optim.warmup": 0.03}
    if keys.get("rl") == "simpo":
        found["loss.gamma"] = 0.5
    if not keys.get("rl"):
        del found["loss.beta"]
        found |= {} if keys.get("reward_model") else {"stage": "sft"}
    return found | ({} if keys.get("adapter") else {"lora.method": "full", "model.dtype": "float32"})


RULES: Mapping[str, Rule] = {
    **hugging_face.RULES,
    "base_model": to("model.path"),
    "revision_of_model": to("model.revision"),
    "rl": _kind,
    **dict.fromkeys(("rl_beta", "dpo_beta", "orpo_alpha"), _beta),
    "simpo_gamma": to("loss.gamma", float),
    "cpo_alpha": to("loss.cpo_alpha", float),
    "rpo_alpha": hugging_face.imitation_rule,
    "dpo_label_smoothing": to("loss.label_smoothing", float),
    "dpo_use_weighting": to("loss.wpo", bool),
    "dpo_loss_type": hugging_face.objective_rule,
    "dpo_loss_weights": to("loss.weights"),
    **lost("max_prompt_len", "prompt and completion share data.max_length; a long prompt loses its beginning"),
    **by_synonym("kto_desirable_weight kto_undesirable_weight", float),
    **dict.fromkeys(("datasets", "test_datasets"), _listed_sets),
    "val_set_size": to("data.eval_fraction", float),
    "sequence_len": to("data.max_length", int),
    "micro_batch_size": to("train.batch_size", int),
    "num_epochs": to("train.epochs", float),
    "adapter": _adapter,
    "lora_model_dir": _from_there,
    **dict.fromkeys(("load_in_4bit", "load_in_8bit"), _four_bits),
    "special_tokens": _special_tokens,
    "batch_size": _batch_size,
    "reward_model": _reward_model,
    "center_rewards_coefficient": to("reward.center", float),
    "trl": _of_trl,
    **unneeded("chat_template default_system_message train_on_inputs",
               "the model's own chat template is used, completions alone are scored"),
    **unneeded("rl_adapter_ref_model", "the reference is the model without its adapter, scored once"),
    **lost("evals_per_epoch saves_per_epoch", "set train.eval_every and train.save_every, in steps"),
    **lost("excess_length_strategy", "see data.on_long_prompt and data.on_long_completion"),
}  # fmt: skip

MARKS = (
    "base_model rl rl_beta micro_batch_size sequence_len num_epochs val_set_size sample_packing "
    "lora_target_linear dataset_prepared_path flash_attention special_tokens tokenizer_type"
)
AXOLOTL = Tool("axolotl", "Axolotl", frozenset(MARKS.split()), RULES, _axolotl_defaults)
