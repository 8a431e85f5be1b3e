"""Sweeps from Python: settings with several values, one run each, and what can be told apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlxdpo.api.tuned_run import TunedRun, open_run, printed, warn_slow_blas, with_loss
from mlxdpo.config import Config
from mlxdpo.io.settings import dotted_names
from mlxdpo.runs import Run
from mlxdpo.training.given import config_of, nested_settings
from mlxdpo.training.run import train
from mlxdpo.types import UserError
from mlxdpo.ui.runs.chart import STYLE, Series, chart

if TYPE_CHECKING:
    from mlxdpo_eval.sweep_results import SweepResults

LINES = 6  # curves in a notebook's chart


@dataclass(frozen=True)
class Sweep:
    """A finished sweep: `results` as OUT/results.json has them. A notebook shows its table and held-out curves."""

    path: Path
    results: SweepResults

    @property
    def best(self) -> TunedRun | None:
        """The first seed's run of the best setting; None before any setting finished all seeds."""
        from mlxdpo_eval.sweep import run_name

        return None if self.results.best is None else open_run(self.path / run_name(self.results.best, 0))

    @property
    def runs(self) -> list[TunedRun]:
        """All run directories, those of stopped runs included."""
        from mlxdpo_eval.sweep import run_name

        names = [run_name(one.name, seed) for one in self.results.candidates for seed in range(self.results.seeds)]
        return [open_run(self.path / name) for name in names if (self.path / name / "config.yaml").exists()]

    def sentence(self) -> str:
        """Which setting is best, and which cannot be told apart from it."""
        from mlxdpo_eval.sweep_results import sweep_sentence

        return sweep_sentence(self.results)

    def _repr_html_(self) -> str:
        from mlxdpo_eval.report.sweep import SWEEP_COLUMNS, sweep_cells

        rows = [SWEEP_COLUMNS, *sweep_cells(self.results)]
        body = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows)
        curves = [
            Series(candidate.name, [(100 * share, value) for share, value in candidate.curve], "line", number)
            for number, candidate in enumerate(self.results.candidates[:LINES])
        ]
        title = f"held-out {self.results.measure} over % of the steps"
        return f"<p>{escape(self.sentence())}</p><table>{body}</table>{STYLE}{chart(title, curves)}"


def sweep(
    model: str | Path,
    data: Any,
    *,
    out: str | Path = "runs/sweep",
    loss: Any = None,
    eval_data: Any = None,
    seeds: int = 1,
    answers: int = 50,
    quiet: bool = False,
    **settings: Any,
) -> Sweep:
    """Train under every combination of settings; as `mlxdpo sweep`, whose page is OUT/report.html.

    `model`, `data`, `eval_data` and `settings` are those of `tune`; a list is several values: beta=[0.05, 0.1],
    loss=["sigmoid", "ipo"]. Runs that lose at 99 % are stopped early. Called again with the same arguments, finished
    runs are kept, an interrupted one continues, and more `seeds` are added. `answers` is the number of held-out prompts
    on which each finished run's KL is measured.

    Raises `UserError` for settings that cannot be swept, and for an `out` that holds something else.
    """
    from mlxdpo.estimate.forecast import planned_steps
    from mlxdpo_eval.report.sweep import write_sweep
    from mlxdpo_eval.sweep import drift_of, plan_sweep, run_sweep

    if seeds < 1:
        raise UserError(f"seeds is {seeds}; give 1 or more")
    losses = loss if isinstance(loss, list | tuple) else [loss]
    names = [with_loss(one, {}).get("loss.name") for one in losses]
    fixed, swept = _told_apart({**settings, "loss.name": names if len(names) > 1 else names[0]})
    place = Path(out)
    # Rows that are in memory are written beside the runs, once.
    source = config_of(model, data, eval_data, fixed | {"out": str(place / "run")})
    fixed["data"] = source.data.model_dump(exclude_unset=True)
    make = lambda given: config_of(model, settings=_laid_over(fixed, given))  # noqa: E731
    plan = plan_sweep(make, swept, seeds, place, planned_steps)
    warn_slow_blas()
    say: Callable[[str], None] = (lambda text: None) if quiet else print
    run_sweep(plan, _trained(quiet), lambda: False, lambda run: drift_of(run, answers), say)
    return Sweep(place, write_sweep(place))


def _told_apart(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, list[str]]]:
    """Settings with one value, nested, and those with several, by dotted name and as text."""
    nested = nested_settings({name: value for name, value in settings.items() if value is not None})
    if "out" in nested:
        raise UserError("out is an argument: sweep(..., out=FOLDER)")
    fixed, swept = {}, {}
    for name in dotted_names(Config):
        section, _, key = name.rpartition(".")
        inside = nested.get(section, {}) if section else nested
        if key in inside and isinstance(inside[key], list | tuple) and not _takes_list(section, key):
            swept[name] = [_value_text(value) for value in inside.pop(key)]
    fixed = {section: values for section, values in nested.items() if values != {}}
    return fixed, swept


def _laid_over(fixed: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with others over them; what a section has besides stays."""
    both = {name: {**fixed[name], **value} for name, value in given.items() if isinstance(fixed.get(name), Mapping)}
    return {**fixed, **given, **both}


def _takes_list(section: str, key: str) -> bool:
    schema: Any = Config.model_fields[section].annotation if section else Config
    return "list[" in str(schema.model_fields[key].annotation)


def _value_text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _trained(quiet: bool) -> Any:
    from mlxdpo.inference.generate import generate

    def one(config: Config, resume: Run | None, stop: Callable[[], bool]) -> Iterator[Any]:
        """The events of one run, printed unless `quiet`."""
        events = train(config, resume=resume, should_stop=stop, generate=generate)
        return events if quiet else printed(events, config)

    return one
