"""`mlxdpo compare RUN_A RUN_B [RUN_C ...]`"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mlxdpo.runs import Run
from mlxdpo.types import UserError

FLIPS = 10


def run(*paths: Path, json: bool = False) -> int:
    """Hold evaluated runs against the first of them, pair by pair and prompt by prompt.

    Of three runs or more the intervals of a measure hold at once with 95 % (Bonferroni). Exit status 1: something got
    significantly worse.

    Args:
        paths: Run directories, the one to compare with first.
        json: Print the comparison as JSON, every flip included.
    """
    if len(paths) < 2:
        raise UserError(f"compare needs at least two runs, got {len(paths)}: mlxdpo compare RUN_A RUN_B")
    if len({path.resolve() for path in paths}) < len(paths) > 2:
        raise UserError("compare got a run twice; name each run once")
    return _show_pair(*paths, json=json) if len(paths) == 2 else _show_several(paths, json=json)


def _show_several(paths: Sequence[Path], *, json: bool) -> int:
    from rich.table import Table

    from mlxdpo.commands.terminal import console
    from mlxdpo_eval.compare import compare_with_first, comparison_sentence
    from mlxdpo_eval.results import to_json

    comparisons, level = compare_with_first([Run.open(path) for path in paths])
    found = list(zip(map(str, paths[1:]), comparisons, strict=True))
    regressed = any(comparison.regressed for comparison in comparisons)
    if json:
        rows = [{"run": name, **to_json(c), "sentence": comparison_sentence(c)} for name, c in found]
        print(jsonlib.dumps({"first": str(paths[0]), "level": level, "runs": rows}, ensure_ascii=False))
        return int(regressed)
    for measure in dict.fromkeys(change.measure for comparison in comparisons for change in comparison.changes):
        table = Table("run", "value", f"change from {paths[0]}", "", title=f"{measure}, {100 * level:.1f} % intervals")
        for name, comparison in found:
            for change in comparison.changes:
                if change.measure == measure:
                    table.add_row(name, f"{change.second:.3f}", _change_with_bounds(change), change.verdict)
        console.print(table)
    for name, comparison in found:
        if not comparison.same_start:
            console.print(
                f"{name} started from a different model: each win rate is against its own start", style="yellow"
            )
        console.print(f"{name}: {comparison_sentence(comparison)}", style="bold", markup=False)
    return int(regressed)


def _change_with_bounds(change: Any) -> str:
    bounds = "no interval" if change.interval is None else f"[{change.interval.low:+.3f}, {change.interval.high:+.3f}]"
    return f"{change.change:+.3f} {bounds} n={change.items}".replace("[", r"\[")


def _show_pair(first: Path, second: Path, *, json: bool) -> int:
    from mlxdpo.commands.terminal import console
    from mlxdpo_eval.compare import compare_runs, comparison_sentence
    from mlxdpo_eval.results import to_json

    found = compare_runs(Run.open(first), Run.open(second))
    if json:
        print(jsonlib.dumps(to_json(found) | {"sentence": comparison_sentence(found)}, ensure_ascii=False))
        return 1 if found.regressed else 0
    console.print(_changes_table(found))
    for flip in found.flips[:FLIPS]:
        where = flip.get("where") or f"sample {flip.get('sample')}"
        console.print(
            f"{flip['flip']}  {flip['measure']}  {where}  {' '.join(flip['prompt'].split())[:70]}", markup=False
        )
    if len(found.flips) > FLIPS:
        console.print(f"and {len(found.flips) - FLIPS} more flips; --json lists all")
    for name, count in found.only.items():
        if count:
            console.print(f"{count} {name} are in only one of the two evaluations and were skipped", style="yellow")
    if not found.same_start:
        console.print("the runs started from different models: each win rate is against its own start", style="yellow")
    console.print(comparison_sentence(found), style="bold", markup=False)
    return 1 if found.regressed else 0


def _changes_table(found: Any) -> Any:
    from rich.table import Table

    sheet = Table("", "first", "second", "change [95 % interval]", "gained / lost", "sign test p", "")
    for c in found.changes:
        flips = f"{c.gained} / {c.lost}"
        sheet.add_row(
            c.measure, f"{c.first:.3f}", f"{c.second:.3f}", _change_with_bounds(c), flips, f"{c.p:.3g}", c.verdict
        )
    return sheet
