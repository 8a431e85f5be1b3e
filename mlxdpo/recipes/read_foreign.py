"""A recipe of another trainer as one of ours: recognised, taken over key by key, written with a comment for each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.config import Config, load_config
from mlxdpo.io.settings import dotted_names
from mlxdpo.io.yaml_file import read_recipe, yaml_text
from mlxdpo.recipes.axolotl import AXOLOTL
from mlxdpo.recipes.llamafactory import LLAMA_FACTORY
from mlxdpo.recipes.mlx_lm import MLX_LM
from mlxdpo.recipes.outcome import KeyOutcome, Rule, Tool, unknown_key
from mlxdpo.recipes.subjects import rule_by_subject
from mlxdpo.recipes.trl import GROUPS, TRL
from mlxdpo.recipes.trl_script import Computed, read_script
from mlxdpo.types import UserError

TOOLS = {tool.name: tool for tool in (TRL, AXOLOTL, LLAMA_FACTORY, MLX_LM)}
OTHER_SPELLINGS = {
    "mlx-lm-lora": "mlx-lm",
    "mlx_lm": "mlx-lm",
    "mlx_lm_lora": "mlx-lm",
    "llama-factory": "llamafactory",
}


COMPUTED = KeyOutcome("not supported", "computed by the script, which import-recipe does not run; set it in the recipe")


class ForeignRecipe(NamedTuple):
    """A recipe read: `outcomes` by key of theirs, our `settings` by dotted name with where each comes from."""

    file: Path
    tool: Tool
    keys: Mapping[str, Any]
    outcomes: Mapping[str, KeyOutcome]
    settings: Mapping[str, tuple[Any, str]]


def read_foreign(file: Path, name: str | None = None) -> ForeignRecipe:
    """A recipe of the trainer `name`, or of the one that its keys tell.

    Raises `UserError` for a file that is none, that no trainer is recognised in, or whose objective is not here.
    """
    keys = _without_groups(read_script(file) if file.suffix == ".py" else read_recipe(file))
    tool = TRL if file.suffix == ".py" and name is None else _tool_of(file, keys, name)
    constant = {key: value for key, value in keys.items() if not isinstance(value, Computed)}
    outcomes = {
        key: _rule_of(tool, key)(key, value, constant) if key in constant else COMPUTED for key, value in keys.items()
    }
    settings: dict[str, tuple[Any, str]] = {}
    for key, outcome in outcomes.items():
        for setting, value in outcome.settings.items():
            told = f"{key}: {_on_one_line(keys[key])}" + (f"; {outcome.note}" if outcome.note else "")
            settings[setting] = (value, f"{settings[setting][1]}; {told}" if setting in settings else told)
    for setting, value in tool.usual(constant).items():
        settings.setdefault(setting, (value, f"not in the file: {tool.title}'s default"))
    _without_contradiction(settings)
    return ForeignRecipe(file, tool, keys, outcomes, {k: v for k, v in settings.items() if v[0] is not None})


def _rule_of(tool: Tool, key: str) -> Rule:
    return tool.rules.get(key) or rule_by_subject(key) or unknown_key


def _without_contradiction(settings: dict[str, tuple[Any, str]]) -> None:
    """Take out what has no effect beside another setting: lora.* without an adapter, a rate without warm-up."""
    if settings.get("lora.method", ("lora", ""))[0] == "full":
        for name in [name for name in settings if name.startswith("lora.") and name != "lora.method"]:
            del settings[name]
        settings.pop("model.quantize", None)
    if settings.get("stage", ("dpo", ""))[0] != "dpo":
        for name in [name for name in settings if name.startswith("loss.")]:
            del settings[name]
    if "lora.scale" in settings:
        settings.pop("lora.alpha", None)
    if "train.steps" in settings:  # decides instead of the epochs in every one of these trainers
        settings.pop("train.epochs", None)


def _without_groups(found: Mapping[str, Any]) -> dict[str, Any]:
    """Keyword arguments under the names of their classes, beside one another."""
    keys: dict[str, Any] = {}
    for key, value in found.items():
        keys |= value if key in GROUPS and isinstance(value, Mapping) else {str(key): value}
    if isinstance(found.get("LoraConfig", found.get("peft_config")), Mapping):
        keys.setdefault("use_peft", "LoraConfig")
    return keys


def _tool_of(file: Path, keys: Mapping[str, Any], name: str | None) -> Tool:
    if name is not None:
        tool = TOOLS.get(OTHER_SPELLINGS.get(name, name))
        if tool is None:
            raise UserError(f"--from {name}: known are {', '.join((*TOOLS, 'mlx-lm-lora'))}")
        return tool
    scores = {tool.name: len(tool.marks & keys.keys()) for tool in TOOLS.values()}
    best = max(scores.values())
    likely = [tool for tool, score in scores.items() if score == best]
    own = Config.model_fields.keys()
    if keys and keys.keys() <= own and any(isinstance(value, Mapping) for value in keys.values()):
        raise UserError(f"{file}: this is already an mlxdpo recipe; train with it: mlxdpo train {file}")
    if best == 0 or len(likely) > 1:
        raise UserError(
            f"{file}: cannot tell which trainer this recipe is for; pass --from {', '.join(TOOLS)} "
            f"(keys: {', '.join(list(keys)[:8])})"
        )
    return TOOLS[likely[0]]


def recipe_text(found: ForeignRecipe) -> str:
    """The recipe as YAML with a comment for every key of theirs. Raises `UserError` where our schema refuses it."""
    values: dict[str, Any] = {}
    for setting, (value, _) in found.settings.items():
        section, _, name = setting.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = value
    load_config(None, values)
    lines = [f"# {found.file.name} of {found.tool.title}, read by mlxdpo import-recipe.", *_remarks(found)]
    order = dotted_names(Config)
    sections = sorted(values, key=lambda name: [n.partition(".")[0] for n in order].index(name))
    for section in sections:
        inner = values[section]
        if not isinstance(inner, Mapping):
            lines.append(_line(section, inner, found.settings[section][1]))
            continue
        lines.append(f"{section}:")
        lines += ["  " + _line(name, inner[name], found.settings[f"{section}.{name}"][1]) for name in inner]
    said = " ".join(told for _, told in found.settings.values())
    kinds = ("taken", "No effect in combination with other keys:"), ("not needed", "Not needed:")
    for kind, title in (*kinds, ("not supported", "Not supported, with the effect:")):
        rest = [(k, o) for k, o in found.outcomes.items() if o.kind == kind and found.keys[k] is not None]
        rest = [(key, outcome) for key, outcome in rest if kind != "taken" or f"{key}: " not in said]
        if rest:
            lines += ["", f"# {title}"]
            lines += [
                f"#   {key}: {_on_one_line(found.keys[key])}" + f"  ({outcome.note})" * bool(outcome.note)
                for key, outcome in rest
            ]
    if unset := [key for key, value in found.keys.items() if value is None]:
        lines += ["", "# Unset:", f"#   {', '.join(unset)}"]
    return "\n".join(lines) + "\n"


def _remarks(found: ForeignRecipe) -> list[str]:
    """What no single key says."""
    held = {"data.eval", "data.eval_fraction"} & found.settings.keys()
    adapters = found.settings.get("lora.method", ("lora", ""))[0] != "full"
    silent = adapters and found.tool is TRL and "lora.keys" not in found.settings
    lines = [] if held else ["# A tenth of the prompts is held out, to judge by; data.eval_fraction: 0 trains on all."]
    if silent:
        lines.append("# All linear layers carry adapters; where none are named, PEFT takes few (often q_proj, v_proj).")
    return lines


def _line(name: str, value: Any, comment: str) -> str:
    shown = json.dumps(value, ensure_ascii=False) if isinstance(value, list | Mapping) else None
    text = f"{name}: {shown}" if shown else yaml_text({name: value}, width=10_000).rstrip()
    return f"{text}  # {' '.join(comment.split())}"


def _on_one_line(value: Any) -> str:
    """A value of theirs on one line of a comment."""
    value = value.code if isinstance(value, Computed) else value
    text = json.dumps(value, ensure_ascii=False, default=str) if not isinstance(value, str) else value
    text = " ".join(text.split())
    return text if len(text) <= 60 else f"{text[:57]}..."
