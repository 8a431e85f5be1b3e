"""`mlxdpo constitution RUN_OR_MODEL --prompts FILE --out DIR`"""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from mlxdpo.config import Config, ModelConfig, load_config
from mlxdpo.online.constitution.settings import SamplingSettings
from mlxdpo.types import Event, UserError

AS_IT_IS = SamplingSettings()


def run(
    path: str,
    /,
    *,
    prompts: str,
    out: Path,
    constitution: Path | None = None,
    asking: Annotated[SamplingSettings, Parameter(name="*")] = AS_IT_IS,
    feedback: str | None = None,
    before: bool = False,
    json: bool = False,
) -> int:
    """Let a model criticise and revise its own answers, or compare two of them, by written principles.

    Everything that was said is kept in the folder for reading (the app's Constitution tab shows it); its pairs.jsonl
    and recipe.yaml train as they stand. The same command goes on with a folder that was not finished.

    Parameters
    ----------
    path
        Run directory, recipe, or model: a Hugging Face folder, a Hub id, or smollm2.
    prompts
        Prompts to answer: rows with a prompt, with or without answers; a data file, a folder or a Hub id.
    out
        Folder for conversations, pairs, recipe and report.
    constitution
        YAML file of principles; by default the project's own.
    asking
        How answers are drawn, criticised and compared.
    feedback
        Model that compares answers; by default the one that gives them.
    before
        Of a run: the model as the run found it.
    json
        Print the report as JSON.
    """
    from mlxdpo.commands.interrupt import stop_flag
    from mlxdpo.commands.terminal import console, show_progress
    from mlxdpo.online.constitution.write_outputs import RECIPE, constitution_sentences

    with stop_flag() as should_stop:
        report = None
        events = _events(path, prompts, out, (constitution, feedback, before), asking, should_stop)
        for event in show_progress(events, "talked", json):
            report = event.values["report"] if event.kind == "done" else None
    if report is None:
        console.print("stopped; the same command goes on from here")
        return 130
    if json:
        print(jsonlib.dumps(report, ensure_ascii=False))
        return 0
    for sentence in (
        f"{out}: {report['rows']} pairs from {report['prompts']} prompts",
        *constitution_sentences(report),
    ):
        console.print(sentence, markup=False)
    console.print(f"train on it: mlxdpo train {out / RECIPE} --model ...", style="dim", markup=False)
    return 0


def _events(
    path: str,
    prompts: str,
    out: Path,
    chosen: tuple[Path | None, str | None, bool],
    asking: SamplingSettings,
    should_stop: Any,
) -> Iterator[Event]:
    from mlxdpo.online.collect import read_prompts
    from mlxdpo.online.constitution import apply_constitution, load_constitution

    file, feedback, before = chosen
    rules = load_constitution(file)
    config, run = _config(path)
    if before and run is None:
        raise UserError(f"--before is for runs, and {path} is none; drop it")
    if feedback is not None and asking.labels == "none":
        raise UserError(f"--feedback {feedback} has nothing to compare with --labels none; drop one of them")
    data = config.data.model_copy(update={"columns": {}, "format": "auto"})
    found = read_prompts(data, prompts)
    return apply_constitution(
        _source(config, run, path, before), found, rules, asking, out, _feedback(feedback), should_stop
    )


def _config(path: str) -> tuple[Config, Any]:
    """The settings behind a run, a recipe or a model's name, and the run if it is one."""
    from mlxdpo.runs import Run

    place = Path(path)
    if (place / "config.yaml").exists():
        run = Run.open(place)
        return run.config(), run
    if place.suffix in (".yaml", ".yml") and place.is_file():
        return load_config(place), None
    return load_config(None, {"model": {"path": path}}), None


def _source(config: Config, run: Any, path: str, before: bool) -> Any:
    from mlxdpo.online.collect import source_of
    from mlxdpo.online.rounds.start import start_source

    return source_of(run, before) if run else start_source(config, Path(path).name)


def _feedback(model: str | None) -> Any:
    if model is None:
        return None
    from mlxdpo.model.policy import load_policy
    from mlxdpo.online.constitution import Feedback

    policy = load_policy(ModelConfig(path=model))
    return Feedback(policy, {name: policy.identity[name] for name in ("digest", "dtype", "quantization")})
