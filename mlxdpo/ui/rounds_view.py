"""The rounds that a run belongs to, side by side, from their `rounds.json`. Everything from the file is escaped."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from mlxdpo.runs import as_written, read_json
from mlxdpo.types import UserError
from mlxdpo.ui.tables import table
from mlxdpo_eval.rounds_report import NOTE, cells, header, verdict


def rounds(path: Path) -> str:
    """The rounds around the run at `path`, its own marked; or how there would be some."""
    file = path.parent / "rounds.json"
    if not file.exists():
        return "<p>This run is no round of several. In a terminal: <code>mlxdpo iterate RECIPE --rounds 3</code></p>"
    try:
        found = read_json(file)
        with as_written(file, "run `mlxdpo iterate` again"):
            return _shown(path, found)
    except UserError as error:
        return f'<p role="alert">{escape(str(error))}</p>'


def _shown(path: Path, found: Mapping[str, Any]) -> str:
    lines = cells(found["rounds"])
    why = f"<p>Stopped by itself: {escape(found['stopped'])}.</p>" if found["stopped"] else ""
    shown = table(f"Rounds of {path.parent.name}", header(found["rounds"]), lines, path.name)
    return f"<p><strong>{escape(verdict(found)[1])}</strong></p>{why}{shown}<p>{escape(NOTE)}</p>"
