"""What is exported: a trained run, the folder its weights came from, and where they are to go."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import mlx.nn as nn
import yaml

from mlxdpo.exporters.merge_weights import Change, adapted, changes
from mlxdpo.exporters.names import Origins, origins
from mlxdpo.inference.trained_run import TrainedRun
from mlxdpo.io.json_file import read_json
from mlxdpo.io.names import is_hub_id
from mlxdpo.model.adapters import read_settings
from mlxdpo.model.policy import find_model

GgufType = Literal["auto", "f32", "f16", "bf16", "q8_0"]
# What travels with weights besides weights: never code, never what some tool left in the folder.
SIDE = ("*.json", "tokenizer.model", "*.tiktoken", "*.txt", "*.jinja", "LICENSE*", "NOTICE*")
NOT_SIDE = ("*.index.json", "adapter_config.json", "export.json", "hf_quant_config.json")


@dataclass(frozen=True)
class Choices:
    """What the user may choose. `base` is the full-precision model that a quantised run is put onto."""

    base: str | None = None
    bits: int = 4
    group_size: int = 64
    gguf_type: GgufType = "auto"


@dataclass(frozen=True)
class ExportSource:
    """A trained run to be exported."""

    trained: TrainedRun
    choices: Choices

    @property
    def model(self) -> nn.Module:
        """The tuned model, adapters attached."""
        return self.trained.policy.model

    @property
    def folder(self) -> Path:
        """The folder of the weights that were trained on."""
        return self.trained.policy.folder

    @cached_property
    def method(self) -> str:
        """lora, dora or full."""
        return read_settings(self.trained.run.adapter).method

    @cached_property
    def base(self) -> Path:
        """The folder that fused Hugging Face weights and PEFT adapters stand on: `--base`, else the trained one."""
        return find_model(self.choices.base) if self.choices.base else self.folder

    @property
    def stored_quantised(self) -> bool:
        """Whether the trained folder itself holds packed weights."""
        return "quantization" in self.raw_config or "quantization_config" in self.raw_config

    @property
    def quantised(self) -> bool:
        """Whether the run trained on packed weights, stored or made when loading."""
        return self.trained.policy.identity["quantization"] is not None

    @cached_property
    def raw_config(self) -> dict[str, Any]:
        """The base's config.json as it stands on disk."""
        return read_json(self.folder / "config.json")

    @cached_property
    def adapted(self) -> dict[str, nn.Module]:
        """The adapted modules by their path in the model; empty after full fine-tuning."""
        return adapted(self.model)

    @cached_property
    def changes(self) -> dict[str, Change]:
        """What became of each changed parameter, by its name in mlx-lm's model."""
        return changes(self.model, self.method)

    @cached_property
    def origins(self) -> Origins:
        """Which tensors of the base folder each parameter is made of."""
        return origins(self.base)

    @property
    def base_name(self) -> str:
        """What cards and adapters call the base: a Hub id where there is one, never a path of this machine."""
        return hub_name(self.choices.base or self.trained.config.model.path, self.base)

    @property
    def remark_on_base(self) -> str | None:
        """What an adapter's user has to know when the base goes by a Hub id that is not where its weights came from."""
        path = self.choices.base or self.trained.config.model.path
        if is_hub_id(path) or self.base_name == Path(path).resolve().name:
            return None
        return f"made for, and measured on, {Path(path).name}, a version of {self.base_name} by its card"


def hub_name(path: str, folder: Path) -> str:
    """The Hub id behind a model: itself, or the `base_model` of a local folder's card, else the folder's name."""
    if is_hub_id(path):
        return path
    card = folder / "README.md"
    named = _head_of(card).get("base_model") if card.is_file() else None
    named = named[0] if isinstance(named, list) and named else named
    return named if isinstance(named, str) else Path(path).resolve().name


def _head_of(card: Path) -> Mapping[str, Any]:
    """The metadata of a model card; a head that is no YAML mapping says nothing, as on the Hub."""
    head = re.match(r"---\n(.*?)\n---", card.read_text("utf-8", "replace"), re.DOTALL)
    try:
        found = yaml.safe_load(head.group(1)) if head else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date with a month 13, say
        return {}
    return found if isinstance(found, Mapping) else {}


def side_files(folder: Path) -> list[Path]:
    """Configuration, tokenizer, template, generation settings and licence of a model folder."""
    dropped = {file for pattern in NOT_SIDE for file in folder.glob(pattern)}
    return sorted({file for pattern in SIDE for file in folder.glob(pattern)} - dropped)
