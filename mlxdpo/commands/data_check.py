"""`mlxdpo data check D [--model M]`: the data doctor; `mlxdpo data formats [--json]`: the row shapes."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

from cyclopts import Parameter

from mlxdpo.config import DataConfig, ModelConfig, Section
from mlxdpo.types import Preference, UnpairedExample, UserError

if TYPE_CHECKING:
    from mlxdpo.data.encode import Shown

NO_LIMIT = 10**9  # tokens


class CheckConfig(Section):
    """What is checked, with which tokenizer."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()


NOTHING = CheckConfig()  # no setting given


def run(path: str, /, *, config: Annotated[CheckConfig, Parameter(name="*")] = NOTHING, json: bool = False) -> int:
    """Say what is in preference data and what is wrong with it; with a model also lengths in tokens and one pair.

    Exit status 2 when a bad row would stop `mlxdpo train`.

    Args:
        path: File, folder or Hub dataset id.
        config: Settings.
        json: Machine-readable.
    """
    from mlxdpo.data.check import check_rows, finding_lines
    from mlxdpo.data.read import heldout_source, read_preferences
    from mlxdpo.data.reasons import NO_PREFERENCE

    data = config.data.model_copy(update={"path": path, "on_bad_row": "skip"})
    rows, report = read_preferences(data)
    source = heldout_source(data)
    heldout = None if source is None else read_preferences(data, *source)[0]
    seen = _as_seen(rows, data, config.model) if config.model.path else None
    found = check_rows(rows, report, path, heldout, seen and seen.counts, data.max_length if seen else None)
    bad = sum(n for reason, n in found.refused.items() if reason not in NO_PREFERENCE)
    if json:
        extra = {"would_stop": bad, "first_pair": None if seen is None else seen.first._asdict()}
        print(jsonlib.dumps(found.as_dict() | extra, indent=2, ensure_ascii=False))
    else:
        _show_findings(finding_lines(found), seen, bad)
    return 2 if bad else 0


class Seen(NamedTuple):
    """Rows as the model sees them: lengths of prompt and completions before any limit, the first row, remarks."""

    counts: list[tuple[int, ...]]
    first: Shown
    remarks: list[str]
    names: tuple[str, ...]


def _as_seen(rows: Sequence[Preference | UnpairedExample], data: DataConfig, model: ModelConfig) -> Seen:
    from mlxdpo.data.dataset import token_counts
    from mlxdpo.data.encode import encode_all, shown_example
    from mlxdpo.model.policy import find_model, load_tokenizer

    tokenizer = load_tokenizer(find_model(model.path, model.revision), model.path, model.trust_remote_code)
    # The tokens as they are before any limit, so that rows over it can be counted.
    unlimited, _ = encode_all(rows, tokenizer, data.model_copy(update={"max_length": NO_LIMIT}))
    limited, report = encode_all(rows, tokenizer, data)
    if not limited:
        raise UserError(f"{data.path}: no row is left after encoding ({'; '.join(report.lines())})")
    names = ("chosen", "rejected") if isinstance(rows[0], Preference) else ("completion",)
    counts = [lengths[: 1 + len(names)] for lengths in token_counts(unlimited)]
    return Seen(counts, shown_example(limited[0], tokenizer), report.lines(), names)


def _show_findings(sentences: list[str], seen: Seen | None, bad: int) -> None:
    from mlxdpo.commands.terminal import console, show_pair

    for sentence in sentences:
        console.print(sentence)
    if seen is None:
        console.print("Pass --model to see lengths in tokens and the first row as the model sees it.")
    else:
        for line in seen.remarks:
            console.print(f"encoding: {line}", style="yellow")
        console.print("The first row, as the model sees it (scored tokens underlined, or between [[ ]]):")
        show_pair(seen.first, seen.names)
    if bad:
        console.print(f"{bad} bad rows: mend them, or train with --data.on-bad-row skip", style="yellow")


def list_formats(*, json: bool = False) -> None:
    """List the row shapes that are understood, in the order of detection.

    Args:
        json: Machine-readable.
    """
    from rich.table import Table

    from mlxdpo.commands.terminal import console
    from mlxdpo.data.formats import FORMATS

    rows = [
        {"name": f.name, "columns": list(f.columns), "about": f.about, "example": f.example} for f in FORMATS.values()
    ]
    if json:
        print(jsonlib.dumps(rows, indent=2))
        return
    table = Table("data.format", "columns", "what", "as in")
    for row in rows:
        table.add_row(row["name"], ", ".join(row["columns"]), row["about"], row["example"])
    console.print(table)
