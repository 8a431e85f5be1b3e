"""A recipe file as it stands: YAML in which 1e-5 is a number. What its keys mean is `config`'s business."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from mlxdpo.types import UserError


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]  # libyaml's is 7 times as fast
    """YAML in which 1e-5 is a number (YAML 1.1 asks for 1.0e-5 and makes the rest text), and 1:30 none."""


class _Dumper(yaml.SafeDumper):
    """YAML that comes back as it went in: unquoted, a next-line or line-separator sign would come back as a blank."""


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style=None if text.replace("\n", "").isprintable() else '"'
    ),
)


BASE_60 = "(?::[0-5]?[0-9])+"
_Loader.yaml_implicit_resolvers = {  # 1:30 is a time or a typing error: YAML 1.1 makes 90 of it
    first: [(tag, re.compile(rule.pattern.replace(BASE_60, "(?!)"), rule.flags)) for tag, rule in rules]
    for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _side in (_Loader, _Dumper):  # the dumper too: text that looks like a number has to be quoted
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"),
        list("-+0123456789"),
    )


def yaml_text(value: Any, width: int = 80) -> str:
    """A value as YAML, which `read_recipe` reads back to an equal one."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)


def read_recipe(file: Path) -> Mapping[str, Any]:
    """The keys and values of a recipe. Raises `UserError` naming the file when it holds something else."""
    try:
        text = file.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"{file}: no such recipe; give a YAML file or --model and --data") from None
    except (OSError, ValueError) as error:  # ValueError: no UTF-8, or a name that cannot be one
        raise UserError(f"{file}: cannot be read as text ({error}); expected a YAML recipe") from None
    try:
        found = yaml.load(text, Loader=_Loader) or {}
    # The loader's own errors, and what its constructors raise for `!!int ""`, a date with a month 13, deep nesting.
    except (yaml.YAMLError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{file}: not valid YAML ({' '.join(str(error).split())[:200]})") from None
    if not isinstance(found, Mapping):
        raise UserError(f"{file}: expected `key: value` lines, found {type(found).__name__}")
    return found


def key_with_nul(value: Any) -> str | None:
    """The dotted key of a text with a NUL in it: the system's calls refuse such a name with an error of their own.

    Each value is looked at once: a YAML alias can hold itself, or stand for itself a billion times.
    """
    left, seen = [("", value)], set()
    while left:
        key, one = left.pop()
        if isinstance(one, str) and "\0" in one:
            return key
        if id(one) in seen or not isinstance(one, Mapping | list | tuple):
            continue
        seen.add(id(one))
        pairs = one.items() if isinstance(one, Mapping) else ((None, inner) for inner in one)
        left += [(key if name is None else f"{key}.{name}".lstrip("."), inner) for name, inner in pairs]
    return None
