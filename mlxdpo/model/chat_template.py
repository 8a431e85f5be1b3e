"""The chat template of a model folder where transformers' tokenizers do not look: chat_template.json, a processor's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mlxdpo.io.json_file import read_json

PROCESSORS_FILE, TEMPLATE_FILE, NAMED_FOLDER = "chat_template.json", "chat_template.jinja", "additional_chat_templates"


def template_settings(folder: Path) -> dict[str, Any]:
    """`{"chat_template": ...}` out of chat_template.json for a tokenizer that has no template elsewhere, else {}.

    The template is text, or a list of `{"name", "template"}`, as `AutoTokenizer.from_pretrained` takes both.
    """
    file, config = folder / PROCESSORS_FILE, folder / "tokenizer_config.json"
    if not file.is_file() or (folder / TEMPLATE_FILE).is_file() or (folder / NAMED_FOLDER).is_dir():
        return {}
    if config.is_file() and read_json(config).get("chat_template"):
        return {}
    found = read_json(file).get("chat_template")
    return {"chat_template": found} if found else {}


def write_template_files(settings: dict[str, Any], folder: Path) -> None:
    """Write what `template_settings` found to where tokenizers look: chat_template.jinja, named ones in a folder."""
    found = settings.get("chat_template", [])
    named = {"default": found} if isinstance(found, str) else {each["name"]: each["template"] for each in found}
    for name, template in named.items():
        file = folder / TEMPLATE_FILE if name == "default" else folder / NAMED_FOLDER / f"{Path(name).name}.jinja"
        file.parent.mkdir(exist_ok=True)
        file.write_text(template, "utf-8")
