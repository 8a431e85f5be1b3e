"""A Python script of TRL's, read without running it: constants given to its configurations, model and data set."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.types import UserError

CONFIGURATIONS = ("DPOConfig", "ModelConfig", "ScriptArguments", "LoraConfig", "TrainingArguments")
TRAINER = "DPOTrainer"


class Computed(NamedTuple):
    """A value that is no constant: the code that computes it."""

    code: str


def read_script(file: Path) -> dict[str, Any]:
    """The keyword arguments of TRL's configurations under their names, with `model_name_or_path` and `dataset_name`.

    A value is a constant, a name that the script gives a constant once, or `Computed`. Raises `UserError` for a file
    that is not Python, and for one without a DPOTrainer and a DPOConfig.
    """
    try:
        tree = ast.parse(file.read_text("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file") from None
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{file}: cannot be read as a Python script ({' '.join(str(error).split())[:200]})") from None
    calls = {name: call for name, call in reversed(list(_script_calls(tree)))}  # the first of each name
    if not calls.keys() & {TRAINER, "DPOConfig"}:
        raise UserError(f"{file}: no {TRAINER} or DPOConfig in it; import-recipe reads scripts that train with these")
    known = _script_constants(tree)
    found: dict[str, Any] = {
        name: _keywords(calls[name], known) for name in (*CONFIGURATIONS, "BitsAndBytesConfig") if name in calls
    }
    found |= {name: value for name, value in _model_and_data(calls, known).items() if value is not None}
    return found


def _model_and_data(calls: Mapping[str, ast.Call], known: Mapping[str, Any]) -> dict[str, Any]:
    keywords = {name: _keywords(call, known) for name, call in calls.items()}
    model = _first_argument(calls.get("from_pretrained"), known)
    if model is None:
        model = keywords.get(TRAINER, {}).get("model") or _first_argument(calls.get(TRAINER), known)
    given = keywords.get("load_dataset", {})
    path = given.get("path", _first_argument(calls.get("load_dataset"), known))
    files = given.get("data_files")
    return {
        "model_name_or_path": model,
        "dataset_name": files if isinstance(files, str) else path,
        "dataset_config": given.get("name"),
        "dataset_train_split": given.get("split"),
    }


def _script_calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """(last word of what is called, the call), in the order of the lines."""
    for node in sorted((n for n in ast.walk(tree) if isinstance(n, ast.Call)), key=lambda n: (n.lineno, n.col_offset)):
        called = node.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        owner = getattr(getattr(called, "value", None), "id", "")
        if name != "from_pretrained" or "Model" in owner:  # a tokenizer is read from the model's folder
            yield name, node


def _script_constants(tree: ast.AST) -> dict[str, Any]:
    """Names that are given a constant, and nothing else anywhere."""
    given: dict[str, list[Any]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            given.setdefault(node.targets[0].id, []).append(_constant_value(node.value, {}))
    return {name: values[0] for name, values in given.items() if len(values) == 1}


def _keywords(call: ast.Call, known: Mapping[str, Any]) -> dict[str, Any]:
    return {word.arg: _constant_value(word.value, known) for word in call.keywords if word.arg is not None}


def _first_argument(call: ast.Call | None, known: Mapping[str, Any]) -> Any:
    return _constant_value(call.args[0], known) if call is not None and call.args else None


def _constant_value(node: ast.expr, known: Mapping[str, Any]) -> Any:
    """A constant, also behind a name; torch.bfloat16 is "bfloat16"."""
    if isinstance(node, ast.Name) and node.id in known:
        return known[node.id]
    if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "torch":
        return node.attr
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError):
        return Computed(ast.unparse(node))
