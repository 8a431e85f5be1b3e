"""Groups of settings: what every one refuses, and what is wrong with given values, a sentence each."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from mlxdpo.io.synonyms import right_name


class Section(BaseModel):
    """A frozen group of knobs that refuses unknown names."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )


def merged(base: Any, over: Any) -> Any:
    """Nested settings with others laid over them."""
    if not (isinstance(base, Mapping) and isinstance(over, Mapping)):
        return over
    return {**base, **{k: merged(base.get(k), v) for k, v in over.items()}}


def explain(error: ValidationError, source: str, schema: type[BaseModel]) -> list[str]:
    """Everything that is wrong, a sentence each, with the value and, for an unknown key, the right name.

    `UserError(*explain(...))` is what a user reads.
    """
    return [_fault_sentence(fault, source, schema) for fault in error.errors(include_url=False)]


def _fault_sentence(fault: Any, source: str, schema: type[BaseModel]) -> str:
    where = [str(p) for p in fault["loc"]]
    if fault["type"] == "extra_forbidden":
        given = ".".join(where)
        meant = right_name(given, dotted_names(schema))
        known = ", ".join(_names(schema, where[:-1]))
        return f"{source}: unknown key `{given}`; " + (f"did you mean `{meant}`?" if meant else f"known: {known}")
    key = ".".join(p for p in where if p not in ("function-after", "constrained-float"))  # pydantic's own words
    value = reprlib.repr(fault["input"])
    return f"{source}: `{key}` is {value}: {fault['msg']}" if key else f"{source}: {fault['msg']}"


def dotted_names(schema: type[BaseModel]) -> list[str]:
    """Every setting of a schema by its dotted name: `out`, `loss.beta`."""
    names: list[str] = []
    for name, info in schema.model_fields.items():
        inner: Any = info.annotation
        is_section = isinstance(inner, type) and issubclass(inner, BaseModel)
        names += [f"{name}.{below}" for below in dotted_names(inner)] if is_section else [name]
    return names


def _names(schema: Any, path: list[str]) -> list[str]:
    for part in path:
        schema = schema.model_fields[part].annotation
    return list(schema.model_fields)
