"""The schema of a recipe as fields of a form, the form's values as a recipe, and a recipe as a command line.

Nothing is listed twice: a knob added to `config.py` appears on the page with its own help.
"""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Union

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mlxdpo.config import Config, load_config
from mlxdpo.types import UserError
from mlxdpo.ui.runs.tab import flat

VISIBLE = (
    "loss.name", "loss.beta", "lora.rank", "optim.lr", "train.epochs", "train.batch_size",
    "train.gradient_accumulation", "data.max_length",
)  # fmt: skip
CHOSEN = ("model.path", "model.adapter", "reference.model", "reference.adapter", "data.path", "data.eval", "out")
"""Paths: chosen from what is there, never typed."""
NEVER = ("model.trust_remote_code",)
"""Not on the page: who may use it is not thereby allowed to run any program as the user who started it."""

Kind = Literal["choice", "several", "flag", "whole", "number", "text", "words", "pair", "mapping"]


class Knob(NamedTuple):
    """A field: its dotted name, how it is asked for, its default, its help, and the values it may have."""

    name: str
    kind: Kind
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    empty: bool = False


def knobs() -> list[Knob]:
    """Every knob of the schema but the paths, in its order."""
    found = []
    for section, info in Config.model_fields.items():
        inner = info.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found += [_knob(f"{section}.{name}", field) for name, field in inner.model_fields.items()]
        else:
            found.append(_knob(section, info))
    return [knob for knob in found if knob.name not in (*CHOSEN, *NEVER)]


SECTIONS = {
    "": "General",
    "model": "Model",
    "data": "Data",
    "loss": "Objective",
    "reward": "Reward model",
    "reference": "Reference",
    "lora": "Adapter (LoRA)",
    "optim": "Optimizer",
    "train": "Training",
    "log": "Logging",
}
"""Sections of a recipe in words; another one is shown under its own name."""
WORDS = {
    "loss.name": "Objective",
    "loss.beta": "Strength of the pull to the reference (β)",
    "lora.rank": "Rank of the adapter",
    "optim.lr": "Learning rate",
    "optim.name": "Optimizer",
    "train.epochs": "Passes over the data",
    "train.batch_size": "Pairs at once",
    "train.gradient_accumulation": "Batches in a step",
    "data.max_length": "Longest pair, tokens",
}
"""Knobs whose key alone says too little."""


def label_of(name: str) -> str:
    """A knob's name in words; the key itself stands small in its help."""
    return WORDS.get(name) or name.rpartition(".")[2].replace("_", " ").capitalize()


def _knob(name: str, field: FieldInfo) -> Knob:
    kind, choices, empty = _knob_kind(field.annotation)
    if named := _registered(name):
        kind, choices = "choice", named
    told = " ".join((field.description or "").split())  # a line of the source is not one of the page
    return Knob(name, kind, field.get_default(call_default_factory=True), told, choices, empty)


def _registered(name: str) -> tuple[str, ...]:
    """The names of a registry, for knobs that are text in the schema."""
    if name == "loss.name":
        from mlxdpo.losses import LOSSES

        return tuple(LOSSES)
    if name == "optim.name":
        from mlxdpo.training.step import OPTIMIZERS

        return tuple(OPTIMIZERS)
    if name == "data.format":
        from mlxdpo.data.formats import FORMATS

        return ("auto", *FORMATS)
    return ()


def _knob_kind(annotation: Any) -> tuple[Kind, tuple[str, ...], bool]:
    """How a type is asked for, its choices, and whether it may stay empty."""
    origin, inside = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (Union, types.UnionType):
        given = [one for one in inside if one is not types.NoneType]
        if len(given) > 1:  # a number, or the word auto
            return "text", (), len(given) < len(inside)
        kind, choices, _ = _knob_kind(given[0])
        return kind, choices, True
    if origin is Literal:
        return "choice", tuple(map(str, inside)), False
    if origin is list and typing.get_origin(inside[0]) is Literal:
        return "several", tuple(map(str, typing.get_args(inside[0]))), False
    plain: dict[Any, Kind] = {bool: "flag", int: "whole", float: "number", str: "text"}
    composed: dict[Any, Kind] = {list: "words", tuple: "pair", dict: "mapping"}
    return (composed[origin] if origin else plain[annotation]), (), False


def form_value(knob: Knob, value: Any) -> Any:
    """A value as the form holds it."""
    if knob.kind == "choice":
        return "" if value is None else str(value)
    if knob.kind == "several":
        return list(value)
    if knob.kind in ("words", "pair"):
        return ", ".join(map(str, value or ()))
    if knob.kind in ("whole", "number") and knob.empty:
        # Asked for as text: a number field that is left empty arrives as 0.
        return "" if value is None else str(value)
    if knob.kind == "mapping":
        return ", ".join(f"{name}: {column}" for name, column in value.items())
    return value


def entered(knob: Knob, value: Any) -> Any:
    """What was entered, as the schema takes it. Raises `UserError` for a mapping that is none."""
    if knob.kind == "mapping":
        return _mapping(knob, value or "")
    if knob.kind == "several":
        return list(value) if isinstance(value, list | tuple) else value or []
    if value is None or (isinstance(value, str) and not value.strip()):
        # An emptied number means its default, not zero.
        return None if knob.empty else knob.default
    if knob.kind in ("words", "pair") and isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def _mapping(knob: Knob, text: str) -> dict[str, str]:
    try:
        found = yaml.safe_load(f"{{{text}}}")
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        found = None  # as in `yaml_file.read_recipe`
    if not isinstance(found, dict) or not all(isinstance(v, str) for v in found.values()):
        raise UserError(f"{knob.name} is {text!r}; write it as `prompt: question, chosen: good`")
    return found


def to_config(values: Mapping[str, Any]) -> Config:
    """A recipe from dotted names. Raises `UserError` for what the schema refuses."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        section, dot, inner = name.partition(".")
        if dot:
            nested.setdefault(section, {})[inner] = value
        else:
            nested[section] = value
    return load_config(None, nested)


def flags(config: Config) -> list[str]:
    """The options of `mlxdpo train` that give this recipe: all in which it differs from the defaults of its stage."""
    plain = flat(load_config(None, {"stage": config.stage}).model_dump(mode="json"))
    plain["stage"] = Config().stage
    words: list[str] = []
    for name, value in flat(config.model_dump(mode="json")).items():
        if name not in plain or value != plain[name]:
            words += _option(SHORT.get(name, name), value)
    return words


SHORT = {"model.path": "model", "data.path": "data"}


def _option(name: str, value: Any) -> list[str]:
    """One option; `=` keeps a value that begins with a dash from being taken for one."""
    if isinstance(value, bool):
        return [f"--{name}={str(value).lower()}"]
    if isinstance(value, Sequence) and not isinstance(value, str):
        if name == "optim.betas":
            return [f"--{name}", *map(repr, value)]
        return [f"--{name}={item}" for item in value]
    if value is None or value == {}:
        raise UserError(f"{name} cannot be emptied on the command line; give it a value")
    return [f"--{name}={value!r}" if isinstance(value, float) else f"--{name}={value}"]
