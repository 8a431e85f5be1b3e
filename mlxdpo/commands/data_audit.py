"""`mlxdpo data audit D --model M [--out FILE --drop FLAG --flip --select RULE]`"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from mlxdpo.commands.data_check import CheckConfig
from mlxdpo.types import Preference, UserError

if TYPE_CHECKING:
    from mlxdpo.data.findings import Audit

NOTHING = CheckConfig()  # no setting given
Folds = Annotated[int, Parameter(validator=validators.Number(gte=2))]
Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]
Share = Annotated[float, Parameter(validator=validators.Number(gt=0.5, lt=1))]


def run(
    path: str,
    /,
    *,
    config: Annotated[CheckConfig, Parameter(name="*")] = NOTHING,
    findings: Path | None = None,
    out: Path | None = None,
    drop: list[str] | None = None,
    flip: bool = False,
    select: str | None = None,
    folds: Folds = 5,
    sure: Share = 0.75,
    batch_size: Count = 8,
    json: bool = False,
) -> None:
    """Audit every pair with a model: labels that the other pairs contradict, near-duplicates, and more.

    One pass over the data for the model's hidden states, one for the reference's log-probs, which training reuses from
    the cache. Nothing is removed unless requested.

    Args:
        path: File, folder or Hub dataset id of pairs.
        config: Settings; --model is needed.
        findings: Output file of findings, JSON lines, a line for each pair; next to the data file by default.
        out: Output file of the pairs after --drop, --flip and --select, JSON lines.
        drop: Drop pairs with this flag: flip, near-duplicate, contradictory, off-template; repeat it for several.
        flip: Exchange the answers of pairs flagged flip.
        select: Keep a share of the pairs by a rule NAME:SHARE: agreed, hard, easy, low-ches, diverse.
        folds: Parts of the data; each part's labels are judged by a model fitted on the others.
        sure: Flag a label from this probability of being wrong.
        batch_size: Pairs computed at once.
        json: Print the summary as JSON.
    """
    from mlxdpo.commands.terminal import console
    from mlxdpo.data.findings import audit_pairs, chosen_rows
    from mlxdpo.io.atomic import write_text
    from mlxdpo.io.json_file import json_lines

    wanted = bool(drop or flip or select)
    if wanted != (out is not None):
        raise UserError("--out FILE requires --drop, --flip or --select, and vice versa")
    chosen_rows([], drop or (), flip, None)  # refused before the work begins
    place = _findings_file(path, findings, out)
    rows, given = _read_audit_input(path, config, batch_size)
    audit = audit_pairs(rows, given, folds, sure)
    write_text(place, json_lines(audit.rows))
    if json:
        print(jsonlib.dumps(audit.summary | {"findings": str(place)}, ensure_ascii=False))
    else:
        for line in audit_sentences(audit):
            console.print(line, markup=False)
        console.print(f"findings of {len(rows)} pairs -> {place}", markup=False)
    if out is not None:
        left, flipped = chosen_rows(audit.rows, drop or (), flip, select)
        if not left:
            raise UserError(f"{out}: --drop and --select leave no pair; nothing was written")
        write_text(out, json_lines(_row_as_json(rows[i], audit.rows[i], i in flipped) for i in left))
        if not json:
            console.print(f"{len(left)} of {len(rows)} pairs, {len(flipped)} of them exchanged -> {out}", markup=False)


def _findings_file(path: str, findings: Path | None, out: Path | None) -> Path:
    if findings is None and not Path(path).is_file():
        raise UserError(
            f"{path} is not a file, so there is no default place for the findings; name one with --findings"
        )
    place = findings or Path(path).with_suffix(".audit.jsonl")
    for one in filter(None, (place, out)):
        if one.exists() and one != place:
            raise UserError(f"{one} already exists; choose another --out, or remove it")
    if findings is not None and findings.exists() and findings.samefile(path):
        raise UserError(f"--findings {findings} is the data file; name another file")
    return place


def _read_audit_input(path: str, config: CheckConfig, batch_size: int) -> tuple[list[Preference], Any]:
    """The pairs that fit, and what findings are made from. Raises `UserError` for trajectories, and without a model."""
    from functools import partial

    from rich.progress import track

    from mlxdpo.commands.terminal import console, warn
    from mlxdpo.data.encode import encode
    from mlxdpo.data.examples import largest_token, longest_row
    from mlxdpo.data.read import read_pairs
    from mlxdpo.data.report import Report
    from mlxdpo.inference.pair_states import audit_input
    from mlxdpo.io.digest import folder_digest
    from mlxdpo.model.adapters import load_adapter
    from mlxdpo.model.limits import check_takes
    from mlxdpo.model.policy import load_policy

    if not config.model.path:
        raise UserError("no model given; pass --model, such as the one that will be trained")
    data = config.data.model_copy(update={"path": path})
    rows, report = read_pairs(data)
    if (turns := next((row for row in rows if row.context is not None), None)) is not None:
        raise UserError(
            f"{turns.where}: a trajectory of several turns; the audit supports only pairs of single answers"
        )
    policy, encoding = load_policy(config.model), Report()
    digest = None
    if config.model.adapter:
        load_adapter(policy.model, Path(config.model.adapter))
        digest = folder_digest(Path(config.model.adapter))
    found = [(row, encode(row, policy.tokenizer, data, encoding, eos_ids=policy.eos_ids)) for row in rows]
    fitting = [(row, example) for row, example in found if example is not None]
    if not fitting:
        raise UserError(f"{path}: no rows left after encoding ({'; '.join(encoding.lines())})")
    examples = [example for _, example in fitting]
    check_takes(policy, longest_row(examples), largest_token(examples))
    for line in [*policy.reading.notes, *report.lines(), *encoding.lines()]:
        warn(line)
    progress = partial(track, description="reading", console=console, transient=True, disable=not console.is_terminal)
    return [row for row, _ in fitting], audit_input(policy, digest, examples, data.group, batch_size, progress)


def audit_sentences(audit: Audit) -> list[str]:
    """What was found, in words with counts."""
    from mlxdpo.data.findings import FLAGS

    found = audit.summary
    lines = [f"{count} x {flag}: {FLAGS[flag]}" for flag, count in found["flags"].items() if count]
    lines.append(
        f"the other pairs agree with {found['agreement']:.0%} of the labels; form alone (length, lists, headings, ...) "
        f"with {found['form_accuracy']:.0%}, and chosen is the longer one in {found['longer']:.0%}"
    )
    lines.append(
        f"the model finds the chosen answer likelier in {found['reference_accuracy']:.0%}; in "
        f"{found['displacement_expected']:.0%} the answers are so alike that DPO may lower both (CHES above 0)"
    )
    return lines


def _row_as_json(row: Preference, finding: Mapping[str, Any], flipped: bool) -> dict[str, Any]:
    """A pair as a row of a data file, with the probability that its label is right."""
    from mlxdpo.inference.run_prompts import text_to_json

    sides: Sequence[Any] = (row.rejected, row.chosen) if flipped else (row.chosen, row.rejected)
    right = finding["probability"]
    found: dict[str, Any] = {"prompt": text_to_json(row.prompt)}
    found |= {name: text_to_json(side) for name, side in zip(("chosen", "rejected"), sides, strict=True)}
    if row.tools:
        found["tools"] = [dict(tool) for tool in row.tools]
    kept = {name: value for name, value in row.columns.items() if name not in found}
    return kept | found | {"probability": round(1 - right, 4) if flipped else right, "where": row.where}
