"""The pages of `--help`: commands in groups, common options, the rest in `--help-all`, examples at the end."""

from __future__ import annotations

from functools import cache
from typing import Any

GROUPS = {
    "Start": "demo tune app doctor",
    "Train": "train sweep plan bench objectives data iterate collect pairs constitution import-recipe import",
    "Judge": "eval compare runs generate chat influence score dial frontier",
    "Leave": "export merge pull",
}
"""The commands of the first page, each where a reader looks for it."""

COMMON = frozenset(
    f"--{name}"
    for name in (
        "stage", "model.path", "model.adapter", "model.quantize", "data.path", "data.eval", "data.max-length",
        "loss.name", "loss.beta", "lora.rank", "lora.method", "optim.lr", "train.epochs", "train.steps",
        "train.minutes", "train.batch-size", "train.gradient-accumulation", "train.gradient-checkpointing",
    )
)  # fmt: skip
"""Settings with a section in their name that the short page has; options without one are always there."""

COMMON_HERE = {"iterate": ("--rounds.", "--collect.")}
"""Sections that a command is about: all their settings are on its short page."""

FEW = 6  # as many hidden options as this are shown after all

EXAMPLES = {
    "": (
        "mlxdpo tune pairs.jsonl --model smollm2 --time 1h",
        "mlxdpo train --model smollm2 --data pairs.jsonl --out runs/mine",
        "mlxdpo eval runs/mine --judge longest",
        "mlxdpo chat runs/mine",
        "mlxdpo export runs/mine --to mlx --out exported",
    ),
    "train": (
        "mlxdpo train --model smollm2 --data pairs.jsonl",
        "mlxdpo train recipe.yaml --loss.beta 0.3 --out runs/b",
        "mlxdpo train --resume runs/b --train.epochs 3",
    ),
    "sweep": (
        "mlxdpo sweep recipe.yaml --loss.beta 0.05,0.1,0.3 --seeds 3 --out runs/sweep",
        "mlxdpo sweep --model smollm2 --data pairs.jsonl --optim.lr auto,1e-4 --out runs/rates",
    ),
    "compare": ("mlxdpo compare runs/a runs/b", "mlxdpo compare runs/a runs/b runs/c --json"),
    "runs": ("mlxdpo runs", "mlxdpo runs runs/sweep --by accuracy", "mlxdpo runs diff runs/a runs/b"),
    "tune": ("mlxdpo tune pairs.jsonl --model smollm2 --time 1h",),
    "eval": ("mlxdpo eval runs/mine --judge longest", "mlxdpo eval runs/mine --judge local:smollm2"),
    "generate": ('mlxdpo generate runs/mine "Name a fruit."', 'mlxdpo generate runs/mine "Name a fruit." --before'),
    "influence": (
        'mlxdpo influence runs/mine "Name a fruit."',
        'mlxdpo influence runs/mine "Name a fruit." --part apple',
    ),
    "chat": ("mlxdpo chat runs/mine", "mlxdpo chat runs/mine --temperature 0"),
    "import-recipe": ("mlxdpo import-recipe axolotl.yaml", "mlxdpo train axolotl-mlxdpo.yaml"),
    "export": ("mlxdpo export runs/mine --to gguf --out exported",),
    "plan": ("mlxdpo plan --model smollm2 --data pairs.jsonl",),
    "data": ("mlxdpo data check pairs.jsonl --model smollm2",),
    "data audit": ("mlxdpo data audit pairs.jsonl --model smollm2 --flip --out fixed.jsonl",),
    "pairs": ("mlxdpo pairs --chosen runs/mine --rejected smollm2 --prompts prompts.jsonl --out new.jsonl",),
}


def group_of(command: str) -> Any:
    """The group of a command on the first page, as cyclopts takes it. Raises `KeyError` for one that is in none."""
    title = next((title for title, names in GROUPS.items() if command in names.split()), None)
    if title is None:
        raise KeyError(f"{command} is in no group of GROUPS")
    return _group(title)


@cache
def _group(title: str) -> Any:
    """One object a title: cyclopts refuses two of the same name."""
    from cyclopts import Group

    return Group(title, sort_key=list(GROUPS).index(title))


def help_formatter(command: str, shorthand: dict[str, str], everything: bool) -> Any:
    """cyclopts's formatter, with the short names of settings and, unless `everything`, only the common ones."""
    from cyclopts.help import DefaultFormatter

    shown = {long: short for short, long in shorthand.items()}
    plain = DefaultFormatter()

    def page(console: Any, options: Any, panel: Any) -> None:
        """Print a panel of the page."""
        hidden = [] if everything else [entry for entry in panel.entries if _is_special(entry, command)]
        if len(hidden) > FEW:
            panel.entries = [entry for entry in panel.entries if entry not in hidden]
            panel.title = "Common options"
        panel.entries = [_short_entry(entry, shown) for entry in panel.entries]
        plain(console, options, panel)
        if len(hidden) > FEW:
            console.print(f"{len(hidden)} more: mlxdpo {command} --help-all", highlight=False)

    return page


def _is_special(entry: Any, command: str) -> bool:
    names = [name for name in entry.positive_names if name.startswith("--")]
    about = COMMON_HERE.get(command, ())
    return bool(names) and "." in names[0] and not COMMON & set(names) and not names[0].startswith(about or "-- ")


def _short_entry(entry: Any, shown: dict[str, str]) -> Any:
    """An option under its short name, and without the `--no-` of a switch that is off anyway."""
    import attrs

    names = tuple(dict.fromkeys(shown.get(name, name) for name in entry.positive_names))
    off = entry.default in (None, "False", "")
    return attrs.evolve(entry, positive_names=names, **({"negative_names": ()} if off else {}))


def examples_of(command: str) -> str:
    """The examples below a page, in Markdown; empty where there are none."""
    lines = EXAMPLES.get(command, ())
    return "\n".join(("Examples:", "", *(f"- `{line}`" for line in lines))) if lines else ""
