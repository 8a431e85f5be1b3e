"""`mlxdpo objectives [--json]`"""

from __future__ import annotations

import json as jsonlib

from mlxdpo.config import LossConfig


def run(*, json: bool = False) -> None:
    """List the objectives with their papers, knobs and value before the first step.

    Parameters
    ----------
    json
        Machine-readable.
    """
    from rich.table import Table

    from mlxdpo.commands.screen import console
    from mlxdpo.losses import LOSSES

    beta = LossConfig().beta
    rows = [
        {"name": n, "title": o.title, "arxiv": o.paper, "knobs": list(o.knobs), "start": o.start(beta)}
        for n, o in LOSSES.items()
    ]
    if json:
        print(jsonlib.dumps(rows, indent=2))
        return
    table = Table("loss.name", "what", "arXiv", "knobs", f"start at beta {beta}")
    for row in rows:
        table.add_row(row["name"], row["title"], row["arxiv"], ", ".join(row["knobs"]), f"{row['start']:.6g}")
    console.print(table)
