"""What each round is: its folder, its prompts, its recipe. Pure functions of the recipe and the round's number.

OUT/rounds.yaml    the recipe, resolved            OUT/rounds.json   the rounds side by side, and why they stopped
OUT/start.json     the start, measured             OUT/report.html
OUT/round-1/       a run directory, with data/pairs.jsonl (what was collected) and eval/round.json (measured)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlxdpo.config import Config, Drawing, dump_config, load_config
from mlxdpo.data.read import heldout_prompts, heldout_source, prompt_key
from mlxdpo.io.atomic import write_text
from mlxdpo.model.adapters import read_settings
from mlxdpo.online.partial_output import changed_setting
from mlxdpo.online.prompts import Asked, Prompts, holds_answers, read_prompts
from mlxdpo.runs import Run
from mlxdpo.training.plan import learning_rate
from mlxdpo.types import UserError

RECIPE, RESULTS, START = "rounds.yaml", "rounds.json", "start.json"


def check_rounds(config: Config) -> None:
    """Raise `UserError` for a recipe that rounds cannot follow."""
    rounds = config.rounds
    if config.stage != "dpo":
        raise UserError(f"stage {config.stage} cannot be done in rounds; set stage to dpo")
    if not config.collect.judge:
        raise UserError("no judge ranks the answers; set collect.judge, such as --collect.judge vader")
    if rounds.second == config.collect.judge:
        raise UserError(f"rounds.second {rounds.second} is the judge that ranks; name another one, or none")
    if rounds.reference == "previous" and config.reference.model is not None:
        raise UserError(f"rounds.reference previous leaves no place for reference.model {config.reference.model}")
    if rounds.every is not None and config.train.steps is not None:
        raise UserError(f"rounds.every {rounds.every} already says how many steps a round takes; drop train.steps")
    if config.collect.judge.startswith("votes:") and (rounds.count > 1 or rounds.every):
        raise UserError("votes are about answers that are there already: they make one round; set --rounds 1")


def begin_rounds(config: Config) -> Path:
    """The folder of the rounds, its recipe written; an existing one must hold the same recipe (more rounds may be
    asked for, but for online ones, whose schedule spans them all).

    Raises `UserError` naming the setting that is another one.
    """
    folder = Path(config.out) if config.out else _free_rounds_folder(config)
    file = folder / RECIPE
    if file.exists():
        then, now = (one.model_dump(mode="json") for one in (load_config(file), config))
        if config.rounds.every is None:
            now["rounds"]["count"] = then["rounds"]["count"]
        if changed := changed_setting(then, now | {"out": then["out"]}):
            raise UserError(f"{folder} holds rounds with another {changed}; choose another --out, or put it back")
    elif (folder / "config.yaml").exists():
        raise UserError(f"{folder} holds a run, not rounds; choose another --out")
    text = dump_config(config.model_copy(update={"out": str(folder)}))
    if not file.exists() or file.read_text("utf-8") != text:
        write_text(file, text)
    return folder


def _free_rounds_folder(config: Config) -> Path:
    stem = f"{Path(config.model.path).name}-{Path(config.data.path).stem}-rounds".lower()
    return next(p for n in range(1, 10**6) if not (p := Path("runs") / f"{stem}-{n}").exists())


def split_prompts(config: Config) -> tuple[Prompts, list[Asked]]:
    """(prompts to answer and learn from, held-out prompts to measure with, at most `rounds.heldout`).

    Held out are those of `data.eval`, else a share of `data.eval_fraction`. Raises `UserError` when there are none.
    """
    prompts, named = read_prompts(config.data), heldout_source(config.data)
    if named is not None:
        heldout = read_prompts(config.data, *named).asked
        keys = {prompt_key(one.prompt) for one in heldout}
    else:
        every = {prompt_key(one.prompt) for one in prompts.asked}
        keys = heldout_prompts(every, config.data.eval_fraction, config.train.seed)
        heldout = [one for one in prompts.asked if prompt_key(one.prompt) in keys]
    kept = [one for one in prompts.asked if prompt_key(one.prompt) not in keys]
    if not kept or len(heldout) < 2:
        raise UserError(
            f"{config.data.path}: {len(kept)} prompts to learn from and {len(heldout)} held out; rounds need at least "
            f"1 and 2: give data.eval, or raise data.eval_fraction"
        )
    out = len(prompts.asked) - len(kept)
    left_out = prompts.left_out | ({"held out, to measure with": out} if out else {})
    return Prompts(kept, left_out, frozenset(keys)), heldout[: config.rounds.heldout]


def prompts_of(config: Config, prompts: Prompts, number: int) -> Prompts:
    """The prompts of round `number` (from 1): the next ones of a fixed random order, which begins again at its end."""
    asked, size = prompts.asked, _prompts_per_round(config)
    if size is None or size >= len(asked):
        return prompts
    order = np.random.default_rng([config.collect.seed, 7]).permutation(len(asked)).tolist()
    places = [order[at % len(asked)] for at in range((number - 1) * size, number * size)]
    return prompts._replace(asked=[asked[at] for at in places])


def _prompts_per_round(config: Config) -> int | None:
    if config.rounds.prompts is None and config.rounds.every is not None:
        return config.rounds.every * config.train.batch_size * config.train.gradient_accumulation
    return config.rounds.prompts


def drawing_of(config: Config, number: int) -> Drawing:
    """How round `number` draws: as the recipe says, with noise of its own."""
    values = config.collect.model_dump(exclude={"judge"})
    seed = np.random.SeedSequence([config.collect.seed, number]).generate_state(1)[0]
    return Drawing.model_validate(values | {"seed": int(seed)})


def round_config(config: Config, folder: Path, number: int, parent: Run | None) -> Config:
    """The recipe of round `number`: its own pairs, from its parent's adapter, against the reference that was asked."""
    out = folder / f"round-{number}"
    values = config.model_dump(exclude_unset=True, exclude={"collect", "rounds"})
    for name in ("model", "data", "train", "optim"):
        values.setdefault(name, {})
    data = {k: v for k, v in values["data"].items() if k not in ("path", "split", "eval", "format", "columns")}
    values["data"] = data | {
        "path": str(out / "data" / "pairs.jsonl"),
        "eval_fraction": 0.0,
        "eval": _heldout_pairs_path(config),
    }
    values["train"]["seed"] = config.train.seed + number - 1
    values["out"] = str(out)
    if parent is not None:
        own = read_settings(parent.adapter).model_dump(exclude_none=True)
        values["lora"] = own | {"dropout": config.lora.dropout}
        values["model"]["adapter"] = str(parent.adapter)
        if config.rounds.reference == "first" and config.reference.model is None:
            first = {"model": config.model.path, "adapter": config.model.adapter}
            values["reference"] = values.get("reference", {}) | first
    if (every := config.rounds.every) is not None:
        # A piece of one schedule: constant within the piece, at the rate the whole one has where it begins.
        rate = learning_rate(config.optim, (number - 1) * every, config.rounds.count * every)
        values["optim"] |= {"lr": rate, "schedule": "constant", "warmup": 0.0}
        values["train"] |= {"steps": every, "epochs": float(every)}
    return load_config(None, values)


def _heldout_pairs_path(config: Config) -> str | None:
    """Held-out pairs for the curves of a round, where `data.eval` has answers; online rounds are too short for them."""
    if config.rounds.every is not None or (named := heldout_source(config.data)) is None:
        return None
    return config.data.eval if named[0] == config.data.eval and holds_answers(config.data, *named) else None


def trained(run: Path) -> bool:
    """Whether a round's training is over."""
    files: Sequence[str] = ("adapters.safetensors", "adapter_config.json")
    return all((run / "adapter" / name).exists() for name in files)
