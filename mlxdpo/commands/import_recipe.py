"""`mlxdpo import-recipe FILE [--from axolotl|trl|llamafactory|mlx-lm] [--out RECIPE.yaml]`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mlxdpo.types import UserError


def run(
    file: Path, /, *, source: Annotated[str | None, Parameter(name="--from")] = None, out: Path | None = None
) -> None:
    """Write another trainer's recipe as one that `mlxdpo train` takes, with a comment for each of its keys.

    Args:
        file: YAML of TRL, Axolotl, LLaMA-Factory, mlx-lm or mlx-lm-lora; for TRL also a Python script, which is read
            and not run, or JSON of DPOConfig's arguments.
        source: trl, axolotl, llamafactory, mlx-lm; unset: the keys tell.
        out: Recipe to write; unset means NAME-mlxdpo.yaml in this folder.
    """
    from mlxdpo.commands.terminal import console
    from mlxdpo.io.atomic import write_text
    from mlxdpo.io.words import counted
    from mlxdpo.recipes.read_foreign import read_foreign, recipe_text

    target = out or Path(f"{file.stem}-mlxdpo.yaml")
    if target.exists():
        raise UserError(f"{target}: exists already; name another file with --out")
    found = read_foreign(file, source)
    write_text(target, recipe_text(found))
    count = {kind: 0 for kind in ("taken", "not needed", "not supported")}
    for outcome in found.outcomes.values():
        count[outcome.kind] += 1
    said = ", ".join(f"{number} {kind}" for kind, number in count.items())
    console.print(f"{file} is a recipe of {found.tool.title}: {counted(len(found.keys), 'key')}, {said}", markup=False)
    lost: dict[str, list[str]] = {}
    for key, outcome in found.outcomes.items():
        if outcome.kind == "not supported":
            lost.setdefault(outcome.note, []).append(key)
    for note, keys in lost.items():
        console.print(f"{', '.join(keys)}: {note}", style="yellow", markup=False)
    console.print(f"{target}: the recipe, with a comment for each key\nnext: mlxdpo train {target}", markup=False)
