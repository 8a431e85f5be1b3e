"""Rounds side by side: as cells of a table for terminal, app and page, and the page itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxdpo.inner import as_written, read_json
from mlxdpo_eval.report.blocks import Document, Part, SampleBlock, Table, bounded, bounds, decimal
from mlxdpo_eval.report.plots import scores_over_rounds
from mlxdpo_eval.report.write import write_pages

Rows = Sequence[Mapping[str, Any]]
SHOWN = 6  # samples: the first ones, not the best ones
NOTE = (
    "The same held-out prompts and noise in every round; 95 % intervals clustered by prompt; KL to where round 1 "
    "started, along each round's own answers, nats per answer (per token in brackets)."
)


def round_columns(rows: Rows) -> tuple[str, ...]:
    """The names of the columns."""
    judges = [judge["name"] for judge in rows[-1]["judges"]]
    return ("round", "pairs", *(h for name in judges for h in (name, f"{name}, change from the start")), "KL", "length")


def round_cells(rows: Rows) -> list[tuple[str, ...]]:
    """A line for the start and each round, for the columns of `round_columns`."""
    lines = []
    for row in rows:
        judged: list[str] = []
        for judge in row["judges"]:
            change = judge["from_start"]
            judged.append(bounded(judge["mean"], judge["interval"]))
            judged.append("–" if change is None else bounded(change["estimate"], change, "+"))
        drift = f"{row['kl']:.2f} ({row['kl_per_token']:.3f})" if row["round"] else "0"
        name, pairs = (f"{row['run']}", str(row["collected"]["rows"])) if row["round"] else ("start", "–")
        lines.append((name, pairs, *judged, drift, decimal(row["texts"]["length"])))
    return lines


def rounds_verdict(found: Mapping[str, Any]) -> tuple[str, str]:
    """Better, worse, or cannot tell yet, of the round that is kept; and the sentence with its numbers."""
    rows, kept = found["rounds"], found["kept"]
    if not kept:
        return "cannot tell yet", f"No round is kept: {found['stopped']}."
    judge = rows[kept]["judges"][0]
    change = judge["from_start"]
    if change is None:
        return "cannot tell yet", f"Cannot tell yet: too few prompts for an interval; {kept} rounds done."
    word = "better" if change["low"] > 0 else "worse" if change["high"] < 0 else "cannot tell yet"
    facts = f"{judge['name']} {decimal(change['estimate'], '+')} {bounds(change, '+')} against the start"
    why = f"; stopped: {found['stopped']}" if found["stopped"] else ""
    return word, f"{word.capitalize()}: round {kept}, {facts}{why}."


def write_rounds(folder: Path) -> Path:
    """`report.html` and `report.md` of a folder of rounds, from its files alone; returns the HTML file."""
    found = read_json(folder / "rounds.json")
    with as_written(folder / "rounds.json", "run `mlxdpo iterate` again"):
        return write_pages(folder, _rounds_document(folder, found))


def _rounds_document(folder: Path, found: Mapping[str, Any]) -> Document:
    rows, (word, sentence) = found["rounds"], rounds_verdict(found)
    kept = rows[found["kept"]]
    names = [judge["name"] for judge in kept["judges"]]
    asked = found["asked_for"]
    mode = f"online, {found['every']} steps a round" if found["every"] else "whole rounds"
    subtitle = f"{len(rows) - 1} of {asked} rounds ({mode}), reference: {found['reference']}; ranked by {names[0]}"
    tiles = [(judge["name"], decimal(judge["mean"]), bounds(judge["interval"])) for judge in kept["judges"]]
    tiles.append(("KL from the start", f"{kept['kl']:.2f} nats", bounds(kept["kl_interval"])))
    sections = [
        Part("Rounds side by side", [Table(round_columns(rows), round_cells(rows), NOTE), scores_over_rounds(rows)]),
        Part("What was collected", [_collected_table(rows)]),
        Part(
            f"Answers at the start and after round {found['kept']}", list(_round_samples(folder, found["kept"], rows))
        ),
    ]
    return Document(folder.name, word, sentence, subtitle, tiles, sections)


def _collected_table(rows: Rows) -> Table:
    lines = []
    for row in rows[1:]:
        found = row["collected"]
        out = {**found["answers_left_out"], **found["prompts_without_pair"]}
        why = "; ".join(f"{count} {reason}" for reason, count in out.items()) or "none"
        lines.append((row["run"], str(found["rows"]), str(found["answers"]), decimal(found["mean_score"]), why))
    return Table(("round", "pairs", "answers", "mean score", "left out"), lines)


def _round_samples(folder: Path, kept: int, rows: Rows) -> list[SampleBlock]:
    old = read_json(folder / "start.json")["answers"]
    file = folder / rows[kept]["run"] / "eval" / "round.json" if kept else folder / "start.json"
    new = read_json(file)["answers"]
    seen: dict[str, SampleBlock] = {}
    for before, after in zip(old, new, strict=True):
        note = f"scores {before['scores']} before, {after['scores']} after"
        seen.setdefault(before["prompt_id"], SampleBlock(before["prompt"], before["text"], after["text"], note))
    return list(seen.values())[:SHOWN]
