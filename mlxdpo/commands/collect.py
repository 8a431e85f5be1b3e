"""`mlxdpo collect RUN --prompts FILE --judge NAME --out pairs.jsonl`"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from mlxdpo.config import Config, DataConfig, Drawing, load_config
from mlxdpo.runs import Run
from mlxdpo.types import Event, UserError

AS_IT_IS = Drawing()


def run(
    path: Path,
    /,
    *,
    prompts: str | None = None,
    judge: str | None = None,
    reward: str | None = None,
    out: Path,
    drawing: Annotated[Drawing, Parameter(name="*")] = AS_IT_IS,
    before: bool = False,
    json: bool = False,
) -> int:
    """Draw answers from a run's model, have them ranked, and write preference pairs.

    The file trains as it stands: mlxdpo train --data OUT. Beside it stand every answer with its score
    (OUT's .samples.jsonl) and what was left out, counted (OUT's .report.json). The same command goes on with a
    collection that was stopped.

    Parameters
    ----------
    path
        Run directory, or a recipe: the model as it is before any training.
    prompts
        Prompts to answer: rows with a prompt, with or without answers; a data file, a folder or a Hub id.
    judge
        Who ranks: as for mlxdpo eval. Judges that compare are asked in both orders; votes:FILE takes the pairs that
        the app's votes decide, and draws nothing.
    reward
        The same for what gives each answer a number: vader, textblob, longest, reward:RUN, FILE.py:FUNCTION.
    out
        File of pairs, JSON lines.
    drawing
        How answers are drawn and paired.
    before
        Draw from the model as the run found it.
    json
        Print the report as JSON.
    """
    from mlxdpo.commands.interrupt import stop_flag
    from mlxdpo.commands.terminal import console, show_progress
    from mlxdpo.online.collect.write_outputs import collection_sentences

    recipe = path.suffix in (".yaml", ".yml") and path.is_file()
    config = load_config(path) if recipe else Run.open(path).config()
    report = None
    with stop_flag() as should_stop:
        asked = (prompts, _one_of(judge, reward), drawing, out)
        for event in show_progress(_events(path, config, recipe, before, asked, should_stop), "collected", json):
            report = event.values["report"] if event.kind == "done" else None
    if report is None:
        console.print("stopped; the same command goes on from here")
        return 130
    if json:
        print(jsonlib.dumps(report, ensure_ascii=False))
        return 0
    for sentence in (f"{out}: {report['rows']} rows of {report['answers']} answers", *collection_sentences(report)):
        console.print(sentence, markup=False)
    console.print(f"train on it: mlxdpo train --model ... --data {out}", style="dim", markup=False)
    return 0


def _one_of(judge: str | None, reward: str | None) -> tuple[str, bool]:
    """The specification, and whether it must give numbers."""
    if (judge is None) == (reward is None):
        raise UserError("name who ranks the answers: one of --judge NAME and --reward NAME")
    return (judge, False) if judge is not None else (str(reward), True)


def _events(
    path: Path, config: Config, recipe: bool, before: bool, asked: Any, should_stop: Callable[[], bool]
) -> Iterator[Event]:
    prompts, (spec, numbers), drawing, out = asked
    if spec.startswith("votes:"):
        from mlxdpo.commands.votes_to_pairs import voted_pairs
        from mlxdpo.inference.run_prompts import gallery
        from mlxdpo.io.digest import folder_digest

        if recipe or prompts is not None or before or drawing != AS_IT_IS:
            raise UserError("--judge votes:FILE draws nothing: give the run, --out and nothing else")
        run = Run.open(path)
        source = {"run": run.path.name, "adapter": folder_digest(run.adapter)}
        return voted_pairs(Path(spec.removeprefix("votes:")), out, gallery(run).heldout_keys, source)
    if prompts is None:
        raise UserError("no prompts given; name a file of them with --prompts")
    from mlxdpo.online.collect import collect, read_prompts, source_of
    from mlxdpo.online.rounds.start import start_source

    data = config.data.model_copy(update={"columns": {}, "format": "auto"})
    found, ranker = read_prompts(data, prompts), ranker_of(spec, config.data, numbers)
    source = start_source(config, path.name) if recipe else source_of(Run.open(path), before)
    return collect(source, found, ranker, drawing, out, should_stop)


def ranker_of(spec: str, data: DataConfig, numbers: bool = False) -> Any:
    """Any judge as a ranker. Raises `UserError` for one that is unknown, and for one without `numbers` asked for."""
    from mlxdpo.commands.eval import named_rewards
    from mlxdpo.online.collect import Ranker
    from mlxdpo_eval.judges import Scalar, open_judge
    from mlxdpo_eval.judges.both import scores_of

    judge = open_judge(spec, named_rewards(data))
    if numbers and not isinstance(judge, Scalar):
        raise UserError(f"--reward {spec} compares answers and gives none a number; use --judge {spec}")
    return Ranker(judge.name, judge.identity, lambda prompts, answers: scores_of(judge, prompts, answers))
