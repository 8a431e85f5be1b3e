"""`mlxdpo data check D [--model M]`: the data doctor; `mlxdpo data formats [--json]`: the row shapes."""

from __future__ import annotations

import json as jsonlib
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, NamedTuple

from cyclopts import Parameter

from mlxdpo.config import DataConfig, ModelConfig, Section, TrainConfig
from mlxdpo.data.report import Report
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
    """Describe preference data and its problems; with a model also lengths in tokens and one pair.

    Exit status 2 if a bad row would stop `mlxdpo train`, held-out rows included.

    Args:
        path: File, folder or Hub dataset id.
        config: Settings.
        json: Machine-readable.
    """
    from mlxdpo.data.check import check_rows, finding_lines
    from mlxdpo.data.read import heldout_prompts, heldout_source, prompt_key, read_preferences
    from mlxdpo_eval.metrics.sequential import minimum_detectable

    data = config.data.model_copy(update={"path": path, "on_bad_row": "skip"})
    rows, report = read_preferences(data)
    source, told = heldout_source(data), Report()
    heldout, told = (None, told) if source is None else read_preferences(data, *source)
    seen = _as_seen(rows, data, config.model) if config.model.path else None
    every = {prompt_key(row.prompt) for row in rows}
    drawn = heldout_prompts(every, data.eval_fraction, TrainConfig().seed)
    held = len(drawn if heldout is None else {prompt_key(row.prompt) for row in heldout})
    found = check_rows(
        rows,
        report,
        path,
        heldout,
        seen and seen.counts,
        data.max_length if seen else None,
        held,
        minimum_detectable(held) if held else None,
    )
    bad = sum(map(_stopping, (report, told, seen.report if seen else Report())))
    if json:
        extra = {"would_stop": bad, "first_pair": None if seen is None else seen.first._asdict()}
        print(jsonlib.dumps(found.as_dict() | extra, indent=2, ensure_ascii=False))
    else:
        lines = [*finding_lines(found), *(f"Held-out data: {line}." for line in told.lines())]
        _show_findings(lines, seen, bad, path)
    return 2 if bad and config.data.on_bad_row == "stop" else 0


def _stopping(report: Report) -> int:
    """Bad rows at which a training stops; those that a setting drops, or that state no preference, are none."""
    from mlxdpo.data.reasons import NO_PREFERENCE, TOO_LONG

    return sum(count for reason, count in report.refused.items() if reason not in NO_PREFERENCE | TOO_LONG)


class Seen(NamedTuple):
    """Rows as the model sees them: lengths of prompt and completions before any limit, the first row, remarks."""

    counts: list[tuple[int, ...]]
    first: Shown
    report: Report
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
        raise UserError(f"{data.path}: no rows left after encoding ({'; '.join(report.lines())})")
    names = ("chosen", "rejected") if isinstance(rows[0], Preference) else ("completion",)
    counts = [lengths[: 1 + len(names)] for lengths in token_counts(unlimited)]
    return Seen(counts, shown_example(limited[0], tokenizer), report, names)


def _show_findings(sentences: list[str], seen: Seen | None, bad: int, path: str) -> None:
    from mlxdpo.commands.terminal import console, show_pair

    for sentence in sentences:
        console.print(sentence, soft_wrap=True)
    if seen is None:
        console.print("Pass --model to see lengths in tokens and the first row as the model sees it.")
    else:
        for line in seen.report.lines():
            console.print(f"encoding: {line}", style="yellow")
        console.print("The first row, as the model sees it (scored tokens underlined, or between [[ ]]):")
        show_pair(seen.first, seen.names)
    if bad:
        rows = "1 bad row would stop" if bad == 1 else f"{bad} bad rows would stop"
        command = f"mlxdpo data check {shlex.quote(path)} --data.on-bad-row skip"
        remedy = f"fix the rows above, or skip them: `{command}`; train takes the same option"
        console.print(f"{rows} a training: {remedy}", style="yellow", soft_wrap=True)


def list_formats(*, json: bool = False) -> None:
    """List the supported row shapes, in the order of detection.

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
