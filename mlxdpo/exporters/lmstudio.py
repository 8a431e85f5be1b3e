"""LM Studio: the folder that it scans (publisher/model) and a preset with the template and the ends of turns.

`~/.lmstudio/models/PUBLISHER/MODEL/` holds a model's files, MLX or GGUF; `config-presets/NAME.preset.json` holds fields
by key. Both are read back by these rules; LM Studio itself is an app without a command line that could be asked here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import mlx.nn as nn

from mlxdpo.exporters import gguf, mlx
from mlxdpo.exporters.modelfile import stop_texts, writer_of
from mlxdpo.exporters.source import ExportSource
from mlxdpo.io.atomic import write_json
from mlxdpo.types import UserError

PRESET = "preset.json"
TEMPLATE_KEY, STOPS_KEY = "llm.prediction.promptTemplate", "llm.prediction.stopStrings"


def refuse_lmstudio(source: ExportSource) -> None:
    """Raise `UserError` for what LM Studio has no form of."""
    if source.choices.lmstudio == "gguf":
        gguf.refuse_gguf(source)


def model_folder(source: ExportSource, folder: Path) -> Path:
    """PUBLISHER/MODEL below `folder`, with names that are plain on every file system."""
    name = source.trained.run.path.resolve().name
    return folder / folder_name(source.choices.publisher) / folder_name(name)


def folder_name(name: str) -> str:
    """Letters, digits, dots, dashes and underscores of a name; others become dashes."""
    return re.sub(r"[^\w.-]+", "-", name, flags=re.ASCII).strip(".-") or "model"


def write_lmstudio(source: ExportSource, folder: Path) -> str | None:
    """Write the model into PUBLISHER/MODEL, and the preset beside it."""
    inside = model_folder(source, folder)
    inside.mkdir(parents=True)
    write = gguf.write_gguf if source.choices.lmstudio == "gguf" else mlx.write_fused
    note = write(source, inside)
    preset = preset_of(source, inside.name)
    write_json(folder / f"{inside.name}.{PRESET}", preset)
    check_preset(folder / f"{inside.name}.{PRESET}", preset)
    where = f"copy {inside.parent.name}/ to ~/.lmstudio/models/, and the preset to ~/.lmstudio/config-presets/"
    return f"{note + '; ' if note else ''}{where}; not asked: files read back by LM Studio's rules"


def preset_of(source: ExportSource, name: str) -> dict[str, Any]:
    """A preset: template and stop strings as the run was trained with."""
    writer, stops = writer_of(source), stop_texts(source)
    fields: list[dict[str, Any]] = [{"key": STOPS_KEY, "value": stops}]
    if writer.template is not None and source.trained.config.data.template != "plain":
        jinja = {"type": "jinja", "jinjaPromptTemplate": {"template": writer.template}, "stopStrings": stops}
        fields.append({"key": TEMPLATE_KEY, "value": jinja})
    named = {"identifier": f"@local:{name.lower()}", "name": name, "changed": False}
    return named | {"operation": {"fields": fields}, "load": {"fields": []}}


def check_preset(file: Path, written: dict[str, Any]) -> None:
    """Raise `UserError` unless the preset reads back as LM Studio reads one: an identifier, and fields by key."""
    read = json.loads(file.read_text("utf-8"))
    fields = {field["key"]: field["value"] for field in read["operation"]["fields"]}
    if read != written or not read["identifier"].startswith("@local:") or STOPS_KEY not in fields:
        raise UserError(f"lmstudio: {file.name} does not read back unchanged; export --to gguf")


def reload_lmstudio(source: ExportSource, folder: Path) -> nn.Module:
    """The model in the scanned folder, by the loader that LM Studio's engine has for it."""
    inside = model_folder(source, folder)
    reload = gguf.reload_gguf if source.choices.lmstudio == "gguf" else mlx.reload_model
    return reload(source, inside)
