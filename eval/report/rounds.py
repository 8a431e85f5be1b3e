"""Rounds side by side: as cells of a table for terminal, app and page, and the page itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mlxdpo import as_written, read_json, write_text
from mlxdpo_eval.report.blocks import Document, Sample, Section, Table, both, number, within
from mlxdpo_eval.report.html import page
from mlxdpo_eval.report.markdown import markdown
from mlxdpo_eval.report.plots import over_rounds

Rows = Sequence[Mapping[str, Any]]
SHOWN = 6  # samples: the first ones, not the best ones
NOTE = (
    "The same held-out prompts and noise in every round; 95 % intervals clustered by prompt; KL to where round 1 "
    "started, along each round's own answers, nats per answer (per token in brackets)."
)


def header(rows: Rows) -> tuple[str, ...]:
    """The names of the columns."""
    judges = [judge["name"] for judge in rows[-1]["judges"]]
    return ("round", "pairs", *(h for name in judges for h in (name, f"{name}, change from the start")), "KL", "length")


def cells(rows: Rows) -> list[tuple[str, ...]]:
    """A line for the start and each round, for the columns of `header`."""
    return [_line(row) for row in rows]


def _line(row: Mapping[str, Any]) -> tuple[str, ...]:
    name = f"{row['run']}" if row["round"] else "start"
    judged = [cell for judge in row["judges"] for cell in (_mean(judge), _change(judge["from_start"]))]
    drift = f"{row['kl']:.2f} ({row['kl_per_token']:.3f})" if row["round"] else "0"
    pairs = str(row["collected"]["rows"]) if row["round"] else "–"
    return (name, pairs, *judged, drift, number(row["texts"]["length"]))


def _mean(judge: Mapping[str, Any]) -> str:
    return both(judge["mean"], judge["interval"])


def _change(change: Mapping[str, Any] | None) -> str:
    return "–" if change is None else both(change["estimate"], change, "+")


def verdict(found: Mapping[str, Any]) -> tuple[str, str]:
    """Better, worse, or cannot tell yet, of the round that is kept; and the sentence with its numbers."""
    rows, kept = found["rounds"], found["kept"]
    if not kept:
        return "cannot tell yet", f"No round is kept: {found['stopped']}."
    judge = rows[kept]["judges"][0]
    change = judge["from_start"]
    if change is None:
        return "cannot tell yet", f"Cannot tell yet: too few prompts for an interval; {kept} rounds done."
    word = "better" if change["low"] > 0 else "worse" if change["high"] < 0 else "cannot tell yet"
    facts = f"{judge['name']} {number(change['estimate'], '+')} {within(change, '+')} against the start"
    why = f"; stopped: {found['stopped']}" if found["stopped"] else ""
    return word, f"{word.capitalize()}: round {kept}, {facts}{why}."


def write_rounds(folder: Path) -> Path:
    """`report.html` and `report.md` of a folder of rounds, from its files alone; returns the HTML file."""
    found = read_json(folder / "rounds.json")
    with as_written(folder / "rounds.json", "run `mlxdpo iterate` again"):
        document = _document(folder, found)
    write_text(folder / "report.md", markdown(document))
    write_text(folder / "report.html", page(document))
    return folder / "report.html"


def _document(folder: Path, found: Mapping[str, Any]) -> Document:
    rows, (word, sentence) = found["rounds"], verdict(found)
    kept = rows[found["kept"]]
    names = [judge["name"] for judge in kept["judges"]]
    asked = found["asked_for"]
    mode = f"online, {found['every']} steps a round" if found["every"] else "whole rounds"
    subtitle = f"{len(rows) - 1} of {asked} rounds ({mode}), reference: {found['reference']}; ranked by {names[0]}"
    tiles = [(judge["name"], number(judge["mean"]), within(judge["interval"])) for judge in kept["judges"]]
    tiles.append(("KL from the start", f"{kept['kl']:.2f} nats", within(kept["kl_interval"])))
    sections = [
        Section("Rounds side by side", [Table(header(rows), cells(rows), NOTE), over_rounds(rows)]),
        Section("What was collected", [_collected(rows)]),
        Section(f"Answers at the start and after round {found['kept']}", list(_samples(folder, found["kept"], rows))),
    ]
    return Document(folder.name, word, sentence, subtitle, tiles, sections)


def _collected(rows: Rows) -> Table:
    lines = []
    for row in rows[1:]:
        found = row["collected"]
        out = {**found["answers_left_out"], **found["prompts_without_pair"]}
        why = "; ".join(f"{count} {reason}" for reason, count in out.items()) or "none"
        lines.append((row["run"], str(found["rows"]), str(found["answers"]), number(found["mean_score"]), why))
    return Table(("round", "pairs", "answers", "mean score", "left out"), lines)


def _samples(folder: Path, kept: int, rows: Rows) -> list[Sample]:
    old = read_json(folder / "start.json")["answers"]
    file = folder / rows[kept]["run"] / "eval" / "round.json" if kept else folder / "start.json"
    new = read_json(file)["answers"]
    seen: dict[str, Sample] = {}
    for before, after in zip(old, new, strict=True):
        note = f"scores {before['scores']} before, {after['scores']} after"
        seen.setdefault(before["prompt_id"], Sample(before["prompt"], before["text"], after["text"], note))
    return list(seen.values())[:SHOWN]
