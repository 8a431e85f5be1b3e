"""Train a recipe under several settings and seeds, stop those that surely lose, and keep what each pair showed.

OUT/sweep.json        what was asked for, and how each run ended
OUT/NAME-seedN/       a run directory; its heldout.jsonl has each held-out pair's loss and accuracy at every evaluation

Asked again, finished runs are kept and an interrupted one continues.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mlxdpo import Config, Run, UserError
from mlxdpo.inner import append_line, as_written, read_json, read_lines, write_json
from mlxdpo_eval.metrics.intervals import Interval, clustered_mean
from mlxdpo_eval.results import to_json

FORMAT = 1
LOOKS = 4  # held-out evaluations in a run, where the recipe names no train.eval_every
LEVEL = 0.99  # of the interval that stops a run
SWEPT = ("loss", "reward", "lora", "optim", "train", "reference")
RESCALES = ("loss.", "reward.", "reference.")
"""Settings that change what a loss of 0.6 means: runs that differ in one are compared by accuracy."""
RULE = (
    "At each held-out evaluation between a quarter and the end of its steps a run is compared with the best finished "
    "run of its seed at the same share of steps, pair by pair. It is stopped when the 99 % interval of the difference, "
    "clustered by prompt, is entirely on the worse side; a finished run that fails the same test gets no further seeds."
)

Make = Callable[[Mapping[str, Any]], Config]
Stop = Callable[[], bool]
Train = Callable[[Config, Run | None, Stop], Iterator[Any]]
Drift = Callable[[Run], Mapping[str, Any] | None]


class SweepPlan(NamedTuple):
    """`configs` by candidate are those of the first seed, without a run directory; `measure` is loss or accuracy."""

    folder: Path
    settings: dict[str, list[str]]
    seeds: int
    measure: str
    configs: dict[str, Config]


def plan_sweep(
    make: Make,
    settings: Mapping[str, Sequence[str]],
    seeds: int,
    folder: Path,
    steps_of: Callable[[Config], int | None],
) -> SweepPlan:
    """All combinations of the values of `settings` (dotted name -> values), as configurations.

    `make` builds one from settings that are laid over the recipe; `steps_of` says how many steps it takes, None where
    that cannot be known before. Raises `UserError` for settings that leave the runs without a common measure, and for
    a `folder` that holds another sweep.
    """
    _check_settings(settings)
    several = {name: values for name, values in settings.items() if len(values) > 1}
    configs = {}
    for values in itertools.product(*settings.values()):
        chosen = dict(zip(settings, values, strict=True))
        name = "-".join(f"{key.split('.')[-1]}{_file_name(chosen[key])}" for key in several) or "recipe"
        while name in configs:
            name += "+"
        given = _nested(chosen)
        config = make(given)
        if config.train.minutes is not None:
            raise UserError(
                "a sweep compares runs step by step and does not support train.minutes; use train.steps instead"
            )
        if "eval_every" not in config.train.model_fields_set and (steps := steps_of(config)):
            given.setdefault("train", {})["eval_every"] = math.ceil(steps / LOOKS)
            config = make(given)
        configs[name] = config.model_copy(update={"out": None})
    measure = "accuracy" if any(name.startswith(RESCALES) for name in several) else "loss"
    plan = SweepPlan(folder, {name: list(values) for name, values in settings.items()}, seeds, measure, configs)
    _check_same_sweep(plan)
    return plan


def _check_settings(settings: Mapping[str, Sequence[str]]) -> None:
    for name, values in settings.items():
        if len(values) < 2:
            continue
        if name.split(".")[0] not in SWEPT:
            raise UserError(
                f"--{name} has several values, and runs that differ in it have no common held-out pairs; sweep "
                f"settings of {', '.join(SWEPT)}, and make a sweep for each {name}"
            )
        if name in ("train.seed", "train.eval_every"):
            instead = "--seeds N trains N seeds" if name == "train.seed" else "give one value"
            raise UserError(f"--{name} has several values; {instead}")
        if len(set(values)) < len(values):
            raise UserError(f"--{name} names a value twice: {','.join(values)}")


def _file_name(value: str) -> str:
    return re.sub(r"[^\w.+-]", "_", value)


def _nested(chosen: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in chosen.items():
        section, _, key = name.rpartition(".")
        (found.setdefault(section, {}) if section else found)[key] = value
    return found


def _asked_for(plan: SweepPlan) -> dict[str, Any]:
    configs = {name: config.model_dump(mode="json") for name, config in plan.configs.items()}
    return {"format": FORMAT, "settings": plan.settings, "measure": plan.measure, "configs": configs}


def _check_same_sweep(plan: SweepPlan) -> None:
    """More seeds than before are no other sweep."""
    if (plan.folder / "config.yaml").exists():
        raise UserError(f"{plan.folder} is a run; choose another --out")
    if not (plan.folder / "sweep.json").exists():
        return
    before, now = read_sweep(plan.folder), _asked_for(plan)
    differs = [name for name in now if before.get(name) != now[name]]
    if differs:
        raise UserError(f"{plan.folder} holds another sweep (other {', '.join(differs)}); choose another --out")


def read_sweep(folder: Path) -> dict[str, Any]:
    """OUT/sweep.json. Raises `UserError` where it is missing or damaged."""
    file = folder / "sweep.json"
    if not file.exists():
        raise UserError(f"{folder}: no sweep.json in it; expected a folder written by mlxdpo sweep")
    return read_json(file)


class HeldoutValues(NamedTuple):
    """One held-out evaluation of a run: its share of the run's steps, and (N,) values of the measure."""

    step: int
    share: float
    values: list[float]


def evaluations(run: Path, measure: str) -> tuple[list[str], list[HeldoutValues]]:
    """The prompts of the held-out pairs, and each evaluation, oldest first; of a step done again the newest."""
    prompts: list[str] = []
    found: dict[int, HeldoutValues] = {}
    file = run / "heldout.jsonl"
    with as_written(file):
        for line in read_lines(file) if file.exists() else ():
            if "prompts" in line:
                prompts = line["prompts"]
            else:
                found[line["step"]] = HeldoutValues(line["step"], line["step"] / line["steps"], line[measure])
    return prompts, [found[step] for step in sorted(found)]


def run_sweep(plan: SweepPlan, train: Train, should_stop: Stop, drift: Drift, say: Callable[[str], None]) -> bool:
    """Train what is not finished yet; False when asked to stop. `drift` is kept of each finished run.

    Raises `UserError` for whatever stops a run but numbers that are not finite: that run is kept as diverged.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    records = read_sweep(plan.folder)["runs"] if (plan.folder / "sweep.json").exists() else {}
    _save_sweep(plan, records)
    for seed in range(plan.seeds):
        for candidate in still_in(plan, records, seed):
            name = run_name(candidate, seed)
            if name not in records:
                number = list(plan.configs).index(candidate) + 1
                say(f"{name} ({number}/{len(plan.configs)}, seed {seed + 1}/{plan.seeds})")
                record = _train_one(plan, records, candidate, seed, train, should_stop)
                if record is None:
                    return False
                records[name] = record
                _save_sweep(plan, records)
                say(f"{name}: {ending(record)}")
            if records[name]["state"] == "finished" and records[name].get("drift") is None:
                records[name]["drift"] = drift(Run.open(plan.folder / name))
                _save_sweep(plan, records)
    return True


def drift_of(run: Run, answers: int) -> Mapping[str, Any] | None:
    """The KL of a finished run on `answers` prompts; None where it is not asked for, or its model writes no answers."""
    from mlxdpo_eval.checkpoints import measure_drift  # it loads MLX

    if not answers or run.config().stage not in ("dpo", "sft"):
        return None
    return measure_drift(run, answers)


def run_name(candidate: str, seed: int) -> str:
    """The folder of a run in its sweep."""
    return f"{candidate}-seed{seed}"


def _save_sweep(plan: SweepPlan, records: Mapping[str, Any]) -> None:
    write_json(plan.folder / "sweep.json", to_json({**_asked_for(plan), "seeds": plan.seeds, "runs": dict(records)}))


def ending(record: Mapping[str, Any]) -> str:
    """How a run ended, in words."""
    if record["state"] == "stopped":
        lost = record["lost"]
        return (
            f"stopped at step {record['step']} of {record['steps']}: held-out {lost['measure']} is "
            f"{abs(lost['low']):.3f} to {abs(lost['high']):.3f} worse than {lost['against']}'s (99 %)"
        )
    return record["state"] if record["state"] == "finished" else f"diverged: {record['why']}"


def still_in(plan: SweepPlan, records: Mapping[str, Any], seed: int) -> list[str]:
    """The candidates that are trained with this seed: those that lost in no earlier one."""
    left = list(plan.configs)
    for before in range(seed):
        leader = _leader(plan, records, before)
        left = [name for name in left if _may_go_on(plan, records, name, before, leader)]
    return left


def _may_go_on(plan: SweepPlan, records: Mapping[str, Any], candidate: str, seed: int, leader: str | None) -> bool:
    name = run_name(candidate, seed)
    if records.get(name, {}).get("state") != "finished" or leader is None:
        return False
    prompts, own = evaluations(plan.folder / name, plan.measure)
    return name == leader or surely_worse(plan, own[-1], leader, prompts) is None


def _leader(plan: SweepPlan, records: Mapping[str, Any], seed: int) -> str | None:
    """The finished run of this seed with the best last evaluation."""
    names = [run_name(candidate, seed) for candidate in plan.configs]
    done = [name for name in names if records.get(name, {}).get("state") == "finished"]
    sign = 1 if plan.measure == "accuracy" else -1
    best = {name: sign * float(np.mean(evaluations(plan.folder / name, plan.measure)[1][-1].values)) for name in done}
    return max(best, key=lambda name: best[name], default=None)


def surely_worse(plan: SweepPlan, own: HeldoutValues, leader: str, prompts: Sequence[str]) -> Interval | None:
    """The interval of how much better (below 0: worse) than the leader's evaluation at the same share of steps.

    None where it does not lie wholly below 0. Raises `UserError` where the two have other held-out pairs.
    """
    others, found = evaluations(plan.folder / leader, plan.measure)
    if list(prompts) != others:
        raise UserError(
            f"{plan.folder}: its runs have different held-out pairs, which cannot be compared; sweep objectives for "
            f"pairs and for single rows apart"
        )
    earlier = [evaluation for evaluation in found if evaluation.share <= own.share + 1e-9]
    sign = 1 if plan.measure == "accuracy" else -1
    difference = sign * (np.array(own.values) - np.array(earlier[-1].values))
    interval = clustered_mean(difference, list(prompts), LEVEL)
    return interval if interval is not None and interval.high < 0 else None


def _train_one(
    plan: SweepPlan, records: Mapping[str, Any], candidate: str, seed: int, train: Train, should_stop: Stop
) -> dict[str, Any] | None:
    """How the run ended; None when asked to stop."""
    from mlxdpo.inner import NonFiniteError  # it loads MLX

    path, leader = plan.folder / run_name(candidate, seed), _leader(plan, records, seed)
    resume = Run.open(path) if (path / "config.yaml").exists() else None
    config = resume.config() if resume else _seeded(plan, candidate, seed)
    lost: dict[str, Any] = {}
    prompts: list[str] = []
    steps, last, finished = 0, 0, False
    try:
        for event in train(config, resume, lambda: bool(lost) or should_stop()):
            last = event.step
            if event.kind == "start":
                steps, prompts = event.values["plan"].steps, _prompt_names(event.values["data"].heldout)
                append_line(path / "heldout.jsonl", {"prompts": prompts})
            elif event.kind == "eval":
                own = _keep_evaluation(plan, path, event, steps)
                if leader is not None and (own.share < 1):
                    interval = surely_worse(plan, own, leader, prompts)
                    if interval is not None and own.share >= 1 / LOOKS:
                        lost.update({**interval._asdict(), "against": leader, "measure": plan.measure})
            finished = finished or event.kind == "done"
    except NonFiniteError as error:
        return {"state": "diverged", "step": last, "steps": steps, "why": str(error)}
    if not finished and not lost:
        return None
    how = {"state": "finished"} if finished else {"state": "stopped", "lost": lost}
    return how | {"step": last, "steps": steps, "lr": Run.open(path).config().optim.lr}


def _seeded(plan: SweepPlan, candidate: str, seed: int) -> Config:
    config = plan.configs[candidate]
    train = config.train.model_copy(update={"seed": config.train.seed + seed})
    return config.model_copy(update={"train": train, "out": str(plan.folder / run_name(candidate, seed))})


def _prompt_names(heldout: Sequence[Any]) -> list[str]:
    """A name for the prompt of each pair, the same in every split of the data."""
    if not len(heldout):
        raise UserError("a sweep needs held-out pairs to compare its runs; set data.eval or data.eval_fraction")
    return [hashlib.sha256(example.prompt.tobytes()).hexdigest()[:16] for example in heldout]


def _keep_evaluation(plan: SweepPlan, path: Path, event: Any, steps: int) -> HeldoutValues:
    if plan.measure not in event.pairs:
        raise UserError(
            f"runs that differ in {', '.join(n for n, v in plan.settings.items() if len(v) > 1)} are compared by "
            f"held-out accuracy, which single rows have not; sweep settings of lora, optim or train"
        )
    kept = {name: values.tolist() for name, values in event.pairs.items()}
    append_line(path / "heldout.jsonl", {"step": event.step, "steps": steps, **kept})
    return HeldoutValues(event.step, event.step / steps, kept[plan.measure])
