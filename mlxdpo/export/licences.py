"""Licences as far as they are known: what the user says, else what the base model's own card says. Never a guess."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mlxdpo.config import Config
from mlxdpo.export.published import is_hub_id
from mlxdpo.model.policy import BUILTIN, find_model


class Licences(NamedTuple):
    """Identifiers as the Hub spells them (apache-2.0) of the base model's and the data's licence; None: not known."""

    model: str | None = None
    data: str | None = None


def known(config: Config, given: Licences) -> Licences:
    """`given`, with the base model's licence filled in from its card where that lies on this machine."""
    return given if given.model is not None else given._replace(model=_of_card(_card_of(config)))


def _card_of(config: Config) -> Path | None:
    path = config.model.path
    if path in BUILTIN or Path(path).is_dir():
        return find_model(path) / "README.md"
    if not is_hub_id(path):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(path, "README.md", revision=config.model.revision)
    return Path(found) if isinstance(found, str) else None


def _of_card(card: Path | None) -> str | None:
    if card is None or not card.exists():
        return None
    from huggingface_hub import ModelCard

    try:
        licence = ModelCard(card.read_text("utf-8"), ignore_metadata_errors=True).data.get("license")
    except ValueError:  # a card whose metadata is no YAML says nothing
        return None
    return licence if isinstance(licence, str) else None
