"""`mlxdpo data audit D --model M --test`: which rule of --select helps on these pairs, by short runs on each."""

from __future__ import annotations

import json as jsonlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxdpo.config import Config, LoraConfig, LossConfig, OptimConfig, TrainConfig
from mlxdpo.types import Preference, UserError

if TYPE_CHECKING:
    from mlxdpo.inference.selection_pilot import PilotRun

LEVEL = 0.95  # that all intervals of a table hold at once
ALIKE = "cannot be told apart"


def compare_rules(
    config: Config,
    rows: Sequence[Preference],
    heldout: Sequence[Preference],
    findings: Sequence[Mapping[str, Any]],
    select: str | None,
    seeds: int,
    place: Path,
    json: bool,
) -> int:
    """Run the pilot, resuming what `place` holds of it, and say which rule helps; the exit status.

    `rows` and their findings are those to train on, `heldout` shares no prompt with them.
    """
    from mlxdpo.commands.interrupt import stop_flag
    from mlxdpo.commands.terminal import console, warn
    from mlxdpo.inference.selection_pilot import every_rule, run_pilot
    from mlxdpo.io.atomic import write_json

    rules = [select] if select else every_rule()
    state = {"pilot": _pilot_digest(config, rows, heldout, rules), "steps": config.train.steps, "heldout": len(heldout)}
    done = _done_runs(place, state["pilot"])
    total, say = (len(rules) + 2) * seeds, warn if json else lambda text: console.print(text, markup=False)
    with stop_flag() as should_stop:
        for found in run_pilot(config, rows, findings, heldout, rules, seeds, done, should_stop):
            done.append(found)
            write_json(place, {**state, "runs": [one._asdict() for one in done]})
            right = sum(margin > 0 for margin in found.margins) / len(found.margins)
            say(f"{len(done)} of {total}: {found.name}, seed {found.seed}, {found.pairs} pairs: accuracy {right:.3f}")
    wanted = [one for one in done if one.seed < seeds]
    if len(wanted) < total:
        warn(f"stopped; run the same command again to resume ({place} has {len(wanted)} of {total} runs)")
        return 130
    table = pilot_table(wanted, [row.prompt for row in heldout])
    best = recommended(table)
    command = command_after(config, best)
    write_json(
        place, {**state, "table": table, "recommended": best, "next": command, "runs": [one._asdict() for one in done]}
    )
    if json:
        print(jsonlib.dumps({**state, "table": table, "recommended": best, "next": command}, ensure_ascii=False))
    else:
        _print_table(table, len(heldout), place)
        console.print(f"next: {command}", markup=False, soft_wrap=True)
    return 0


def pilot_table(runs: Sequence[PilotRun], prompts: Sequence[Any]) -> list[dict[str, Any]]:
    """A line for each selection: held-out accuracy and margin, means over seeds, and what they differ from random's.

    The differences are paired by held-out pair, resampled by prompt; together the intervals of the accuracies hold with
    95 % (Bonferroni), and so do those of the margins. They cover the choice of held-out pairs; seeds are averaged.
    """
    import numpy as np

    from mlxdpo.data.read import prompt_key
    from mlxdpo.inference.selection_pilot import RANDOM
    from mlxdpo_eval.metrics.intervals import paired_difference

    names = list(dict.fromkeys(one.name for one in runs))
    margins = {name: np.array([one.margins for one in runs if one.name == name]) for name in names}
    values = {name: {"accuracy": (m > 0).mean(axis=0), "margin": m.mean(axis=0)} for name, m in margins.items()}
    clusters, level = [prompt_key(prompt) for prompt in prompts], 1 - (1 - LEVEL) / max(1, len(names) - 1)
    table = []
    for name in names:
        line: dict[str, Any] = {"selection": name, "pairs": next(one.pairs for one in runs if one.name == name)}
        for what, found in values[name].items():
            line[what] = float(found.mean())
            if name == RANDOM:
                continue
            gap = paired_difference(values[RANDOM][what].tolist(), found.tolist(), clusters, level=level)
            line[f"{what}_vs_random"] = None if gap is None else [gap.estimate, gap.low, gap.high]
        line["verdict"] = "" if name == RANDOM else verdict(line["accuracy_vs_random"])
        table.append(line)
    return table


def verdict(interval: Sequence[float] | None) -> str:
    """`better`, `worse`, or that it cannot be told: the interval of a difference includes 0, or is unknown."""
    if interval is None or interval[1] <= 0 <= interval[2]:
        return ALIKE
    return "better" if interval[1] > 0 else "worse"


def recommended(table: Sequence[Mapping[str, Any]]) -> str:
    """The selection with the highest accuracy of those that are better than random; all pairs where none is."""
    from mlxdpo.inference.selection_pilot import ALL

    better = [line for line in table if line["verdict"] == "better"]
    return max(better, key=lambda line: line["accuracy"])["selection"] if better else ALL


def command_after(config: Config, best: str) -> str:
    """What to run next: the selection that is recommended, written to a file, or a training on all pairs."""
    from mlxdpo.inference.selection_pilot import ALL

    given = f"{shlex.quote(config.data.path)} --model {shlex.quote(config.model.path)}"
    if best == ALL:
        return f"mlxdpo train --model {shlex.quote(config.model.path)} --data {shlex.quote(config.data.path)}"
    target = Path(config.data.path).with_suffix("").name + "." + best.partition(":")[0] + ".jsonl"
    return f"mlxdpo data audit {given} --select {best} --out {shlex.quote(target)}"


def pilot_config(
    data: Any, model: Any, loss: LossConfig, lora: LoraConfig, optim: OptimConfig, train: TrainConfig
) -> Config:
    """The recipe of every run of a pilot. Raises `UserError` for settings that a pilot has no use for."""
    from mlxdpo.inference.selection_pilot import STEPS

    if named := [name for name in ("probability", "weight", "margin") if name in data.columns]:
        raise UserError(f"--test does not take data.columns {named[0]}: it compares which pairs are kept; leave it out")
    if train.minutes is not None or train.epochs != "auto":
        raise UserError("--test compares runs of equal steps: give --train.steps, not minutes or epochs")
    quick = {"steps": train.steps or STEPS, "eval_every": 0, "sample_every": 0}
    return Config(data=data, model=model, loss=loss, lora=lora, optim=optim, train=train.model_copy(update=quick))


def _pilot_digest(
    config: Config, rows: Sequence[Preference], heldout: Sequence[Preference], rules: Sequence[str]
) -> str:
    """What the runs of a pilot depend on, in a digest: rows, settings, rules, versions."""
    from mlxdpo.inference.selection_pilot import pair_as_json
    from mlxdpo.io.digest import json_digest
    from mlxdpo.machine.device import this_machine, versions

    texts = [[pair_as_json(row) for row in part] for part in (rows, heldout)]
    settings = config.model_dump(mode="json", exclude={"data": {"path", "eval"}})
    return json_digest([texts, settings, list(rules), versions(), this_machine().kind], str)[:32]


def _done_runs(place: Path, pilot: str) -> list[PilotRun]:
    """The runs in the file of an earlier call with the same rows and settings; a file of another pilot is refused."""
    from mlxdpo.inference.selection_pilot import PilotRun
    from mlxdpo.io.json_file import read_json

    if not place.exists():
        return []
    found = read_json(place)
    if found.get("pilot") != pilot:
        raise UserError(f"{place} is of other pairs or settings; move it away, or name the findings with --findings")
    return [PilotRun(**one) for one in found["runs"]]


def _print_table(table: Sequence[Mapping[str, Any]], heldout: int, place: Path) -> None:
    from rich.table import Table

    from mlxdpo.commands.terminal import console

    def interval(found: Sequence[float] | None, unit: float, digits: int) -> str:
        """`+1.2 (-0.3 to +2.5)`, in units of `unit`."""
        if found is None:
            return "-"
        value, low, high = (f"{number / unit:+.{digits}f}" for number in found)
        return f"{value} ({low} to {high})"

    sheet = Table("selection", "pairs", "accuracy", "to random, points", "margin", "to random, nats", "accuracy is")
    for line in table:
        points = interval(line.get("accuracy_vs_random"), 0.01, 1)
        nats = interval(line.get("margin_vs_random"), 1, 2)
        numbers = (str(line["pairs"]), f"{line['accuracy']:.3f}", points, f"{line['margin']:+.2f}", nats)
        sheet.add_row(line["selection"], *numbers, line["verdict"])
    console.print(sheet, markup=False)
    console.print(
        f"on {heldout} held-out pairs; the intervals of a column hold at once with 95 % and cover the choice of "
        f"held-out pairs, not of seeds -> {place}",
        markup=False,
        soft_wrap=True,
    )
