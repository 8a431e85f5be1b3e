"""`mlxdpo dial RUN [--judge NAME] [--strength S ...]`, `mlxdpo average RUN RUN --out RUN`"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mlxdpo.commands.eval import AS_IT_IS, Answering, Data, rewards_of
from mlxdpo.runs import Run

HEADERS = {
    "strength": "strength",
    "accuracy": "accuracy",
    "margin": "margin",
    "loss": "loss",
    "kl": "KL, nats a sequence",
    "win_rate": "win rate",
}


def run(
    path: Path,
    /,
    *,
    judge: str | None = None,
    strength: list[float] | None = None,
    data: Data = None,
    answering: Annotated[Answering, Parameter(name="*")] = AS_IT_IS,
    json: bool = False,
) -> None:
    """Measure a run at several strengths of its adapter and say which one to take; nothing is trained.

    Strength 0 is the model before tuning, 1 the run as trained. Take one along with generate, eval, frontier or export
    --strength. Writes RUN/eval/dial.json.

    Args:
        path: Run directory.
        judge: Who compares answers before and after: as for `mlxdpo eval`. Without one the held-out loss decides.
        strength: A strength to measure; repeat it for several. Unset: 0 to 2 in eight steps.
        data: Held-out pairs; those of the run's recipe when not given.
        json: Print the points as JSON.
    """
    from rich.table import Table

    from mlxdpo.commands.terminal import console, warn
    from mlxdpo_eval.dial import STRENGTHS, dial_table, sweep_strengths
    from mlxdpo_eval.judges import open_judge
    from mlxdpo_eval.results import to_json
    from mlxdpo_eval.sampling import Sampling

    source = Run.open(path)
    opened = None if judge is None else open_judge(judge, rewards_of(source))
    sampling = Sampling(**answering.model_dump())
    found = sweep_strengths(source, strength or STRENGTHS, sampling, opened, data, warn)
    if json:
        print(jsonlib.dumps(to_json(found), ensure_ascii=False))
        return
    names = [name for name in HEADERS if name != "win_rate" or judge is not None]
    sheet = Table(*(HEADERS[name] for name in names), title=f"{path.name} at several strengths")
    for row in dial_table(found):
        sheet.add_row(*(row[name] for name in names))
    console.print(sheet)
    console.print(f"* take strength {found.recommended:g}: {found.reason}", markup=False)
    if found.recommended not in (0, 1):
        console.print(f"see it: mlxdpo generate {path} --strength {found.recommended:g} --prompt '...'", markup=False)


def average(*paths: Path, out: Path, weight: list[float] | None = None) -> None:
    """Average the LoRA adapters of several runs (seeds, rounds) exactly, as a run directory; nothing is trained.

    Args:
        paths: Run directories with one base model, two or more.
        out: Run directory to make.
        weight: Share of each run, in their order, 1 in all; repeat it. Unset: equal shares.
    """
    from mlxdpo.commands.terminal import console
    from mlxdpo.inference.mixtures import average_runs
    from mlxdpo.model.adapters import read_settings

    made = average_runs([Run.open(path) for path in paths], out, weight)
    rank = read_settings(made.adapter).rank
    console.print(f"{out} holds the average of {len(paths)} runs, rank {rank}", markup=False)
    if not made.config().data.eval and not made.config().data.eval_fraction:
        console.print("the runs held out different pairs; evaluate it with --data", style="yellow", markup=False)
    console.print(f"see it: mlxdpo generate {out} --prompt '...'", markup=False)
