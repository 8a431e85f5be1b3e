"""`mlxdpo influence RUN "..." [--completion "..." --part "..."]`"""

from __future__ import annotations

import json as jsonlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter, validators

from mlxdpo.runs import Run
from mlxdpo.types import UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mlxdpo.types import Preference

Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]


def run(
    path: Path,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=False)],
    /,
    *,
    completion: str | None = None,
    part: str | None = None,
    occurrence: Count = 1,
    top: Count = 5,
    max_tokens: Count = 64,
    out: Path | None = None,
    json: bool = False,
) -> None:
    """Say which training pairs taught an answer, and which taught against it.

    The influence of a pair is the cosine of two gradients of what was trained: that of a step on the pair, and that
    which makes the answer likelier. The gradients of the pairs are kept, so the second question costs seconds.

    Args:
        path: Run directory.
        prompt: What was asked.
        completion: The answer; what the run's model answers when not given.
        part: Words of the answer that are asked about, instead of all of it.
        occurrence: Which occurrence of the part is meant: 1 is the first.
        top: Pairs to show of each kind.
        max_tokens: Longest answer, in tokens, where the model answers.
        out: Write the influence of every pair to this file, JSON lines, largest first.
        json: Print the pairs shown as JSON.
    """
    from mlxdpo.commands.terminal import console
    from mlxdpo.inference.influence import answer_gradient, answer_part, influences, training_pairs
    from mlxdpo.inference.run_prompts import short_line
    from mlxdpo.inference.trained_run import encode_pairs, open_trained_run
    from mlxdpo.io.atomic import write_text
    from mlxdpo.io.json_file import json_lines

    if out is not None and out.exists():
        raise UserError(f"{out} already exists; choose another --out, or remove it")
    trained = open_trained_run(Run.open(path))
    if completion is None:
        completion = _answer_of(trained, prompt, max_tokens)
    asked = answer_part(trained, prompt, completion, part, occurrence)
    rows, examples, _ = encode_pairs(trained, training_pairs(trained))
    values = influences(_read_gradients(trained, examples), answer_gradient(trained, asked))
    order = sorted(range(len(rows)), key=lambda i: -values[i])
    found = [_finding(rows[i], float(values[i])) for i in order]
    if out is not None:
        write_text(out, json_lines(found))
    against = [one for one in found[::-1][:top] if one["influence"] < 0]
    if json:
        kinds = {"taught": [one for one in found[:top] if one["influence"] > 0], "against": against}
        print(jsonlib.dumps({"completion": completion, "part": asked.text, "pairs": len(rows), **kinds}))
        return
    console.print(completion, markup=False)
    _print_pairs(f'taught "{short_line(asked.text)}"', [one for one in found[:top] if one["influence"] > 0])
    _print_pairs("taught against it", against)
    if out is not None:
        console.print(f"influence of {len(rows)} pairs -> {out}", markup=False)


def _answer_of(trained: Any, prompt: str, max_tokens: int) -> str:
    """What the tuned model answers, likeliest tokens. Raises `UserError` for an empty answer."""
    from mlxdpo.inference.conversation import answers_of

    settings = {"max_tokens": max_tokens, "temperature": 0.0}
    ((text, _),) = answers_of(trained.policy, trained.config.data, [prompt], **settings)
    if not text.strip():
        raise UserError("the run's model answers nothing to this prompt; give an answer with --completion")
    return text


def _read_gradients(trained: Any, examples: Sequence[Any]) -> Any:
    """(N, WIDTH) gradients of the pairs, with their progress: a bar on a terminal, lines elsewhere."""
    from rich.progress import Progress

    from mlxdpo.commands.terminal import console
    from mlxdpo.inference.influence import pair_gradients

    steps = pair_gradients(trained, examples)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("gradients of pairs", total=len(examples))
        while True:
            try:
                done = next(steps)
            except StopIteration as end:
                return end.value
            progress.update(task, completed=done)
            if not console.is_terminal:
                print(f"gradients of {done} of {len(examples)} pairs", file=sys.stderr, flush=True)


def _finding(row: Preference, influence: float) -> dict[str, Any]:
    from mlxdpo.inference.run_prompts import text_to_json

    sides = {"prompt": row.prompt, "chosen": row.chosen, "rejected": row.rejected}
    return {"where": row.where, "influence": round(influence, 4)} | {k: text_to_json(v) for k, v in sides.items()}


def _print_pairs(title: str, found: Sequence[dict[str, Any]]) -> None:
    from rich.table import Table

    from mlxdpo.commands.terminal import console
    from mlxdpo.inference.run_prompts import short_line, text_from_json, text_of

    if not found:
        console.print(f"no pair {title}", markup=False)
        return
    sheet = Table("influence", "pair", "prompt", "chosen", "rejected", title=title)
    for one in found:
        texts = [short_line(text_of(text_from_json(one[name]))) for name in ("prompt", "chosen", "rejected")]
        sheet.add_row(f"{one['influence']:+.3f}", one["where"], *texts)
    console.print(sheet, markup=False)
