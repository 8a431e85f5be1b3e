"""`mlxdpo data formats [--json]`"""

from __future__ import annotations

import json as jsonlib


def run(*, json: bool = False) -> None:
    """List the row shapes that are understood, in the order of detection.

    Parameters
    ----------
    json
        Machine-readable.
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
