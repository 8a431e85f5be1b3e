"""The first screen of a report on a terminal, 80 columns wide: verdict, three answers side by side, cost, counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mlxdpo_eval.report.blocks import percent, share
from mlxdpo_eval.report.cost import cost_sentences
from mlxdpo_eval.report.samples import SampleBlock, three_samples

if TYPE_CHECKING:
    from rich.console import Console

Result = Mapping[str, Any]
WIDTH = 80
LONGEST_PROMPT, LONGEST_SHOWN = 150, 230  # characters on a screen that is to hold three of them


def print_first_screen(console: Console, results: Result, samples: Sequence[Result]) -> None:
    """Print what the report begins with; no line is wider than 80 columns, or than the terminal."""
    width = min(WIDTH, console.width)
    first, *others = results["sentences"]
    _print_words(console, first, width, "bold")
    for sentence in others:
        _print_words(console, sentence, width)
    told, blocks = three_samples(samples)
    _print_heading(console, "Three answers before and after", width)
    _print_words(console, told, width, "dim")
    for block in blocks:
        _print_sample(console, block, width)
    _print_heading(console, "What it cost", width)
    for sentence in cost_sentences(results):
        _print_words(console, f"- {sentence}", width)
    if results["winrates"]:
        _print_heading(console, "What the judges were asked", width)
        _print_counts(console, results["winrates"], width)


def _print_words(console: Console, words: str, width: int, style: str = "") -> None:
    console.print(words, style=style, markup=False, soft_wrap=False, width=width, overflow="fold")


def _print_heading(console: Console, words: str, width: int) -> None:
    console.print()
    _print_words(console, words, width, "bold")


def _print_sample(console: Console, block: SampleBlock, width: int) -> None:
    from rich.table import Table
    from rich.text import Text

    _print_words(console, f"\n> {on_one_line(block.prompt, LONGEST_PROMPT)}", width)
    sides = Table(box=None, padding=(0, 2, 0, 0), width=width, show_edge=False)
    for name in ("before", "after"):
        sides.add_column(name, ratio=1, overflow="fold", header_style="dim")
    sides.add_row(*(Text(on_one_line(text, LONGEST_SHOWN) or "(empty)") for text in (block.before, block.after)))
    console.print(sides, soft_wrap=False, width=width)
    if block.note:
        _print_words(console, block.note, width, "dim")


def on_one_line(text: str, longest: int) -> str:
    """A text on as few lines as it needs, its end left out where it is too long; control characters are escaped."""
    line = " ".join(text.split())
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
    return line if len(line) <= longest else f"{line[: longest - 2]} …"


def _print_counts(console: Console, winrates: Sequence[Result], width: int) -> None:
    from rich.table import Table
    from rich.text import Text

    sheet = Table(box=None, padding=(0, 2, 0, 0), width=width, show_edge=False)
    sheet.add_column("judge", ratio=1, overflow="fold", header_style="dim")
    for name in ("asked", "answered", "invalid", "equal", "win rate"):
        sheet.add_column(name, justify="right", header_style="dim", overflow="fold")
    for w in winrates:
        rate = share(w["rate"]) + (f" ({percent(w['interval'])})" if w["interval"] else "")
        sheet.add_row(Text(w["judge"]), *(str(w[key]) for key in ("asked", "answered", "invalid", "equal")), rate)
    console.print(sheet, soft_wrap=False, width=width)
