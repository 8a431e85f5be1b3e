"""What a run looks like on a terminal (one moving line with rate and time left) and elsewhere (plain lines)."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from mlxdpo.commands.interrupt import outliving_the_terminal
from mlxdpo.config import Config
from mlxdpo.io.progress import clock
from mlxdpo.io.words import counted
from mlxdpo.types import Event

if TYPE_CHECKING:
    from mlxdpo.data.encode import Shown

console = Console(soft_wrap=True, highlight=False)
SHOWN = {
    "loss": "loss {:.4f}",
    "accuracy": "accuracy {:.2f}",
    "margin": "margin {:+.4f}",
    "rewards/accuracies": "accuracy {:.2f}",
    "rewards/margins": "margin {:+.4f}",
    "rewards/chosen": "chosen {:+.3f}",
    "rewards/rejected": "rejected {:+.3f}",
    "completions/mean_length": "{:.0f} tokens",
    "completions/clipped_ratio": "{:.0%} cut off",
    "completions/repetition": "repetition {:.2f}",
    "completions/kl": "KL {:.3g} a token",
    "grad_norm": "|g| {:.3g}",
    "learning_rate": "lr {:.2g}",
    "tokens_per_second": "{:.0f} tok/s",
    "peak_memory_gb": "{:.2f} GB",
}


def show_training(
    events: Iterable[Event], introduce: Callable[[Mapping[str, Any]], None] | None = None
) -> Iterator[Event]:
    """Show events as they pass and hand them on; `introduce` shows the first (default `introduce_run`)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(None),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    config, steps = Config(), 0
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading", total=None, left="")
        for event in events:
            values = event.values
            if event.kind == "start":
                config, steps = values["config"], values["plan"].steps
                (introduce or introduce_run)(values)
            elif event.kind == "note":
                steps = values.get("steps", steps)  # those that train.minutes leave
            with outliving_the_terminal():
                if event.kind in ("reading", "reference"):
                    doing = values.get("doing", "reference")
                    bar.update(task, description=doing, completed=values["done"], total=values["total"])
                if event.kind == "probe":
                    bar.update(task, description="probing rates", completed=values["done"], total=values["total"])
                if event.kind == "step":
                    left = f"{clock(values['seconds_left'])} left"
                    bar.update(task, description="training", completed=event.step, total=steps, left=left)
                if event.kind in LINES and (event.kind != "step" or event.step % config.log.every_steps == 0):
                    LINES[event.kind](event, steps)
            yield event


def _print_step(event: Event, steps: int) -> None:
    left = clock(event.values["seconds_left"])
    console.print(_fit_line(f"step {event.step}/{steps}", event.values, f"{left} left"))


def _print_probe(event: Event, steps: int) -> None:
    values = event.values
    console.print(
        f"probe {values['done']}/{values['total']}  lr {values['lr']:.2g}  "
        f"rewards differ by {values['rewards']:.4f}  loss of unseen pairs {values['loss']:.4f}"
    )


def _print_eval(event: Event, steps: int) -> None:
    held = {name.removeprefix("eval_"): value for name, value in event.values.items()}
    console.print(_fit_line(f"held-out at step {event.step}/{steps}", held), style="bold")


LINES = {
    "referenced": lambda event, steps: console.print(
        f"reference: log-probs of {counted(event.values['total'], event.values['part'] + ' pair')} ready"
    ),
    "probe": _print_probe,
    "resumed": lambda event, steps: console.print(f"resuming from step {event.step}/{steps}"),
    "step": _print_step,
    "eval": _print_eval,
    "answers": lambda event, steps: console.print(_fit_line(f"answers at step {event.step}/{steps}", event.values)),
    "note": lambda event, steps: console.print(event.values["text"], style="yellow"),
}


def numbers(values: Mapping[str, Any]) -> str:
    """The metrics a person watches, in a fixed order."""
    # "+ 0.0" after rounding: a margin of -1e-9 is shown as +0.0000, not as -0.0000.
    return "  ".join(form.format(round(values[name], 9) + 0.0) for name, form in SHOWN.items() if name in values)


LEAST = (
    "peak_memory_gb", "learning_rate", "grad_norm", "tokens_per_second", "rewards/rejected", "rewards/chosen",
    "completions/mean_length", "completions/clipped_ratio", "completions/repetition", "completions/kl",
)  # fmt: skip
"""What a line leaves out first where it would be longer than the terminal; `metrics.jsonl` has everything."""


def _fit_line(start: str, values: Mapping[str, Any], end: str = "") -> str:
    """A line of metrics that fits the terminal; whole if the output is not a terminal."""
    left, leaving = dict(values), iter(LEAST)
    while True:
        line = "  ".join(part for part in (start, numbers(left), end) if part)
        name = next(leaving, None) if console.is_terminal and len(line) > console.width else None
        if name is None:
            return line
        left.pop(name, None)


def introduce_model(values: Mapping[str, Any]) -> None:
    """Which model is trained on how many pairs, and where the run is."""
    data, config, identity = values["data"], values["config"], values["policy"].identity
    bits = f", {identity['quantization']['bits']} bits" if identity["quantization"] else ""
    console.print(f"{config.model.path} ({identity['dtype']}{bits}) -> {values['run'].path}")
    console.print(f"{counted(len(data.train), 'training pair')}, {len(data.heldout)} held out")


def introduce_run(values: Mapping[str, Any]) -> None:
    """The model, the plan, what was left out of the data, and the first row."""
    from mlxdpo.data.encode import shown_example
    from mlxdpo.training.plan import plan_sentence

    introduce_model(values)
    data, policy = values["data"], values["policy"]
    console.print(plan_sentence(values["plan"]))
    for name, report in data.reports.items():
        for line in report.lines():
            console.print(f"{name}: {line}", style="yellow")
    if data.overlap:
        console.print(f"{counted(data.overlap, 'prompt')} in both training and held-out pairs", style="yellow")
    example, names = values["shown"]
    console.print("the first row, as the model sees it (scored tokens underlined, or between [[ ]]):")
    show_pair(shown_example(example, policy.tokenizer), names)


def show_pair(shown: Shown, names: Sequence[str] = ("chosen", "rejected")) -> None:
    """Print a pair, or the first completion of it, with its scored part marked."""
    for name, segments in zip(names, shown, strict=False):
        line = Text(f"{name}: ", style="bold")
        for text, scored in segments:
            marked = f"[[{text}]]" if scored and not console.is_terminal else text
            line.append(marked, style="underline green" if scored else "dim")
        console.print(line)


def warn(text: str) -> None:
    """One line on standard error."""
    print(text, file=sys.stderr)


COUNTED = {
    "collected": ("answering", "answered", "prompt"),
    "talked": ("talking", "talked over", "prompt"),
    "answered": ("answering", "got", "answer"),
}


def show_progress(events: Iterable[Event], kind: str, quiet: bool = False) -> Iterator[Event]:
    """Show how far along prompts are, by events of `kind` (a key of `COUNTED`), and hand all events on.

    A bar on a terminal, plain lines elsewhere, both with the time left at the pace of those that are not `kept` from
    before; nothing when `quiet`.
    """
    doing, did, noun = COUNTED[kind]
    columns = (TextColumn(doing), BarColumn(None), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=quiet or not console.is_terminal) as bar:
        task, started = bar.add_task(doing, total=None), time.monotonic()
        for event in events:
            if event.kind == kind:
                done, total, kept = (event.values[name] for name in ("done", "total", "kept"))
                bar.update(task, completed=done, total=total)
                if not quiet and not console.is_terminal:
                    left = clock((time.monotonic() - started) / (done - kept) * (total - done)) if done > kept else "?"
                    console.print(f"{did} {done} of {counted(total, noun)}, {left} left")
            yield event
