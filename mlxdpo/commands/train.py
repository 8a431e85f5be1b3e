"""`mlxdpo train [RECIPE.yaml] [--model M --data D --loss.beta 0.1 ...] [--resume RUN]`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from mlxdpo.config import Config, load_config
from mlxdpo.runs import Run
from mlxdpo.types import UserError

Overrides = Annotated[Config, Parameter(name="*")]
NOTHING = Config()  # no setting given


def run(recipe: Path | None = None, /, *, config: Overrides = NOTHING, resume: Path | None = None) -> int:
    """Tune a model on preference pairs.

    Parameters
    ----------
    recipe
        YAML file with any of the settings below; the command line wins over it.
    config
        Settings of the run.
    resume
        Run directory to go on with, exactly where its last checkpoint stands.
    """
    given = config.model_dump(exclude_unset=True)
    if resume is not None:
        if recipe is not None or given:
            what = recipe or "--" + next(iter(given))
            raise UserError(f"--resume {resume} goes on with the run's own settings; drop {what}")
        existing = Run.open(resume)
        return follow_training(existing.config(), existing)
    return follow_training(load_config(recipe, given), None)


def follow_training(config: Config, resume: Run | None) -> int:
    """Train with everything shown and tracked; 0 when done, 130 when interrupted."""
    from mlxdpo.commands import screen
    from mlxdpo.commands.interrupt import stop_flag
    from mlxdpo.commands.track import check_installed, tracked
    from mlxdpo.platform import preload_blas
    from mlxdpo.train import train

    if not preload_blas().fast:
        screen.warn(preload_blas().note)
    check_installed(config)
    path, finished = resume.path if resume else None, False
    with stop_flag() as should_stop:
        for event in tracked(screen.follow(train(config, resume=resume, should_stop=should_stop)), config):
            if event.kind == "start":
                path = event.values["run"].path
            elif event.kind == "done":
                finished = True
                screen.console.print(f"done: {event.values['adapter']} holds {event.values['from']}")
    if not finished:
        screen.console.print(f"stopped; go on with: mlxdpo train --resume {path}")
        return 130
    screen.console.print(f"see it: mlxdpo generate {path} --prompt '...'   (--before for the untuned model)")
    return 0
