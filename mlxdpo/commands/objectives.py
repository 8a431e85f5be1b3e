"""`mlxdpo objectives [NAME] [--json | --markdown]`: the registry as tables, also those of docs/objectives.md."""

from __future__ import annotations

import difflib
import inspect
import json as jsonlib
from collections.abc import Iterable
from typing import Any

from mlxdpo.config import LossConfig
from mlxdpo.losses.loss import resolve
from mlxdpo.losses.modifiers import MODIFIERS
from mlxdpo.losses.registry import LOSSES
from mlxdpo.types import UserError

SETTINGS = {
    "f_divergence": "`loss.f_divergence`, `loss.f_alpha`",
    "ld_alpha": "`loss.ld_alpha`",
    "wpo": "`loss.wpo`",
    "reference_free": "`loss.reference_free`",
    "probability": "`data.columns: {probability: ...}`",
    "weight": "`data.columns: {weight: ...}`",
    "margin": "`data.columns: {margin: ...}`",
}


def facts(name: str) -> dict[str, Any]:
    """The facts about an objective, for machines; `start` is at its default knobs, null where no constant."""
    objective, config = LOSSES[name], LossConfig(name=name)
    return {
        "name": name,
        "title": objective.title,
        "arxiv": objective.paper,
        "formula": (objective.function.__doc__ or "").split(": ")[0].strip(),
        "knobs": {knob: getattr(config, knob) for knob in objective.knobs},
        "start": resolve(config).start(),
        "rows": "pairs" if objective.paired else "thumbs",
        "reference": objective.reference,
        "lifts": objective.lifts,
        "over": objective.over,
        "use": objective.use,
        "refuses": dict(objective.refuses),
    }


def objectives_table() -> str:
    """Every objective in Markdown."""
    head = ("loss.name", "what", "paper", "settings and their defaults", "at the start", "reference", "holds chosen up")
    return _markdown(head, [_objective_row(facts(name)) for name in LOSSES])


def _objective_row(found: dict[str, Any]) -> tuple[str, ...]:
    knobs = ", ".join(f"{knob} {value:g}" for knob, value in found["knobs"].items())
    paper = f"[{found['arxiv']}](https://arxiv.org/abs/{found['arxiv']})"
    start = "-" if found["start"] is None else f"{found['start']:.6g}"
    yes = {True: "yes", False: "no"}
    what = f"{found['title']}: {found['use']}"
    return f"`{found['name']}`", what, paper, knobs or "-", start, yes[found["reference"]], yes[found["lifts"]]


def modifiers_table() -> str:
    """Every modifier, how to ask for it, and which objectives refuse it for which reason."""
    rows = []
    for modifier, paper in MODIFIERS.items():
        reasons: dict[str, list[str]] = {}
        for name, objective in LOSSES.items():
            if reason := objective.refuses.get(modifier):
                reasons.setdefault(reason, []).append(f"`{name}`")
        refused = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        link = f"[{paper}](https://arxiv.org/abs/{paper})" if paper else "-"
        rows.append((SETTINGS[modifier], link, refused or "none"))
    return _markdown(("setting", "paper", "refused by"), rows)


def _markdown(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *map(list, rows)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


TABLES = {"objectives": objectives_table, "modifiers": modifiers_table}
"""The tables of docs/objectives.md by their marks: <!-- objectives --> ... <!-- /objectives -->."""


def run(name: str | None = None, /, *, json: bool = False, markdown: bool = False) -> None:
    """List the objectives with their papers, knobs and value before the first step.

    Args:
        name: One objective, with its formula and the modifiers that it refuses.
        json: Machine-readable.
        markdown: The tables of docs/objectives.md.
    """
    from mlxdpo.losses import LOSSES

    if name is not None and name not in LOSSES:
        near = difflib.get_close_matches(name, LOSSES, n=1)
        raise UserError(
            f"{name} is not an objective; {f'did you mean {near[0]}?' if near else 'mlxdpo objectives lists them'}"
        )
    rows = [facts(known) for known in ([name] if name else LOSSES)]
    if json:
        print(jsonlib.dumps(rows, indent=2))
    elif markdown:
        print("\n".join(table() for table in TABLES.values()))
    elif name:
        _show_objective(rows[0], inspect.getdoc(LOSSES[name].function) or "")
    else:
        _list_objectives(rows)


def _list_objectives(rows: list[dict[str, Any]]) -> None:
    from rich.table import Column, Table

    from mlxdpo.commands.terminal import console

    table = Table(Column("loss.name", no_wrap=True), "what", "arXiv", "knobs", "at the start")
    for row in rows:
        knobs = ", ".join(f"{knob} {value:g}" for knob, value in row["knobs"].items())
        start = "" if row["start"] is None else f"{row['start']:.6g}"
        table.add_row(row["name"], row["title"], row["arxiv"], knobs, start)
    console.print(table)


def _show_objective(row: dict[str, Any], formula: str) -> None:
    from mlxdpo.commands.terminal import console
    from mlxdpo.config import LossConfig

    console.print(f"{row['name']}: {row['title']}", style="bold")
    console.print(formula)
    console.print(f"when: {row['use']}")
    for knob, value in row["knobs"].items():
        console.print(f"--loss.{knob.replace('_', '-')} {value:g}: {LossConfig.model_fields[knob].description}")
    for modifier, reason in row["refuses"].items():
        console.print(f"not with {modifier}: {reason}")
