"""`mlxdpo demo [--shuffle-labels | --flip-labels]`"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators

from mlxdpo.types import Event, UserError

Seed = Annotated[int, Parameter(validator=validators.Number(gte=0))]
SHOWN = 5
TIMED, AFTERWARDS = 4, 115
"""Steps that are timed, and how many steps' time the rest takes after the last one: evaluation, continuations, drift
(measured on two x86-64 cores)."""


def run(*, seed: Seed = 0, shuffle_labels: bool = False, flip_labels: bool = False, out: Path | None = None) -> int:
    """Tune a real 135M model on 200 bundled pairs, offline, and show what changed, with intervals.

    Each pair holds two continuations of an opening; the chosen one has the happier words by VADER. Afterwards the
    model continues openings it has not seen.

    Args:
        seed: Order of the pairs, adapter start, sampling.
        shuffle_labels: Control: exchange chosen and rejected in half of the pairs; nothing should change.
        flip_labels: Control: exchange them in all pairs; the change should turn round.
        out: Run directory; runs/demo when not given.
    """
    if shuffle_labels and flip_labels:
        raise UserError("--shuffle-labels and --flip-labels are different controls; use one at a time")
    from mlxdpo.commands import terminal
    from mlxdpo.commands.train import follow_training
    from mlxdpo.demo.material import bundled_labels, flipped, measure_demo, prepare_demo, shuffled
    from mlxdpo.runs import Run

    started = time.monotonic()
    labels = shuffled if shuffle_labels else flipped if flip_labels else bundled_labels
    folder = out or _free_demo_folder(Path("runs/demo"))
    heldout, steps = list[float](), list[int]()

    def see(event: Event) -> None:
        """Say after some steps how long it all takes, and keep the margins of the last evaluation."""
        if event.kind == "start":
            steps.append(event.values["plan"].steps)
        elif event.kind == "step" and event.step == TIMED:
            left = event.values["seconds_left"]
            a_step = left / (steps[0] - event.step)
            terminal.console.print(duration_sentence(left, AFTERWARDS * a_step), style="bold")
        elif event.kind == "eval" and event.pairs is not None:
            heldout[:] = event.pairs["margin"]

    if status := follow_training(prepare_demo(folder, seed, labels), None, see=see):
        return status
    terminal.console.print("sampling before and after ...")
    result, before, after = measure_demo(Run.open(folder), seed, heldout, terminal.console.print)
    terminal.console.print(figures_table(result))
    terminal.console.print(f"the first {SHOWN} held-out openings (not a selection):", style="bold")
    terminal.console.print(side_by_side(before, after))
    terminal.console.print(f"figures: {folder}/eval/demo.json, samples: {folder}/samples/")
    terminal.console.print(f"done in {terminal.clock(time.monotonic() - started)}")
    return 0


def duration_sentence(training: float, rest: float) -> str:
    """How long the demo still takes here, of the seconds of training and of what follows."""
    from mlxdpo.io.progress import clock

    return (
        f"about {clock(training + rest)} to go here: {clock(training)} of training, then {clock(rest)} of "
        f"continuations before and after, their judges and their drift"
    )


def _free_demo_folder(path: Path) -> Path:
    """runs/demo, or runs/demo-2 and so on when there is one."""
    candidates = [path, *(path.with_name(f"{path.name}-{n}") for n in range(2, 1000))]
    return next(p for p in candidates if not p.exists())


def figures_table(result: Any) -> Any:
    """The figures as a table, each with its interval."""
    from rich.table import Table

    sheet = Table(
        "", "before", "after", "change [95 % interval]", title="held-out openings, intervals clustered by opening"
    )
    for name, row in result.rewards.items():
        seen = "the reward" if name == "vader" else "a judge not used in training"
        sheet.add_row(
            f"{name} ({seen})",
            _estimate_text(row["before"]),
            _estimate_text(row["after"]),
            _interval_text(row["change"], "+"),
        )
    sheet.add_row("held-out reward accuracy", "0.500", _estimate_text(result.accuracy), _interval_text(result.accuracy))
    sheet.add_row(
        "held-out reward margin", "+0.000", _estimate_text(result.margin, "+"), _interval_text(result.margin, "+")
    )
    sheet.add_row("sequence KL to the reference, nats", "0.000", _estimate_text(result.kl), _interval_text(result.kl))
    for name in ("repetition", "distinct_2", "length", "stopped"):
        values = [getattr(stats, name) for stats in (result.before, result.after)]
        sheet.add_row(name.replace("_", "-"), *(f"{v:.3f}" if v is not None else "-" for v in values), "")
    return sheet


def _estimate_text(interval: Any, sign: str = "") -> str:
    return "-" if interval is None else f"{interval.estimate:{sign}.3f}"


def _interval_text(interval: Any, sign: str = "") -> str:
    if interval is None:
        return "too few data for an interval"
    return f"{interval.estimate:{sign}.3f} [{interval.low:{sign}.3f}, {interval.high:{sign}.3f}] n={interval.clusters}"


def side_by_side(before: Any, after: Any) -> Any:
    """The first openings with their first continuation before and after."""
    from rich.table import Table

    sheet = Table("opening", "before", "after", show_lines=True)
    shown: list[str] = []
    for prompt, old, new in zip(before.prompts, before.texts, after.texts, strict=True):
        if prompt not in shown and len(shown) < SHOWN:
            shown.append(prompt)
            sheet.add_row(*(" ".join(text.split()) for text in (prompt, old, new)))
    return sheet
