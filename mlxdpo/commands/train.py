"""`mlxdpo train [RECIPE.yaml] [--model M --data D --loss.beta 0.1 ...] [--resume RUN]`"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mlxdpo.config import Config, load_config
from mlxdpo.runs import LENGTH, Run, with_length
from mlxdpo.types import UserError

if TYPE_CHECKING:
    from mlxdpo.distributed.group import Group
    from mlxdpo.types import Event

Overrides = Annotated[Config, Parameter(name="*")]
NOTHING = Config()  # no setting given


def run(
    recipe: Path | None = None, /, *, config: Overrides = NOTHING, resume: Path | None = None, keep_awake: bool = False
) -> int:
    """Tune a model on preference pairs.

    Args:
        recipe: YAML file with any of the settings below; the command line takes precedence.
        config: Settings of the run.
        resume: Run directory to resume from its last checkpoint; the result is bit-identical. With --train.epochs,
            --train.steps or --train.patience it trains longer, even if finished.
        keep_awake: Keep the Mac awake while this trains (the display may sleep); macOS only.
    """
    from mlxdpo.distributed.group import joined
    from mlxdpo.machine.errors import error_message
    from mlxdpo.training.distributed import asked_for

    if keep_awake:
        stay_awake()
    with joined(error_message) as peers:
        settings, existing = asked_for(peers, lambda: _settings_and_run(recipe, config, resume))
        if peers.first:
            gone = go_on_once if peers.size == 1 else leave_stopped
            return follow_training(settings, existing, peers, gone, say_outcome)
        return _follow_the_first(settings, existing, peers)


def _settings_and_run(recipe: Path | None, config: Config, resume: Path | None) -> tuple[Config, Run | None]:
    """The settings of a run, and the run to resume."""
    given = config.model_dump(exclude_unset=True)
    if resume is None:
        return load_config(recipe, given), None
    others = [f"--{name}" for name in _option_names(given) if name not in MAY_CHANGE]
    if recipe is not None or others:
        raise UserError(
            f"--resume {resume} uses the run's settings; drop {recipe or others[0]} "
            f"(only {', '.join(MAY_CHANGE)} may change)"
        )
    existing = Run.open(resume)
    return with_length(existing.config(), given.get("train", {})), existing


MAY_CHANGE = tuple(f"train.{name}" for name in LENGTH)


def _option_names(given: Mapping[str, Any]) -> Iterator[str]:
    """The dotted names of settings, as the command line has them."""
    for name, value in given.items():
        yield from (f"{name}.{inner}" for inner in value) if isinstance(value, Mapping) else (name,)


def _follow_the_first(config: Config, resume: Run | None, peers: Group) -> int:
    """Train with process 0, which shows what happens."""
    from mlxdpo.commands.interrupt import stop_flag
    from mlxdpo.distributed.group import PeerLost
    from mlxdpo.estimate.forecast import check_fits
    from mlxdpo.inference.generate import generate
    from mlxdpo.training.run import train

    kind, path = "", None
    with stop_flag() as should_stop:
        try:
            for event in train(
                config, resume=resume, should_stop=should_stop, group=peers, fits=check_fits, generate=generate
            ):
                kind = event.kind
                path = event.values["run"].path if kind == "start" else path
        except PeerLost as lost:
            raise PeerLost(f"{lost}; {_resume_hint(path)}") from lost
    return 0 if kind == "done" else 130


def _resume_hint(path: Path | None) -> str:
    from mlxdpo.machine.errors import resume_hint

    return "start again" if path is None else resume_hint(path)


def stay_awake() -> None:
    """Keep macOS from sleeping as long as this process lives, whatever program it becomes; `caffeinate` watches it.

    The display is left alone: with it asleep nothing on it can be held up by training. Raises `UserError` elsewhere.
    """
    if sys.platform != "darwin":
        raise UserError(
            "--keep-awake is for macOS, where it runs caffeinate; on Linux put this before the command: "
            "systemd-inhibit --what=sleep"
        )
    subprocess.Popen(
        ["/usr/bin/caffeinate", "-i", "-s", "-w", str(os.getpid())],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip


WENT_ON = "MLXDPO_WENT_ON"  # in the environment of a process that went on by itself
GENTLER = {
    "MLX_MAX_OPS_PER_BUFFER": "4",
    "MLX_MAX_MB_PER_BUFFER": "10",
    "AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "1",
}
"""What the second process is given where the user has not set it: work reaches the GPU in small pieces, between which
macOS can draw. The last is reported to help by people whose trainings were stopped; none changes a number."""


def go_on_once(path: Path, error: RuntimeError) -> None:
    """Become a new process that resumes a run; macOS stopped this one's work on the GPU, and the next can be
    stopped too, so a process that went on by itself adds a note to the error and returns.

    The process keeps its number, its terminal and what it holds for others; after such an error nothing that this one
    computes can be trusted, so nothing is saved.
    """
    from mlxdpo.commands.terminal import warn
    from mlxdpo.machine.errors import error_message

    if os.environ.get(WENT_ON):
        error.add_note("the run was already resumed automatically once")
        return
    warn(f"{error_message(error)}; resuming from the last checkpoint in a new process, once")
    sys.stdout.flush()
    words = [sys.executable, "-P", "-m", "mlxdpo.cli", "train", "--resume", str(path)]
    os.execve(sys.executable, words, GENTLER | os.environ | {WENT_ON: "1"})


def nothing_more(run: Run, heldout: Mapping[str, float]) -> None:
    """Nothing: the caller says what came out."""


def say_outcome(run: Run, heldout: Mapping[str, float]) -> None:
    """Whether the answers changed, by how much, and what to do next; for runs that write and held out prompts."""
    from mlxdpo.commands.terminal import console
    from mlxdpo_eval.outcome import measure_outcome, outcome_sentences

    if not heldout or run.config().stage == "reward":
        return
    for sentence in outcome_sentences(measure_outcome(run, console.print), heldout, run):
        console.print(sentence, style="bold", markup=False)


def leave_stopped(path: Path, error: RuntimeError) -> None:
    """Nothing: who starts the processes again is not one of them."""


def follow_training(
    config: Config,
    resume: Run | None,
    peers: Group | None = None,
    when_stopped: Callable[[Path, RuntimeError], None] = leave_stopped,
    finish: Callable[[Run, Mapping[str, float]], None] = nothing_more,
    see: Callable[[Event], None] = lambda event: None,
    introduce: Callable[[Mapping[str, Any]], None] | None = None,
) -> int:
    """Train with everything shown and tracked; 0 when done, 130 when interrupted.

    `when_stopped` is called when macOS stopped the work on the GPU; when it returns, that error is raised. `finish`
    gets the finished run and its last held-out metrics, `see` every event after it was shown, `introduce` the first.
    """
    from mlxdpo.commands import terminal
    from mlxdpo.commands.interrupt import stop_flag
    from mlxdpo.commands.trackers import check_trackers, tracked
    from mlxdpo.distributed.group import ALONE, PeerLost
    from mlxdpo.estimate.forecast import check_fits
    from mlxdpo.inference.generate import generate
    from mlxdpo.machine.errors import gpu_was_stopped
    from mlxdpo.machine.openblas import preload_blas
    from mlxdpo.training.run import train

    if not preload_blas().fast:
        terminal.warn(preload_blas().note)
    check_trackers(config)
    path, finished = resume.path if resume else None, False
    heldout: Mapping[str, float] = {}
    with stop_flag() as should_stop:
        events = train(
            config, resume=resume, should_stop=should_stop, group=peers or ALONE, fits=check_fits, generate=generate
        )
        try:
            for event in tracked(terminal.show_training(events, introduce), config):
                see(event)
                if event.kind == "start":
                    path = event.values["run"].path
                elif event.kind == "eval":
                    heldout = event.values
                elif event.kind == "done":
                    finished = True
                    terminal.console.print(f"done: {event.values['adapter']} holds {event.values['from']}")
        except PeerLost as lost:
            raise PeerLost(f"{lost}; {_resume_hint(path)}") from lost
        except (RuntimeError, MemoryError) as error:
            if path is not None and isinstance(error, RuntimeError) and gpu_was_stopped(error):
                when_stopped(path, error)
            error.add_note(_resume_hint(path))
            raise
    if not finished:
        way = "nothing was saved, start again" if path is None else f"resume with: mlxdpo train --resume {path}"
        terminal.console.print(f"stopped; {way}")
        return 130
    del events  # and with it the model, which `finish` may load again
    if config.stage != "reward":
        terminal.console.print(f"talk to it: mlxdpo chat {path}   (/both: the untuned model answers too)", markup=False)
    assert path is not None  # a finished run has one
    finish(Run(path), heldout)
    return 0
