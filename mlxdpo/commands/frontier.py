"""`mlxdpo frontier RUN [RUN ...] --judge NAME`"""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mlxdpo.commands.eval import AS_IT_IS, Answering, rewards_of
from mlxdpo.runs import Run
from mlxdpo.types import UserError


def run(
    *paths: Path,
    judge: str,
    strength: list[float] | None = None,
    answering: Annotated[Answering, Parameter(name="*")] = AS_IT_IS,
    json: bool = False,
) -> None:
    """Measure drift and win rate at every kept checkpoint, and mark those that no other beats.

    Writes RUN/eval/frontier.json, which the run's next report shows. Give runs with several beta to see the objective's
    own frontier; `train.keep_checkpoints` says how many checkpoints a run keeps.

    Args:
        paths: Run directories.
        judge: Judge that compares answers before and after, as for `mlxdpo eval`.
        strength: Measure the run's adapter at this strength instead of the checkpoints; repeat it for several.
        json: Print the points as JSON.
    """
    from mlxdpo.commands.terminal import console, warn
    from mlxdpo_eval.checkpoints import measure_checkpoints, name_points
    from mlxdpo_eval.judges import open_judge
    from mlxdpo_eval.metrics.frontier import pareto_front
    from mlxdpo_eval.results import to_json
    from mlxdpo_eval.sampling import Sampling

    if not paths:
        raise UserError("no run given; name one or more run directories")
    points, sampling = [], Sampling(**answering.model_dump())
    for source in map(Run.open, paths):
        points += name_points(
            measure_checkpoints(source, open_judge(judge, rewards_of(source)), sampling, warn, strength or ()), source
        )
    best = pareto_front(points)
    if json:
        print(jsonlib.dumps(to_json([p._asdict() | {"best": p in best} for p in points]), ensure_ascii=False))
        return
    for p in sorted(points, key=lambda p: p.kl):
        bounds = "" if p.reward_interval is None else f" [{p.reward_interval.low:.3f}, {p.reward_interval.high:.3f}]"
        mark = "*" if p in best else " "
        console.print(f"{mark} KL {p.kl:8.3f} nats  win rate {p.reward:.3f}{bounds}  {p.name}", markup=False)
    console.print("* no other point has both less KL and a higher win rate")
