"""Writes `report.html` and `report.md` into a run directory from its result files."""

from __future__ import annotations

from pathlib import Path

from mlxdpo import Run, UserError, as_written, read_json, read_lines, write_text
from mlxdpo_eval.compare import latest_results
from mlxdpo_eval.report.document import build_document
from mlxdpo_eval.report.html import html_page
from mlxdpo_eval.report.markdown import markdown_page
from mlxdpo_eval.results import FORMAT


def write_report(run: Run) -> Path:
    """The report on the run's newest evaluation; returns the HTML file. Raises `UserError` without an evaluation."""
    results = latest_results(run)
    if results.get("format") != FORMAT:
        raise UserError(f"{run.path} was evaluated by another version; run `mlxdpo eval {run.path}` again")
    pairs, samples = (list(read_lines(run.path / "eval" / f"eval_{name}.jsonl")) for name in ("pairs", "samples"))
    frontier = run.path / "eval" / "frontier.json"
    with as_written(run.path / "eval", f"run `mlxdpo eval {run.path}` again"):
        document = build_document(results, pairs, samples, read_json(frontier) if frontier.exists() else None)
    write_text(run.path / "report.md", markdown_page(document))
    write_text(run.path / "report.html", html_page(document))
    return run.path / "report.html"
