"""Groups of settings: what every one refuses, and what is wrong with given values in one sentence."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError


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


def explain(error: ValidationError, source: str, schema: type[BaseModel]) -> str:
    """The first thing wrong in one sentence, with the value and, for an unknown key, the nearest right name."""
    first = error.errors(include_url=False)[0]
    where = [str(p) for p in first["loc"]]
    if first["type"] == "extra_forbidden":
        known = _names(schema, where[:-1])
        near = difflib.get_close_matches(where[-1], known, n=1, cutoff=0.5)
        hint = f"did you mean `{'.'.join([*where[:-1], near[0]])}`?" if near else f"known: {', '.join(known)}"
        return f"{source}: unknown key `{'.'.join(where)}`; {hint}"
    key = ".".join(p for p in where if p not in ("function-after", "constrained-float"))  # pydantic's own words
    return (
        f"{source}: `{key}` is {reprlib.repr(first['input'])}: {first['msg']}" if key else f"{source}: {first['msg']}"
    )


def _names(schema: Any, path: list[str]) -> list[str]:
    for part in path:
        schema = schema.model_fields[part].annotation
    return list(schema.model_fields)
