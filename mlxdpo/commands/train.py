"""`mlxdpo train [RECIPE.yaml] [--model M --data D --loss.beta 0.1 ...] [--resume RUN]`"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from mlxdpo.config import Config, load_config
from mlxdpo.runs import Run
from mlxdpo.types import UserError

if TYPE_CHECKING:
    from mlxdpo.distributed.group import Group

Overrides = Annotated[Config, Parameter(name="*")]
NOTHING = Config()  # no setting given


def run(recipe: Path | None = None, /, *, config: Overrides = NOTHING, resume: Path | None = None) -> int:
    """Tune a model on preference pairs.

    Args:
        recipe: YAML file with any of the settings below; the command line wins over it.
        config: Settings of the run.
        resume: Run directory to go on with, exactly where its last checkpoint stands.
    """
    from mlxdpo.commands.interrupt import error_message
    from mlxdpo.distributed.group import joined
    from mlxdpo.training.distributed import asked_for

    with joined(error_message) as peers:
        settings, existing = asked_for(peers, lambda: _settings_and_run(recipe, config, resume))
        if peers.first:
            return follow_training(settings, existing, peers)
        return _follow_the_first(settings, existing, peers)


def _settings_and_run(recipe: Path | None, config: Config, resume: Path | None) -> tuple[Config, Run | None]:
    """The settings of a run, and the run to go on with."""
    given = config.model_dump(exclude_unset=True)
    if resume is None:
        return load_config(recipe, given), None
    if recipe is not None or given:
        what = recipe or "--" + next(iter(given))
        raise UserError(f"--resume {resume} goes on with the run's own settings; drop {what}")
    existing = Run.open(resume)
    return existing.config(), existing


def _follow_the_first(config: Config, resume: Run | None, peers: Group) -> int:
    """Train with process 0, which shows what happens."""
    from mlxdpo.commands.interrupt import stop_flag
    from mlxdpo.distributed.group import PeerLost
    from mlxdpo.estimate.forecast import check_fits
    from mlxdpo.training.run import train

    kind, path = "", None
    with stop_flag() as should_stop:
        try:
            for event in train(config, resume=resume, should_stop=should_stop, group=peers, fits=check_fits):
                kind = event.kind
                path = event.values["run"].path if kind == "start" else path
        except PeerLost as lost:
            raise PeerLost(f"{lost}; {_resume_hint(path)}") from lost
    return 0 if kind == "done" else 130


def _resume_hint(path: Path | None) -> str:
    return "start again" if path is None else f"go on from the last checkpoint with: mlxdpo train --resume {path}"


def follow_training(config: Config, resume: Run | None, peers: Group | None = None) -> int:
    """Train with everything shown and tracked; 0 when done, 130 when interrupted."""
    from mlxdpo.commands import terminal
    from mlxdpo.commands.interrupt import stop_flag
    from mlxdpo.commands.trackers import check_trackers, tracked
    from mlxdpo.distributed.group import ALONE, PeerLost
    from mlxdpo.estimate.forecast import check_fits
    from mlxdpo.machine.openblas import preload_blas
    from mlxdpo.training.run import train

    if not preload_blas().fast:
        terminal.warn(preload_blas().note)
    check_trackers(config)
    path, finished = resume.path if resume else None, False
    with stop_flag() as should_stop:
        events = train(config, resume=resume, should_stop=should_stop, group=peers or ALONE, fits=check_fits)
        try:
            for event in tracked(terminal.show_training(events), config):
                if event.kind == "start":
                    path = event.values["run"].path
                elif event.kind == "done":
                    finished = True
                    terminal.console.print(f"done: {event.values['adapter']} holds {event.values['from']}")
        except PeerLost as lost:
            raise PeerLost(f"{lost}; {_resume_hint(path)}") from lost
    if not finished:
        way = "nothing was begun, start again" if path is None else f"go on with: mlxdpo train --resume {path}"
        terminal.console.print(f"stopped; {way}")
        return 130
    terminal.console.print(f"see it: mlxdpo generate {path} --prompt '...'   (--before for the untuned model)")
    return 0
