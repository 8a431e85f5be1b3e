"""Trainings that the page starts, stops and resumes; RUN/job/ is the folder of the process (`ui/jobs.py`)."""

from __future__ import annotations

import os
import re
import shlex
import signal
from collections.abc import Sequence
from os.path import isfile
from pathlib import Path
from typing import NamedTuple

from mlxdpo.config import Config
from mlxdpo.runs import Run
from mlxdpo.types import UserError
from mlxdpo.ui.jobs import log_tail, read_job, spawn
from mlxdpo.ui.runs.run_list import JOB, busy, newest, number_in, refuse_strange_code, state
from mlxdpo.ui.train.recipe_form import flags

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}")
STEP = re.compile(r"(?:step|held-out at step) (\d+)/(\d+)")


class Watched(NamedTuple):
    """Where a training stands.

    step, steps  optimizer steps done and planned; None before the first
    left         seconds, as the trainer reckons
    rate         tokens per second
    memory       GB of MLX that are in use
    cached       GB that MLX keeps for reuse
    stopping     it was asked to stop
    command      how to go on in a terminal
    log          the last lines that it said
    """

    state: str
    step: int | None
    steps: int | None
    left: float | None
    rate: float | None
    memory: float | None
    cached: float | None
    stopping: bool
    command: str
    log: str


def run_path(runs: Path, name: str) -> Path:
    """The directory of a new run. Raises `UserError` for a name that is not one plain word."""
    if not NAME.fullmatch(name or ""):
        raise UserError(f"{name!r} is not a valid name for a run; use letters, digits, dots, dashes and underscores")
    return runs / name


def plain_name(text: str) -> str:
    """A text as part of a run's name."""
    return re.sub(r"[^a-z0-9._-]+", "-", text.lower()).strip("-._")[:60] or "run"


def command_of(config: Config) -> list[str]:
    """The words of the command, as one would type them."""
    return ["mlxdpo", "train", *flags(config)]


def start_training(runs: Path, name: str, config: Config) -> Path:
    """Begin training; returns the run directory. Raises `UserError` when there is a run of that name."""
    path = run_path(runs, name)
    if (path / "config.yaml").exists():
        raise UserError(f"{path} already holds a run; choose another name, or resume it below")
    _spawn(path, command_of(config.model_copy(update={"out": str(path)})))
    return path


def resume_training(path: Path) -> None:
    """Go on with an interrupted run. Raises `UserError` when it is being trained, or never came to be."""
    now = state(path)
    if now in ("training", "starting"):
        raise UserError(f"{path.name} is being trained already; stop it first, or wait")
    if now == "unreadable":
        raise UserError(f"{path.name}: its config.yaml cannot be read; restore it, or remove the folder")
    if now == "failed":
        raise UserError(f"{path.name} stopped before there was anything to resume; fix what its log says, and start it")
    if now == "finished":
        raise UserError(f"{path.name} is finished; start a new run, or one from its adapter")
    command = ["mlxdpo", "train", "--resume", str(path)]
    refuse_strange_code(path, command)
    _spawn(path, command)


def _spawn(path: Path, command: Sequence[str]) -> None:
    spawn(path / JOB, command, f"{path.name} is being trained already; stop it first, or wait")


def stop_training(path: Path) -> str:
    """Ask a training to save and stop; says what will happen. Raises `UserError` when nothing can be stopped."""
    if not busy(path / JOB / "lock"):
        if isfile(path / "config.yaml") and Run(path).held():
            raise UserError(f"{path.name} was started in a terminal; press Ctrl-C there")
        raise UserError(f"{path.name} is not being trained now; there is nothing to stop")
    job = read_job(path / JOB)
    asked = path / JOB / "asked"
    if asked.exists():
        raise UserError(
            f"{path.name} stops after the step it is in and saves it; to end it without saving: kill -9 {job['pid']}"
        )
    asked.touch()
    # Not SIGINT: whoever starts the app in the background hands down that it is ignored. The trainer takes both alike.
    os.kill(job["pid"], signal.SIGTERM)
    return f"{path.name} stops after the step it is in; what it has learned is saved."


def watch(path: Path) -> Watched:
    """Where a training stands, from its files alone."""
    now, log = state(path), log_tail(path / JOB)
    at = STEP.findall(log)
    last, _ = newest(path / "metrics.jsonl")
    live = now == "training" and bool(last)
    return Watched(
        state=now,
        step=last.get("step"),
        steps=int(at[-1][1]) if at else None,
        left=number_in(last, "seconds_left") if live else None,
        rate=number_in(last, "tokens_per_second") if live else None,
        memory=number_in(last, "active_memory_gb") if live else None,
        cached=number_in(last, "cache_memory_gb") if live else None,
        stopping=now in ("training", "starting") and (path / JOB / "asked").exists(),
        command=shlex.join(["mlxdpo", "train", "--resume", str(path)]),
        log=log,
    )
