"""`mlxdpo collect RUN --prompts FILE --judge NAME --out pairs.jsonl`"""

from __future__ import annotations

import hashlib
import json as jsonlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from mlxdpo.config import Config, DataConfig, Drawing, load_config
from mlxdpo.io.atomic import write_json, write_text
from mlxdpo.io.json_file import json_lines, read_lines
from mlxdpo.io.words import counted
from mlxdpo.runs import Run
from mlxdpo.types import Event, UserError

if TYPE_CHECKING:
    from mlxdpo.online.votes_to_pairs import Pair

AS_IT_IS = Drawing()
WRITTEN = {"prompt", "a", "b", "winner"}  # what the app writes, and pairs are made of


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
    """Sample answers from a run's model, rank them, and write preference pairs.

    Train on the file with mlxdpo train --data OUT. Next to it are every answer with its score
    (OUT's .samples.jsonl) and what was left out, counted (OUT's .report.json). The same command resumes a
    stopped collection.

    Args:
        path: Run directory, or a recipe (the model before training).
        prompts: Prompts to answer: rows with a prompt, with or without answers; a data file, a folder or a Hub id.
        judge: Judge that ranks, as for mlxdpo eval. Comparing judges see both orders; votes:FILE takes the pairs
            decided by the app's votes and samples nothing.
        reward: The same for judges that score each answer: vader, textblob, longest, reward:RUN, FILE.py:FUNCTION.
        out: File of pairs, JSON lines.
        drawing: How answers are sampled and paired.
        before: Sample from the model before training.
        json: Print the report as JSON.
    """
    from mlxdpo.online.collect.run import collection_sentences

    asked = (prompts, _one_of(judge, reward), drawing, out)
    return write_pairs(
        lambda should_stop: _collecting(path, before, asked, should_stop),
        "collected",
        lambda report: [
            f"{out}: {counted(report['rows'], 'row')} of {counted(report['answers'], 'answer')}",
            *collection_sentences(report),
        ],
        f"train on it: mlxdpo train --model ... --data {out}",
        json,
    )


def write_pairs(
    begin: Callable[[Callable[[], bool]], Iterator[Event]],
    kind: str,
    sentences: Callable[[dict[str, Any]], list[str]],
    hint: str,
    json: bool,
) -> int:
    """Show how far along the prompts are (events of `kind`), then the report; 0 when done, 130 when interrupted.

    `begin` gives the events and is passed a check for the user's stop; `sentences` puts the report into words.
    """
    from mlxdpo.commands.interrupt import stop_flag
    from mlxdpo.commands.terminal import console, show_progress

    report = None
    with stop_flag() as should_stop:
        for event in show_progress(begin(should_stop), kind, json):
            report = event.values["report"] if event.kind == "done" else None
    if report is None:
        console.print("stopped; run the same command again to resume")
        return 130
    if json:
        print(jsonlib.dumps(report, ensure_ascii=False))
        return 0
    for sentence in sentences(report):
        console.print(sentence, markup=False)
    console.print(hint, style="dim", markup=False)
    return 0


def _one_of(judge: str | None, reward: str | None) -> tuple[str, bool]:
    """The specification, and whether it must give numbers."""
    if (judge is None) == (reward is None):
        raise UserError("name a judge to rank the answers: --judge NAME or --reward NAME")
    return (judge, False) if judge is not None else (str(reward), True)


def _collecting(path: Path, before: bool, asked: Any, should_stop: Callable[[], bool]) -> Iterator[Event]:
    prompts, (spec, numbers), drawing, out = asked
    config, run = open_recipe_or_run(path)
    if spec.startswith("votes:"):
        from mlxdpo.inference.run_prompts import gallery
        from mlxdpo.io.digest import folder_digest

        if run is None or prompts is not None or before or drawing != AS_IT_IS:
            raise UserError("--judge votes:FILE samples nothing: give only the run and --out")
        source = {"run": run.path.name, "adapter": folder_digest(run.adapter)}
        return voted_pairs(Path(spec.removeprefix("votes:")), out, gallery(run).heldout_keys, source)
    if prompts is None:
        raise UserError("no prompts given; pass a file with --prompts")
    from mlxdpo.online.collect import collect

    found, ranker = prompts_for(config, prompts), ranker_of(spec, config.data, numbers)
    return collect(source_at(config, run, path.name, before), found, ranker, drawing, out, should_stop)


def open_recipe_or_run(path: Path) -> tuple[Config, Run | None]:
    """The settings of a recipe or a run, and the run if it is one."""
    if path.suffix in (".yaml", ".yml") and path.is_file():
        return load_config(path), None
    run = Run.open(path)
    return run.config(), run


def prompts_for(config: Config, file: str) -> Any:
    """The prompts of a file, read as the settings read data except for its shape."""
    from mlxdpo.online.prompts import read_prompts

    return read_prompts(config.data.model_copy(update={"columns": {}, "format": "auto"}), file)


def source_at(config: Config, run: Run | None, name: str, before: bool) -> Any:
    """The model of a run, or that of a recipe before any training."""
    from mlxdpo.online.prompts import source_of, start_source

    return start_source(config, name) if run is None else source_of(run, before)


def ranker_of(spec: str, data: DataConfig, numbers: bool = False) -> Any:
    """Any judge as a ranker. Raises `UserError` for one that is unknown, and for one without `numbers` asked for."""
    from mlxdpo.commands.eval import named_rewards
    from mlxdpo.online.collect import Ranker
    from mlxdpo_eval.judges import Scalar, open_judge
    from mlxdpo_eval.judges.both import score_answers

    judge = open_judge(spec, named_rewards(data))
    if numbers and not isinstance(judge, Scalar):
        raise UserError(f"--reward {spec} compares answers without scoring them; use --judge {spec}")
    return Ranker(judge.name, judge.identity, lambda prompts, answers: score_answers(judge, prompts, answers))


def voted_pairs(votes: Path, out: Path, heldout: frozenset[bytes], source: Mapping[str, Any]) -> Iterator[Event]:
    """Pairs that the app's votes decide, as a collection: the same files, the same counts, nothing drawn.

    Writes the pairs of a votes file to `out`; prompts in `heldout` teach nothing and are counted.

    `source` goes into every row. Raises `UserError` for a file that is missing, or without a vote that gives a pair.
    """
    from mlxdpo.online.collect.run import report_file
    from mlxdpo.online.votes_to_pairs import pairs_of, row_of
    from mlxdpo_eval.judges.votes import problem_with, read_ballots

    if out.exists():
        raise UserError(f"{out} already exists; choose another --out, or remove it")
    known = read_ballots(votes)  # says what is wrong with a file that holds no vote at all
    lines = [line for line in read_lines(votes) if line.keys() >= WRITTEN]
    pairs, left_out = pairs_of(lines, heldout, problem_with)
    if not pairs:
        why = "; ".join(f"{count} {reason}" for reason, count in left_out.items())
        raise UserError(f"{votes}: none of its {counted(len(known.votes), 'vote')} gives a pair ({why})")
    digest = hashlib.sha256(votes.read_bytes()).hexdigest()
    made = {**source, "judge": f"votes:{votes.name}", "judge_digest": digest[:16]}
    turns = any(not isinstance(pair.prompt, str) for pair in pairs)
    report = _votes_report(pairs, len(lines), left_out | known.left_out, made)
    write_json(report_file(out), report)
    write_text(out, json_lines(row_of(pair, turns) | {"made": made} for pair in pairs))
    yield Event("done", len(pairs), {"file": out, "report": report})


def _votes_report(
    pairs: Sequence[Pair], votes: int, left_out: Mapping[str, int], made: Mapping[str, Any]
) -> dict[str, Any]:
    return {
        "prompts": len({str(pair.prompt) for pair in pairs}),
        "prompts_left_out": {},
        "prompts_without_pair": {},
        "answers": 2 * votes,
        "answers_left_out": {f"votes {reason}": count for reason, count in left_out.items()},
        "mean_score": None,
        "rows": len(pairs),
        "identity": {"judge": dict(made)},
    }
