"""The prompts to answer: rows with a prompt alone, or rows of any known shape whose answers are left aside;
and who answers: a run's model before or after tuning, or the model of a recipe, with what rows say of it."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.config import Config, DataConfig
from mlxdpo.data import fields
from mlxdpo.data.fields import asked_prompt, prompt_of_row
from mlxdpo.data.formats import detect
from mlxdpo.data.read import Item, prompt_key, stream_preferences
from mlxdpo.data.report import BadRow, Report
from mlxdpo.data.sources import Found, read_rows
from mlxdpo.data.template import template_digest
from mlxdpo.io.digest import folder_digest
from mlxdpo.model.adapters import load_adapter, load_run, load_start
from mlxdpo.model.policy import Policy, load_policy
from mlxdpo.runs import Run
from mlxdpo.types import Preference, Text, UserError

REPEATED = "the same prompt as in an earlier row"


class Asked(NamedTuple):
    """A prompt to answer, the tools its template shows, and where it stands."""

    prompt: Text
    where: str
    tools: tuple[Mapping[str, Any], ...] = ()


class Prompts(NamedTuple):
    """Distinct prompts in order; `left_out` counts other rows by reason; `heldout`: keys that must not teach."""

    asked: list[Asked]
    left_out: dict[str, int]
    heldout: frozenset[bytes] = frozenset()

    @property
    def digest(self) -> str:
        """SHA-256 over the prompts in order."""
        return hashlib.sha256(repr([(one.prompt, one.tools) for one in self.asked]).encode()).hexdigest()


def read_prompts(data: DataConfig, path: str | None = None, split: str | None = None) -> Prompts:
    """The distinct prompts of `path` (default `data.path`).

    Raises `UserError` at the first row without a usable prompt (`data.on_bad_row: skip` counts it instead), and when
    none is left.
    """
    source, left_out = path or data.path, dict[str, int]()
    if holds_answers(data, source, split):
        rows, report = stream_preferences(data, source, split)
        found = _answered_prompts(rows)
    else:
        report = Report()
        found = _bare_prompts(read_rows(source, split or data.split), data, report)
    first: dict[bytes, Asked] = {}
    for one in found:
        key = prompt_key(one.prompt)
        if key in first:
            left_out[REPEATED] = left_out.get(REPEATED, 0) + 1
        first.setdefault(key, one)
    if not first:
        raise UserError(f"{source}: none of its rows has a prompt that can be used; {'; '.join(report.lines())}")
    return Prompts(list(first.values()), left_out | dict(report.refused))


def holds_answers(data: DataConfig, path: str, split: str | None = None) -> bool:
    """Whether the rows of a source have answers too, as one of the known shapes."""
    rows = itertools.islice(read_rows(path, split or data.split), 100)
    if data.format != "auto" or data.columns:
        return True
    return any(not isinstance(row, BadRow) and detect(row) is not None for _, row in rows)


def _answered_prompts(rows: Iterable[Item]) -> Iterator[Asked]:
    return (Asked(row.prompt, row.where, tuple(row.tools)) for row in rows)


def _bare_prompts(found: Iterable[Found], data: DataConfig, report: Report) -> Iterator[Asked]:
    for where, row in found:
        report.read += 1
        try:
            if isinstance(row, BadRow):
                raise row
            if "prompt" not in row:
                raise BadRow("no prompt", f'"prompt" is missing; the row has {fields.column_names(row)}')
            read = {name: fields.parsed(value) for name, value in row.items()}
            yield Asked(asked_prompt(prompt_of_row(read, "prompt")), where, fields.tools(read.get("tools")))
        except BadRow as bad:
            report.refuse(where, bad, data.on_bad_row)


def as_rows(asked: Iterable[Asked]) -> list[Preference]:
    """Prompts as rows without answers, for what reads rows."""
    return [Preference(one.prompt, "", "", one.where, one.tools) for one in asked]


class PolicySource(NamedTuple):
    """A loaded policy, how its text is written, and what rows say of it (run, digests)."""

    policy: Policy
    data: DataConfig
    made: Mapping[str, Any]


def policy_source(policy: Policy, data: DataConfig, name: str, adapter: Path | None) -> PolicySource:
    """A loaded policy as a source; `adapter` is the folder of the adapter it has, if any."""
    own = {name: policy.identity[name] for name in ("digest", "dtype", "quantization")}
    digest = None if adapter is None else folder_digest(adapter)
    made = {"run": name, "model": own, "adapter": digest, "template": template_digest(policy.tokenizer, data)}
    return PolicySource(policy, data, made)


def source_of(run: Run, before: bool = False) -> PolicySource:
    """A run's tuned model, or the one it started from."""
    policy, start = (load_start(run) if before else load_run(run)), run.config().model.adapter
    adapter = Path(start) if before and start else run.adapter
    return policy_source(policy, run.config().data, run.path.name, None if before and not start else adapter)


def start_source(config: Config, name: str) -> PolicySource:
    """The model of a recipe as it is before any training, with the adapter it starts from."""
    policy, adapter = load_policy(config.model), config.model.adapter
    if adapter is not None:
        load_adapter(policy.model, Path(adapter))
    return policy_source(policy, config.data, name, None if adapter is None else Path(adapter))
