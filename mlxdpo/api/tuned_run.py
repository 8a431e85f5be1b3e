"""A run as Python has it: it answers, shows itself in a notebook, and can be trained again to compare."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from mlxdpo.config import Config
from mlxdpo.inference.generate import generate
from mlxdpo.io.digest import file_digest
from mlxdpo.io.json_file import read_json, read_lines
from mlxdpo.machine.openblas import preload_blas
from mlxdpo.model.adapters import WEIGHTS
from mlxdpo.runs import Run
from mlxdpo.training.given import config_of
from mlxdpo.training.run import train
from mlxdpo.types import Event, UserError
from mlxdpo.ui.runs.chart import STYLE, Series, chart

SHOWN_ANSWERS = 3


class Reproduction(NamedTuple):
    """Whether a second training gave the same adapter: SHA-256 of both files, and where the second one is."""

    same: bool
    digest: str
    again: str
    path: Path


@dataclass(frozen=True)
class TunedRun(Run):
    """A run directory that shows itself: its curve, its verdict once it is evaluated, and answers before and after."""

    def reproduce(self, out: str | Path | None = None) -> Reproduction:
        """Train again from the run's configuration into `out` (RUN-again) and compare the adapters' files.

        Raises `UserError` if `out` contains a run, or an input no longer exists.
        """
        place = Path(out) if out is not None else self.path.with_name(f"{self.path.name}-again")
        config = self.config()
        finished_run(train(config.model_copy(update={"out": str(place)}), generate=generate))
        digests = [file_digest(folder / "adapter" / WEIGHTS) for folder in (self.path, place)]
        return Reproduction(digests[0] == digests[1], digests[0], digests[1], place)

    def verdict(self) -> list[str]:
        """The sentences of the newest evaluation; none before the first."""
        found = sorted((self.path / "eval").glob("results_*.json"))
        return list(read_json(found[-1]).get("sentences", [])) if found else []

    def samples(self) -> list[Mapping[str, Any]]:
        """Answers of the newest evaluation: `prompt`, `before`, `after`; none before the first."""
        file = self.path / "eval" / "eval_samples.jsonl"
        return list(read_lines(file)) if file.exists() else []

    def _repr_html_(self) -> str:
        """What a notebook shows."""
        lines = self.metrics()
        parts = [f"<h4>{escape(self.path.name)}</h4>", STYLE, '<div class="charts">', _curves(lines), "</div>"]
        said = self.verdict() or [f"not evaluated yet: mlxdpo.evaluate(mlxdpo.open_run({str(self.path)!r}))"]
        parts += [f"<p>{escape(sentence)}</p>" for sentence in said]
        return "".join([*parts, _answers_table(self.samples()[:SHOWN_ANSWERS])])


def _curves(lines: Sequence[Mapping[str, Any]]) -> str:
    shown = (("loss", "loss"), ("rewards/margins", "margin"))
    return "".join(
        chart(
            title,
            [
                Series(title, _points(lines, key), "line", 0),
                Series(f"{title}, held out", _points(lines, f"eval_{key}"), "dots", 1),
            ],
        )
        for key, title in shown
    )


def _points(lines: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], line[key]) for line in lines if line.get(key) is not None]


def _answers_table(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    cells = "".join(
        f"<tr>{''.join(f'<td>{escape(str(row.get(name, str())))}</td>' for name in ('prompt', 'before', 'after'))}</tr>"
        for row in rows
    )
    return f"<table><tr><th>prompt</th><th>before</th><th>after</th></tr>{cells}</table>"


def open_run(path: str | Path) -> TunedRun:
    """An existing run. Raises `UserError` where the folder holds none."""
    return TunedRun(Run.open(path).path)


def finished_run(events: Any) -> TunedRun:
    """The run of a training that is carried through. Raises `UserError` where it was interrupted."""
    last, run = None, None
    for event in events:
        last = event
        run = event.values["run"] if event.kind in ("start", "done") else run
    if not isinstance(last, Event) or last.kind != "done" or run is None:
        raise UserError("training stopped early; see the events of mlxdpo.train")
    return TunedRun(run.path)


def tune(
    model: str | Path,
    data: Any,
    *,
    loss: Any = None,
    eval_data: Any = None,
    quiet: bool = False,
    **settings: Any,
) -> TunedRun:
    """Tune a model on preference pairs and return the run.

    `model` is a folder, a Hub id or "smollm2". `data` is a path, a Hub id or rows: dicts in any row shape. `loss` is
    the name of an objective or a function of `Pairs` (`mlxdpo.objective`). `settings` are those of a recipe: lr=1e-4,
    optim_lr=1e-4, optim={"lr": 1e-4} or **{"optim.lr": 1e-4}; out="runs/mine" names the directory. Steps are printed
    unless `quiet`.

    Raises `UserError` in a sentence for whatever is wrong with them, before the model is loaded.
    """
    config = config_of(model, data, eval_data, with_loss(loss, settings))
    warn_slow_blas()
    events = train(config, generate=generate)
    return finished_run(events if quiet else printed(events, config))


def warn_slow_blas() -> None:
    """Warn where matrix products are slow on Linux: mlx was imported first, or the fast BLAS is absent."""
    blas = preload_blas()
    if not blas.fast:
        warnings.warn(blas.note, stacklevel=3)


def with_loss(loss: Any, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with the objective that `loss` names or is; a function is registered under its name."""
    if loss is None:
        return dict(settings)
    if callable(loss):
        from mlxdpo.api.objective_function import OWN_TITLE, objective
        from mlxdpo.losses import LOSSES

        function: Any = loss
        name = function.__name__
        if name not in LOSSES or LOSSES[name].title != OWN_TITLE or name == "<lambda>":
            objective(function, name="own_loss" if name == "<lambda>" else name)
        loss = "own_loss" if name == "<lambda>" else name
    return {**settings, "loss.name": loss}


def printed(events: Any, config: Config) -> Any:
    """Hand events on and print steps with the time left, held-out losses and notes."""
    from mlxdpo.io.progress import clock

    for event in events:
        if event.kind == "step":
            left = clock(event.values["seconds_left"])
            print(f"step {event.step}  loss {event.values['loss']:.4f}  {left} left", flush=True)
        elif event.kind == "eval":
            print(f"held out at step {event.step}  loss {event.values['eval_loss']:.4f}", flush=True)
        elif event.kind == "note":
            print(event.values["text"])
        yield event
