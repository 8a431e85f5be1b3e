"""`mlxdpo eval RUN [--judge NAME ...]`"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators
from pydantic import Field

from mlxdpo.commands.generate import Strength
from mlxdpo.config import DataConfig, Section
from mlxdpo.runs import Run
from mlxdpo.types import UserError

Count = Annotated[int, Parameter(validator=validators.Number(gte=1))]
Share = Annotated[float, Parameter(validator=validators.Number(gte=0, lte=1))]
# The command line writes --data out as --data.path, as recipes have it. The dotted name has to stand first: behind the
# other one cyclopts takes it for a key of it, and knows neither.
Data = Annotated[str | None, Parameter(name=["--data.path", "--data"])]


class Answering(Section):
    """How answers are drawn, the same way before and after."""

    prompts: int = Field(default=100, ge=1)
    """Held-out prompts to answer."""
    samples: int = Field(default=2, ge=1)
    """Answers to each prompt."""
    max_tokens: int = Field(default=0, ge=0)
    """Longest answer, in tokens; 0 takes the length that 95 % of the held-out answers have."""
    temperature: float = Field(default=1.0, gt=0)
    """Sampling temperature; 1 is the model's distribution."""
    seed: int = Field(default=0, ge=0)
    """Noise of sampling."""
    batch_size: int = Field(default=64, ge=1)
    """Answers sampled at once."""


AS_IT_IS = Answering()


def run(
    path: Path,
    /,
    *,
    data: Data = None,
    judge: list[str] | None = None,
    strength: Strength = 1.0,
    votes: Path | None = None,
    slices: Annotated[list[str] | None, Parameter(name="--slice")] = None,
    retest: Count | None = None,
    retained: Annotated[bool, Parameter(negative="")] = False,
    answering: Annotated[Answering, Parameter(name="*")] = AS_IT_IS,
    max_invalid: Share = 0.1,
    tasks: str | None = None,
    include: Path | None = None,
    limit: Count | None = None,
    json: bool = False,
) -> int:
    """Evaluate whether tuning made the model better: held-out pairs, judged answers, drift; with intervals.

    Writes RUN/eval/ and RUN/report.html. Exit status 1: a judge has no verdict.

    Args:
        path: Run directory.
        data: Held-out pairs, or best-of-k records (several completions under rejected, as in RewardBench 2); unset
            means the pairs of the run's recipe.
        judge: Judge that compares answers before and after; repeatable, the first is the headline: vader,
            textblob, longest, local:MODEL, reward:RUN, endpoint:MODEL@URL or rubric:MODEL@URL (key in
            $MLXDPO_JUDGE_KEY), panel:majority:JUDGE,JUDGE, votes:FILE, FILE.py:FUNCTION.
        strength: Evaluate the run at this strength instead (mlxdpo dial); its results and report are in RUN/strengths/.
        votes: Human votes, as evidence (valid at every look) and to check the judges; default: RUN/votes.jsonl.
        slices: Column of the held-out rows to break results down by, repeatable; unset means all that are categories.
        retest: Comparisons to ask each judge a second time, without the cache.
        max_invalid: Largest share of a judge's verdicts that may be invalid, of those asked for; above it there is no
            verdict.
        retained: Also check side effects of the tuning: 963 small items with exact answers, before and after.
        tasks: Capability checks instead, before and after: tasks of lm-evaluation-harness, such as arc_easy,hellaswag.
        include: Folder with your own task files.
        limit: Questions of each task, or retained checks of each area.
        json: Print the results as JSON.
    """
    from mlxdpo.commands.terminal import console, warn
    from mlxdpo.inference.mixtures import run_at
    from mlxdpo_eval.run import EvalOptions

    source = run_at(Run.open(path), strength)
    path = source.path
    say: Callable[[str], None] = warn if json else (lambda text: console.print(text, style="dim", markup=False))
    if limit and not tasks and not retained:
        raise UserError(f"--limit {limit} applies to --tasks or --retained; add one of them, or drop it")
    if tasks and retained:
        raise UserError("--tasks runs lm-evaluation-harness instead of the evaluation; run --retained separately")
    if tasks:
        return _capability(source, tasks.split(","), (limit, include), say, json)
    file = votes or next((f for f in (path / "votes.jsonl",) if f.exists()), None)
    wanted = EvalOptions(data, file, tuple(slices or ()), retest or 0, max_invalid, retained, limit)
    found = _evaluate(source, judge or [], answering, wanted, say)
    _show_results(found, path, json)
    return _exit_status(found)


def _exit_status(found: Any) -> int:
    from mlxdpo.commands.terminal import warn

    for sentence in found.failures:
        warn(f"error: {sentence} Use another judge, or raise --max-invalid")
    return 1 if found.failures else 0


def _show_results(found: Any, path: Path, json: bool) -> None:
    from mlxdpo.commands.terminal import console
    from mlxdpo.io.json_file import read_lines
    from mlxdpo_eval.report.screen import print_first_screen

    if json:
        print(jsonlib.dumps(found.results, ensure_ascii=False))
        return
    console.print()
    print_first_screen(console, found.results, list(read_lines(path / "eval" / "eval_samples.jsonl")))
    console.print()
    console.print(f"report: {path / 'report.html'}\nnumbers: {found.file}", markup=False)


def _evaluate(run: Run, judges: list[str], answering: Answering, wanted: Any, say: Callable[[str], None]) -> Any:
    from mlxdpo_eval.judges import open_judge
    from mlxdpo_eval.report.write import write_report
    from mlxdpo_eval.run import evaluate
    from mlxdpo_eval.sampling import Sampling

    opened = [open_judge(name, rewards_of(run)) for name in judges]
    found = evaluate(run, opened, Sampling(**answering.model_dump()), wanted, say)
    write_report(run)
    return found


def rewards_of(run: Run) -> dict[str, Callable[[str, str], float]]:
    """The named text rewards; a continuation is read with its opening, an answer without its question."""
    return named_rewards(run.config().data)


def named_rewards(data: DataConfig) -> dict[str, Callable[[str, str], float]]:
    """`rewards_of` a run that reads its data so."""
    from mlxdpo.demo.rewards import REWARDS

    continued = data.template == "plain"

    def judged(reward: Callable[[str], float]) -> Callable[[str, str], float]:
        """The reward of a whole continuation, or of an answer alone."""
        return lambda prompt, answer: reward(prompt + answer if continued else answer)

    return {name: judged(reward) for name, reward in REWARDS.items()}


def _capability(
    run: Run, tasks: list[str], how: tuple[int | None, Path | None], say: Callable[[str], None], json: bool
) -> int:
    """`how` holds the limit of questions and the folder of own tasks."""
    from mlxdpo.inference.lm_eval_harness import find_tasks, run_tasks
    from mlxdpo.inference.trained_run import open_trained_run
    from mlxdpo.io.atomic import write_json

    limit, include = how
    known = find_tasks(tasks, include)
    opened = open_trained_run(run)
    say(f"after: {', '.join(tasks)}")
    after = run_tasks(opened.policy.model, opened.policy.tokenizer, tasks, known, limit)
    say("before")
    with opened.start() as model:
        before = run_tasks(model, opened.policy.tokenizer, tasks, known, limit)
    results = {"tasks": tasks, "limit": limit, "before": before, "after": after}
    write_json(run.path / "eval" / "capability.json", results)
    print(jsonlib.dumps(results, ensure_ascii=False)) if json else _show_capabilities(before, after)
    return 0


def _show_capabilities(before: dict[str, Any], after: dict[str, Any]) -> None:
    from rich.table import Table

    from mlxdpo.commands.terminal import console

    sheet = Table("task", "measure", "before", "after", title="capabilities (standard errors by lm-evaluation-harness)")
    for task, measures in before.items():
        for name, value in measures.items():
            if isinstance(value, float) and "stderr" not in name:
                error = after[task].get(name.replace(",", "_stderr,", 1))
                shown = f" ± {error:.3f}" if isinstance(error, float) else ""
                sheet.add_row(task, name, f"{value:.3f}", f"{after[task][name]:.3f}{shown}")
    console.print(sheet)
