"""A configuration from what Python gives: a model, rows in memory or a path, and settings by name."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlxdpo.config import Config, load_config
from mlxdpo.io.atomic import write_text
from mlxdpo.io.digest import json_digest
from mlxdpo.io.settings import dotted_names
from mlxdpo.io.synonyms import SYNONYMS, right_name
from mlxdpo.types import UserError


def config_of(
    model: Any = None, data: Any = None, eval_data: Any = None, settings: Mapping[str, Any] | None = None
) -> Config:
    """The configuration of a run from Python.

    `data` and `eval_data` are a path, a Hub id, or rows: dicts in any of the row shapes, a `datasets.Dataset`, a data
    frame. `settings` are named as in a recipe ("optim.lr"), with an underscore (optim_lr), by their last word where
    that is clear (lr), or as a section ({"optim": {"lr": 1e-4}}). Rows are written to a file beside the runs, so that
    the run can be evaluated and repeated later.

    Raises `UserError` naming every setting that does not exist, with the right name.
    """
    values = nested_settings(settings or {})
    folder = Path(values["out"]).parent if values.get("out") else Path("runs")
    for setting, given in (("path", data), ("eval", eval_data)):
        if given is not None:
            values.setdefault("data", {})[setting] = str(given) if _is_path(given) else str(rows_file(given, folder))
    if model is not None:
        values.setdefault("model", {})["path"] = str(model)
    return load_config(None, values)


def nested_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by section, as a recipe has them. Raises `UserError` with a sentence for each unknown name."""
    known = dotted_names(Config)
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for name, value in given.items():
        setting = _full_name(name, known)
        if setting is not None:
            section, _, key = setting.rpartition(".")
            (values.setdefault(section, {}) if section else values)[key] = value
        elif name in Config.model_fields and isinstance(value, Mapping):
            values[name] = {**values.get(name, {}), **value}
        else:
            meant = right_name(name, known)
            hint = f"did you mean {meant}?" if meant else "see help(mlxdpo.Config)"
            wrong.append(f"unknown setting {name}; {hint}")
    if wrong:
        raise UserError(*wrong)
    return values


def _full_name(name: str, known: list[str]) -> str | None:
    """The dotted name of a setting that is given dotted, with an underscore, or by its last word."""
    if name in known:
        return name
    ours = [setting for setting in known if name in (setting.replace(".", "_"), setting.rpartition(".")[2])]
    usual = SYNONYMS.get(name)  # of two settings with the same last word, the one that is meant
    return ours[0] if len(ours) == 1 else usual if usual in ours else None


def _is_path(given: Any) -> bool:
    return isinstance(given, str | Path)


def rows_file(rows: Any, folder: Path) -> Path:
    """Write rows to `folder`/rows-DIGEST.jsonl, where equal rows are once. Raises `UserError` for what is no rows."""
    found = [dict(row) if isinstance(row, Mapping) else row for row in _each_row(rows)]
    if not found:
        raise UserError("data holds no rows; give a list of dicts with prompt, chosen, rejected")
    if odd := next((row for row in found if not isinstance(row, dict)), None):
        raise UserError(f"data holds a row of type {type(odd).__name__}; expected dicts with prompt, chosen, rejected")
    try:
        lines = [json.dumps(row, ensure_ascii=False, default=_plain) for row in found]
    except TypeError as error:
        raise UserError(f"data cannot be written as JSON ({error}); give texts, numbers, lists and dicts") from None
    file = folder / f"rows-{json_digest(lines)[:8]}.jsonl"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, "\n".join(lines) + "\n")
    return file


def _each_row(rows: Any) -> Iterable[Any]:
    if hasattr(rows, "to_dict") and hasattr(rows, "columns"):  # a data frame
        return rows.to_dict("records")
    if isinstance(rows, Mapping) or not isinstance(rows, Iterable):
        raise UserError(f"data is a {type(rows).__name__}; expected a path, a Hub id or a list of dicts")
    return rows


def _plain(value: Any) -> Any:
    """What JSON has no form for and has one all the same: numbers and lists of NumPy."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")
