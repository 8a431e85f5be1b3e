"""A run as others may see it: the recipe and manifest without this machine's folders, and the command in one line.

`pack_run` writes RUN below the export folder, what `mlxdpo pull` makes a run directory of again:

    run/config.yaml  run/manifest.json  run/adapter/
    run/start/  run/reference/    the adapters that training began from, and that its reference has, if any
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from mlxdpo.config import Config, dump_config, load_config
from mlxdpo.exporters.record import RUN
from mlxdpo.io.atomic import write_atomic, write_json, write_text
from mlxdpo.io.names import is_hub_id
from mlxdpo.model.adapters import SETTINGS, WEIGHTS, read_settings
from mlxdpo.model.reward_head import FILE as HEAD
from mlxdpo.runs import Run

# A path inside a sentence: from a root, a home or a drive to the next blank or closing mark.
PATHS = re.compile(r"(?<![\w.:/~-])(?:~?/|[A-Za-z]:[\\/])[^\s\"'`,;()]*[\\/]")
START, REFERENCE = "start", "reference"


def public_name(name: str) -> str:
    """A source as others may see it: a Hub id or an address as it stands, a file or folder by its last name."""
    return name if is_hub_id(name) or "://" in name else re.split(r"[\\/]", name.rstrip("\\/"))[-1]


def card_metadata(card: Path) -> Mapping[str, Any]:
    """The metadata at the head of a model card; a missing card, or a head that is no YAML mapping, holds nothing."""
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    head = re.match(r"\s*---[\r\n]+(.*?)[\r\n]+---", text, re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else None
    except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date with a month 13, say
        return {}
    return found if isinstance(found, Mapping) else {}


def without_paths(value: Any) -> Any:
    """JSON values in which paths from the root, a home or a drive are cut down to their last name."""
    if isinstance(value, Mapping):
        return {name: without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(inner) for inner in value]
    return PATHS.sub("", value) if isinstance(value, str) else value


def public_config(config: Config) -> Config:
    """The recipe with names instead of places; adapters it begins from are named by their folder in the package."""
    model = {"path": public_name(config.model.path), "adapter": START if config.model.adapter else None}
    data = {"path": public_name(config.data.path)}
    if config.data.eval is not None:
        data["eval"] = public_name(config.data.eval)
    reference: dict[str, Any] = {"adapter": REFERENCE if config.reference.adapter else None}
    if config.reference.model is not None:
        reference["model"] = public_name(config.reference.model)
    return config.model_copy(
        update={
            "model": config.model.model_copy(update=model),
            "data": config.data.model_copy(update=data),
            "reference": config.reference.model_copy(update=reference),
            "out": None,
        }
    )


def public_manifest(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The manifest with names instead of places; its digests stay, they are the proof."""
    source, data = manifest["reference_source"], manifest["data"]
    named = {
        "model": manifest["model"] | {"source": public_name(manifest["model"]["source"])},
        "reference_source": {name: value and public_name(value) for name, value in source.items()},
        "data": data | {"source": public_name(data["source"])},
    }
    return without_paths({**manifest, **named})


def pack_run(run: Run, out: Path) -> Path:
    """Write what makes a run directory out of a pulled repository into `out`/run, and return that folder."""
    config, folder = run.config(), out / RUN
    adapters = {"adapter": run.adapter, START: config.model.adapter, REFERENCE: config.reference.adapter}
    for name, source in adapters.items():
        if source is None:
            continue
        read_settings(Path(source))
        for file in (WEIGHTS, SETTINGS):
            write_atomic(folder / name / file, lambda copy, origin=Path(source) / file: _copy(origin, copy))
    if (run.path / HEAD).exists():  # a reward model's
        write_atomic(folder / HEAD, lambda copy: _copy(run.path / HEAD, copy))
    write_text(folder / "config.yaml", dump_config(public_config(config)))
    write_json(folder / "manifest.json", public_manifest(run.manifest()))
    return folder


def _copy(source: Path, target: Path) -> None:
    shutil.copyfile(source, target)


def command(config: Config) -> str:
    """The `mlxdpo train` command line that gives this recipe: every setting that is not its stage's default."""
    stage = [] if config.stage == Config().stage else ["--stage", config.stage]
    defaults = load_config(None, {"stage": config.stage})
    return shlex.join(
        ["mlxdpo", "train", *stage, *_options(public_config(config).model_dump(), defaults.model_dump(), "")]
    )


def _options(values: Mapping[str, Any], defaults: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        key, default = f"{prefix}{name}", defaults.get(name)
        if value == default:
            continue
        if isinstance(value, Mapping):
            yield from _options(value, default or {}, f"{key}.")
        elif isinstance(value, bool):
            yield f"--{key}" if value else f"--no-{key}"
        elif isinstance(value, list):
            yield from (word for item in value for word in (f"--{key}", str(item)))
        elif isinstance(value, tuple):
            yield from (f"--{key}", *map(str, value))
        else:
            yield from (f"--{key}", str(value))
