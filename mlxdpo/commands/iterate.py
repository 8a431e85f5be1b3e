"""`mlxdpo iterate RECIPE.yaml --rounds 3 --collect.judge vader [--reference first|previous|merged] [--every K]`"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from mlxdpo.commands.train import NOTHING, Overrides
from mlxdpo.config import Config, load_config
from mlxdpo.io.words import counted
from mlxdpo.types import Event, UserError

WIDE = 150  # columns in which the rounds fit side by side


def run(
    recipe: Path | None = None,
    /,
    *,
    config: Overrides = NOTHING,
    resume: Annotated[Path | None, Parameter(name="--resume")] = None,
    json: bool = False,
) -> int:
    """Collect answers, train on their ranking, measure on held-out prompts; repeat from the result.

    The prompts are those of the recipe's data (answers in it are ignored). Each round is a run directory
    OUT/round-N; OUT/rounds.json and OUT/report.html compare them. It stops when a second judge
    (--rounds.second) or the KL (--rounds.max-kl) shows that the first judge is being gamed (exit status 0). The same
    command resumes where it stopped.

    Args:
        recipe: YAML file with any of the settings below; the command line takes precedence.
        config: Settings of the rounds. Short: --rounds N, --reference first|previous|merged, --every K.
        resume: Folder of rounds to resume; with --rounds N, up to more of them.
        json: Print the rounds as JSON.
    """
    from mlxdpo.commands import terminal
    from mlxdpo.commands.interrupt import stop_flag
    from mlxdpo.commands.trackers import check_trackers
    from mlxdpo.online.rounds import iterate
    from mlxdpo.online.rounds.run import check_rounds

    asked = _rounds_config(recipe, config, resume)
    check_rounds(asked)
    check_trackers(asked)
    folder, done = None, None
    with stop_flag() as should_stop:
        for event in iterate(asked, _stages(asked, json), should_stop):
            if event.kind == "begin":
                folder = event.values["folder"]
                learning, heldout = counted(event.values["prompts"], "prompt"), event.values["heldout"]
                text = f"{folder}: {learning} to learn from, {heldout} held out"
                (terminal.warn if json else terminal.console.print)(text)
            elif event.kind == "merged":
                _say(json, f"the reference of round {event.values['round']} is {_as_sum(event.values['weights'])}")
            elif event.kind == "round" and not json:
                _show_rounds(event.values["rows"])
            elif event.kind == "over":
                done = event.values
    if done is None:
        terminal.warn(f"stopped; resume with: mlxdpo iterate --resume {folder}")
        return 130
    _show_verdict(folder, done, json)
    return 0


def _rounds_config(recipe: Path | None, config: Config, resume: Path | None) -> Config:
    given = config.model_dump(exclude_unset=True)
    if resume is None:
        return load_config(recipe, given)
    others = {f"{section}.{key}" for section, keys in given.items() if isinstance(keys, dict) for key in keys}
    if recipe is not None or others - {"rounds.count"} or "out" in given:
        what = recipe or f"--{next(iter(others - {'rounds.count'}), 'out')}"
        raise UserError(f"--resume {resume} uses the settings of its rounds; drop {what} (only --rounds may change)")
    file = resume / "rounds.yaml"
    if not file.exists():
        raise UserError(f"{resume}: no rounds.yaml in it; expected a folder written by mlxdpo iterate")
    return load_config(file, given | {"out": str(resume)})


def _stages(config: Config, quiet: bool) -> Any:
    """The stages as this command does them: shown, tracked, and judged by what the recipe names."""
    from mlxdpo.commands.collect import ranker_of
    from mlxdpo.commands.eval import named_rewards
    from mlxdpo.commands.terminal import show_progress
    from mlxdpo.online.rounds import Stages
    from mlxdpo_eval.judges import open_judge
    from mlxdpo_eval.rounds import measure_round, summarize_round
    from mlxdpo_eval.sampling import Sampling

    how, rounds = config.collect, config.rounds
    ranker = None if how.judge.startswith("votes:") else ranker_of(how.judge, config.data)
    names = [name for name in (how.judge, rounds.second) if name and not name.startswith("votes:")]
    judges = [open_judge(name, named_rewards(config.data)) for name in names]
    if not judges:
        raise UserError("votes rank the pairs, but nothing measures the rounds; name a judge with --rounds.second")
    sampling = Sampling(rounds.heldout, rounds.heldout_samples, how.max_tokens, seed=how.seed)

    def gather(source: Any, prompts: Any, drawing: Any, out: Path, stop: Callable[[], bool]) -> Iterator[Event]:
        """Drawn and ranked, or from votes."""
        if ranker is None:
            from mlxdpo.commands.collect import voted_pairs

            return voted_pairs(Path(how.judge.removeprefix("votes:")), out, prompts.heldout, {"run": "start"})
        from mlxdpo.online.collect import collect

        return show_progress(collect(source(), prompts, ranker, drawing, out, stop), "collected", quiet)

    def measure(opened: Any, rows: Any, start: Any) -> Any:
        """Answers of the held-out prompts."""
        _say(
            quiet,
            f"measuring {opened.run.path.name}: {counted(rounds.heldout_samples, 'answer')} to "
            f"{counted(len(rows), 'prompt')}",
        )
        return measure_round(opened, rows, judges, sampling, start)

    def training(*asked: Any) -> Iterator[Event]:
        """Shown and tracked."""
        return _training(*asked, quiet=quiet)

    return Stages(gather, training, measure, lambda found: summarize_round(found, rounds.max_kl))


def _training(config: Config, resume: Any, warm: Path | None, stop: Callable[[], bool], quiet: bool) -> Iterator[Event]:
    from mlxdpo.commands.terminal import show_training
    from mlxdpo.commands.trackers import tracked
    from mlxdpo.inference.generate import generate
    from mlxdpo.training.run import train

    events = train(config, resume=resume, warm=warm, should_stop=stop, generate=generate)
    return tracked(events if quiet else show_training(events), config)


def _say(quiet: bool, text: str) -> None:
    from mlxdpo.commands.terminal import console

    if not quiet:
        console.print(text, style="dim", markup=False)


def _as_sum(weights: Mapping[str, float]) -> str:
    """The parts of a merged reference, as "0.30 start + 0.70 round-1"."""
    return " + ".join(f"{weight:.2f} {name}" for name, weight in weights.items() if weight)


def _show_rounds(rows: Any) -> None:
    """A table if it fits, otherwise a line for the newest round."""
    from rich.table import Table

    from mlxdpo.commands.terminal import console
    from mlxdpo_eval.report.rounds import round_cells, round_columns

    if console.is_terminal and console.width >= WIDE:
        sheet = Table(*round_columns(rows), title="held-out prompts, 95 % intervals clustered by prompt")
        for line in round_cells(rows):
            sheet.add_row(*line)
        console.print(sheet)
        return
    for line in round_cells(rows)[-2:] if len(rows) == 2 else round_cells(rows)[-1:]:
        pairs = zip(round_columns(rows)[1:], line[1:], strict=True)
        console.print(f"{line[0]}: " + ", ".join(f"{name} {cell}" for name, cell in pairs), markup=False, style="bold")


def _show_verdict(folder: Any, done: Any, json: bool) -> None:
    from mlxdpo.commands.terminal import console
    from mlxdpo.io.json_file import read_json
    from mlxdpo_eval.report.rounds import rounds_verdict, write_rounds

    report = write_rounds(folder)
    found = read_json(folder / "rounds.json")
    if json:
        print(jsonlib.dumps(found, ensure_ascii=False))
        return
    if done["reason"]:
        console.print(f"stopped: {done['reason']}", style="bold", markup=False)
    console.print(rounds_verdict(found)[1], style="bold", markup=False)
    if found["kept"]:
        console.print(f"keep: {folder / found['rounds'][found['kept']]['run']}", markup=False)
    console.print(f"report: {report}  numbers: {folder / 'rounds.json'}", markup=False)
