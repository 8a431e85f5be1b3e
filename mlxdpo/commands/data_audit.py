"""`mlxdpo data audit D --model M [--out FILE --drop FLAG --flip --select RULE] [--test]`"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from mlxdpo.commands.data_check import CheckConfig
from mlxdpo.config import LoraConfig, LossConfig, OptimConfig, TrainConfig
from mlxdpo.types import Preference, UserError

if TYPE_CHECKING:
    from mlxdpo.data.findings import Audit


class AuditConfig(CheckConfig):
    """What is audited, with which model; the rest is how --test trains."""

    loss: LossConfig = LossConfig()
    lora: LoraConfig = LoraConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()


NOTHING = AuditConfig()  # no setting given
Folds = Annotated[int, Parameter(validator=validators.Number(gte=2))]
Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]
Share = Annotated[float, Parameter(validator=validators.Number(gt=0.5, lt=1))]


def run(
    path: str,
    /,
    *,
    config: Annotated[AuditConfig, Parameter(name="*")] = NOTHING,
    findings: Path | None = None,
    out: Path | None = None,
    drop: list[str] | None = None,
    flip: bool = False,
    select: str | None = None,
    test: bool = False,
    seeds: Count = 2,
    folds: Folds = 5,
    sure: Share = 0.75,
    batch_size: Count = 8,
    json: bool = False,
) -> int:
    """Audit every pair with a model: labels that the other pairs contradict, near-duplicates, and more.

    One pass over the data for the model's hidden states, one for the reference's log-probs, which training reuses from
    the cache. Nothing is removed unless requested.

    With --test every rule of --select is tried: short runs of equal steps (--train.steps, default 40) on half the pairs
    by each rule, on all of them, and on half at random, compared on held-out pairs. Writes NAME.pilot.json next to the
    findings after each run; the same command resumes.

    Args:
        path: File, folder or Hub dataset id of pairs.
        config: Settings; --model is needed.
        findings: Output file of findings, JSON lines, a line for each pair; next to the data file by default.
        out: Output file of the pairs after --drop, --flip and --select, JSON lines.
        drop: Drop pairs with this flag: flip, near-duplicate, contradictory, off-template; repeat it for several.
        flip: Exchange the answers of pairs flagged flip.
        select: Keep a share of the pairs by a rule NAME:SHARE: agreed, hard, easy, low-ches, diverse.
        test: Compare the rules, or the one of --select, with random pairs of equal number, by training on each.
        seeds: Runs with --test for each selection.
        folds: Parts of the data; each part's labels are judged by a model fitted on the others.
        sure: Flag a label from this probability of being wrong.
        batch_size: Pairs computed at once.
        json: Print the summary as JSON.
    """
    from mlxdpo.data.findings import chosen_rows

    _check_options(config, out, bool(drop or flip), select, test, seeds)
    chosen_rows([], drop or (), flip, None)  # refused before the work begins
    place = _findings_file(path, findings, out)
    if test:
        return _test_rules(path, config, place, select, seeds, folds, sure, batch_size, json)
    rows, audit = _write_findings(path, config, place, folds, sure, batch_size, json)
    if out is not None:
        _write_pairs(rows, audit, out, drop or (), flip, select, json)
    return 0


def _write_findings(
    path: str, config: AuditConfig, place: Path, folds: int, sure: float, batch_size: int, json: bool
) -> tuple[list[Preference], Audit]:
    """The pairs and what was found on them; it is printed, and `place` has a line for each pair."""
    from mlxdpo.commands.terminal import console
    from mlxdpo.data.findings import audit_pairs
    from mlxdpo.io.atomic import write_text
    from mlxdpo.io.json_file import json_lines

    rows, given, _ = _read_audit_input(path, config, batch_size)
    audit = audit_pairs(rows, given, folds, sure)
    write_text(place, json_lines(audit.rows))
    if json:
        print(jsonlib.dumps(audit.summary | {"findings": str(place)}, ensure_ascii=False))
    else:
        for line in audit_sentences(audit):
            console.print(line, markup=False)
        console.print(f"findings of {len(rows)} pairs -> {place}", markup=False)
    return rows, audit


def _write_pairs(
    rows: Sequence[Preference],
    audit: Audit,
    out: Path,
    drop: Collection[str],
    flip: bool,
    select: str | None,
    json: bool,
) -> None:
    """The pairs that are left. Raises `UserError` for none."""
    from mlxdpo.commands.terminal import console
    from mlxdpo.data.findings import chosen_rows
    from mlxdpo.io.atomic import write_text
    from mlxdpo.io.json_file import json_lines

    left, flipped = chosen_rows(audit.rows, drop, flip, select)
    if not left:
        raise UserError(f"{out}: --drop and --select leave no pair; nothing was written")
    write_text(out, json_lines(_row_with_probability(rows[i], audit.rows[i], i in flipped) for i in left))
    if not json:
        console.print(f"{len(left)} of {len(rows)} pairs, {len(flipped)} of them exchanged -> {out}", markup=False)


def _check_options(
    config: AuditConfig, out: Path | None, changes: bool, select: str | None, test: bool, seeds: int
) -> None:
    """Refuse options that would have no effect together, and a rule that does not exist."""
    from mlxdpo.data.findings import selected

    if select:
        selected([], select)
    if test:
        if out is not None or changes:
            raise UserError("--test writes no pairs: leave out --out, --drop and --flip, and follow its next command")
        return
    if (changes or select is not None) != (out is not None):
        raise UserError("--out FILE requires --drop, --flip or --select, and vice versa")
    trains = [name for name in ("loss", "lora", "optim", "train") if getattr(config, name) != getattr(NOTHING, name)]
    if trains or seeds != 2:
        raise UserError(f"{f'{trains[0]} settings have' if trains else '--seeds has'} no effect without --test")


def _test_rules(
    path: str,
    config: AuditConfig,
    place: Path,
    select: str | None,
    seeds: int,
    folds: int,
    sure: float,
    batch_size: int,
    json: bool,
) -> int:
    """The audit of the pairs that are not held out, and the pilot on them."""
    from mlxdpo.commands.audit_pilot import compare_rules, pilot_config
    from mlxdpo.data.findings import audit_pairs

    data = config.data.model_copy(update={"path": path})
    recipe = pilot_config(data, config.model, config.loss, config.lora, config.optim, config.train)
    rows, given, heldout = _read_audit_input(path, config, batch_size, test=True)
    findings = audit_pairs(rows, given, folds, sure).rows
    name = place.name.removesuffix(".jsonl").removesuffix(".audit") + ".pilot.json"
    return compare_rules(recipe, rows, heldout, findings, select, seeds, place.with_name(name), json)


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


def _read_audit_input(
    path: str, config: AuditConfig, batch_size: int, test: bool = False
) -> tuple[list[Preference], Any, list[Preference]]:
    """The pairs that fit, what findings are made from, and held-out pairs that fit (none without `test`).

    Raises `UserError` for trajectories, without a model, and where a test has no held-out pairs.
    """
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
    rows, heldout = _held_out(rows, data) if test else (rows, [])
    policy, encoding = load_policy(config.model), Report()
    digest = None
    if config.model.adapter:
        load_adapter(policy.model, Path(config.model.adapter))
        digest = folder_digest(Path(config.model.adapter))
    encoded = lambda row: encode(row, policy.tokenizer, data, encoding, eos_ids=policy.eos_ids)  # noqa: E731
    fitting = [(row, example) for row in rows if (example := encoded(row)) is not None]
    heldout = [row for row in heldout if encoded(row) is not None]
    if not fitting or (test and not heldout):
        raise UserError(f"{path}: no rows left after encoding ({'; '.join(encoding.lines())})")
    examples = [example for _, example in fitting]
    check_takes(policy, longest_row(examples), largest_token(examples))
    for line in [*policy.reading.notes, *report.lines(), *encoding.lines()]:
        warn(line)
    progress = partial(track, description="reading", console=console, transient=True, disable=not console.is_terminal)
    given = audit_input(policy, digest, examples, data.group, batch_size, progress)
    return [row for row, _ in fitting], given, heldout


def _held_out(rows: list[Preference], data: Any) -> tuple[list[Preference], list[Preference]]:
    """(pairs to train on, held-out pairs), of `data.eval` or a share of the prompts; no prompt is in both."""
    from mlxdpo.data.read import heldout_source, prompt_key, read_pairs, split_heldout

    source = heldout_source(data)
    if source is None:
        rows, heldout = split_heldout(rows, data.eval_fraction, TrainConfig().seed)
    else:
        heldout, _ = read_pairs(data, *source)
        prompts = {prompt_key(row.prompt) for row in heldout}
        rows = [row for row in rows if prompt_key(row.prompt) not in prompts]
    if not heldout or not rows:
        raise UserError("--test needs held-out pairs and others: set data.eval_fraction or data.eval")
    return rows, heldout


def audit_sentences(audit: Audit) -> list[str]:
    """What was found, in words with counts."""
    from mlxdpo.data.findings import FLAGS

    found = audit.summary
    lines = [f"{count} x {flag}: {FLAGS[flag]}" for flag, count in found["flags"].items() if count]
    lines.append(
        f"the other pairs agree with {found['agreement']:.0%} of the labels, and about {found['wrong_labels']:.0%} are "
        f"wrong; form alone (length, lists, headings, ...) agrees with {found['form_accuracy']:.0%}, and chosen is the "
        f"longer one in {found['longer']:.0%}"
    )
    lines.append(
        f"the model finds the chosen answer likelier in {found['reference_accuracy']:.0%}; in "
        f"{found['displacement_expected']:.0%} the answers are so alike that DPO may lower both (CHES above 0)"
    )
    return lines


def _row_with_probability(row: Preference, finding: Mapping[str, Any], flipped: bool) -> dict[str, Any]:
    """A pair as a row of a data file, with the probability that its label is right."""
    from mlxdpo.inference.selection_pilot import pair_as_json

    right = finding["probability"]
    return pair_as_json(row, flipped) | {"probability": round(1 - right, 4) if flipped else right, "where": row.where}
