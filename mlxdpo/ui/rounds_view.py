"""The rounds that a run belongs to, side by side, from their `rounds.json`. Everything from the file is escaped."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

from mlxdpo.ui.tables import table
from mlxdpo_eval.rounds_report import NOTE, cells, header, verdict


def rounds(path: Path) -> str:
    """The rounds around the run at `path`, its own marked; or how there would be some."""
    file = path.parent / "rounds.json"
    if not file.exists():
        return "<p>This run is no round of several. In a terminal: <code>mlxdpo iterate RECIPE --rounds 3</code></p>"
    found = json.loads(file.read_text("utf-8"))
    lines = cells(found["rounds"])
    why = f"<p>Stopped by itself: {escape(found['stopped'])}.</p>" if found["stopped"] else ""
    shown = table(f"Rounds of {path.parent.name}", header(found["rounds"]), lines, path.name)
    return f"<p><strong>{escape(verdict(found)[1])}</strong></p>{why}{shown}<p>{escape(NOTE)}</p>"
