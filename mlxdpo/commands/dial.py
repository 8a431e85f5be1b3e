"""`mlxdpo dial RUN [--judge NAME] [--strength S ...]`, `mlxdpo merge RUN RUN --out RUN`"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from mlxdpo.commands.eval import AS_IT_IS, Answering, Data, rewards_of
from mlxdpo.runs import Run
from mlxdpo.types import UserError

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
    """Measure a run at several strengths of its adapter and recommend one; nothing is trained.

    Strength 0 is the model before tuning, 1 the run as trained. Use one with generate, eval, frontier or export
    --strength. Writes RUN/eval/dial.json.

    Args:
        path: Run directory.
        judge: Judge that compares answers before and after, as for `mlxdpo eval`; default: held-out loss.
        strength: A strength to measure; repeat it for several. Unset: 0 to 2 in eight steps.
        data: Held-out pairs; default: those of the run's recipe.
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
        console.print(f"talk to it: mlxdpo chat {path} --strength {found.recommended:g}", markup=False)


def merge(
    *paths: Path,
    out: Path,
    weight: list[float] | None = None,
    method: Literal["linear", "ties", "dare_linear", "dare_ties"] = "linear",
    density: float = 0.5,
    seed: int = 0,
) -> None:
    """Merge the LoRA adapters of several runs, or of a run and its base, into a run directory; nothing is trained.

    Args:
        paths: Run directories with one base model; one alone with --weight is the run at that strength.
        out: Run directory to create.
        weight: Weight of each run, in their order; repeat it. Unset: equal shares, 1 in all (1 each for ties and dare).
        method: linear is the exact weighted sum; ties, dare_linear and dare_ties are PEFT's.
        density: Share of the entries that ties and dare keep.
        seed: Seed of dare's random choice.
    """
    from mlxdpo.commands.terminal import console
    from mlxdpo.inference.mixtures import merge_runs
    from mlxdpo.model.adapters import read_settings

    if not paths:
        raise UserError("no run named; expected mlxdpo merge RUN RUN --out RUN")
    made = merge_runs([Run.open(path) for path in paths], out, weight, method, density, seed)
    rank, kept = read_settings(made.adapter).rank, made.manifest()["made_of"].get("kept")
    words = "" if kept is None else f", which keeps {kept:.1%} of the {method} merge"
    console.print(f"{out} holds {len(paths)} runs, merged: rank {rank}{words}", markup=False)
    if not made.config().data.eval and not made.config().data.eval_fraction:
        console.print("the runs held out different pairs; evaluate it with --data", style="yellow", markup=False)
    console.print(f"talk to it: mlxdpo chat {out}", markup=False)
    console.print(f"ship it: mlxdpo export {out} --to mlx,gguf --out exported", markup=False)
