"""`mlxdpo constitution RUN_OR_MODEL --prompts FILE --out DIR`"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from mlxdpo.commands.collect import open_recipe_or_run, prompts_for, source_at, write_pairs
from mlxdpo.config import ModelConfig, load_config
from mlxdpo.io.words import counted
from mlxdpo.online.constitution.schema import SamplingSettings
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

    All conversations are kept in the folder (the app's Constitution tab shows it); its pairs.jsonl
    and recipe.yaml are ready to train on. The same command resumes an unfinished folder.

    Args:
        path: Run directory, recipe, or model: a Hugging Face folder, a Hub id, or smollm2.
        prompts: Prompts to answer: rows with a prompt, with or without answers; a data file, a folder or a Hub id.
        out: Folder for conversations, pairs, recipe and report.
        constitution: YAML file of principles; default: the bundled one.
        asking: How answers are sampled, criticised and compared.
        feedback: Model that compares answers; default: the one that writes them.
        before: With a run: use the model before training.
        json: Print the report as JSON.
    """
    from mlxdpo.online.constitution.run import RECIPE, constitution_sentences

    chosen = (constitution, feedback, before)
    return write_pairs(
        lambda should_stop: _applying(path, prompts, out, chosen, asking, should_stop),
        "talked",
        lambda found: [
            f"{out}: {counted(found['rows'], 'pair')} from {counted(found['prompts'], 'prompt')}",
            *constitution_sentences(found),
        ],
        f"train on it: mlxdpo train {out / RECIPE} --model ...",
        json,
    )


def _applying(
    path: str,
    prompts: str,
    out: Path,
    chosen: tuple[Path | None, str | None, bool],
    asking: SamplingSettings,
    should_stop: Callable[[], bool],
) -> Iterator[Event]:
    from mlxdpo.online.constitution import apply_constitution, load_constitution

    file, feedback, before = chosen
    rules = load_constitution(file)
    recipe = Path(path).suffix in (".yaml", ".yml") and Path(path).is_file()
    known = recipe or (Path(path) / "config.yaml").exists()
    config, run = open_recipe_or_run(Path(path)) if known else (load_config(None, {"model": {"path": path}}), None)
    if before and run is None:
        raise UserError(f"--before is for runs, and {path} is not a run; drop it")
    if feedback is not None and asking.labels == "none":
        raise UserError(f"--feedback {feedback} has no effect with --labels none; drop one of them")
    found, source = prompts_for(config, prompts), source_at(config, run, Path(path).name, before)
    return apply_constitution(source, found, rules, asking, out, _feedback(feedback), should_stop)


def _feedback(model: str | None) -> Any:
    if model is None:
        return None
    from mlxdpo.model.policy import load_policy
    from mlxdpo.online.constitution import Feedback

    policy = load_policy(ModelConfig(path=model))
    return Feedback(policy, {name: policy.identity[name] for name in ("digest", "dtype", "quantization")})
