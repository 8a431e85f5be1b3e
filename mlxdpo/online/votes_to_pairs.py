"""Votes as the next round's training pairs, with the recipe and the command that train on them.

The next round starts from this run's adapter and measures against it. Prompts that are held out stay held out.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.config import Config, dump_config, load_config
from mlxdpo.data.read import prompt_key
from mlxdpo.inference.run_prompts import gallery, text_from_json, text_to_json
from mlxdpo.inference.trained_run import heldout_pairs
from mlxdpo.io.atomic import write_text
from mlxdpo.io.json_file import json_lines, read_lines
from mlxdpo.io.words import counted
from mlxdpo.model.adapters import read_settings
from mlxdpo.runs import Run
from mlxdpo.types import Message, Text, UserError

FILE = "votes.jsonl"
FOLDER = "next-round"
HELDOUT = "on held-out prompts, which are never trained on"


ProblemWith = Callable[[Mapping[str, Any]], str | None]
"""Why a line is no vote, None for one that is: `mlxdpo_eval.judges.votes.problem_with`."""


class Pair(NamedTuple):
    """A pair that votes have decided."""

    prompt: Text
    chosen: str
    rejected: str


class Export(NamedTuple):
    """What was written: the file of pairs, how many, how many votes were left out for which reason, the command."""

    file: Path
    pairs: int
    votes: int
    left_out: dict[str, int]
    command: str

    def sentence(self) -> str:
        """The counts in words."""
        out = "; ".join(f"{count} {reason}" for reason, count in self.left_out.items())
        return f"Pairs: {self.pairs}, from {count_of_votes(self.votes)}. " + (
            f"Left out: {out}." if out else "None left out."
        )


def votes_of(run: Run) -> list[dict[str, Any]]:
    """The votes of a run, in order."""
    return list(read_lines(run.path / FILE))


def count_of_votes(count: int) -> str:
    """A number of votes in words."""
    return f"{count} vote{'' if count == 1 else 's'}"


def pairs_of(
    votes: Sequence[Mapping[str, Any]], heldout: frozenset[bytes], problem_with: ProblemWith
) -> tuple[list[Pair], dict[str, int]]:
    """The pairs in the order of their first vote, and how many votes became none, by reason.

    Votes on the same two answers are added up; where they cancel out there is no pair.
    """
    left_out: Counter[str] = Counter()
    sums: dict[tuple[bytes, str, str], int] = {}
    counts: Counter[tuple[bytes, str, str]] = Counter()
    prompts: dict[bytes, Text] = {}
    for vote in votes:
        if problem := problem_with(vote):
            left_out[f"that are not votes ({problem})"] += 1
            continue
        prompt = text_from_json(vote["prompt"])
        key = prompt_key(prompt)
        if vote["winner"] not in ("a", "b"):
            left_out["without a winner (equally good, or both bad)"] += 1
        elif key in heldout:
            left_out[HELDOUT] += 1
        else:
            prompts.setdefault(key, prompt)
            first, second = sorted((vote["a"], vote["b"]))
            place = (key, first, second)
            counts[place] += 1
            sums[place] = sums.get(place, 0) + (1 if vote[vote["winner"]] == first else -1)
    pairs = []
    for (key, first, second), balance in sums.items():
        count = counts[key, first, second]
        if balance == 0:
            left_out["that cancel each other out"] += count
            continue
        left_out["that repeat a pair"] += count - 1
        pairs.append(Pair(prompts[key], *((first, second) if balance > 0 else (second, first))))
    return pairs, {reason: count for reason, count in left_out.items() if count}


def export_votes(run: Run, problem_with: ProblemWith) -> Export:
    """Write RUN/next-round/{pairs.jsonl, recipe.yaml}, whole or not at all.

    Raises `UserError` when no vote gives a pair.
    """
    votes, found = votes_of(run), gallery(run)
    pairs, left_out = pairs_of(votes, found.heldout_keys, problem_with)
    if not pairs:
        out = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise UserError(
            f"none of {counted(len(votes), 'vote')} gives a training pair ({out or 'there are none yet'}); "
            f"vote on your own prompts or on training prompts"
        )
    folder = run.path / FOLDER
    turns = any(not isinstance(pair.prompt, str) for pair in pairs)
    write_text(folder / "pairs.jsonl", json_lines(row_of(pair, turns) for pair in pairs))
    recipe = next_recipe(run, folder)
    write_text(folder / "recipe.yaml", dump_config(recipe))
    words = ["mlxdpo", "train", str(folder / "recipe.yaml"), "--model.adapter", str(run.adapter)]
    words += ["--data", str(folder / "pairs.jsonl"), "--out", str(recipe.out)]
    return Export(folder / "pairs.jsonl", len(pairs), len(votes), left_out, shlex.join(words))


def row_of(pair: Pair, turns: bool) -> dict[str, Any]:
    """A line of the file: text, or messages throughout where one prompt is a conversation."""
    if not turns:
        return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}
    prompt = (Message("user", pair.prompt),) if isinstance(pair.prompt, str) else pair.prompt
    chosen, rejected = ((Message("assistant", text),) for text in (pair.chosen, pair.rejected))
    return {"prompt": text_to_json(prompt), "chosen": text_to_json(chosen), "rejected": text_to_json(rejected)}


def next_recipe(run: Run, folder: Path) -> Config:
    """This run's recipe with its adapter as the start, the votes as the data, and the same pairs held out."""
    config = run.config()
    values = config.model_dump(exclude_unset=True)
    for name in ("model", "data", "train"):
        values.setdefault(name, {})
    values["model"]["adapter"] = str(run.adapter)
    own = read_settings(run.adapter).model_dump(exclude_none=True)
    values["lora"] = own | {"dropout": config.lora.dropout}  # another shape than the adapter's would be refused
    values["reference"] = {}  # the start is the reference
    kept = {k: v for k, v in values["data"].items() if k not in ("path", "split", "eval", "format", "columns")}
    values["data"] = kept | {"path": str(folder / "pairs.jsonl")} | _heldout_settings(run, config, folder)
    if "eval" not in values["data"]:
        values["train"] |= {"keep_model": "last", "patience": None}
    values["out"] = str(_free_run_folder(run.path))
    return load_config(None, values)


def _heldout_settings(run: Run, config: Config, folder: Path) -> dict[str, Any]:
    if config.data.eval is not None and Path(config.data.eval).exists() and not config.data.columns:
        return {"eval": config.data.eval}
    try:
        rows = heldout_pairs(run)[0]
    except UserError:
        return {"eval_fraction": 0.0}  # nothing was held out, and a handful of votes can spare none
    turns = any(not isinstance(row.prompt, str) for row in rows)
    lines = [Pair(row.prompt, _answer_text(row.chosen), _answer_text(row.rejected)) for row in rows]
    write_text(folder / "heldout.jsonl", json_lines(row_of(line, turns) for line in lines))
    return {"eval": str(folder / "heldout.jsonl")}


def _answer_text(answer: Text) -> str:
    return answer if isinstance(answer, str) else answer[-1].content


def _free_run_folder(path: Path) -> Path:
    stem = path.name.split("-votes-")[0]
    return next(p for n in range(1, 10**6) if not (p := path.with_name(f"{stem}-votes-{n}")).exists())
