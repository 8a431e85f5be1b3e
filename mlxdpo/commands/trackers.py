"""Metrics to TensorBoard, W&B or Trackio, through their own libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from uuid import uuid4

from mlxdpo.config import Config
from mlxdpo.io.atomic import write_text
from mlxdpo.types import Event, UserError


class Tracker(NamedTuple):
    """Where numbers go: `log(values, step)` and `close()`."""

    log: Callable[[dict[str, float], int], None]
    close: Callable[[], None]


def _tensorboard(path: str, config: Config) -> Tracker:
    from tensorboardX import SummaryWriter

    writer = SummaryWriter(logdir=f"{path}/tensorboard")

    def log(values: dict[str, float], step: int) -> None:
        """One scalar after the other."""
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _wandb(path: str, config: Config) -> Tracker:
    import wandb

    run_id, _ = _tracked_as(path, "wandb")
    run = wandb.init(project="mlxdpo", name=path, id=run_id, resume="allow", config=config.model_dump(mode="json"))
    return Tracker(lambda values, step: run.log(values, step=step), run.finish)


def _trackio(path: str, config: Config) -> Tracker:
    import trackio

    _, known = _tracked_as(path, "trackio")
    resume = "allow" if known else "never"
    trackio.init(project="mlxdpo", name=path, resume=resume, config=config.model_dump(mode="json"))
    return Tracker(lambda values, step: trackio.log(values, step=step), trackio.finish)


def _tracked_as(path: str, tracker: str) -> tuple[str, bool]:
    """The id of this run at a tracker and whether it has one already: a resumed run continues its curves."""
    file = Path(path) / f"{tracker}_run_id.txt"
    if file.exists():
        return file.read_text("utf-8").strip(), True
    run_id = uuid4().hex
    write_text(file, run_id + "\n")
    return run_id, False


TRACKERS: dict[str, Callable[[str, Config], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}


def check_trackers(config: Config) -> None:
    """Raise `UserError` before anything is loaded when a tracker's library is missing."""
    import importlib.util

    modules = {"tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}
    for name in config.log.trackers:
        if importlib.util.find_spec(modules[name]) is None:
            raise UserError(
                f"log.trackers has {name}, but {modules[name]} is not installed: pip install {modules[name]}"
            )


def tracked(events: Iterable[Event], config: Config) -> Iterator[Event]:
    """Send the numbers of "step" and "eval" events to the trackers and hand all events on."""
    trackers: list[Tracker] = []
    try:
        for event in events:
            if event.kind == "start":
                path = str(event.values["run"].path)
                trackers = [TRACKERS[name](path, config) for name in config.log.trackers]
            elif event.kind in ("step", "eval"):
                for tracker in trackers:
                    tracker.log(_scalars(event.values), event.step)
            yield event
    finally:
        for tracker in trackers:
            tracker.close()


def _scalars(values: Any) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}
