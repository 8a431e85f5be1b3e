"""Runs made of runs: one at another strength, several merged. A run directory like any other, not trained.

`manifest.json` says under `made_of` from what, so that it is not taken for a training and not trained on.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlxdpo.config import Config, LoraConfig, dump_config
from mlxdpo.inference.trained_run import TrainedRun, open_trained_run
from mlxdpo.io.atomic import write_json, write_text
from mlxdpo.io.checksum import load_checksummed, save_checksummed, write_checksummed_json
from mlxdpo.io.digest import folder_digest
from mlxdpo.io.json_file import read_json
from mlxdpo.io.staging import publish_new, staging_folder
from mlxdpo.model.adapters import SETTINGS, WEIGHTS, adapter_settings, load_start, read_settings
from mlxdpo.model.merging import MergeMethod, merge_adapters
from mlxdpo.model.strength import check_strength, interpolated, refuse_dora, scaled, weighted_sum
from mlxdpo.runs import PATHS, Run, input_paths
from mlxdpo.types import UserError

FOLDER = "strengths"
"""In a run: the same run at other strengths, one folder each."""


def run_at(run: Run, strength: float) -> Run:
    """The run `run` at a strength: itself at 1, else RUN/strengths/S, made where it is missing or of another adapter.

    0 is the model that training started from, 1 the tuned one, on the line between (and beyond) in the weights: LoRA as
    an exact product, every-weight runs by interpolation. Raises `UserError` for DoRA and for a reward model.
    """
    check_strength(strength)
    if strength == 1:
        return run
    config = run.config()
    if config.stage == "reward":
        raise UserError(f"{run.path}: strength does not apply to a reward model")
    settings = read_settings(run.adapter)
    refuse_dora(settings.method, run.adapter)
    made_of = {"strength": strength, "runs": [{"run": run.path.resolve().name, "adapter": folder_digest(run.adapter)}]}
    place = run.path / FOLDER / f"{run.path.resolve().name}-strength-{strength:g}"
    if (place / "manifest.json").exists():
        if read_json(place / "manifest.json").get("made_of") == made_of:
            return Run.open(place)
        shutil.rmtree(place)
    if settings.method == "full":
        lora, arrays = settings, _full_at(run, strength)
    else:
        lora, arrays = weighted_sum(_terms_at(run, strength))
    return _write_mixture(run, config, (lora, arrays), made_of, place)


def _full_at(run: Run, strength: float) -> dict[str, mx.array]:
    """Every weight of a run at a strength."""
    start = dict(tree_flatten(load_start(run).model.parameters()))
    return interpolated(start, load_checksummed(run.adapter / WEIGHTS), strength)


def at_strengths(run: Run, strengths: Sequence[float]) -> Iterator[tuple[float, TrainedRun]]:
    """A run at each strength in turn, loaded; one set of weights for all where a factor before its adapter does it.

    Raises `UserError` as `run_at`.
    """
    for strength in strengths:
        check_strength(strength)
    refuse_dora(method := read_settings(run.adapter).method, run.adapter)
    if method == "full" or run.config().model.adapter is not None:
        for strength in strengths:
            yield strength, open_trained_run(run_at(run, strength))
        return
    opened = open_trained_run(run)
    for strength in strengths:
        with scaled(opened.policy.model, strength):
            yield strength, opened


def merge_runs(
    runs: Sequence[Run],
    out: Path,
    weights: Sequence[float] | None = None,
    method: MergeMethod = "linear",
    density: float = 0.5,
    seed: int = 0,
) -> Run:
    """Several runs' LoRA adapters in one, or one run at the strength of its weight, as a run directory `out`.

    `linear` is the exact weighted sum (the ranks add up; equal weights of 1 in all when not given), the others are
    PEFT's (weights of 1 each; `model.merging`). What the result is measured against, and on, is the first run's. Raises
    `UserError` for runs of unlike base models or layers, DoRA, and every-weight runs.
    """
    equal = 1 / len(runs) if method == "linear" else 1.0
    shares = list(weights) if weights is not None else [equal] * len(runs)
    if len(shares) != len(runs) or not all(math.isfinite(share) for share in shares):
        raise UserError(f"--weight: {len(shares)} for {len(runs)} runs; give a number for each run, in their order")
    if len(runs) == 1 and (method != "linear" or weights is None):
        raise UserError("one run is not enough to merge; name another, or give its strength with --weight 0.5")
    if out.exists():
        raise UserError(f"{out} already exists; choose another --out")
    _check_alike(runs)
    named = [{"run": run.path.resolve().name, "adapter": folder_digest(run.adapter)} for run in runs]
    if len(runs) == 1:
        made = weighted_sum(_terms_at(runs[0], shares[0]))
        return _write_mixture(runs[0], runs[0].config(), made, {"strength": shares[0], "runs": named}, out)
    terms = [(run.adapter, share) for run, share in zip(runs, shares, strict=True)]
    lora, arrays, kept = merge_adapters(terms, method, density, seed)
    settings = {} if method == "linear" else {"density": density, "seed": seed, "kept": kept}
    made_of = {"merge": method, "weights": shares, **settings, "runs": named}
    return _write_mixture(runs[0], _without_seen(runs), (lora, arrays), made_of, out)


def _check_alike(runs: Sequence[Run]) -> None:
    """Raise `UserError` for runs on unlike base models, and for one that trained every weight."""
    first, rest = runs[0].manifest()["model"], [run.manifest()["model"] for run in runs[1:]]
    for run, model in zip(runs[1:], rest, strict=True):
        for name in ("digest", "dtype", "quantization"):
            if model[name] != first[name]:
                raise UserError(
                    f"{run.path}: was trained on a different base model from {runs[0].path} ({name} differs)"
                )
    if full := [run for run in runs if read_settings(run.adapter).method == "full"]:
        raise UserError(f"{full[0].path}: trained every weight (lora.method full); only LoRA adapters are merged")


def _terms_at(run: Run, strength: float) -> list[tuple[Path, float]]:
    """What adds up to a LoRA run at a strength: its adapter alone, or the line from the one that it started from."""
    start = run.config().model.adapter
    if start is None:
        return [(run.adapter, strength)]
    return [(Path(start), 1.0)] if strength == 0 else [(Path(start), 1 - strength), (run.adapter, strength)]


def _without_seen(runs: Sequence[Run]) -> Config:
    """The first run's configuration; where the runs held out different pairs, it holds out none."""
    configs = [run.config() for run in runs]
    heldout = [_heldout_part(config) for config in configs]
    if all(part == heldout[0] for part in heldout):
        return configs[0]
    data = configs[0].data.model_copy(update={"eval": None, "eval_fraction": 0.0})
    return configs[0].model_copy(update={"data": data})


def _heldout_part(config: Config) -> tuple[Any, ...]:
    if config.data.eval is not None:
        return config.data.path, config.data.eval
    return config.data.path, config.data.eval_fraction, config.train.seed


def _write_mixture(
    run: Run, config: Config, made: tuple[LoraConfig, Mapping[str, mx.array]], made_of: Mapping[str, Any], out: Path
) -> Run:
    """Write a run directory with an adapter that was not trained; whole or absent."""
    lora, arrays = made
    config = config.model_copy(update={"out": str(out)})
    out.parent.mkdir(parents=True, exist_ok=True)
    with staging_folder(out.parent, f".{out.name}-draft-") as folder:
        save_checksummed(folder / "adapter" / WEIGHTS, dict(arrays), {"format": "mlx"})
        write_checksummed_json(folder / "adapter" / SETTINGS, adapter_settings(lora))
        if (run.path / "metrics.jsonl").exists() and "strength" in made_of:
            shutil.copyfile(run.path / "metrics.jsonl", folder / "metrics.jsonl")
        write_json(folder / "manifest.json", run.manifest() | {"made_of": made_of})
        write_json(folder / PATHS, input_paths(config, out))
        write_text(folder / "config.yaml", dump_config(config))
        publish_new(folder, out)
    return Run.open(out)
